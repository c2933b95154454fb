"""(c) Latency, from the call of `submit` to the result in the caller's hands, one job after the other, model no-op.

Idle: nothing else is there. Under half load: another process submits single jobs at half the rate that 64 callers reach
who each wait for their result; what that rate was stands with the figure. Peers are asked for the idle one.

Behind a batch: one job submitted while a batch of the same model and priority runs: seconds until its chunk is claimed
and until it has ended, by the database's clock; the worst of several a round, from before the batch's middle.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from cases import SOME_ROUNDS, Case
from ground import Ground
from measures import rivals
from measures.ours import KINDS, SUBJECT, VALUE, about, open_relay, running
from producers import capacity, producer, said
from record import Sample
from sqlalchemy import text
from system import warm, workers

from torchrelay import Relay
from torchrelay_storage import ids

MEASURES = (
    "latency idle p50", "latency idle p99", "latency half load p50", "latency half load p99",
    "behind a batch: starts", "behind a batch: ends",
)  # fmt: skip

PER_S = 100.0  # round trips, guessed
WARM_UP = 20  # round trips before they count
CALLERS = 64
SIZES = {"some": 250_000, "most": 1_000_000}  # jobs of the batch
QUICK_SIZES = {"some": 50_000, "most": 200_000}
BEHIND = 6  # jobs behind a batch
BEHIND_SECONDS = 0.3  # between two of them


def cases(ground: Ground) -> list[Case]:
    """Ours on both databases, idle, under half load and behind a batch; and the peers that keep results."""
    found = []
    for kind in KINDS:
        variant = f"{kind}, 1 worker"
        run, is_goal = partial(_idle, ground, kind, variant), kind == "postgresql"
        found.append(Case("latency idle p50", SUBJECT, variant, run, None if is_goal else SOME_ROUNDS, is_goal))
        run = partial(_half_load, ground, kind, variant)
        found.append(Case("latency half load p50", SUBJECT, variant, run, SOME_ROUNDS))
    for size, jobs in (QUICK_SIZES if ground.quick else SIZES).items():
        variant = f"postgresql, {jobs:,} jobs"
        run = partial(_behind, ground, size, jobs, variant)
        is_goal = size == "most"
        found.append(Case("behind a batch: starts", SUBJECT, variant, run, None if is_goal else SOME_ROUNDS, is_goal))
    return found + rivals.cases(ground, "latency")


def _idle(ground: Ground, kind: str, variant: str, round_: int) -> Iterator[Sample]:
    key = f"latency {variant}"
    jobs = ground.jobs(key, PER_S)
    with running(ground, kind) as (relay, _):
        seconds = _round_trips(relay, jobs)
    ground.took(key, PER_S, jobs, sum(seconds))
    yield from _samples("latency idle", variant, round_, seconds, about("Relay, 1 caller", jobs=jobs))


def _half_load(ground: Ground, kind: str, variant: str, round_: int) -> Iterator[Sample]:
    with running(ground, kind) as (relay, _):
        most = asyncio.run(capacity(CALLERS, max(ground.seconds / 2, 0.5), relay.settings))
        with producer(relay.settings, "load", "--rate", str(most / 2)) as process:
            time.sleep(1.0)  # its start
            seconds = _round_trips(relay, ground.jobs(f"latency {variant}", PER_S), pause=0.01)
            assert process.stdin is not None
            process.stdin.close()
            figures = said(process)
    more = about("Relay, 1 caller beside a steady load", jobs=len(seconds), load_per_s=round(figures["rate"]),
                 most_per_s=round(most))  # fmt: skip
    yield from _samples("latency half load", variant, round_, seconds, more)


def _round_trips(relay: Relay, jobs: int, pause: float = 0.0) -> list[float]:
    seconds = []
    for i in range(jobs + WARM_UP):
        if pause:
            time.sleep(random.uniform(0.0, pause))  # else the caller falls in step with the load
        began = time.perf_counter()
        relay.submit("noop", {"x": i}).result(timeout=60)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def _samples(measure: str, variant: str, round_: int, seconds: Sequence[float], more: dict[str, Any]) -> list[Sample]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return [
        Sample(f"{measure} {name}", SUBJECT, variant, round_, cuts[i] * 1000, "ms", more)
        for name, i in (("p50", 49), ("p99", 98))
    ]


# --- behind a batch ---------------------------------------------------------------------------------------------------


def _behind(ground: Ground, size: str, jobs: int, variant: str, round_: int) -> Iterator[Sample]:
    template = f"a waiting batch of {jobs}"
    if not ground.has(template):
        _make_template(ground, template, jobs)
    with ground.fresh("postgresql", template) as settings, open_relay(settings) as relay, workers(settings):
        batch = relay.batches()[0]
        warm_model(relay)
        relay.resume("noop")
        while not batch.counts().succeeded:
            time.sleep(0.02)
        waits = []
        for i in range(BEHIND):
            job = relay.submit("noop", {"x": i})
            job.result(timeout=120)
            ahead = batch.counts()
            if ahead.open:  # else it had the worker to itself in the end
                waits.append(_waited(relay, job.id))
            time.sleep(BEHIND_SECONDS)
        left = batch.counts().open
    if not waits:
        raise RuntimeError(f"the batch of {jobs} had ended before the first job behind it")
    more = about("the same model and priority", size=size, batch=jobs, behind=len(waits), left=left)
    for name, i in (("starts", 0), ("ends", 1)):
        worst = max(wait[i] for wait in waits)
        median = statistics.median(wait[i] for wait in waits)
        yield Sample(f"behind a batch: {name}", SUBJECT, variant, round_, worst, "s", {**more, "median": median})


def warm_model(relay: Relay) -> None:
    """Wait for a worker without running anything of the paused model: by another model of the same handler."""
    relay.register_model("warm", handler="noop")
    warm(relay, "warm", VALUE, 1)


def _make_template(ground: Ground, name: str, jobs: int) -> None:
    with ground.fresh("postgresql", keep=name) as settings, open_relay(settings) as relay:
        relay.pause("noop")
        relay.submit_batch("noop", ({"x": i} for i in range(jobs)))


def _waited(relay: Relay, job: str) -> tuple[float, float]:
    """Return the seconds from a job's submit to its claim and to its end."""
    statement = text("SELECT c.created_at, c.claimed_at, j.finished_at FROM jobs j JOIN chunks c ON c.id = j.chunk "
                     "WHERE j.id = :job")  # fmt: skip
    scope = {"job": ids.read(ids.Kind.JOB, job)}
    row = relay._core.db.query(lambda connection: connection.execute(statement, scope).one())
    return row.claimed_at - row.created_at, row.finished_at - row.created_at
