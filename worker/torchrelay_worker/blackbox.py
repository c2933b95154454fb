"""What a worker's inner process was doing at its last moment, in a file that outlives it.

The process writes plain integers into shared memory, so a segfault or a kill between two instructions loses nothing;
the supervisor reads them once it is dead. Not here: what follows from it (`postmortem`).
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

PLACES = 2  # device batches in flight: on CUDA the next is launched before this one is waited for
PLACE_SIZE = 16_384  # jobs of one of them that are kept by name
SLOTS = 64  # threads that run an author's code

_LOADING = PLACES
_DEADLINE = PLACES + 1
_LATE = PLACES + 2
_SLOTS_AT = PLACES + 3
_IDS_AT = _SLOTS_AT + SLOTS
SIZE = 8 * (_IDS_AT + PLACES * PLACE_SIZE)  # bytes


@dataclass(frozen=True, slots=True)
class Contents:
    """What was going on.

    Attributes:
        jobs: in a device batch, or in their author's `preprocess` or `decode`.
        versions: of models that were being loaded.
        overflow: a device batch was too large to be kept by name, so that `jobs` is not all.
    """

    jobs: frozenset[int]
    versions: frozenset[int]
    overflow: bool = False


class BlackBox:
    """The file, mapped. One process writes, another reads."""

    def __init__(self, descriptor: int) -> None:
        """Map an open file, which is made as large as it must be. It may be closed afterwards."""
        if os.fstat(descriptor).st_size < SIZE:
            os.ftruncate(descriptor, SIZE)
        self._cells = memoryview(mmap.mmap(descriptor, SIZE)).cast("q")
        self._place = 0
        self._slots = 0

    def launched(self, jobs: Sequence[int]) -> int:
        """Note the jobs of a device batch before it runs; return what to pass to `landed`."""
        place = self._place = (self._place + 1) % PLACES
        kept = array("q", jobs[:PLACE_SIZE])
        start = _IDS_AT + place * PLACE_SIZE
        self._cells[start : start + len(kept)] = memoryview(kept)
        self._cells[place] = len(jobs)
        return place

    def landed(self, place: int) -> None:
        """Note that it has ended."""
        self._cells[place] = 0

    def slot(self) -> Slot:
        """Return a place of its own for a thread that runs an author's code."""
        index = self._slots % SLOTS
        self._slots += 1
        return Slot(self._cells[_SLOTS_AT + index : _SLOTS_AT + index + 1])

    def loading(self, version: int) -> None:
        """Note that a model version is being loaded; 0: no longer."""
        self._cells[_LOADING] = version

    def due(self, deadline: float | None, late: float | None = None) -> None:
        """Note until when what runs may run, on the monotonic clock that all processes share; None: nothing runs.

        Args:
            late: from when on a replacement may soon be needed.
        """
        self._cells[_DEADLINE] = int(deadline * 1e6) if deadline is not None else 0
        self._cells[_LATE] = int(late * 1e6) if late is not None else 0

    def deadline(self) -> float | None:
        """Return until when what runs may run; None: nothing runs."""
        noted = self._cells[_DEADLINE]
        return noted / 1e6 if noted else None

    def is_late(self, now: float) -> bool:
        """Whether a replacement may soon be needed."""
        return 0 < self._cells[_LATE] <= now * 1e6

    def read(self) -> Contents:
        """Return what was noted."""
        jobs: set[int] = set()
        overflow = False
        for place in range(PLACES):
            n = self._cells[place]
            overflow = overflow or n > PLACE_SIZE
            start = _IDS_AT + place * PLACE_SIZE
            jobs.update(self._cells[start : start + min(n, PLACE_SIZE)])
        jobs.update(self._cells[_SLOTS_AT : _SLOTS_AT + SLOTS])
        jobs.discard(0)
        version = self._cells[_LOADING]
        return Contents(frozenset(jobs), frozenset({version} if version else ()), overflow)


class Slot:
    """Which job a thread runs an author's code for: one store before, and none but a last one after.

    Attributes:
        cell: of length one, for loops in which even a call counts.
    """

    __slots__ = ("cell",)

    def __init__(self, cell: memoryview) -> None:
        self.cell = cell

    def note(self, job: int) -> None:
        """Note a job; 0: none."""
        self.cell[0] = job


def scratch() -> BlackBox:
    """Return a box in memory, for a pipeline without a supervisor."""
    descriptor = os.memfd_create("torchrelay-black-box") if hasattr(os, "memfd_create") else -1
    if descriptor < 0:
        import tempfile

        with tempfile.TemporaryFile() as file:
            return BlackBox(file.fileno())
    try:
        return BlackBox(descriptor)
    finally:
        os.close(descriptor)
