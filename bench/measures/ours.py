"""torchrelay as a subject: a system of ours on fresh tables, with workers up and warm, and what it says of itself."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeAlias

import sleeper_model
from goals import OURS
from ground import Ground
from system import warm, workers

from torchrelay import Relay
from torchrelay.settings import Settings

SUBJECT = OURS
KEEPS = "status and result of every job, in SQL"
KINDS = ("postgresql", "sqlite")
CHUNK = 4_000  # jobs
CHUNKS = {"noop": CHUNK, "sleeper": 4 * sleeper_model.BATCH}  # about what a worker that has loaded them would set
TIMEOUT = 600.0  # seconds that anything may take
Supervisor: TypeAlias = subprocess.Popen[bytes]
VALUE = {"x": 0}


def about(settings: str, **more: Any) -> dict[str, Any]:
    """Return what a sample of ours tells beside its figure."""
    return {
        "version": version("torchrelay"),
        "settings": settings,
        "keeps": KEEPS,
        **more,
    }


def variant(kind: str, n: int) -> str:
    """Return how a database and a number of workers are named."""
    return f"{kind}, {n} worker{'s' if n > 1 else ''}"


@contextmanager
def open_relay(settings: Settings, model: str = "noop") -> Iterator[Relay]:
    """Yield a relay that knows the model, whose connections are open."""
    with Relay(settings=settings) as relay:
        if model not in {row.newest.name for row in relay.models()}:
            relay.register_model(model, handler=model, chunk_size=CHUNKS[model])
        yield relay


@contextmanager
def working(settings: Settings, n: int = 1, model: str = "noop") -> Iterator[tuple[Relay, list[Supervisor]]]:
    """Yield a relay, and the supervisors of n workers that have served the model."""
    with open_relay(settings, model) as relay, workers(settings, n) as started:
        warm(relay, model, VALUE, n)
        yield relay, started


@contextmanager
def running(ground: Ground, kind: str, n: int = 1, model: str = "noop") -> Iterator[tuple[Relay, list[Supervisor]]]:
    """The same on fresh tables."""
    with ground.fresh(kind) as settings, working(settings, n, model) as found:
        yield found
