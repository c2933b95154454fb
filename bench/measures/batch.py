"""(a) A batch of no-op jobs, through a real Model in real workers, beside the bare loops and the peers.

Submitted by one caller while the model is paused; then, its workers up and idle, drained: from `resume` to the moment
at which `batch.wait` returns, so all of them recorded. End to end: submitted and drained at once, from the first to
the last. Peers have their own way to enqueue in bulk, and drain a full queue; what they keep stands in the table.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from cases import SOME_ROUNDS, Case
from goals import BARE
from ground import Ground
from limits import postgresql, sqlite
from limits.hooks import hooks
from measures import rivals
from measures.ours import CHUNK, KEEPS, KINDS, SUBJECT, TIMEOUT, about, running, variant
from noop_model import Noop
from record import Sample

MEASURES = ("batch submit", "batch drain", "batch end to end")

RATE = 100_000  # jobs/s, guessed: 200,000 jobs in two seconds


def cases(ground: Ground) -> list[Case]:
    """Ours on both databases with one and two workers, the bare loops, and the peers."""
    found = []
    for kind in KINDS:
        for n in (1, 2):
            run = partial(_ours, ground, kind, n)
            found.append(Case("batch drain", SUBJECT, variant(kind, n), run, None if n == 1 else SOME_ROUNDS, n == 1))
        found.append(Case("batch drain", BARE, kind, partial(_bare, ground, kind), quick=True))
    return found + rivals.cases(ground, "batch")


def _ours(ground: Ground, kind: str, n: int, round_: int) -> Iterator[Sample]:
    jobs = ground.jobs(f"batch {kind}", RATE)
    more = about(f"chunks of {CHUNK}, 2 preprocessing threads a worker", jobs=jobs)
    name = variant(kind, n)
    with running(ground, kind, n) as (relay, _):
        relay.submit_batch("noop", ({"x": i} for i in range(jobs // 10))).wait(timeout=TIMEOUT)
        relay.pause("noop")
        began = time.perf_counter()
        batch = relay.submit_batch("noop", ({"x": i} for i in range(jobs)))
        submitted = time.perf_counter()
        if n == 1:
            yield Sample("batch submit", SUBJECT, kind, round_, jobs / (submitted - began), "jobs/s", more)
        resumed = time.perf_counter()
        relay.resume("noop")
        assert batch.wait(timeout=TIMEOUT).succeeded == jobs
        seconds = time.perf_counter() - resumed
        ground.took(f"batch {kind}", RATE, jobs, seconds)
        yield Sample("batch drain", SUBJECT, name, round_, jobs / seconds, "jobs/s", more)
        began = time.perf_counter()
        assert relay.submit_batch("noop", ({"x": i} for i in range(jobs))).wait(timeout=TIMEOUT).succeeded == jobs
        seconds = time.perf_counter() - began
        yield Sample("batch end to end", SUBJECT, name, round_, jobs / seconds, "jobs/s", more)


def _bare(ground: Ground, kind: str, round_: int) -> Iterator[Sample]:
    jobs = ground.jobs(f"batch {kind}", RATE)
    inputs = ({"x": i} for i in range(jobs))
    run = hooks(Noop())
    with ground.fresh(kind) as settings:
        if kind == "postgresql":
            limit = postgresql.measure(settings.database_url, inputs, run, chunk=CHUNK)
        else:
            limit = sqlite.measure(settings.database_url.removeprefix("sqlite:///"), inputs, run, chunk=CHUNK)
    driver = "psycopg, COPY and unnest" if kind == "postgresql" else "sqlite3, executemany"
    more = {"settings": f"{driver}, chunks of {CHUNK}, one process, one thread", "jobs": jobs, "keeps": KEEPS}
    yield Sample("batch submit", BARE, kind, round_, limit.submitted_per_s, "jobs/s", more)
    yield Sample("batch drain", BARE, kind, round_, limit.drained_per_s, "jobs/s", more)
