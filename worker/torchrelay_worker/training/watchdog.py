"""Ends a process of a run in which no step ends any more, and has it show where: its worker starts another.

The clock runs in a thread of faulthandler's, which needs no GIL, so that it ends even a process that hangs while it
holds that. Here it is only wound up again when something has ended.
"""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Callable
from typing import Self

LOOK_SECONDS = 1.0


class Watchdog:
    """Watches while a run has steps. A context manager."""

    def __init__(self, ended: Callable[[], int | None], limit: float, *, look: float = LOOK_SECONDS) -> None:
        """Make it.

        Args:
            ended: how many steps have ended; None while the run does what has no steps.
            limit: seconds without one after which the process is ended; it may be a `look` more.
        """
        self._ended = ended
        self._limit = limit
        self._look = look
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def _run(self) -> None:
        seen: int | None = None
        while True:
            ended = self._ended()
            if ended is None and seen is not None:
                faulthandler.cancel_dump_traceback_later()
            elif ended != seen and ended is not None:
                faulthandler.dump_traceback_later(self._limit, exit=True)
            seen = ended
            if self._closing.wait(self._look):
                break
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join()
