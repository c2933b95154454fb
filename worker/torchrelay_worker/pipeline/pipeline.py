"""A worker's pipeline, put together: intake -> preparer -> batcher -> device -> recorder. Started and stopped in order.

Not here: Celery (`consumer`), processes (`worker`, `supervisor`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import structlog
import torch

from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import RelayError, Unreachable
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.registry import Registry
from torchrelay_worker.blackbox import BlackBox, scratch
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.models.residency import Residency
from torchrelay_worker.models.weights import WeightsCache
from torchrelay_worker.pipeline.batcher import Batcher
from torchrelay_worker.pipeline.device import Device
from torchrelay_worker.pipeline.intake import Intake
from torchrelay_worker.pipeline.ledger import Hold, Ledger, Work
from torchrelay_worker.pipeline.loader import Loader
from torchrelay_worker.pipeline.pace import Pace
from torchrelay_worker.pipeline.preparer import Preparer
from torchrelay_worker.pipeline.recorder import Recorder
from torchrelay_worker.pipeline.serving import Serving
from torchrelay_worker.pipeline.standstill import Standstill
from torchrelay_worker.pipeline.warden import Warden
from torchrelay_worker.pipeline.watch import Watch
from torchrelay_worker.training.gate import Gate
from torchrelay_worker.training.lanes import Lanes
from torchrelay_worker.training.launcher import Launcher

log = structlog.get_logger("torchrelay.pipeline")

WARDEN_SECONDS = 0.5
SERVING_SECONDS = 2.0
CHUNK_SIZE_SECONDS = 5.0
HAND_BACK_SECONDS = 5.0  # that the database may be away at the end before its rescue is left to do the rest


@dataclass(frozen=True, slots=True)
class Setup:
    """What a pipeline is made of.

    Attributes:
        models: names to serve; None: all whose handler is installed.
        threads: preparing threads.
        max_loaded: models loaded at a time; None: as many as the device's memory takes.
        grace: seconds that the running device batch and the recording have when the pipeline stops.
        lanes: of a worker that trains; None: it does not.
        launcher: starts its runs.
        gate: by which inference goes before a run on the same device.
        box: where the supervisor finds what ran when this process dies.
    """

    database: Database
    artifacts: Artifacts
    handlers: Handlers
    weights_folder: Path
    device: torch.device
    worker: int
    inline_limit: int
    models: Sequence[str] | None = None
    threads: int = 2
    max_loaded: int | None = None
    grace: float = 30.0
    lanes: Lanes | None = None
    launcher: Launcher | None = None
    gate: Gate | None = None
    box: BlackBox = field(default_factory=scratch)


@dataclass(frozen=True, slots=True)
class Road:
    """What the pipeline needs of Redis; each may fail without harm."""

    wake: Callable[[str], object] = lambda model: None
    publish: Callable[[Sequence[int], Sequence[int]], object] = lambda chunks, batches: None
    is_up: Callable[[], bool] = lambda: True


class Pipeline:
    """Everything between a claimed chunk and its recorded results. A context manager."""

    def __init__(self, setup: Setup, road: Road, fatal: Callable[[BaseException], None]) -> None:
        """Put it together.

        Args:
            fatal: called from any thread that cannot go on.
        """
        self._setup = setup
        self._chunks = ChunkStore(setup.database)
        registry = Registry(setup.database)
        self.watch = Watch(note=setup.box.due)
        self.pace = Pace()
        self.ledger = Ledger()
        self.batcher: Batcher[Work] = Batcher()
        self.serving = Serving(registry, setup.handlers, setup.models, setup.lanes)
        self.launcher = setup.launcher
        self.residency = Residency(
            registry,
            setup.handlers,
            WeightsCache(setup.artifacts, setup.weights_folder),
            setup.device,
            max_loaded=setup.max_loaded,
            on_loaded=lambda resident: self._fit_chunks(),
        )
        self.recorder = Recorder(
            JobStore(setup.database),
            self.ledger,
            setup.artifacts,
            road.publish,
            worker=setup.worker,
            inline_limit=setup.inline_limit,
            pace=self.pace,
            fatal=fatal,
            box=setup.box,
            watch=self.watch,
        )
        self.device = Device(
            self.batcher,
            self.recorder,
            self.ledger,
            self.residency,
            self.watch,
            fatal=fatal,
            busy=setup.gate.set if setup.gate is not None else lambda busy: None,
            box=setup.box,
        )
        self.preparer = Preparer(
            self.batcher,
            self.recorder,
            self.ledger,
            setup.artifacts,
            self.watch,
            threads=setup.threads,
            fatal=fatal,
            box=setup.box,
        )
        fleet = Fleet(setup.database)
        self.loader = Loader(
            self.residency,
            self.recorder,
            self.watch,
            setup.box,
            send=self.preparer.put,
            serves=lambda version, revision: fleet.serves(setup.worker, version, revision),
            fatal=fatal,
        )
        self.intake = Intake(
            self._chunks,
            self.ledger,
            self.preparer,
            self.loader,
            pace=self.pace,
            worker=setup.worker,
            served=self.serving.names,
            wake=road.wake,
            redis_is_up=road.is_up,
            opened=self._on_room,
            loads_wait=lambda: self.residency.is_waited_for,
            lanes=self.serving.lanes,
            runs=setup.launcher,
            fatal=fatal,
        )
        self.warden = Warden(
            self._chunks,
            self.ledger,
            self.batcher,
            worker=setup.worker,
            elsewhere=setup.launcher.chunks if setup.launcher is not None else frozenset,
        )
        if setup.launcher is not None:
            setup.launcher.changed = self.intake.nudge
        self.opened: Callable[[], object] = lambda: None  # called when there is room for more messages
        self.ledger.changed = self.intake.nudge
        self.ledger.released = self.loader.unpin
        self.loader.loaded, self.loader.nudge = self.intake.has_loaded, self.intake.nudge
        self._standstill = Standstill(self.device, self.intake)
        self._stopping = threading.Event()
        self._done = threading.Event()
        self._stopped = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, name="warden", daemon=True)

    def start(self) -> None:
        """Start all threads, the last step's first."""
        self._wait_for_database()
        self.recorder.start()
        self.device.start()
        self.preparer.start()
        self.loader.start()
        self.intake.start()
        self._keeper.start()

    def _wait_for_database(self) -> None:
        while not self._stopping.is_set():
            try:
                self.serving.look()
                return
            except Unreachable as error:
                log.warning("database_unreachable", reason=str(error), effect="the worker starts once it is back")
                self._stopping.wait(SERVING_SECONDS)

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def stop(self) -> bool:
        """Hand back at once what has not begun, finish the device batch that runs, and record what has run.

        Returns:
            Whether nothing is left claimed.
        """
        with self._stopped:
            if self._stopping.is_set():
                return len(self.ledger) == 0
            self._stopping.set()
            until = time.monotonic() + self._setup.grace
            if self.launcher is not None:
                self.launcher.ask_to_end()
            self.preparer.close()
            self.loader.close()
            self.intake.stop(timeout=1.0)
            self.residency.close()
            begun = self.device.close() | self.recorder.holds()  # in this order: what has run is in one of both
            self._hand_back([hold for hold in self.ledger.holds() if hold not in begun])
            self.preparer.stop(timeout=1.0)
            self.device.stop(max(0.1, until - time.monotonic()))
            self.recorder.stop(max(1.0, until - time.monotonic()))
            self._done.set()
            if self._keeper.is_alive():
                self._keeper.join(HAND_BACK_SECONDS)
            if self.launcher is not None:
                self.launcher.stop()
            return self._hand_back(self.ledger.holds())

    def _hand_back(self, holds: Sequence[Hold]) -> bool:
        if holds:
            pairs = [(hold.claimed.chunk, hold.claimed.token) for hold in holds]
            try:
                back = self._chunks.hand_back(pairs, self._setup.worker)
            except RelayError as error:
                log.warning("not_handed_back", chunks=len(holds), reason=str(error))
                return False
            self.ledger.drop([hold.claimed.chunk for hold in holds])
            log.info("handed_back", chunks=back)
        return True

    def __enter__(self) -> Pipeline:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _on_room(self) -> None:
        self.opened()

    # --- what is done now and then ------------------------------------------------------------------------

    def _keep(self) -> None:
        duties: list[tuple[float, Callable[[], None]]] = [
            (WARDEN_SECONDS, self._look),  # also while the worker ends: what runs may be cancelled
            (SERVING_SECONDS, self.serving.look),
            (CHUNK_SIZE_SECONDS, self._fit_chunks),
            (CHUNK_SIZE_SECONDS, self.loader.say),
        ]
        due = [time.monotonic() + seconds for seconds, _ in duties]
        while not self._done.wait(max(0.0, min(due) - time.monotonic())):
            for i, (seconds, duty) in enumerate(duties):
                if time.monotonic() >= due[i] and not (i and self._stopping.is_set()):
                    try:
                        duty()
                    except Unreachable:
                        pass  # the intake and the recorder say so; this comes again anyway
                    except Exception:
                        log.exception("duty_failed")
                    due[i] = time.monotonic() + seconds

    def _look(self) -> None:
        try:
            self.warden.look()
        finally:
            self.device.forsake()
            self.preparer.forsake()

    def _fit_chunks(self) -> None:
        try:
            self.serving.fit_chunks(self.residency, self.pace)
        except RelayError as error:
            log.info("chunk_size_not_set", reason=str(error))

    def report(self) -> Mapping[str, object]:
        """Return what the supervisor is told each half second.

        `reason`: what is to be said should what runs overrun its limit (until when it may run stands in the black box).
        `still`: what stands still though work waits, None if nothing does.
        """
        still = self._standstill.reason() if not self._stopping.is_set() else None
        if still is not None:
            log.error("pipeline_stands_still", reason=still)
        return {
            "reason": self.watch.reason(),
            "still": still,
            "stats": self.stats(),
        }

    def stats(self) -> Mapping[str, object]:
        """Return what the heartbeat tells of this worker. `rates` is read by the announcer: chunks a second."""
        return {
            "device": str(self._setup.device),
            "rates": self.serving.rates(self.pace),
            "jobs_per_s": self.serving.job_rates(self.pace),
            "recorded": self.recorder.recorded,
            "batches": self.device.batches,
            "held": len(self.ledger),
            "loaded": self.residency.names(),
            "runs": self.launcher.shown() if self.launcher is not None else None,
            "not_loaded": self.residency.failures(),
        }
