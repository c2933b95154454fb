"""When the inner process asks to be replaced, though nothing is wrong with what it runs: it has run enough jobs, uses
too much memory, or its consumer stays silent.

It then drains as at a SIGTERM and ends with EXIT_RECYCLE; the supervisor starts another, and nobody is to blame.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType

import structlog

log = structlog.get_logger("torchrelay.recycling")

LOOK_SECONDS = 0.2
SILENCE_ROUNDS = 5  # looks between two at Redis
STUCK_SECONDS = 10.0  # that Celery's main thread has to take the signal in


class Recycling:
    """A thread that looks five times a second. A context manager."""

    def __init__(
        self,
        *,
        recorded: Callable[[], int],
        silent: Callable[[], str | None],
        stop: Callable[[], object],
        is_stopping: Callable[[], bool],
        must_wait: Callable[[], bool] = lambda: False,
        max_jobs: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        """Make it.

        Args:
            recorded: how many jobs this process has recorded.
            silent: why it must be replaced because its consumer is silent; None: it is not.
            stop: drains and ends the process, should the main thread not take the signal in.
            is_stopping: whether it drains.
            must_wait: whether results wait for a database that is away: they would be lost with the process.
            max_jobs: after how many it is replaced; None: never.
            max_memory: MiB of resident memory above which it is replaced; None: never.
        """
        self._recorded = recorded
        self._silent = silent
        self._stop = stop
        self._is_stopping = is_stopping
        self._must_wait = must_wait
        self._max_jobs = max_jobs
        self._max_memory = max_memory
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recycling", daemon=True)
        self.wanted: str | None = None  # why the process is to be replaced

    def __enter__(self) -> Recycling:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()

    def _run(self) -> None:
        rounds = 0
        while not self._closing.wait(LOOK_SECONDS) and not self._is_stopping():
            rounds += 1
            if self._must_wait():
                continue
            try:
                self.wanted = self._worn() or (self._silent() if rounds % SILENCE_ROUNDS == 0 else None)
            except Exception:
                log.exception("recycling_failed")
            if self.wanted is not None:
                log.warning("worker_recycled", reason=self.wanted)
                os.kill(os.getpid(), signal.SIGTERM)
                if not self._closing.wait(STUCK_SECONDS) and not self._is_stopping():
                    self._stop()
                return

    def _worn(self) -> str | None:
        recorded = self._recorded()
        if self._max_jobs is not None and recorded >= self._max_jobs:
            return f"it has run {recorded} jobs (--max-jobs {self._max_jobs})"
        if self._max_memory is not None and (used := resident_mib()) > self._max_memory:
            return f"it uses {used} MiB of memory (--max-memory {self._max_memory})"
        return None


def resident_mib() -> int:
    """Return how much memory this process has in RAM, in MiB; where the system does not say, the most it ever had."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 2**20
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most // 2**20 if sys.platform == "darwin" else most // 2**10
