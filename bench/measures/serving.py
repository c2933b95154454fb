"""The peers that serve models as subjects: which scripts of bench/peers are asked for MiniLM, and how they are named.

Each computes on one torch thread and is asked for the same texts as ours and the limit, 256 at a time. What computes on
two cores at once is a measure of its own, where ours has two workers. A peer that batches in order of arrival says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import peers_env
from cases import Case
from goals import IN_ORDER
from ground import Ground
from record import Sample
from texts import digest, texts

MINILM, TWO_CORES = "minilm", "minilm, two cores"
SECONDS = 600.0  # that a peer may take, its start and its end included


@dataclass(frozen=True, slots=True)
class Server:
    """A peer with settings.

    Attributes:
        rounds: how many it takes part in: those that may be the fastest in more than the others, which take long.
    """

    subject: str
    peer: str
    variant: str
    settings: Mapping[str, str] = field(default_factory=dict)
    measure: str = MINILM
    environment: str = "serving"
    processes: int = 1
    rounds: int | None = 1

    @property
    def in_order(self) -> bool:
        """Whether it forms batches of several, of whatever comes next."""
        return self.environment == "serving" and int(self.settings.get("max_batch", "1")) > 1


def _batched(subject: str, peer: str, *, first: int | None = 1) -> list[Server]:
    return [
        Server(subject, peer, f"batch {size}", {"max_batch": str(size)}, rounds=first if size == 1 else 1)
        for size in (1, 8, 32)
    ]


CONTENDERS = 2  # rounds of those that may be the fastest
ASYNCHRONOUS = {"mode": "asynchronous", "concurrency": "1"}
TWO = {"concurrency": "2"}

SERVERS = (
    Server("Celery", "minilm_celery", "solo", {"pool": "solo"}, rounds=CONTENDERS),
    *_batched("LitServe", "minilm_litserve", first=CONTENDERS),
    *_batched("mosec", "minilm_mosec", first=CONTENDERS),
    *_batched("BentoML", "minilm_bentoml"),
    *_batched("Ray Serve", "minilm_ray"),
    Server("Ray Serve", "minilm_ray", "asynchronous", ASYNCHRONOUS),
    *(
        Server("Infinity", "minilm_infinity", f"batch {size}", {"max_batch": str(size)}, environment="infinity",
               rounds=CONTENDERS)
        for size in (1, 8, 32)
    ),
    Server("Celery", "minilm_celery", "2 threads", {"pool": "threads", **TWO}, TWO_CORES, rounds=CONTENDERS),
    Server("Ray Serve", "minilm_ray", "asynchronous, 2 threads", {**ASYNCHRONOUS, **TWO}, TWO_CORES),
    Server("LitServe", "minilm_litserve", "batch 1, 2 workers", {"max_batch": "1"}, TWO_CORES, processes=2),
)  # fmt: skip


def cases(ground: Ground, jobs: int) -> list[Case]:
    """Return a case for each server and setting."""
    return [
        Case(server.measure, server.subject, server.variant, partial(_run, ground, server, jobs), rounds=server.rounds)
        for server in SERVERS
    ]


def _run(ground: Ground, server: Server, jobs: int, round_: int) -> Iterator[Sample]:
    ground.level()
    figures = peers_env.ask(
        server.peer,
        "minilm",
        redis=ground.redis.url,
        jobs=jobs,
        processes=server.processes,
        settings=server.settings,
        environment=server.environment,
        seconds=SECONDS,
    )
    if figures["texts"] != digest(texts(jobs)):
        raise RuntimeError(f"{server.subject} had other texts than ours: its Python is of another version")
    more = {name: figures[name] for name in ("version", "settings", "keeps", "cosine")} | {"jobs": jobs}
    more |= IN_ORDER if server.in_order else {}
    yield Sample(server.measure, server.subject, server.variant, round_, figures["texts_per_s"], "texts/s", more)
