"""How jobs ended, as a worker hands it to `JobStore.finish`, and what became of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torchrelay_storage.states import End

SPAN_FROM = 16  # successes of a chunk from which they have a statement of their own


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

    @property
    def is_span(self) -> bool:
        """Whether they are worth one statement for their range of ids."""
        return len(self.jobs) >= SPAN_FROM and None not in self.outputs  # of which a slice would make an empty value

    def span(self) -> Span:
        """Return them as their range of ids."""
        first, last = min(self.jobs), max(self.jobs)
        if first - 1 + len(self.jobs) == last and list(self.jobs) == list(range(first, last + 1)):
            outputs = self.outputs
            lengths = [len(output or b"") for output in outputs]
        else:
            whole: list[bytes | None] = [None] * (last - first + 1)
            lengths = [-1] * len(whole)
            for job, output in zip(self.jobs, self.outputs, strict=True):
                whole[job - first] = output
                lengths[job - first] = len(output or b"")
            outputs = whole
        return Span(first, last, b"".join(filter(None, outputs)), lengths)


class Span(NamedTuple):
    """A range of ids and the outputs of the jobs in it.

    Attributes:
        first, last: ids.
        whole: all outputs, one after the other, in the order of the ids.
        lengths: of each id's output in bytes; -1 where the id is not among them.
    """

    first: int
    last: int
    whole: bytes
    lengths: Sequence[int]

    @property
    def starts(self) -> Iterator[int]:
        """Where each id's output begins, from 0, and where the last one ends."""
        return accumulate((max(0, n) for n in self.lengths), initial=0)


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
