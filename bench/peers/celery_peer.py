"""Celery on Redis, with its SQL result backend, its Redis one, or without results.

Its pool is what cost least CPU a job: solo, but prefork for the SQL backend, which pools connections only there.
"""

from __future__ import annotations

import os

from asked import job, read, versions
from driving import drive
from peer import BIN, Peer, Value

asked = read(
    __doc__,
    results="none",  # sql, redis or none
    pool="",  # solo, threads or prefork; the fastest for these results if empty
    prefetch="128",
    late="0",  # 1: acknowledge after the body instead of before
    batch="100",  # messages a pipeline at the bulk enqueue; 0: one by one
)
URL = asked.need("redis")
RESULTS = asked["results"]
POOL = asked["pool"] or ("prefork" if RESULTS == "sql" else "solo")

from celery import Celery  # noqa: E402 (its settings come from what was asked)

app = Celery("celery_peer", broker=URL)
app.conf.update(
    task_ignore_result=RESULTS == "none",
    task_acks_late=asked["late"] == "1",
    worker_prefetch_multiplier=int(asked["prefetch"]),
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
if RESULTS == "redis":
    app.conf.result_backend = URL
elif RESULTS == "sql":
    app.conf.result_backend = asked.need("postgres").replace("postgresql://", "db+postgresql+psycopg://")
    app.conf.database_engine_options = {"pool_pre_ping": False}


@app.task(name="noop")
def noop(value: Value) -> Value:
    return job(value)


class CeleryPeer(Peer):
    settings = (
        f"JSON, -P {POOL} -c 1, prefetch multiplier {asked['prefetch']}, "
        f"acks {'late' if asked['late'] == '1' else 'early'}, without gossip, mingle, heartbeat and remote control; "
        + ("results polled every 2 ms; " if RESULTS == "sql" else "")
        + (f"bulk enqueue in kombu's batches of {asked['batch']}" if asked["batch"] != "0" else "one producer held")
    )
    keeps = {
        "sql": "status and result of every job, in PostgreSQL (queue in Redis)",
        "redis": "status and result of every job, in Redis, for a day",
        "none": "nothing",
    }[RESULTS]
    version = versions("celery", "kombu", "redis", *(["SQLAlchemy"] if RESULTS == "sql" else []))
    keeps_results = RESULTS != "none"

    def prepare(self) -> None:
        app.finalize()
        if RESULTS == "sql":
            app.backend.ResultSession().close()  # makes the tables

    def worker(self) -> list[str]:
        options = ["--pool", POOL, "--concurrency", "1", "--hostname", f"bench-{os.urandom(4).hex()}"]
        options += ["--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        return [str(BIN / "celery"), "-A", "celery_peer", "worker", *options]

    def enqueue(self, values: list[Value]) -> None:
        with app.producer_pool.acquire(block=True) as producer:
            if asked["batch"] == "0":
                for value in values:
                    noop.apply_async((value,), producer=producer)
            else:
                with producer.batch(int(asked["batch"])):
                    for value in values:
                        noop.apply_async((value,), producer=producer)

    def enqueue_one(self, value: Value) -> None:
        noop.delay(value)

    def result(self, value: Value) -> Value:
        return noop.delay(value).get(timeout=30, interval=0.002)

    def kept(self) -> int | None:
        if RESULTS == "redis":
            return sum(1 for _ in app.backend.client.scan_iter("celery-task-meta-*", count=10_000))
        if RESULTS == "sql":
            import psycopg

            with psycopg.connect(asked.postgres) as connection:
                return connection.execute("SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'").fetchone()[0]
        return None


if __name__ == "__main__":
    drive(CeleryPeer(asked))
