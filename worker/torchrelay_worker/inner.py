"""The inner process as the supervisor sees it: its command line, its reports, its black box, and whether it is well."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from torchrelay.settings import Settings
from torchrelay_worker.blackbox import BlackBox

START_SECONDS = 180.0  # until the first report: torch is imported, a CUDA context made
SILENT_SECONDS = 30.0  # without a report while nothing is known to run: the process hangs
PAUSED_SECONDS = 3.0  # between two looks of ours: we were stopped, and the inner process may have been too


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    name: str
    models: Sequence[str] | None = None
    train: str = "no"  # "also": training runs beside inference; "only": nothing else
    device: str = "auto"
    threads: int = 2
    torch_threads: int | None = None
    max_loaded: int | None = None
    max_jobs: int | None = None  # after which the inner process is replaced
    max_memory: int | None = None  # MiB, above which it is replaced
    grace: float = 30.0  # seconds for the running device batch when the worker is asked to end
    log_level: str = "warning"


class Inner:
    """The inner process. It waits, with everything imported, until it is told as whom to work (`go`)."""

    def __init__(self, settings: Settings, options: Options) -> None:
        self.worker = 0
        self.started = self.reported = time.monotonic()
        self.has_reported = False
        self.reason: str | None = None  # what is said should what runs overrun its limit
        self.still: str | None = None  # what stands still though work waits
        self.last_words: str | None = None  # why it has ended itself
        self._looked = self.started
        self._patient_until = self.started
        self.overran = False  # it was killed for that
        self.stats: Mapping[str, Any] = {}
        self._buffer = b""
        self.reports, write_end = os.pipe()
        os.set_blocking(self.reports, False)
        with tempfile.TemporaryFile() as file:
            self.box = BlackBox(file.fileno())
            command = [sys.executable, "-m", "torchrelay_worker.worker", "--name", options.name]
            command += ["--report-fd", str(write_end), "--black-box-fd", str(file.fileno())]
            command += ["--device", options.device, "--threads", str(options.threads), "--grace", str(options.grace)]
            command += ["--train", options.train, "--log-level", options.log_level]
            for flag, value in (
                ("--models", ",".join(options.models or ())),
                ("--torch-threads", options.torch_threads),
                ("--max-loaded", options.max_loaded),
                ("--max-jobs", options.max_jobs),
                ("--max-memory", options.max_memory),
            ):
                if value:
                    command += [flag, str(value)]
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # its end of file tells the process that we are gone
                    stdout=2,  # what Celery and authors print is news for the operator, not output
                    pass_fds=(write_end, file.fileno()),
                    env={**os.environ, **settings.as_environment()},
                    process_group=0,  # Ctrl-C in a terminal is the supervisor's; it ends the process in its own order
                )
            finally:
                os.close(write_end)

    def go(self, worker: int) -> None:
        """Let it work as this incarnation."""
        self.worker = worker
        self.started = self.reported = self._looked = time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: whoever watches it sees that
            self.process.stdin.write(orjson.dumps({"worker": worker}) + b"\n")
            self.process.stdin.flush()

    def read(self) -> None:
        """Take in the reports that have come."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reports, 65_536):
                self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            report = orjson.loads(line)
            self.reported = time.monotonic()
            if "last" in report:
                self.last_words = report["last"]
                continue
            self.has_reported = True
            self.reason = report["reason"]
            self.still = report["still"]
            self.stats = report["stats"]

    @property
    def is_late(self) -> bool:
        """Whether what runs has used more than half of its time."""
        return self.box.is_late(time.monotonic())

    @property
    def has_overrun(self) -> bool:
        """Whether what runs has overrun its limit. The black box tells: a report may be held up by what runs."""
        deadline = self.box.deadline()
        return deadline is not None and time.monotonic() > deadline

    def trouble(self) -> str | None:
        """Return why the process must be killed, or None while it is well."""
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        if gap > PAUSED_SECONDS:
            self._patient_until = now + gap
        if now < self._patient_until:
            return None
        if self.has_overrun:
            return self.reason or "what it ran has overrun its limit"
        if self.still is not None:
            return self.still
        if self.box.deadline() is not None:
            return None  # a long forward is not a dead process
        if not self.has_reported:
            return "it did not start in time" if now - self.started > START_SECONDS else None
        return "it does not answer" if now - self.reported > SILENT_SECONDS else None

    def end(self) -> None:
        """Kill it and close its pipes. It must not be working."""
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Close the pipes of a process that has ended."""
        os.close(self.reports)
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
