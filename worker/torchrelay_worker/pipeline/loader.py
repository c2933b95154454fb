"""Loads the models of claimed chunks, in a thread of its own, so that chunks of loaded models need not wait.

Not here: what is loaded and what must go for it (`residency`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from torchrelay_storage.errors import RelayError
from torchrelay_worker.blackbox import BlackBox
from torchrelay_worker.models.model import revision_of
from torchrelay_worker.models.residency import LoadFailed, Residency, Resident
from torchrelay_worker.pipeline.ledger import Hold, Work
from torchrelay_worker.pipeline.recorder import Ran, Recorder
from torchrelay_worker.pipeline.watch import Watch

log = structlog.get_logger("torchrelay.loader")


class Loader:
    """The loading thread. What it has loaded, it sends on."""

    def __init__(
        self,
        residency: Residency,
        recorder: Recorder,
        watch: Watch,
        box: BlackBox,
        *,
        send: Callable[[Hold], object],
        serves: Callable[[int, str], object] = lambda version, revision: None,
        fatal: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Make it.

        Args:
            send: takes a chunk whose model is loaded and pinned.
            serves: records which revision of its handler serves a version.
        """
        self._residency = residency
        self._recorder = recorder
        self._watch = watch
        self._box = box
        self._send = send
        self._serves = serves
        self.loaded: Callable[[Resident], object] = lambda resident: None  # told of each model that is there
        self.nudge: Callable[[], object] = lambda: None  # told when there may be room again
        self._fatal = fatal
        self._changed = threading.Condition()
        self._order: list[int] = []
        self._holds: dict[int, list[Hold]] = {}
        self._unsaid: dict[int, str] = {}  # version -> the revision that serves it, not on record yet
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the load that runs, which nobody waits for."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def put(self, hold: Hold) -> None:
        """Load a chunk's model, then send it on."""
        version = hold.claimed.version
        with self._changed:
            if version not in self._holds:
                self._order.append(version)
            self._holds.setdefault(version, []).append(hold)
            self._changed.notify_all()

    def pin(self, hold: Hold) -> bool:
        """Keep a chunk's model loaded until `unpin`; False: it is not loaded."""
        hold.resident = self._residency.pin(hold.claimed.version)
        hold.pinned = hold.resident is not None
        if hold.dropped:  # while its model was being loaded
            self.unpin(hold)
        return hold.resident is not None

    def unpin(self, hold: Hold) -> None:
        """Let the model of a chunk that is gone be unloaded, should its place be needed."""
        if hold.pinned:
            hold.pinned = False
            self._residency.release(hold.claimed.version)

    def say(self) -> None:
        """Put on record which revisions of handlers serve here, where that is not done yet. Raises Unreachable."""
        for version, revision in list(self._unsaid.items()):
            self._serves(version, revision)
            self._unsaid.pop(version, None)

    def _run(self) -> None:
        try:
            self._load_all()
        except BaseException as error:
            log.critical("loader_failed", exc_info=error)
            if self._fatal is None:
                raise
            self._fatal(error)

    def _load_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._order)
                if self._closing:
                    return
                version = self._order.pop(0)
            found = self._load(version)
            with self._changed:
                holds = self._holds.pop(version, [])
                if self._closing:
                    return
            for hold in holds:
                if isinstance(found, LoadFailed):
                    works = [Work(hold, job.id, job.failures) for job in hold.claimed.jobs]
                    self._recorder.put(Ran(failed=[(work, found) for work in works]))
                elif self.pin(hold):
                    self._send(hold)
            if not isinstance(found, LoadFailed):
                self._residency.release(version)
            self.nudge()

    def _load(self, version: int) -> Resident | LoadFailed:
        self._box.loading(version)
        key = self._watch.begin(self._residency.load_timeout(version), f"loading model version {version}")
        try:
            resident = self._residency.acquire(version)
        except LoadFailed as error:
            return error
        finally:
            self._watch.end(key)
            self._box.loading(0)
        self.loaded(resident)
        self._unsaid[version] = revision_of(type(resident.model))
        try:
            self.say()
        except RelayError as error:
            log.info("revision_not_recorded", version=version, reason=str(error), effect="it is once that can be done")
        return resident
