"""The inner process's ties to its supervisor: reports up, the word to begin down, and the leash that ends it.

Not here: the black box, which is read when this process can say nothing any more (`blackbox`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import structlog

from torchrelay_worker.exits import EXIT_LOST

log = structlog.get_logger("torchrelay.worker")

REPORT_SECONDS = 0.5
ORPHAN_SECONDS = 8.0  # that a worker has to end in after its supervisor: less than `stale_after`


class Reports:
    """Tells the supervisor each half second that this process answers, and what it does: a line of JSON each."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._closing = threading.Event()

    def start(self, report: Callable[[], Mapping[str, Any]]) -> None:
        """Report until `close`, or until nobody reads."""

        def run() -> None:
            while self._write(report()) and not self._closing.wait(REPORT_SECONDS):
                pass

        threading.Thread(target=run, name="reports", daemon=True).start()

    def _write(self, report: Mapping[str, Any]) -> bool:
        try:
            self._file.write(orjson.dumps(report) + b"\n")
        except OSError:
            return False
        return True

    def last(self, words: str) -> None:
        """Tell why this process is about to end itself."""
        self._write({"last": words})

    def close(self) -> None:
        """End the thread."""
        self._closing.set()


def wait_to_go() -> int | None:
    """Wait until the supervisor says as whom to work; None: it has no use for this process, or is gone."""
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(0, 1)  # no more: what follows is the leash's
        if not data:
            return None
        line += data
    return int(orjson.loads(line)["worker"])


def follow_supervisor() -> None:
    """End this process when the supervisor closes our standard input, which its death does too."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        log.info("supervisor_gone")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(EXIT_LOST)

    threading.Thread(target=wait, name="leash", daemon=True).start()
