"""PgQueuer, which keeps its queue and a log of statuses in PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

from asked import job, read, versions
from driving import drive
from peer import AsyncPeer, Value

asked = read(
    __doc__,
    batch="1000",  # jobs a dequeue, and statuses a write
    chunk="1000",  # jobs an enqueue
    driver="pool",  # pool or connection, of asyncpg; or psycopg
    pool="16",  # connections of an enqueuing process, and of a worker if its driver is `pool`
    durability="durable",  # its own default; balanced: the log is unlogged, volatile: all is
)
URL = asked.need("postgres")

os.environ["PGQUEUER_DURABILITY"] = asked["durability"]

import asyncpg  # noqa: E402 (after what was asked, as in every peer)
import psycopg  # noqa: E402
import uvloop  # noqa: E402
from pgqueuer import PgQueuer  # noqa: E402
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver, PsycopgDriver  # noqa: E402
from pgqueuer.models import Job  # noqa: E402
from pgqueuer.queries import Queries  # noqa: E402

CHUNK = int(asked["chunk"])


async def work() -> None:
    """Run a worker until SIGTERM."""
    if asked["driver"] == "pool":
        driver = AsyncpgPoolDriver(await asyncpg.create_pool(URL, min_size=2, max_size=int(asked["pool"])))
    elif asked["driver"] == "connection":
        driver = AsyncpgDriver(await asyncpg.connect(URL))
    else:
        driver = PsycopgDriver(await psycopg.AsyncConnection.connect(URL, autocommit=True))
    queuer = PgQueuer(driver)

    @queuer.entrypoint("noop")
    async def noop(taken: Job) -> None:
        job(json.loads(taken.payload))

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queuer.shutdown.set)
    await queuer.run(batch_size=int(asked["batch"]))


class PgQueuerPeer(AsyncPeer):
    settings = (
        f"asyncpg {asked['driver']}, uvloop, batch size {asked['batch']}, enqueue of lists of {asked['chunk']}, "
        f"{asked['durability']} tables"
    )
    keeps = "a log of every job's statuses, in PostgreSQL; no result"
    version = versions("pgqueuer", "asyncpg", "uvloop")

    async def prepare(self) -> None:
        self._pool = await asyncpg.create_pool(URL, min_size=1, max_size=int(asked["pool"]))
        self._queries = Queries(AsyncpgPoolDriver(self._pool))
        await self._queries.install()

    def worker(self) -> list[str]:
        return [sys.executable, __file__, "work"]

    async def enqueue(self, values: list[Value]) -> None:
        for start in range(0, len(values), CHUNK):
            payloads = [json.dumps(value).encode() for value in values[start : start + CHUNK]]
            await self._queries.enqueue(["noop"] * len(payloads), payloads, [0] * len(payloads))

    async def enqueue_one(self, value: Value) -> None:
        await self._queries.enqueue("noop", json.dumps(value).encode())

    async def kept(self) -> int:
        return await self._pool.fetchval("SELECT count(*) FROM pgqueuer_log WHERE status = 'successful'")

    async def drained(self) -> float:
        # Bodies end a batch ahead of their statuses, which are written a batch at a time.
        rate = await self._pool.fetchval(
            """
            SELECT count(*) FILTER (WHERE created > first)
                / nullif(extract(epoch FROM max(created) - min(first)), 0)::float8
            FROM pgqueuer_log, (SELECT min(created) AS first FROM pgqueuer_log WHERE status = 'successful') AS one
            WHERE status = 'successful'
            """
        )
        if rate is None:
            raise ValueError(f"too few jobs to tell a rate by batches of {asked['batch']}")
        return rate


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        uvloop.run(work())
    else:
        drive(PgQueuerPeer(asked))
