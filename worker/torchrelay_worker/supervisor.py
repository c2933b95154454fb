"""The outer process, without torch: beats the heart, does the maintenance, and replaces the inner one when it must.

The heart moves while the inner process answers and nothing that it runs has overrun its limit; a long forward is not a
dead one. Not here: any job (`worker`).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from torchrelay.announcer import Announcer
from torchrelay.broker import Broker
from torchrelay.settings import Settings
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import RelayError, Unreachable
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.retention import Retention
from torchrelay_worker.exits import EXIT_LOST, EXIT_USAGE
from torchrelay_worker.maintenance.announce import Announce
from torchrelay_worker.maintenance.expire import Expire
from torchrelay_worker.maintenance.leader import Duty, Leader
from torchrelay_worker.maintenance.purge import Purge
from torchrelay_worker.maintenance.rescue import Rescue

log = structlog.get_logger("torchrelay.supervisor")

LOOK_SECONDS = 0.25
START_SECONDS = 180.0  # until the first report: torch is imported, a CUDA context made
SILENT_SECONDS = 30.0  # without a report while nothing is known to run: the process hangs
FIRST_BACKOFF, LONGEST_BACKOFF = 0.2, 10.0
END_SECONDS = 10.0  # beyond the grace, until an inner process that was asked to end is killed


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
    grace: float = 30.0  # seconds for the running device batch when the worker is asked to end
    log_level: str = "warning"


class Inner:
    """The inner process, and what it reports."""

    def __init__(self, worker: int, settings: Settings, options: Options) -> None:
        self.worker = worker
        self.started = self.reported = time.monotonic()
        self.has_reported = False
        self.deadline: float | None = None
        self.alone: int | None = None  # the only chunk that runs
        self.stats: Mapping[str, Any] = {}
        self._buffer = b""
        self.reports, write_end = os.pipe()
        os.set_blocking(self.reports, False)
        command = [sys.executable, "-m", "torchrelay_worker.worker"]
        command += ["--worker-id", str(worker), "--report-fd", str(write_end), "--name", options.name]
        command += ["--device", options.device, "--threads", str(options.threads), "--grace", str(options.grace)]
        command += ["--train", options.train, "--log-level", options.log_level]
        for flag, value in (
            ("--models", ",".join(options.models or ())),
            ("--torch-threads", options.torch_threads),
            ("--max-loaded", options.max_loaded),
        ):
            if value:
                command += [flag, str(value)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end of file tells the process that we are gone
                stdout=2,  # what Celery and authors print is news for the operator, not output
                pass_fds=(write_end,),
                env={**os.environ, **settings.as_environment()},
                process_group=0,  # Ctrl-C in a terminal is the supervisor's; it ends the process in its own order
            )
        finally:
            os.close(write_end)

    def read(self) -> None:
        """Take in the reports that have come."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reports, 65_536):
                self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            report = orjson.loads(line)
            if "alone" in report:
                self.alone = report["alone"]
                continue
            self.reported = time.monotonic()
            self.has_reported = True
            self.deadline = None if report["left"] is None else self.reported + report["left"]
            self.stats = report["stats"]

    def trouble(self) -> str | None:
        """Return why the process must be killed, or None while it is well."""
        now = time.monotonic()
        if self.deadline is not None:
            return "a device batch has overrun its limit" if now > self.deadline else None
        if not self.has_reported:
            return "it did not start in time" if now - self.started > START_SECONDS else None
        return "it does not answer" if now - self.reported > SILENT_SECONDS else None

    def close(self) -> None:
        """Close the pipes of a process that has ended."""
        os.close(self.reports)
        if self.process.stdin is not None:
            self.process.stdin.close()


class Supervisor:
    """One worker, whatever happens to its inner process. `run` blocks until a signal ends it."""

    def __init__(self, settings: Settings, options: Options) -> None:
        self._settings = settings
        self._options = options
        self._database = Database(settings.database_url)
        self._broker = Broker(settings)
        self._fleet = Fleet(self._database)
        self._chunks = ChunkStore(self._database)
        self._rescue = Rescue(self._chunks, self._broker.publish_ended, settings.stale_after)
        self._inner: Inner | None = None
        self._incarnation = 0
        self._given_up = threading.Event()  # the database says that our incarnation has ended
        self._signals = 0
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        self._closing = threading.Event()

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit code.

        Raises:
            SchemaMismatch: the database's schema and this code do not fit.
        """
        self._catch_signals()
        self._wait_for_database()
        if self._signals:
            return 0
        duties: list[Duty] = [
            Announce(self._chunks, Announcer(self._database, self._broker)),
            self._rescue,
            Expire(self._chunks, self._broker.publish_ended),
            Purge(
                Retention(self._database),
                Artifacts(self._settings.artifacts_url),
                self._fleet,
                self._settings.retention_days,
            ),
        ]
        self._register()
        heart = threading.Thread(target=self._beat, name="heart", daemon=True)
        heart.start()
        try:
            with Leader(self._fleet, lambda: self._incarnation, duties):
                return self._supervise()
        finally:
            self._closing.set()
            heart.join(self._settings.heartbeat)
            self._broker.close()
            self._database.dispose()

    def _catch_signals(self) -> None:
        def on_signal(*_: object) -> None:
            self._signals += 1
            with contextlib.suppress(OSError):
                os.write(self._wake_write, b"x")

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    def _wait_for_database(self) -> None:
        said = False
        while not self._signals:
            try:
                self._database.check()
                return
            except Unreachable as error:
                if not said:
                    log.warning("database_unreachable", reason=str(error), effect="the worker starts once it is back")
                    said = True
                self._pause(1.0)

    def _pause(self, seconds: float) -> None:
        """Wait, but for a signal."""
        until = time.monotonic() + seconds
        signals = self._signals
        while self._signals == signals and (left := until - time.monotonic()) > 0:
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake_read, selectors.EVENT_READ)
                if selector.select(left):
                    os.read(self._wake_read, 512)

    # --- the inner process --------------------------------------------------------------------------------

    def _supervise(self) -> int:
        backoff = FIRST_BACKOFF
        while True:
            self._given_up.clear()
            inner = self._inner = Inner(self._incarnation, self._settings, self._options)
            asked = self._watch(inner)
            code = inner.process.wait()
            inner.read()
            self._inner = None
            inner.close()
            if asked or code == EXIT_USAGE:
                self._mark_stopped(inner.worker)
                ended_well = asked and code in (0, -signal.SIGTERM)  # the latter while it was still importing torch
                return 0 if ended_well else code if code >= 0 else EXIT_LOST
            log.warning("inner_process_ended", code=code, effect="its chunks are rescued, and it is replaced")
            self._return_innocents(inner)
            self._mark_stopped(inner.worker)
            self._rescue_now()
            if inner.stats.get("recorded"):  # it has done something: no reason to hold the rest up
                backoff = FIRST_BACKOFF
            self._pause(backoff)
            if self._signals:
                return 0
            backoff = min(2 * backoff, LONGEST_BACKOFF)
            self._register()
            if self._signals:
                self._mark_stopped(self._incarnation)
                return 0

    def _watch(self, inner: Inner) -> bool:
        """Return once the inner process has ended: True if it was asked to."""
        asked_at: float | None = None
        killed = False
        with selectors.DefaultSelector() as selector:
            selector.register(inner.reports, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while inner.process.poll() is None:
                for key, _ in selector.select(LOOK_SECONDS):
                    if key.fd == self._wake_read:
                        os.read(self._wake_read, 512)
                    elif killed or inner.process.poll() is not None:
                        selector.unregister(inner.reports)
                    else:
                        inner.read()
                if self._signals and asked_at is None:
                    asked_at = time.monotonic()
                    inner.process.terminate()
                overdue = asked_at is not None and time.monotonic() - asked_at > self._options.grace + END_SECONDS
                trouble = inner.trouble() or ("another worker has its chunks" if self._given_up.is_set() else None)
                if not killed and (self._signals > 1 or overdue or trouble):
                    if trouble:
                        log.warning("inner_process_killed", reason=trouble)
                    inner.process.kill()
                    killed = True
        return asked_at is not None

    def _register(self) -> None:
        while True:
            try:
                self._incarnation = self._fleet.register(
                    self._options.name,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    device=self._options.device,
                    models=() if self._options.train == "only" else self._options.models,
                ).id
                return
            except Unreachable as error:
                log.warning("database_unreachable", reason=str(error), effect="the worker starts once it is back")
                self._pause(1.0)
                if self._signals:
                    return

    def _mark_stopped(self, worker: int) -> None:
        try:
            self._fleet.stop(worker)
        except RelayError as error:
            log.info("not_marked_stopped", reason=str(error), effect="it counts as gone once it is stale")

    def _return_innocents(self, inner: Inner) -> None:
        """Hand back what a lost process held, but for the chunk that ran alone: that one took it down.

        Where several ran, nobody can say which it was. All go back without blame, and whoever claims them next runs
        each alone; so a job is blamed for its own doing only.
        """
        try:
            held = [(h.chunk, h.token) for h in self._chunks.held(inner.worker) if h.chunk != inner.alone]
            self._chunks.hand_back(held, inner.worker, suspect=True)
        except RelayError as error:
            log.info("not_handed_back", reason=str(error), effect="they are rescued instead")

    def _rescue_now(self) -> None:
        try:
            self._rescue.run()
        except RelayError as error:
            log.info("not_rescued_yet", reason=str(error))

    # --- the heart ----------------------------------------------------------------------------------------

    def _beat(self) -> None:
        away = False
        while not self._closing.wait(self._settings.heartbeat):
            inner = self._inner
            if inner is None or inner.trouble() is not None or inner.process.poll() is not None:
                continue
            try:
                alive = self._fleet.beat(inner.worker, inner.stats)
            except Unreachable as error:
                if not away:
                    log.warning("heart_missed", reason=str(error))
                away = True
                continue
            except Exception:
                log.exception("heart_failed")
                continue
            away = False
            if not alive and inner is self._inner and inner.process.poll() is None:
                self._given_up.set()
