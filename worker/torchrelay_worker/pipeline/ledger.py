"""What this worker holds: claimed chunks, and which of their jobs are still on their way.

In memory only; the database knows better, and the warden compares. Not here: any statement, any thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torchrelay_storage.chunk_store import Claimed

if TYPE_CHECKING:
    from torchrelay_worker.models.residency import Resident


class Hold:
    """A chunk that this worker has claimed.

    Attributes:
        left: how many of its jobs have no recorded end yet.
        arrived: when it was claimed, on the monotonic clock.
        dropped: another holds it now, or nobody wants it: its jobs are to be forgotten.
        cancelled: jobs that ended elsewhere while they were on their way here.
        resident: its model; None until that is loaded.
        pinned: the model is kept loaded for it.
        recording: results of it are being written: what the database says of it is about to change.
    """

    __slots__ = (
        "arrived",
        "cancelled",
        "cancels_seen",
        "claimed",
        "dropped",
        "left",
        "pinned",
        "recording",
        "resident",
    )

    def __init__(self, claimed: Claimed, arrived: float) -> None:
        self.claimed = claimed
        self.left = len(claimed.jobs)
        self.arrived = arrived
        self.dropped = False
        self.cancelled: frozenset[int] = frozenset()
        self.cancels_seen = 0
        self.resident: Resident | None = None
        self.pinned = False
        self.recording = False


class Work:
    """One job on its way. There may be a hundred thousand a second, so it holds what only it knows."""

    __slots__ = ("failures", "hold", "job", "length", "prepared")

    def __init__(self, hold: Hold, job: int, failures: int, prepared: Any = None, length: int | None = None) -> None:
        self.hold = hold
        self.job = job
        self.failures = failures
        self.prepared = prepared
        self.length = length

    @property
    def priority(self) -> int:
        """Its chunk's."""
        return self.hold.claimed.priority

    @property
    def arrived(self) -> float:
        """When its chunk was claimed."""
        return self.hold.arrived

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for its result."""
        return not self.hold.dropped and self.job not in self.hold.cancelled


_hold_of = attrgetter("hold")


def holds_of(works: Iterable[Work]) -> Counter[Hold]:
    """Return the chunks that these jobs are of, and how many of each they are."""
    return Counter(map(_hold_of, works))


def all_wanted(holds: Iterable[Hold]) -> bool:
    """Whether none of these chunks was dropped, and no job of them cancelled."""
    return not any(hold.dropped or hold.cancelled for hold in holds)


class Ledger:
    """All holds of this worker. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._holds: dict[int, Hold] = {}
        self._models: dict[int, tuple[int, int]] = {}  # model -> chunks, jobs left
        self.changed: Callable[[], None] = lambda: None  # called when there is room for more
        self.released: Callable[[Hold], None] = lambda hold: None  # called once for each chunk that is gone

    def claim(self, claimed: Iterable[Claimed]) -> list[Hold]:
        """Enter chunks that were claimed just now."""
        now = self._clock()
        holds = [Hold(c, now) for c in claimed]
        with self._lock:
            for hold in holds:
                self._holds[hold.claimed.chunk] = hold
                self._count(hold.claimed.model, 1, hold.left)
        return holds

    def ended(self, works: Sequence[Work]) -> dict[int, int]:
        """Say that these jobs' ends are recorded, or that they are forgotten.

        Returns:
            How many chunks of each model have ended with them.
        """
        gone = []
        with self._lock:
            for hold, n in holds_of(works).items():
                if hold.left <= 0:
                    continue
                less = min(n, hold.left)
                hold.left -= less
                self._count(hold.claimed.model, 0, -less)
                if hold.left == 0:
                    gone.append(hold)
                    self._forget(hold)
        self._tell(gone)
        return Counter(hold.claimed.model for hold in gone)

    def drop(self, chunks: Iterable[int]) -> list[Hold]:
        """Forget chunks, whatever of them is on its way; return those that were held."""
        dropped = []
        with self._lock:
            for chunk in chunks:
                hold = self._holds.get(chunk)
                if hold is not None:
                    hold.dropped = True
                    self._count(hold.claimed.model, 0, -hold.left)
                    hold.left = 0
                    self._forget(hold)
                    dropped.append(hold)
        self._tell(dropped)
        return dropped

    def _forget(self, hold: Hold) -> None:
        if self._holds.get(hold.claimed.chunk) is hold:
            del self._holds[hold.claimed.chunk]
        self._count(hold.claimed.model, -1, 0)

    def _count(self, model: int, chunks: int, jobs: int) -> None:
        c, j = self._models.get(model, (0, 0))
        self._models[model] = (c + chunks, j + jobs)

    def _tell(self, gone: Sequence[Hold]) -> None:
        for hold in gone:
            self.released(hold)
        self.changed()

    def holds(self) -> list[Hold]:
        """Return what is held now."""
        with self._lock:
            return list(self._holds.values())

    def ahead(self, model: int) -> tuple[int, int]:
        """Return how many chunks of a model are held, and how many of their jobs have not ended."""
        with self._lock:
            return self._models.get(model, (0, 0))

    def __len__(self) -> int:
        return len(self._holds)
