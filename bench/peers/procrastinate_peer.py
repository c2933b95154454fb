"""Procrastinate, which keeps its jobs in PostgreSQL."""

from __future__ import annotations

import logging
import sys

from asked import job, read, versions
from driving import drive
from peer import AsyncPeer, Value

asked = read(
    __doc__,
    concurrency="20",  # jobs at once in a worker
    chunk="1000",  # jobs an enqueue
    pool="16",  # connections of an enqueuing process, and of a worker
)
URL = asked.need("postgres")

import uvloop  # noqa: E402 (after what was asked, as in every peer)
from procrastinate import App, PsycopgConnector  # noqa: E402

app = App(connector=PsycopgConnector(conninfo=URL, min_size=2, max_size=int(asked["pool"])))
CHUNK = int(asked["chunk"])


@app.task(name="noop")
async def noop(value: Value) -> Value:
    return job(value)


async def work() -> None:
    """Run a worker until SIGTERM."""
    logging.disable(logging.WARNING)
    async with app.open_async():
        await app.run_worker_async(concurrency=int(asked["concurrency"]))


class ProcrastinatePeer(AsyncPeer):
    settings = (
        f"psycopg pool of {asked['pool']}, uvloop, concurrency {asked['concurrency']}, async task, "
        f"batch_defer of {asked['chunk']}, logging off"
    )
    keeps = "every job with its status and events, in PostgreSQL; no result"
    version = versions("procrastinate", "psycopg", "uvloop")

    async def prepare(self) -> None:
        await app.open_async()
        await app.schema_manager.apply_schema_async()

    def worker(self) -> list[str]:
        return [sys.executable, __file__, "work"]

    async def enqueue(self, values: list[Value]) -> None:
        for start in range(0, len(values), CHUNK):
            await noop.batch_defer_async(*({"value": value} for value in values[start : start + CHUNK]))

    async def enqueue_one(self, value: Value) -> None:
        await noop.defer_async(value=value)

    async def kept(self) -> int:
        query = "SELECT count(*) AS n FROM procrastinate_jobs WHERE status = 'succeeded'"
        return (await app.connector.execute_query_one_async(query))["n"]


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        uvloop.run(work())
    else:
        drive(ProcrastinatePeer(asked))
