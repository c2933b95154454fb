"""How jobs ended, as a worker hands it to `JobStore.finish`, and what became of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchrelay_storage.states import End


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job of a device batch ended. OPEN: it failed and is to be tried again in `retry_in` seconds."""

    job: int
    chunk: int
    token: int
    end: End
    output: bytes | None = None
    error: bytes | None = None  # JSON: type, message, traceback
    retry_in: float = 0.0


@dataclass(frozen=True, slots=True)
class Successes:
    """Jobs of one chunk that succeeded, and their encoded outputs in the same order."""

    chunk: int
    token: int
    jobs: Sequence[int]
    outputs: Sequence[bytes | None]


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of a device batch's outcomes.

    Attributes:
        recorded: how many jobs were written.
        dropped: chunks whose token was refused: another holds them now; nothing of them was written.
        chunks, batches: whom to tell.
    """

    recorded: int
    dropped: frozenset[int]
    chunks: tuple[int, ...]
    batches: tuple[int, ...]
