"""Huey on Redis."""

from __future__ import annotations

from asked import job, read, versions
from driving import drive
from peer import BIN, Peer, Value

asked = read(
    __doc__,
    threads="4",
    results="none",  # or redis
)
URL = asked.need("redis")

from huey import RedisHuey  # noqa: E402 (its settings come from what was asked)

RESULTS = asked["results"] == "redis"
huey = RedisHuey("bench", url=URL, results=RESULTS, notify_result=RESULTS)


@huey.task(name="noop")
def noop(value: Value) -> Value:
    return job(value)


class HueyPeer(Peer):
    settings = f"pickle, {asked['threads']} threads a process, blocking pop, no scheduler of periodic tasks" + (
        ", results announced (notify_result)" if RESULTS else ""
    )
    keeps = "the result of every job, in Redis, until it is read" if RESULTS else "nothing"
    version = versions("huey", "redis")
    keeps_results = RESULTS

    def worker(self) -> list[str]:
        options = ["--workers", asked["threads"], "--worker-type", "thread", "--no-periodic", "--quiet"]
        return [str(BIN / "huey_consumer"), "huey_peer.huey", *options, "--graceful-signal", "TERM"]

    def enqueue(self, values: list[Value]) -> None:
        for value in values:  # it has no bulk
            noop(value)

    def enqueue_one(self, value: Value) -> None:
        noop(value)

    def result(self, value: Value) -> Value:
        return noop(value).get(blocking=True, timeout=30)

    def kept(self) -> int | None:
        return huey.storage.result_store_size() if RESULTS else None


if __name__ == "__main__":
    import huey_peer  # a task's name starts with its module's, which must be the worker's too

    drive(huey_peer.HueyPeer(asked))
