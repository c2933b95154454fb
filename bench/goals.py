"""The goals of the benchmark as data: each is a ratio in one run, or a bound on one figure of ours.

Not here: how a ratio is taken over the rounds, and whether it is met (`verdicts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from record import FAILED, Sample

OURS, BARE = "torchrelay", "bare loop"

# The peers by the names that samples have.
PGQUEUER, PROCRASTINATE = "pgqueuer", "Procrastinate"
CELERY_SQL, CELERY_REDIS, CELERY_NONE = "Celery, SQL results", "Celery, Redis results", "Celery, no results"
ON_REDIS = (CELERY_NONE, CELERY_REDIS, "RQ", "Dramatiq", "Taskiq", "Huey", "arq")
QUEUES = (PGQUEUER, PROCRASTINATE, CELERY_SQL, *ON_REDIS)
SHOWN = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
SERVERS = ("Celery", "Ray Serve", "LitServe", "mosec", "BentoML", "Infinity")
IN_ORDER = {"batches": "in order of arrival"}


@dataclass(frozen=True, slots=True)
class Which:
    """Samples of one measure. What is empty does not filter.

    Attributes:
        variant: how its name begins.
        more: what the samples say beside their figures.
    """

    measure: str
    subjects: tuple[str, ...] = ()
    variant: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def of(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return those of these samples that hold a figure."""
        return [
            sample
            for sample in samples
            if sample.measure == self.measure
            and sample.unit != FAILED
            and (not self.subjects or sample.subject in self.subjects)
            and sample.variant.startswith(self.variant)
            and all(sample.more.get(name) == value for name, value in self.more.items())
        ]


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal.

    Attributes:
        name: for `--compare`; never changed.
        measure: what is measured, as the table words it.
        words: what is to be reached, as the table words it.
        ours: among several variants the best counts.
        theirs: of each of these the best variant counts, and of those the one that `against` says; without any, the
            bound is one on our own figure.
        relation, bound: ours relation bound x theirs.
    """

    name: str
    measure: str
    words: str
    ours: Which
    relation: Literal[">=", "<="]
    bound: float
    theirs: tuple[Which, ...] = ()
    against: Literal["best", "worst"] = "best"

    @property
    def lower(self) -> bool:
        """Whether less is better: a time, memory."""
        return self.relation == "<="


def _ours(measure: str, variant: str = "", **more: Any) -> Which:
    return Which(measure, (OURS,), variant, more)


def _peers(measure: str, *subjects: str) -> tuple[Which, ...]:
    return (Which(measure, subjects or QUEUES),)


def _limit(measure: str, variant: str = "", subject: str = BARE) -> tuple[Which, ...]:
    return (Which(measure, (subject,), variant),)


_DRAIN, _SUBMIT = "batch drain", "batch submit"
_BATCH_PG = "batch of no-op jobs, durable with results on PostgreSQL, 1 worker"
_BATCH_LITE = "batch of no-op jobs on SQLite, the embedded default, 1 worker"
_SINGLE = "single submits, 64 concurrent callers, durable"
_LATENCY = "single job latency, idle"
_MINILM = "MiniLM, mixed lengths, 1 worker, 1 thread"
_ROWS = "at 5,000,000 rows against 1,000"
_PG1, _LITE1 = "postgresql, 1 worker", "sqlite, 1 worker"
_CALLERS = "postgresql, 64 callers"
_SUBMIT_PG, _SUBMIT_LITE = "submit of a batch, PostgreSQL", "submit of a batch, SQLite"


def _digits(kind: str) -> Goal:
    words = "≥ 0.8 of the slower limit: bare PyTorch, bare database"
    limits = (*_limit("digits"), *_limit("digits", kind, "bare database loop"))
    return Goal(
        f"digits-{kind}", f"digits CNN, {SHOWN[kind]}", words, _ours("digits", kind), ">=", 0.8, limits, "worst"
    )


def _grown(question: str, kind: str) -> Goal:
    few, most = (_ours(f"{question} p99", kind, size=size) for size in ("few", "most"))
    return Goal(f"rows-{question}-{kind}", f"{question} {_ROWS}, {SHOWN[kind]}", "p99 ≤ 1.5 ×", most, "<=", 1.5, (few,))


def _drained(kind: str) -> Goal:
    few, most = (_ours("drain beside rows", kind, size=size) for size in ("few", "most"))
    return Goal(f"rows-drain-{kind}", f"drain {_ROWS}, {SHOWN[kind]}", "rate ≥ 1 / 1.5 ×", most, ">=", 1 / 1.5, (few,))


GOALS = (
    Goal("drain-postgresql-pgqueuer", _BATCH_PG, "≥ 2 × pgqueuer at its best batch size",
         _ours(_DRAIN, _PG1), ">=", 2.0, _peers(_DRAIN, PGQUEUER)),
    Goal("drain-postgresql-celery", _BATCH_PG, "≥ 80 × Celery with its SQL result backend",
         _ours(_DRAIN, _PG1), ">=", 80.0, _peers(_DRAIN, CELERY_SQL)),
    Goal("drain-postgresql-bare", _BATCH_PG, "≥ 0.8 of the bare loop",
         _ours(_DRAIN, _PG1), ">=", 0.8, _limit(_DRAIN, "postgresql")),
    Goal("drain-sqlite-redis", _BATCH_LITE, "≥ 20 × the fastest peer on Redis",
         _ours(_DRAIN, _LITE1), ">=", 20.0, _peers(_DRAIN, *ON_REDIS)),
    Goal("drain-sqlite-bare", _BATCH_LITE, "≥ 0.6 of the bare loop",
         _ours(_DRAIN, _LITE1), ">=", 0.6, _limit(_DRAIN, "sqlite")),
    Goal("submit-postgresql-pgqueuer", _SUBMIT_PG, "≥ 2.5 × pgqueuer's",
         _ours(_SUBMIT, "postgresql"), ">=", 2.5, _peers(_SUBMIT, PGQUEUER)),
    Goal("submit-postgresql-bare", _SUBMIT_PG, "≥ 0.7 of bare COPY, JSON included",
         _ours(_SUBMIT, "postgresql"), ">=", 0.7, _limit(_SUBMIT, "postgresql")),
    Goal("submit-sqlite-bare", _SUBMIT_LITE, "≥ 0.7 of bare executemany, JSON included",
         _ours(_SUBMIT, "sqlite"), ">=", 0.7, _limit(_SUBMIT, "sqlite")),
    Goal("single-submit-peers", _SINGLE, "≥ the fastest peer's enqueue rate",
         _ours("single submit", _CALLERS), ">=", 1.0, _peers("single submit")),
    Goal("single-drain-peers", f"{_SINGLE}: their drain", "≥ 2 × the fastest peer's that is not pgqueuer",
         _ours("single drain", _CALLERS), ">=", 2.0,
         _peers("single drain", *(name for name in QUEUES if name != PGQUEUER))),
    Goal("latency-p50", f"{_LATENCY}, p50", "≤ Celery's with a Redis result backend",
         _ours("latency idle p50", _PG1), "<=", 1.0, _peers("latency idle p50", CELERY_REDIS)),
    Goal("latency-p99", f"{_LATENCY}, p99", "≤ Celery's with a Redis result backend",
         _ours("latency idle p99", _PG1), "<=", 1.0, _peers("latency idle p99", CELERY_REDIS)),
    Goal("latency-spread", f"{_LATENCY}, p99", "≤ 2 × p50",
         _ours("latency idle p99", _PG1), "<=", 2.0, (_ours("latency idle p50", _PG1),)),
    Goal("behind-a-batch", "single job behind a million-job batch of its priority", "starts within the window's 2 s",
         _ours("behind a batch: starts", size="most"), "<=", 2.0),
    Goal("minilm-bare", _MINILM, "≥ 0.95 of the best bare loop",
         _ours("minilm"), ">=", 0.95, _limit("minilm")),
    Goal("minilm-peers", _MINILM, "≥ 1.15 × the fastest peer at its best setting",
         _ours("minilm"), ">=", 1.15, _peers("minilm", *SERVERS)),
    Goal("minilm-in-order", _MINILM, "≥ 2.5 × every peer that batches in order of arrival",
         _ours("minilm"), ">=", 2.5, (Which("minilm", SERVERS, more=IN_ORDER),)),
    *(_digits(kind) for kind in ("sqlite", "postgresql")),
    Goal("workers", "1 → 4 workers (sleeping model)", "≥ 0.95 efficiency",
         _ours("workers: efficiency", "postgresql, 4 workers"), ">=", 0.95),
    *(_grown(question, kind) for kind in ("postgresql", "sqlite") for question in ("counts", "status")),
    *(_drained(kind) for kind in ("postgresql", "sqlite")),
    Goal("waiting-redis", "Redis memory while 1,000,000 jobs wait", "≤ 1 MB",
         _ours("Redis: memory", "postgresql"), "<=", 1.0),
    Goal("waiting-producer", "producer memory for a 1,000,000-job batch from a generator", "≤ 50 MB over its start",
         _ours("submit of a batch: memory", "postgresql"), "<=", 50.0),
    Goal("idle-processor", "idle worker", "≤ 1 % of a core", _ours("idle worker: processor", "postgresql"), "<=", 1.0),
    Goal("idle-queries", "idle worker", "≤ 2 queries per second", _ours("idle worker: queries"), "<=", 2.0),
)  # fmt: skip
