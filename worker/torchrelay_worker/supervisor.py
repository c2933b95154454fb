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
import threading
import time

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
from torchrelay_storage.upkeep import Upkeep
from torchrelay_worker.exits import EXIT_LOST, EXIT_RECYCLE, EXIT_USAGE
from torchrelay_worker.inner import Inner, Options
from torchrelay_worker.maintenance.announce import Announce
from torchrelay_worker.maintenance.expire import Expire
from torchrelay_worker.maintenance.leader import Duty, Leader
from torchrelay_worker.maintenance.look import Look
from torchrelay_worker.maintenance.purge import Purge
from torchrelay_worker.maintenance.reach import Reach
from torchrelay_worker.maintenance.rescue import Rescue
from torchrelay_worker.postmortem import Postmortem, described

log = structlog.get_logger("torchrelay.supervisor")

LOOK_SECONDS = 0.25
FIRST_BACKOFF, LONGEST_BACKOFF = 0.2, 10.0
SPARE_SECONDS = 30.0  # that a spare process is kept after what it was started for has ended
END_SECONDS = 10.0  # beyond the grace, until an inner process that was asked to end is killed


class Supervisor:
    """One worker, whatever happens to its inner process. `run` blocks until a signal ends it."""

    def __init__(self, settings: Settings, options: Options) -> None:
        self._settings = settings
        self._options = options
        self._database = Database(settings.database_url)
        self._broker = Broker(settings)
        self._fleet = Fleet(self._database)
        self._chunks = ChunkStore(self._database)
        self._reach = Reach(settings.stale_after)
        self._rescue = Rescue(self._chunks, self._broker.publish_ended, settings.stale_after, self._reach)
        self._postmortem = Postmortem(self._chunks, self._fleet, self._broker.publish_ended)
        self._inner: Inner | None = None
        self._spare: Inner | None = None  # waits to take over at once
        self._spare_wanted_at = float("-inf")
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
        look = Look(Upkeep(self._database), self._settings.stale_after, self._reach)
        self._register()
        heart = threading.Thread(target=self._beat, name="heart", daemon=True)
        heart.start()
        try:
            with Leader(self._fleet, lambda: self._incarnation, duties, look=look, answered=self._reach.note):
                return self._supervise()
        finally:
            self._closing.set()
            self._drop_spare()
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
            inner, self._spare = self._spare or Inner(self._settings, self._options), None
            inner.go(self._incarnation)
            self._inner = inner
            asked, killed_for = self._watch(inner)
            code = inner.process.wait()
            inner.read()
            self._inner = None
            inner.close()
            ended = described(code, killed_for, inner.last_words)
            if asked and not inner.overran:
                self._postmortem.of_ended(inner, "it was asked to end" if killed_for is None else ended)
            elif code in (EXIT_USAGE, EXIT_RECYCLE):
                self._postmortem.of_ended(inner, ended if code == EXIT_USAGE else "its process was replaced")
            elif self._given_up.is_set():
                log.warning("inner_process_ended", reason="another worker has its chunks", effect="it is replaced")
            else:
                log.warning("inner_process_ended", reason=ended, effect="what it held waits again, and it is replaced")
                from_outside = code == -signal.SIGKILL and killed_for is None
                self._postmortem.of_dead(inner, ended, from_outside=from_outside)
                if inner.has_reported:  # its suspects run now, and the guilty one takes the next process down too
                    self._spare_wanted_at = time.monotonic()
            if asked or code == EXIT_USAGE:
                ended_well = asked and code in (0, EXIT_RECYCLE, -signal.SIGTERM)  # the last while it was importing
                return 0 if ended_well else code if code >= 0 else EXIT_LOST
            if inner.stats.get("recorded"):  # it has done something: no reason to hold the rest up
                backoff = FIRST_BACKOFF
            if self._spare is None and code != EXIT_RECYCLE:
                self._pause(backoff)
                backoff = min(2 * backoff, LONGEST_BACKOFF)
            if self._signals:
                return 0
            self._register()
            if self._signals:
                self._mark_stopped(self._incarnation)
                return 0

    def _watch(self, inner: Inner) -> tuple[bool, str | None]:
        """Return once the inner process has ended: whether it was asked to, and why it was killed if it was."""
        asked_at: float | None = None
        killed_for: str | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(inner.reports, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while inner.process.poll() is None:
                for key, _ in selector.select(LOOK_SECONDS):
                    if key.fd == self._wake_read:
                        os.read(self._wake_read, 512)
                    elif killed_for is not None or inner.process.poll() is not None:
                        selector.unregister(inner.reports)
                    else:
                        inner.read()
                if self._signals and asked_at is None:
                    asked_at = time.monotonic()
                    inner.process.terminate()
                if killed_for is None:
                    killed_for = self._reason_to_kill(inner, asked_at)
                    if killed_for is not None:
                        log.warning("inner_process_killed", reason=killed_for)
                        inner.process.kill()
                    self._keep_spare(inner, wanted=asked_at is None)
        return asked_at is not None, killed_for

    def _reason_to_kill(self, inner: Inner, asked_at: float | None) -> str | None:
        if self._signals > 1:
            return "it was asked to end at once"
        if asked_at is not None and time.monotonic() - asked_at > self._options.grace + END_SECONDS:
            return "its time to end in was over"
        if self._given_up.is_set():
            return "another worker has its chunks"
        trouble = inner.trouble()
        inner.overran = trouble is not None and inner.has_overrun
        return trouble

    def _keep_spare(self, inner: Inner, *, wanted: bool) -> None:
        """Have a second process ready while the first may soon have to be replaced: a new one imports for seconds."""
        now = time.monotonic()
        if inner.is_late:
            self._spare_wanted_at = now
        if not wanted or now - self._spare_wanted_at > SPARE_SECONDS:
            self._drop_spare()
        elif self._spare is None or self._spare.process.poll() is not None:
            self._drop_spare()
            self._spare = Inner(self._settings, self._options)

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.end()
            self._spare = None

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
