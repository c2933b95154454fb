"""Whether the pipeline stands still: the process answers and has work, and nothing of it moves.

Not here: what runs for too long (`watch`), and messages that nobody pulls (`silence`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

STANDSTILL_SECONDS = 10.0  # that inputs may wait while nothing runs and the device's thread does not come round
CLAIM_SECONDS = 90.0  # the same for messages and the claiming thread, which may wait for a database in trouble
# Between two looks that count as one: a process that was paused has not stood still meanwhile.
LONGEST_STEP = 2.0


class Turns(Protocol):
    """What it needs of the device and of the intake."""

    turns: int

    @property
    def has_waiting(self) -> bool: ...


class _Still:
    """How long one thread has had work and not come round."""

    def __init__(self, thread: Turns, seconds: float, what: str) -> None:
        self._thread = thread
        self._limit = seconds
        self._what = what
        self._turns = -1
        self._seconds = 0.0

    def reason(self, step: float) -> str | None:
        """Look again after `step` seconds."""
        turns = self._thread.turns
        if turns != self._turns or not self._thread.has_waiting:
            self._turns, self._seconds = turns, 0.0
            return None
        self._seconds += step
        return f"{self._what} for {self._seconds:.0f} s" if self._seconds >= self._limit else None


class Standstill:
    """One look a call, each half second or so."""

    def __init__(self, device: Turns, intake: Turns, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self._all = (
            _Still(device, STANDSTILL_SECONDS, "inputs wait, and the device's thread has stood still"),
            _Still(intake, CLAIM_SECONDS, "messages wait, and the claiming thread has stood still"),
        )

    def reason(self) -> str | None:
        """Return what stands still; None: nothing does."""
        now = self._clock()
        step = min(now - self._looked, LONGEST_STEP)
        self._looked = now
        reasons = [still.reason(step) for still in self._all]
        return next((reason for reason in reasons if reason is not None), None)
