"""Dramatiq on Redis."""

from __future__ import annotations

import os

from asked import job, read, versions
from driving import drive
from peer import BIN, Peer, Value

asked = read(
    __doc__,
    threads="8",  # its default
    prefetch="100",  # messages that a worker process fetches ahead
    results="none",  # or redis
)
URL = asked.need("redis")
os.environ["dramatiq_queue_prefetch"] = asked["prefetch"]  # noqa: SIM112 (its name)

import dramatiq  # noqa: E402 (its settings come from what was asked)
from dramatiq.brokers.redis import RedisBroker  # noqa: E402
from dramatiq.results import Results  # noqa: E402
from dramatiq.results.backends import RedisBackend  # noqa: E402

broker = RedisBroker(url=URL)
RESULTS = asked["results"] == "redis"
if RESULTS:
    broker.add_middleware(Results(backend=RedisBackend(url=URL), result_ttl=600_000))
dramatiq.set_broker(broker)


@dramatiq.actor(actor_name="noop", **({"store_results": True} if RESULTS else {}))
def noop(value: Value) -> Value | None:
    result = job(value)
    return result if RESULTS else None  # it warns of a result that nobody keeps


class DramatiqPeer(Peer):
    settings = f"JSON, {asked['threads']} threads a process, prefetch {asked['prefetch']}, its default middleware" + (
        " and Results on Redis" if RESULTS else ""
    )
    keeps = "the result of every job, in Redis, for 10 minutes" if RESULTS else "nothing"
    version = versions("dramatiq", "redis")
    keeps_results = RESULTS

    def worker(self) -> list[str]:
        processes = ["--processes", str(asked.processes), "--threads", asked["threads"]]
        return [str(BIN / "dramatiq"), "dramatiq_peer", *processes, "--worker-shutdown-timeout", "5000"]

    def worker_processes(self) -> int:
        return 1  # it starts its own

    def enqueue(self, values: list[Value]) -> None:
        for value in values:  # it has no bulk
            noop.send(value)

    def enqueue_one(self, value: Value) -> None:
        noop.send(value)

    def result(self, value: Value) -> Value:
        return noop.send(value).get_result(block=True, timeout=30_000)


if __name__ == "__main__":
    drive(DramatiqPeer(asked))
