"""Taskiq on Redis."""

from __future__ import annotations

import asyncio

from asked import job, read, versions
from driving import drive
from peer import BIN, AsyncPeer, Value

asked = read(
    __doc__,
    broker="list",  # list: a Redis list, taken from one at a time; stream: acknowledged
    concurrency="100",  # jobs at once in a worker: its default
    prefetch="0",  # messages fetched ahead of those jobs: its default
    parse="0",  # 1: arguments checked by pydantic, its default
    results="none",  # or redis
    together="64",  # enqueues in flight at the bulk enqueue; it has no bulk
)
URL = asked.need("redis")

from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend, RedisStreamBroker  # noqa: E402

RESULTS = asked["results"] == "redis"
TOGETHER = int(asked["together"])
if asked["broker"] == "stream":
    broker = RedisStreamBroker(URL, consumer_id="0", max_connection_pool_size=TOGETHER)
else:
    broker = ListQueueBroker(URL, max_connection_pool_size=TOGETHER)
if RESULTS:
    broker = broker.with_result_backend(RedisAsyncResultBackend(URL, result_ex_time=600))


@broker.task(task_name="noop")
async def noop(value: Value) -> Value:
    return job(value)


class TaskiqPeer(AsyncPeer):
    settings = (
        f"{'RedisStreamBroker' if asked['broker'] == 'stream' else 'ListQueueBroker'}, JSON, uvloop, async task, "
        f"max_async_tasks {asked['concurrency']}, max_prefetch {asked['prefetch']}, "
        f"{'with' if asked['parse'] == '1' else 'without'} parsing of arguments, "
        f"{TOGETHER} enqueues of one caller in flight" + (", results polled every 1 ms" if RESULTS else "")
    )
    keeps = "the result of every job, in Redis, for 10 minutes" if RESULTS else "nothing"
    version = versions("taskiq", "taskiq-redis", "redis")
    keeps_results = RESULTS

    async def prepare(self) -> None:
        await broker.startup()

    def worker(self) -> list[str]:
        options = ["--workers", str(asked.processes), "--max-async-tasks", asked["concurrency"]]
        options += ["--max-prefetch", asked["prefetch"], "--log-level", "WARNING"]
        options += [] if asked["parse"] == "1" else ["--no-parse"]
        return [str(BIN / "taskiq"), "worker", "taskiq_peer:broker", *options]

    def worker_processes(self) -> int:
        return 1  # it starts its own

    async def enqueue(self, values: list[Value]) -> None:
        async def send(mine: list[Value]) -> None:
            for value in mine:
                await noop.kiq(value)

        await asyncio.gather(*(send(values[k::TOGETHER]) for k in range(TOGETHER)))

    async def enqueue_one(self, value: Value) -> None:
        await noop.kiq(value)

    async def result(self, value: Value) -> Value:
        task = await noop.kiq(value)
        return (await task.wait_result(check_interval=0.001, timeout=30)).return_value


if __name__ == "__main__":
    drive(TaskiqPeer(asked))
