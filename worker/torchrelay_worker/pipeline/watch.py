"""Until when what runs now may run: the supervisor replaces a process that overruns it, however busy that is.

Not here: work that waits while nothing runs (`standstill`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

GRACE_SECONDS = 0.25  # beyond a limit, so that what ends just in time is not killed
LATE_SECONDS = 1.0  # what runs for less is not called late, however short its limit is


@dataclass(slots=True)
class _Running:
    what: str
    limit: float
    began: float
    deadline: float
    reason: str = ""

    @property
    def late(self) -> float:
        """From when on it has used so much of its time that a replacement may soon be needed."""
        return max(self.deadline - self.limit / 2, self.began + LATE_SECONDS)


class Watch:
    """The deadlines of what runs now, whichever thread runs it. Thread-safe."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        note: Callable[[float | None, float | None], object] = lambda deadline, late: None,
    ) -> None:
        """Make it.

        Args:
            note: told each new first deadline on `clock`, and from when on something has used half of its time; None
                when nothing runs any more. A thread that keeps the interpreter to itself lets no report out, so the
                supervisor must be able to see it without one.
        """
        self._clock = clock
        self._note = note
        self._lock = threading.Lock()
        self._running: dict[int, _Running] = {}
        self._next = 0

    def begin(self, seconds: float, what: str = "what it ran", grace: float = 0.0) -> int:
        """Say that something begins that must not take longer; return what to pass to `end`.

        Args:
            grace: seconds beyond the limit, so that what ends just in time is not killed.
        """
        with self._lock:
            self._next += 1
            now = self._clock()
            self._running[self._next] = _Running(what, seconds, now, now + seconds + grace)
            self._tell()
            return self._next

    def end(self, key: int) -> None:
        """Say that it ended."""
        with self._lock:
            self._running.pop(key, None)
            self._tell()

    def renew(self, key: int, seconds: float, grace: float = 0.0) -> None:
        """Say that its next part begins, which must not take longer."""
        with self._lock:
            running = self._running.get(key)
            if running is not None:
                running.limit, running.began = seconds, self._clock()
                running.deadline = running.began + seconds + grace
                self._tell()

    def cut(self, key: int, seconds: float, reason: str = "") -> None:
        """Let what runs have no more than this from now on, because nobody wants it any more."""
        with self._lock:
            running = self._running.get(key)
            deadline = self._clock() + seconds
            if running is not None and deadline < running.deadline:
                running.deadline, running.reason = deadline, reason
                self._tell()

    def _tell(self) -> None:
        running = self._running.values()
        if running:
            self._note(min(r.deadline for r in running), min(r.late for r in running))
        else:
            self._note(None, None)

    @contextmanager
    def running(self, seconds: float, what: str = "what it ran") -> Iterator[int]:
        """The same as a block."""
        key = self.begin(seconds, what)
        try:
            yield key
        finally:
            self.end(key)

    def left(self) -> float | None:
        """Return the seconds until the first deadline (negative: it is over); None if nothing runs."""
        with self._lock:
            first = self._first()
            return first.deadline - self._clock() if first is not None else None

    def reason(self) -> str | None:
        """Return what is to be said if the first deadline passes; None if nothing runs."""
        with self._lock:
            first = self._first()
            if first is None:
                return None
            return first.reason or f"{first.what} has overrun its limit of {first.limit:g} s"

    def _first(self) -> _Running | None:
        return min(self._running.values(), key=lambda running: running.deadline, default=None)
