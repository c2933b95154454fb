"""(e) Many rows: status, list and counts, and a drain, with a thousand jobs in the tables and with five million.

The rows are ended jobs in batches of a thousand (`rows`), so that the table's size is all that differs: the batch that
is counted, the job that is looked at and the page that is listed are alike. Each figure is of calls one after the other
through a Relay in this process. The drain is that of (a): beside the rows, and against next to none.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

from cases import SOME_ROUNDS, Case
from ground import Ground
from measures.ours import KINDS, SUBJECT, TIMEOUT, about, open_relay, working
from measures.rows import CHUNK, batches, fill
from record import Sample

from torchrelay import Relay
from torchrelay_storage import ids

QUESTIONS = ("status", "list", "list of failed", "counts")
MEASURES = (*(f"{question} {part}" for question in QUESTIONS for part in ("p50", "p99")), "drain beside rows")

SIZES = {"few": 1_000, "some": 100_000, "most": 5_000_000}  # rows
QUICK_SIZES = {"few": 1_000, "most": 100_000}
CALLS = 300  # of each question; a hundred when quick
PAGE = 50  # jobs listed
RATE = 100_000  # jobs/s, guessed, as in `batch`


def cases(ground: Ground) -> list[Case]:
    """Each database at each size."""
    found = []
    for kind in KINDS:
        for size, rows in (QUICK_SIZES if ground.quick else SIZES).items():
            variant = f"{kind}, {rows:,} rows"
            quick = kind == "postgresql"
            rounds = None if quick and size != "some" else SOME_ROUNDS
            found.append(Case("status p50", SUBJECT, variant, partial(_ask, ground, kind, size, rows), rounds, quick))
            if size != "some":
                run = partial(_drain, ground, kind, size, rows)
                found.append(Case("drain beside rows", SUBJECT, variant, run, rounds, quick))
    return found


def _template(ground: Ground, kind: str, rows: int) -> str:
    """Make the rows at their first use; return under which name they are kept."""
    name = f"{kind}, {rows} rows"
    if not ground.has(name):
        with ground.fresh(kind, keep=name) as settings, open_relay(settings) as relay:
            version = relay._core.model("noop")
            fill(relay._core.db, version.id, version.model, rows)
    return name


def _ask(ground: Ground, kind: str, size: str, rows: int, round_: int) -> Iterator[Sample]:
    calls = 100 if ground.quick else CALLS
    with ground.again(_template(ground, kind, rows)) as settings, open_relay(settings) as relay:
        variant = f"{kind}, {rows:,} rows"
        more = about(f"Relay, 1 caller, {calls} calls", size=size, rows=rows)
        for question, ask in _questions(relay).items():
            for _ in range(10):
                ask()
            seconds = []
            for _ in range(calls):
                began = time.perf_counter()
                ask()
                seconds.append(time.perf_counter() - began)
            cuts = statistics.quantiles(seconds, n=100, method="inclusive")
            for part, i in (("p50", 49), ("p99", 98)):
                yield Sample(f"{question} {part}", SUBJECT, variant, round_, cuts[i] * 1000, "ms", more)


def _questions(relay: Relay) -> dict[str, Callable[[], object]]:
    known = batches(relay._core.db)
    handles = [relay.batch(ids.show(ids.Kind.BATCH, one)) for one in random.sample(known, min(len(known), 50))]

    def status() -> object:
        return relay.job(ids.show(ids.Kind.JOB, random.choice(known) + random.randrange(CHUNK))).state

    return {
        "status": status,
        "list": lambda: relay.jobs(limit=PAGE),
        "list of failed": lambda: relay.jobs(state="failed", limit=PAGE),
        "counts": lambda: random.choice(handles).counts(),
    }


def _drain(ground: Ground, kind: str, size: str, rows: int, round_: int) -> Iterator[Sample]:
    jobs = ground.jobs(f"batch {kind}", RATE)
    template = _template(ground, kind, rows)
    # What is drained stays: next to nothing beside many rows, but the few are copied anew.
    place = ground.fresh(kind, template) if size == "few" else ground.again(template)
    with place as settings, working(settings) as (relay, _):
        relay.submit_batch("noop", ({"x": i} for i in range(jobs // 10))).wait(timeout=TIMEOUT)
        relay.pause("noop")
        batch = relay.submit_batch("noop", ({"x": i} for i in range(jobs)))
        began = time.perf_counter()
        relay.resume("noop")
        assert batch.wait(timeout=TIMEOUT).succeeded == jobs
        seconds = time.perf_counter() - began
    more = about("1 worker", size=size, rows=rows, jobs=jobs)
    yield Sample("drain beside rows", SUBJECT, f"{kind}, {rows:,} rows", round_, jobs / seconds, "jobs/s", more)
