"""(e) What a million jobs cost while they wait: the producer that submitted them, Redis, and the worker.

The producer is a fresh process that submits one batch from a generator: its seconds, and the most memory beyond what it
had with everything imported and one job submitted. Redis: bytes used beyond what it used with a worker up and idle. The
worker sleeps as a CPU does beside a GPU, so that the batch waits: memory of all its processes beyond what they had.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import psutil
from cases import SOME_ROUNDS, Case
from ground import Ground
from measures.ours import KINDS, SUBJECT, Supervisor, about, running
from producers import producer, said
from record import Sample

MEASURES = ("submit of a batch: seconds", "submit of a batch: memory", "Redis: memory", "worker: memory")

JOBS = 1_000_000
QUICK_JOBS = 100_000
SETTLE_SECONDS = 3.0  # for the window to fill after the worker has told its rate


def cases(ground: Ground) -> list[Case]:
    """Both databases."""
    return [
        Case(
            "submit of a batch: memory", SUBJECT, kind, partial(_wait, ground, kind), SOME_ROUNDS, kind == "postgresql"
        )
        for kind in KINDS
    ]


def _wait(ground: Ground, kind: str, round_: int) -> Iterator[Sample]:
    jobs = QUICK_JOBS if ground.quick else JOBS
    variant = f"{kind}, {jobs:,} jobs"
    with running(ground, kind, model="sleeper") as (relay, started):
        redis = relay._core.broker.redis
        before, resident = _used(redis.info("memory")), _resident(started[0])
        with producer(relay.settings, "batch", "--model", "sleeper", "--jobs", str(jobs)) as process:
            figures = said(process)
        time.sleep(SETTLE_SECONDS)
        assert relay.batch(figures["batch"]).counts().open > jobs / 2, "they were to wait"
        messages = sum(relay._core.broker.depths("torchrelay.sleeper").values())
        after, worker = _used(redis.info("memory")), _resident(started[0]) - resident
    more = about("a batch from a generator, 1 worker", jobs=jobs, start_mb=figures["start_mb"], messages=messages)
    yield Sample("submit of a batch: seconds", SUBJECT, variant, round_, figures["seconds"], "s", more)
    yield Sample("submit of a batch: memory", SUBJECT, variant, round_, figures["grown_mb"], "MB", more)
    yield Sample("Redis: memory", SUBJECT, variant, round_, (after - before) / 1e6, "MB", more)
    yield Sample("worker: memory", SUBJECT, variant, round_, worker, "MB", more)


def _used(info: object) -> int:
    assert isinstance(info, dict)
    return int(info["used_memory"])


def _resident(supervisor: Supervisor) -> float:
    """Return the memory of a worker's processes in MB."""
    parent = psutil.Process(supervisor.pid)
    return sum(one.memory_info().rss for one in (parent, *parent.children(recursive=True))) / 1e6
