"""arq, which keeps its jobs and their results in Redis."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

from asked import job, read, versions
from driving import drive
from peer import AsyncPeer, Value

asked = read(
    __doc__,
    max_jobs="100",  # jobs at once in a worker; its default is 10
    poll="0.005",  # seconds between two looks at the queue; its default is 0.5
    results="redis",  # its default; or none
    together="64",  # enqueues in flight at the bulk enqueue; it has no bulk
)
URL = asked.need("redis")

import uvloop  # noqa: E402 (after what was asked, as in every peer)
from arq import create_pool  # noqa: E402
from arq.connections import RedisSettings  # noqa: E402
from arq.worker import Worker, func  # noqa: E402

KEEP = 3600 if asked["results"] == "redis" else 0
TOGETHER = int(asked["together"])


async def noop(_: dict[str, Any], value: Value) -> Value:
    return job(value)


async def work() -> None:
    """Run a worker until SIGTERM."""
    logging.disable(logging.WARNING)
    worker = Worker(
        [func(noop, name="noop")],
        redis_settings=RedisSettings.from_dsn(URL),
        max_jobs=int(asked["max_jobs"]),
        poll_delay=float(asked["poll"]),
        keep_result=KEEP,
        log_results=False,
    )
    try:
        await worker.async_run()
    except asyncio.CancelledError:  # how it ends
        await worker.close()


class ArqPeer(AsyncPeer):
    settings = (
        f"pickle, uvloop, max_jobs {asked['max_jobs']}, poll_delay {asked['poll']} s, "
        f"results polled every 1 ms, {TOGETHER} enqueues of one caller in flight"
    )
    keeps = "status and result of every job, in Redis, for an hour" if KEEP else "nothing"
    version = versions("arq", "redis", "uvloop")
    keeps_results = bool(KEEP)

    async def prepare(self) -> None:
        self._redis = await create_pool(RedisSettings.from_dsn(URL))

    def worker(self) -> list[str]:
        return [sys.executable, __file__, "work"]

    async def enqueue(self, values: list[Value]) -> None:
        async def send(mine: list[Value]) -> None:
            for value in mine:
                await self._redis.enqueue_job("noop", value)

        await asyncio.gather(*(send(values[k::TOGETHER]) for k in range(TOGETHER)))

    async def enqueue_one(self, value: Value) -> None:
        await self._redis.enqueue_job("noop", value)

    async def result(self, value: Value) -> Value:
        return await (await self._redis.enqueue_job("noop", value)).result(timeout=30, poll_delay=0.001)

    async def kept(self) -> int | None:
        if not KEEP:
            return None
        return sum([1 async for _ in self._redis.scan_iter("arq:result:*", count=10_000)])


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        uvloop.run(work())
    else:
        drive(ArqPeer(asked))
