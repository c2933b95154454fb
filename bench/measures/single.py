"""(b) Single submits: one caller, 64 concurrent callers (AsyncRelay), four processes of 16 callers; and their drain.

A submit counts once it is committed. No worker takes anything meanwhile: the model is paused. What the 64 callers have
submitted is then drained by one worker that is up and idle, from `resume` until every job has ended. Peers have 64
concurrent callers too, and drain what those enqueued.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from cases import SOME_ROUNDS, Case
from ground import Ground
from measures import rivals
from measures.ours import KINDS, SUBJECT, TIMEOUT, VALUE, about, open_relay, running
from producers import producer, said, submit_by
from record import Sample
from sqlalchemy import text

from torchrelay import Relay

MEASURES = ("single submit", "single drain")

CALLERS = 64
PROCESSES, EACH = 4, 16
ONE_PER_S, CALLERS_PER_S, PROCESSES_PER_S = 500.0, 5_000.0, 5_000.0  # guesses
LOOK_SECONDS = 0.01


def cases(ground: Ground) -> list[Case]:
    """Ours on both databases, and the peers."""
    found = []
    for kind in KINDS:
        for name, run in (("1 caller", _one), (f"{CALLERS} callers", _callers),
                          (f"{PROCESSES} processes of {EACH} callers", _processes)):  # fmt: skip
            variant = f"{kind}, {name}"
            is_goal = variant == f"postgresql, {CALLERS} callers"
            case = partial(run, ground, kind, variant)
            found.append(Case("single submit", SUBJECT, variant, case, None if is_goal else SOME_ROUNDS, is_goal))
    return found + rivals.cases(ground, "single")


def _one(ground: Ground, kind: str, variant: str, round_: int) -> Iterator[Sample]:
    key = f"single {variant}"
    jobs = ground.jobs(key, ONE_PER_S)
    with ground.fresh(kind) as settings, open_relay(settings) as relay:
        relay.submit("noop", VALUE)
        began = time.perf_counter()
        for i in range(jobs):
            relay.submit("noop", {"x": i})
        seconds = time.perf_counter() - began
    ground.took(key, ONE_PER_S, jobs, seconds)
    yield Sample("single submit", SUBJECT, variant, round_, jobs / seconds, "jobs/s", about("Relay", jobs=jobs))


def _callers(ground: Ground, kind: str, variant: str, round_: int) -> Iterator[Sample]:
    key = f"single {variant}"
    jobs = ground.jobs(key, CALLERS_PER_S)
    more = about("AsyncRelay: what callers submit at the same time is committed together", jobs=jobs)
    with running(ground, kind) as (relay, _):
        relay.pause("noop")
        began, ended = asyncio.run(submit_by(CALLERS, jobs, relay.settings))
        seconds = ended - began
        ground.took(key, CALLERS_PER_S, jobs, seconds)
        yield Sample("single submit", SUBJECT, variant, round_, jobs / seconds, "jobs/s", more)
        began = time.perf_counter()
        relay.resume("noop")
        _wait_for_all(relay)
        seconds = time.perf_counter() - began
        yield Sample("single drain", SUBJECT, f"{variant}, 1 worker", round_, jobs / seconds, "jobs/s", more)


def _processes(ground: Ground, kind: str, variant: str, round_: int) -> Iterator[Sample]:
    key = f"single {variant}"
    jobs = max(ground.jobs(key, PROCESSES_PER_S) // PROCESSES, 1) * PROCESSES
    with ground.fresh(kind) as settings, open_relay(settings), ExitStack() as stack:
        arguments = ("singles", "--jobs", str(jobs // PROCESSES), "--callers", str(EACH))
        started = [stack.enter_context(producer(settings, *arguments)) for _ in range(PROCESSES)]
        for process in started:
            said(process)  # it is ready
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [said(process) for process in started]
    seconds = max(one["ended"] for one in told) - min(one["began"] for one in told)
    ground.took(key, PROCESSES_PER_S, jobs, seconds)
    yield Sample("single submit", SUBJECT, variant, round_, jobs / seconds, "jobs/s",
                 about("AsyncRelay", jobs=jobs))  # fmt: skip


def _wait_for_all(relay: Relay) -> None:
    """Return once no job is open, by an index that holds the open chunks only."""
    is_open = text("SELECT 1 FROM chunks WHERE state < 3 LIMIT 1")
    deadline = time.monotonic() + TIMEOUT
    while relay._core.db.query(lambda connection: connection.execute(is_open).first()) is not None:
        if time.monotonic() > deadline:
            raise TimeoutError("jobs are still open")
        time.sleep(LOOK_SECONDS)
