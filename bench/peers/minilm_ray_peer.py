"""Ray Serve: batches in order of arrival, or tasks from Celery.

    python bench/peers/minilm_ray_peer.py minilm --setting max_batch=32
    python bench/peers/minilm_ray_peer.py minilm --setting mode=asynchronous --setting concurrency=2 --redis URL

`direct`: requests through a deployment's handle, batched by `serve.batch` where max_batch is above 1.
`asynchronous`: a task consumer, that is a Celery worker with `concurrency` threads inside of the replica; all texts
are sent, then all results are waited for. It forms no batches.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

from asked import cannot, say, versions
from serving import IN_FLIGHT, START_SECONDS, WARM_UP, figures, read, reply, timed
from texts import texts

asked = read(__doc__, mode="direct", max_batch="", wait_ms="20", concurrency="1")
size = int(asked["max_batch"] or (32 if asked["mode"] == "direct" else 1))
TASK = "embed"

import ray  # noqa: E402
from ray import serve  # noqa: E402


def main() -> None:
    if asked["mode"] == "asynchronous" and size != 1:
        cannot("its task consumers take one task at a time: they form no batches")
    # A short path: Ray puts sockets below it. Loopback only, no dashboard.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else it writes one into the home folder
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, _temp_dir=folder, _node_ip_address="127.0.0.1",
        object_store_memory=200 * 2**20, log_to_driver=False,
    )  # fmt: skip
    try:
        serve.start(proxy_location="Disabled", http_options={"host": "127.0.0.1"})
        found, settings, keeps = (direct if asked["mode"] == "direct" else asynchronous)()
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    reply(found, version=versions("ray", "torch"), settings=settings, keeps=keeps)


def deployment(target: type, ongoing: int) -> Any:
    """Return it with as many replicas as workers were asked for, on a CPU each, that take so many requests at once."""
    options = {"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    return serve.deployment(
        target, name=TASK, num_replicas=asked.processes, max_ongoing_requests=ongoing, ray_actor_options=options
    ).bind()


def direct() -> tuple[dict[str, Any], str, str]:
    """Requests through the handle, 256 at a time."""

    class Embeddings:
        def __init__(self) -> None:
            from minilm import Encoder

            self.encoder = Encoder()

        @serve.batch(max_batch_size=size, batch_wait_timeout_s=int(asked["wait_ms"]) / 1000 if size > 1 else 0.0)
        async def __call__(self, texts: list[str]) -> list[list[float]]:
            return self.encoder.embed(texts)

    handle = serve.run(deployment(Embeddings, 2 * IN_FLIGHT), name=TASK, route_prefix=None)

    async def call(text: str) -> list[float]:
        return await handle.remote(text)

    settings = f"max_batch_size {size}, batch_wait_timeout {asked['wait_ms'] if size > 1 else 0} ms, deployment handle"
    return asyncio.run(timed(asked, call)), settings, "nothing"


def asynchronous() -> tuple[dict[str, Any], str, str]:
    """Tasks through Celery and Redis."""
    from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig
    from ray.serve.task_consumer import instantiate_adapter_from_config, task_consumer, task_handler

    config = TaskProcessorConfig(
        queue_name="minilm", adapter_config=CeleryAdapterConfig(broker_url=asked.redis, backend_url=asked.redis)
    )

    @task_consumer(task_processor_config=config)
    class Embeddings:
        def __init__(self) -> None:
            from minilm import Encoder

            self.encoder = Encoder()

        @task_handler(name=TASK)
        def embed(self, text: str) -> list[float]:
            return self.encoder.embed([text])[0]

    serve.run(deployment(Embeddings, int(asked["concurrency"])), name=TASK, route_prefix=None)
    adapter = instantiate_adapter_from_config(task_processor_config=config)
    some = texts(asked.jobs)

    def send(text: str) -> Callable[[], list[float] | None]:
        task = adapter.enqueue_task_sync(TASK, args=[text]).id

        def result() -> list[float] | None:
            status = adapter.get_task_status_sync(task)
            if status.status == "FAILURE":
                raise RuntimeError(str(status.result))
            return status.result if status.status == "SUCCESS" else None

        return result

    _wait([send(text) for text in some[:WARM_UP]], START_SECONDS)
    say(f"{len(some)} texts")
    began = time.perf_counter()
    vectors = _wait([send(text) for text in some], 600.0)
    seconds = time.perf_counter() - began
    settings = f"task consumer on Celery, {asked['concurrency']} threads, Redis result backend"
    return figures(some, vectors, seconds), settings, "status and result of every task, in Redis for a day"


def _wait(results: list[Callable[[], list[float] | None]], seconds: float) -> list[list[float]]:
    """Return the results, looked for in order: all that the consumer's interface has is a look at the status."""
    deadline = time.monotonic() + seconds
    vectors = []
    for result in results:
        while (vector := result()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(vectors)} of {len(results)} results came")
            time.sleep(0.005)
        vectors.append(vector)
    return vectors


if __name__ == "__main__":
    main()
