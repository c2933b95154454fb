"""RQ, which keeps its jobs and their results in Redis."""

from __future__ import annotations

import sys
import time

from asked import job, read, versions
from driving import drive
from peer import Peer, Value

asked = read(
    __doc__,
    worker="simple",  # simple: in the worker's own process; fork: a process for every job, its default
    serializer="pickle",  # its default; or json
    chunk="1000",  # jobs an enqueue
    ttl="500",  # seconds that a job and its result are kept: its default
)
URL = asked.need("redis")

from redis import Redis  # noqa: E402 (after what was asked, as in every peer)
from rq import Queue, SimpleWorker, Worker  # noqa: E402
from rq.registry import FinishedJobRegistry  # noqa: E402
from rq.serializers import resolve_serializer  # noqa: E402

CHUNK = int(asked["chunk"])
TTL = int(asked["ttl"])
SERIALIZER = resolve_serializer(asked["serializer"])


def noop(value: Value) -> Value:
    return job(value)


def work() -> None:
    """Run a worker until SIGTERM."""
    kind = {"simple": SimpleWorker, "fork": Worker}[asked["worker"]]
    worker = kind(["bench"], connection=Redis.from_url(URL), serializer=SERIALIZER)
    worker.log_job_description = worker.log_result_lifespan = False
    worker.work(logging_level="WARNING")


class RqPeer(Peer):
    settings = (
        f"{'SimpleWorker' if asked['worker'] == 'simple' else 'Worker, a fork for every job'}, {asked['serializer']}, "
        f"enqueue_many of {asked['chunk']}, results kept for {TTL} s"
    )
    keeps = f"status and result of every job, in Redis, for {TTL} s"
    version = versions("rq", "redis")
    keeps_results = True

    def prepare(self) -> None:
        self._redis = Redis.from_url(URL)
        self._queue = Queue("bench", connection=self._redis, serializer=SERIALIZER)

    def worker(self) -> list[str]:
        return [sys.executable, __file__, "work"]

    def enqueue(self, values: list[Value]) -> None:
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            self._queue.enqueue_many(Queue.prepare_data("rq_peer.noop", (value,), result_ttl=TTL) for value in part)

    def enqueue_one(self, value: Value) -> None:
        self._queue.enqueue("rq_peer.noop", value, result_ttl=TTL)

    def result(self, value: Value) -> Value:
        submitted = self._queue.enqueue("rq_peer.noop", value, result_ttl=TTL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            # It blocks; only what Redis answers early (a client that was unblocked) brings it back here.
            if (result := submitted.latest_result(timeout=30)) is not None:
                return result.return_value
        raise TimeoutError(submitted.id)

    def kept(self) -> int:
        return FinishedJobRegistry(queue=self._queue).get_job_count(cleanup=False)


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        work()
    else:
        drive(RqPeer(asked))
