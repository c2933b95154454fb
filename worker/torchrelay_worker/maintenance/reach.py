"""Whether the database was in reach of us all along: only then does a worker's silence mean that it is dead.

After an outage of the database, or after we ourselves were paused, every worker looks silent, and all live on. Whoever
comes back first must not take away what the others hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable

GAP_SECONDS = 4.5  # at least, between two answers of the database; a leader asks it every two, its rivals every three


class Reach:
    """Watches for gaps in what the database answers us, and gives the living time to be heard after one."""

    def __init__(self, stale_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Make it.

        Args:
            stale_after: seconds of silence after which a worker counts as dead; also what the living get after a gap.
        """
        self._gap = max(stale_after / 2, GAP_SECONDS)
        self._patience = stale_after
        self._clock = clock
        self._last: float | None = None
        self._patient_until = float("inf")

    def note(self) -> None:
        """The database has just answered."""
        now = self._clock()
        if self._last is None or now - self._last > self._gap:
            self._patient_until = now + self._patience
        self._last = now

    @property
    def is_trusted(self) -> bool:
        """Whether who is silent is dead: there was no gap for long enough."""
        now = self._clock()
        return self._last is not None and now - self._last <= self._gap and now >= self._patient_until
