"""What is running right now and until when it may: what the supervisor needs to tell a long forward from a dead one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watch:
    """Deadlines of what runs at this moment. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}
        self._next = 0

    def begin(self, seconds: float) -> int:
        """Say that something begins that must not take longer; return what to pass to `end`."""
        with self._lock:
            self._next += 1
            self._running[self._next] = self._clock() + seconds
            return self._next

    def end(self, key: int) -> None:
        """Say that it has ended."""
        with self._lock:
            self._running.pop(key, None)

    @contextmanager
    def running(self, seconds: float) -> Iterator[None]:
        """The same as a block."""
        key = self.begin(seconds)
        try:
            yield
        finally:
            self.end(key)

    def left(self) -> float | None:
        """Return the seconds until the first deadline (negative: it is over); None if nothing runs."""
        with self._lock:
            return min(self._running.values()) - self._clock() if self._running else None
