"""(f) More workers: 1, 2, 4 and 8 of them with a model that sleeps like a GPU, so that cores are not the limit.

One batch that is longer than all of it; workers join it. The rate is that of a stretch in which all of them work, from
one recorded end to another: a batch's own end, at which some have nothing left, is not in it. Efficiency is the rate
against so many times the rate of one worker in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from cases import Case
from ground import Ground
from measures import fleet
from measures.ours import SUBJECT, about, open_relay
from record import Sample
from sleeper_model import BATCH, RATE, SECONDS
from sqlalchemy import text
from system import workers

from torchrelay import Relay

MEASURES = ("workers", "workers: efficiency", *fleet.MEASURES)

NUMBERS = (1, 2, 4, 8)
QUICK_NUMBERS = (1, 4)
START_SECONDS = 120.0
SPARE_SECONDS = 40.0  # of work, while more workers come up


def cases(ground: Ground) -> list[Case]:
    """Real workers on PostgreSQL, then the simulation of many."""
    return [Case("workers", SUBJECT, "postgresql", partial(_workers, ground), quick=True), *fleet.cases(ground)]


def _workers(ground: Ground, round_: int) -> Iterator[Sample]:
    numbers = QUICK_NUMBERS if ground.quick else NUMBERS
    seconds = max(2 * ground.seconds, 2.0)
    more = about(f"a sleep of {SECONDS * 1000:g} ms a device batch of {BATCH}", ideal_per_s=RATE)
    one = 0.0
    with ground.fresh("postgresql") as settings, open_relay(settings, "sleeper") as relay, ExitStack() as stack:
        jobs = int(RATE * sum(numbers) * (seconds + SPARE_SECONDS))  # more than they will do
        relay.submit_batch("sleeper", ({"x": i} for i in range(jobs)))
        started = 0
        for n in numbers:
            while started < n:
                stack.enter_context(workers(settings, 1, "--name", f"bench-{started}", "--torch-threads", "1"))
                started += 1
            _wait_for_ends(relay, n)
            rate = _rate(relay, seconds)
            one = one or rate
            name = f"postgresql, {n} worker{'s' if n > 1 else ''}"
            yield Sample("workers", SUBJECT, name, round_, rate, "jobs/s", more)
            yield Sample("workers: efficiency", SUBJECT, name, round_, rate / n / one, "", more)


def _wait_for_ends(relay: Relay, n: int) -> None:
    """Return once n workers have recorded ends."""
    statement = text("SELECT count(DISTINCT worker) FROM chunks WHERE state = 3")
    deadline = time.monotonic() + START_SECONDS
    while relay._core.db.query(lambda connection: connection.execute(statement).scalar_one()) < n:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{n} workers did not come up")
        time.sleep(0.05)


def _rate(relay: Relay, seconds: float) -> float:
    """Return the jobs recorded per second between the first end and the last of the next so many seconds."""
    statement = text("""
        WITH recorded AS (SELECT finished_at AS at, count(*) AS jobs FROM jobs WHERE finished_at > :since GROUP BY 1)
        SELECT sum(jobs) - (SELECT jobs FROM recorded ORDER BY at LIMIT 1) AS jobs, max(at) - min(at) AS seconds
        FROM recorded
    """)
    since = relay._core.db.now()
    time.sleep(seconds)
    row = relay._core.db.query(lambda connection: connection.execute(statement, {"since": since}).one())
    return float(row.jobs) / float(row.seconds)
