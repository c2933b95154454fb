"""No-op jobs drained from PostgreSQL while a stranger holds a REPEATABLE READ snapshot, against the same without one.

python bench/snapshot.py [--jobs 200000] [--lone-jobs 200000] [--rounds 1]

As long as the snapshot is held nothing can be vacuumed: each move of a chunk leaves a dead entry behind in the partial
indexes that find the next ones. A batch has few chunks; it is drained by a real worker. Of lone jobs each is a chunk:
they are drained by the stores alone, which do what a worker, the announcer and the maintenance do with the database,
since Celery's own cost for each message would hide what the database does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import psycopg
from sqlalchemy import text
from system import system, warm, workers

from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.registry import Registry
from torchrelay_storage.states import End
from torchrelay_storage.submission import NewJob, Submission

SUBMIT = 2_000  # lone jobs stored in one transaction
WINDOW = 64  # chunks announced at a time, and finished in one transaction
CLAIM = 8  # chunks claimed in one transaction
LOOK = 1.0  # seconds between two looks of the maintenance, and of the worker at what it holds


@contextmanager
def snapshot(url: str) -> Iterator[None]:
    """Hold a snapshot, as a backup or a forgotten session does."""
    with psycopg.connect(url) as stranger:
        stranger.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        stranger.execute("SELECT count(*) FROM jobs")
        yield


def drain_batch(settings: Settings, jobs: int, *, held: bool) -> float:
    """Return jobs of a batch drained per second, by a worker."""
    with Relay(settings=settings) as relay, workers(settings):
        relay.register_model("noop", handler="noop", chunk_size=1000)
        warm(relay, "noop", {"x": 0}, 1)
        relay.pause("noop")
        batch = relay.submit_batch("noop", ({"x": i} for i in range(jobs)))
        with snapshot(settings.database_url) if held else nullcontext():
            began = time.perf_counter()
            relay.resume("noop")
            assert batch.wait(timeout=1800).succeeded == jobs
            return jobs / (time.perf_counter() - began)


def drain_lone(settings: Settings, jobs: int, *, held: bool) -> float:
    """Return lone jobs drained per second, by the stores."""
    database = Database(settings.database_url)
    store, chunks, fleet = JobStore(database), ChunkStore(database), Fleet(database)
    version = Registry(database).register("noop", handler="noop")
    worker = fleet.register("bench", host="h", pid=1, device="cpu").id
    for start in range(0, jobs, SUBMIT):
        some = [Submission(version, Options(), [NewJob(b'{"x":1}')]) for _ in range(min(SUBMIT, jobs - start))]
        store.submit(some)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
    room, done = dict.fromkeys(range(10), WINDOW), 0
    with snapshot(settings.database_url) if held else nullcontext():
        began = looked = time.perf_counter()
        while done < jobs:
            outcomes = []
            announced = [a.chunk for a in chunks.announce(version.model, room)]
            for i in range(0, len(announced), CLAIM):
                for claimed in chunks.claim(announced[i : i + CLAIM], worker):
                    outcomes += [Outcome(j.id, claimed.chunk, claimed.token, End.SUCCEEDED, b"1") for j in claimed.jobs]
            done += store.finish(outcomes, worker).recorded
            if time.perf_counter() - looked > LOOK:
                looked = time.perf_counter()
                fleet.beat(worker)
                chunks.due_models()
                chunks.announce_again(version.model, 15, WINDOW)
                chunks.held(worker)
                chunks.expire()
                chunks.rescue(60)
        seconds = time.perf_counter() - began
    database.dispose()
    return jobs / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200_000)
    parser.add_argument("--lone-jobs", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    for name, drain, jobs in (
        ("a batch", drain_batch, arguments.jobs),
        ("lone jobs", drain_lone, arguments.lone_jobs),
    ):
        for _ in range(arguments.rounds if jobs else 0):
            rates = {}
            for held in (False, True):
                with system("postgresql") as settings:  # a fresh one: no round sweeps up after the other
                    rates[held] = drain(settings, jobs, held=held)
            figures = {
                "jobs": jobs,
                "as": name,
                "drained_per_s": round(rates[False]),
                "drained_per_s_with_snapshot": round(rates[True]),
                "ratio": round(rates[True] / rates[False], 2),
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
