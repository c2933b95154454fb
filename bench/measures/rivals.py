"""The peers of the queue as subjects: which scripts of bench/peers are asked what, and how they are named.

Each with the settings that its script holds to be its best, but for what is said here. A peer is asked for as many jobs
as it enqueues and drains in about the time that ours has; its start does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peers_env
from cases import SOME_ROUNDS, Case
from goals import CELERY_NONE, CELERY_REDIS, CELERY_SQL, PGQUEUER, PROCRASTINATE
from ground import Ground
from record import Sample


@dataclass(frozen=True, slots=True)
class Rival:
    """A peer with settings.

    Attributes:
        per_s: jobs enqueued in bulk, enqueued one at a time, and drained per second; guesses, for the first round only.
        measures: what it is asked.
        least: jobs that it is asked for at least, such as some times its batches.
        slow: others of its kind are far faster, so that no goal hangs on it: it takes part in some rounds only.
        quick: in which measures it stands for the others where there are two minutes.
    """

    subject: str
    peer: str
    variant: str
    per_s: tuple[float, float, float]
    settings: Mapping[str, str] = field(default_factory=dict)
    measures: tuple[str, ...] = ("batch", "single")
    quick: tuple[str, ...] = ()
    least: int = 100
    slow: bool = False


ALL = ("batch", "single", "latency")
WAITED = ("latency",)
RESULTS = {"results": "redis"}

RIVALS = (
    Rival(PGQUEUER, "pgqueuer", "postgresql, batch size 100", (60_000, 3_000, 20_000), {"batch": "100"}, ("batch",),
          least=1_000),
    Rival(PGQUEUER, "pgqueuer", "postgresql, batch size 1,000", (60_000, 3_000, 20_000), {"batch": "1000"},
          quick=("batch", "single"), least=5_000),
    Rival(PROCRASTINATE, "procrastinate", "postgresql", (15_000, 1_000, 350), slow=True),
    Rival(CELERY_SQL, "celery", "redis and postgresql", (3_000, 2_000, 500), {"results": "sql"}, ALL,
          ("batch",)),
    Rival(CELERY_REDIS, "celery", "redis", (3_000, 2_000, 1_500), RESULTS, ALL, ("latency",), slow=True),
    Rival(CELERY_NONE, "celery", "redis", (3_000, 2_000, 2_000), {"results": "none"}, slow=True),
    Rival("RQ", "rq", "redis", (4_000, 2_000, 500), {}, ALL, slow=True),
    Rival("Dramatiq", "dramatiq", "redis", (8_000, 4_000, 2_000)),
    Rival("Taskiq", "taskiq", "redis", (5_000, 4_000, 3_000), quick=("batch", "single")),
    Rival("Huey", "huey", "redis", (5_000, 4_000, 2_000)),
    Rival("arq", "arq", "redis", (3_000, 3_000, 1_500), {}, ALL, slow=True),
    Rival("Dramatiq", "dramatiq", "redis, results kept", (0, 0, 0), RESULTS, WAITED),
    Rival("Taskiq", "taskiq", "redis, results kept", (0, 0, 0), RESULTS, WAITED),
    Rival("Huey", "huey", "redis, results kept", (0, 0, 0), RESULTS, WAITED),
)  # fmt: skip

LATENCY_PER_S = 150.0  # round trips, guessed


def cases(ground: Ground, measure: str) -> list[Case]:
    """Return a case for each peer that can be asked this: `batch`, `single` or `latency`."""
    run = _latency if measure == "latency" else _throughput
    name = {"batch": "batch drain", "single": "single drain", "latency": "latency idle p50"}[measure]
    return [
        Case(
            name,
            rival.subject,
            rival.variant,
            partial(run, ground, measure, rival),
            None if _is_goal(measure, rival) else SOME_ROUNDS,
            measure in rival.quick,
        )
        for rival in RIVALS
        if measure in rival.measures
    ]


def _is_goal(measure: str, rival: Rival) -> bool:
    return rival.subject == CELERY_REDIS if measure == "latency" else not rival.slow


def _throughput(ground: Ground, measure: str, rival: Rival, round_: int) -> Iterator[Sample]:
    bulk, single, drain = rival.per_s
    enqueue = bulk if measure == "batch" else single
    key, guess = f"{measure} {rival.subject} {rival.variant}", 1.0 / (1.0 / enqueue + 1.0 / drain)
    jobs = max(ground.jobs(key, guess), rival.least)
    figures = _ask(ground, measure, rival, jobs)
    ground.took(key, guess, jobs, jobs / figures["enqueued_per_s"] + jobs / figures["drained_per_s"])
    variant = rival.variant if measure == "batch" else f"{rival.variant}, 64 callers"
    for suffix, figure in (("submit", "enqueued_per_s"), ("drain", "drained_per_s")):
        yield Sample(f"{measure} {suffix}", rival.subject, variant, round_, figures[figure], "jobs/s",
                     _more(figures, jobs))  # fmt: skip


def _latency(ground: Ground, measure: str, rival: Rival, round_: int) -> Iterator[Sample]:
    jobs = max(ground.jobs(f"latency {rival.subject} {rival.variant}", LATENCY_PER_S), rival.least)
    figures = _ask(ground, measure, rival, jobs)
    seconds = jobs * figures["p50_ms"] / 1000
    ground.took(f"latency {rival.subject} {rival.variant}", LATENCY_PER_S, jobs, seconds)
    for part in ("p50", "p99"):
        yield Sample(f"latency idle {part}", rival.subject, rival.variant, round_, figures[f"{part}_ms"], "ms",
                     _more(figures, jobs))  # fmt: skip


def _ask(ground: Ground, measure: str, rival: Rival, jobs: int) -> dict[str, Any]:
    ground.level()
    return peers_env.ask(
        rival.peer,
        measure,
        redis=ground.redis.url,
        postgres=ground.postgres.url(),
        jobs=jobs,
        settings=rival.settings,
        seconds=90.0 + 10 * ground.seconds,
    )


def _more(figures: Mapping[str, Any], jobs: int) -> dict[str, Any]:
    return {name: figures[name] for name in ("version", "settings", "keeps") if name in figures} | {"jobs": jobs}
