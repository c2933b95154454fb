"""Tells the database how far a run is and what it measured, and learns from it what to do: once a second, on a thread.

So a step that takes a minute still reports, and a database that is away holds no step up. Not here: what is measured
(`loop`), and TensorBoard's files, which are made of the rows at the end (`tensorboard`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from torchrelay_storage.errors import RelayError, Unreachable
from torchrelay_storage.run_writer import Order, Point, Progress

log = structlog.get_logger("torchrelay.reporter")

REPORT_SECONDS = 1.0
RATE_SECONDS = 20.0  # over which examples per second are counted: long enough to smooth, short enough to follow


class Writes(Protocol):
    """What is needed of a RunWriter."""

    def report(
        self, progress: Progress, points: Sequence[Point] = (), best: tuple[int, float] | None = None
    ) -> Order: ...


class Reporter:
    """The progress of one run. What the loop calls at each step costs it an assignment. A context manager.

    Attributes:
        order: what the run is to do, as of the last report.
        phase: what it does.
    """

    def __init__(
        self,
        writer: Writes | None,
        *,
        every: float = REPORT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it.

        Args:
            writer: None in those processes of a run that do not write.
        """
        self._writer = writer
        self._every = every
        self._clock = clock
        self._lock = threading.Lock()  # one report at a time: they are in the order of what they report
        self._points: list[Point] = []
        self._best: tuple[int, float] | None = None
        self.phase = "preparing"
        self._step = self._steps = self._epoch = self._epochs = self._examples = 0
        self._seen: deque[tuple[float, int]] = deque()
        self._beats = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self.order = Order.GO

    def __enter__(self) -> Reporter:
        if self._writer is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    # --- what the run tells -------------------------------------------------------------------------------

    def begin(self, steps: int, epochs: int, examples: int, step: int = 0, epoch: int = 0) -> None:
        """Say how long the run is, how many examples a step has, and where it goes on."""
        self._steps, self._epochs, self._examples = steps, epochs, examples
        self._step, self._epoch = step, epoch
        self._seen = deque()

    def enter(self, phase: str) -> None:
        """Say what the run does now: `preparing`, `training`, `validating`, `exporting`, or nothing."""
        self.phase = phase
        self._beats += 1

    def at(self, step: int, epoch: int) -> None:
        """Say that a step has ended."""
        self._step, self._epoch = step, epoch
        self._beats += 1

    def beat(self) -> None:
        """Say that something has ended that is no step, such as a batch of a validation."""
        self._beats += 1

    def add(self, points: Sequence[Point]) -> None:
        """Hand over what was measured."""
        if self._writer is not None:
            self._points.extend(points)

    def best(self, step: int, value: float) -> None:
        """Say which validation was the best so far."""
        self._best = step, value

    def flush(self) -> None:
        """Report now. Raises Unreachable; then nothing is forgotten."""
        if self._writer is not None:
            self._report()

    def ended(self) -> int | None:
        """Return how many steps, or batches of a validation, have ended; None while the run has neither."""
        return self._beats if self.phase in ("training", "validating") else None

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._report()
            except Unreachable as error:
                log.warning("progress_not_reported", reason=str(error), effect="it is reported once that is over")
            except RelayError as error:
                log.error("progress_not_reported", reason=str(error))
            self._closing.wait(self._every)

    def _report(self) -> None:
        assert self._writer is not None
        with self._lock:
            if self.order is Order.LOST:
                return
            points, best = self._points[:], self._best
            self.order = self._writer.report(self._progress(), points, best)
            del self._points[: len(points)]
            if best is self._best:
                self._best = None

    def _progress(self) -> Progress:
        now, step, seen = self._clock(), self._step, self._seen
        if not seen or step > seen[-1][1]:
            seen.append((now, step))
        while len(seen) > 2 and seen[1][0] < now - RATE_SECONDS:
            seen.popleft()
        (first_at, first), (last_at, last) = seen[0], seen[-1]
        speed = (last - first) / (last_at - first_at) if last > first and last_at > first_at else None
        return Progress(
            self.phase, step, self._steps, self._epoch, self._epochs,
            examples_per_s=speed * self._examples if speed else None,
            eta=(self._steps - step) / speed if speed else None,
        )  # fmt: skip
