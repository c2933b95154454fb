"""Plain Celery on Redis, a task a text, the model loaded once a worker.

    python bench/peers/minilm_celery_peer.py minilm --redis URL --setting pool=threads --setting concurrency=2

All texts are sent, then all results are waited for: a queue takes more than 256 at a time, and is at its best full.
`max_batch` can only be 1: tasks run one by one.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from asked import cannot, say, versions
from celery import Celery, signals
from celery.result import ResultSet
from serving import START_SECONDS, WARM_UP, figures, process, read, reply
from texts import texts

asked = read(__doc__, max_batch="1", pool="solo", concurrency="1")
app = Celery("minilm", broker=asked.redis, backend=asked.redis)
app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)
encoder = None


@signals.worker_init.connect
def load(**_: object) -> None:
    """Load the model before the first task."""
    global encoder
    from minilm import Encoder

    encoder = Encoder()


@app.task(name="embed")
def embed(text: str) -> list[float]:
    """A text in, its vector out."""
    assert encoder is not None
    return encoder.embed([text])[0]


def main() -> None:
    if asked["max_batch"] != "1":
        cannot("Celery runs one task at a time: it forms no batches")
    some = texts(asked.jobs)
    arguments = ["--pool", asked["pool"], "--concurrency", asked["concurrency"], "--loglevel", "WARNING"]
    arguments += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    with ExitStack() as stack:
        for i in range(asked.processes):
            name = ["--hostname", f"minilm-{i}@localhost"]
            stack.enter_context(
                process(sys.executable, "-m", "celery", "-A", "minilm_celery_peer", "worker", *arguments, *name)
            )
        for result in [embed.delay(text) for text in some[:WARM_UP]]:
            result.get(timeout=START_SECONDS)
        say(f"{len(some)} texts")
        began = time.perf_counter()
        results = ResultSet([embed.delay(text) for text in some], app=app)
        vectors = results.join_native(timeout=600.0)
        found = figures(some, vectors, time.perf_counter() - began)
    settings = f"a task a text, -P {asked['pool']} -c {asked['concurrency']}, Redis result backend"
    keeps = "status and result of every task, in Redis for a day"
    reply(found, version=versions("celery", "torch"), settings=settings, keeps=keeps)


if __name__ == "__main__":
    main()
