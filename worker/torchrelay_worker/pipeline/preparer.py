"""Stored inputs -> prepared inputs: fetched where they are artifacts, decoded, and through the author's `preprocess`.

A few CPU threads, the most urgent chunk first. Not here: claiming (`intake`), and what runs together (`batcher`).
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import structlog
import tenacity

from torchrelay_storage import values
from torchrelay_storage.artifacts import Artifacts, load_large
from torchrelay_storage.chunk_store import ClaimedJob
from torchrelay_storage.errors import InvalidInput, Unreachable
from torchrelay_worker.blackbox import BlackBox, Slot, scratch
from torchrelay_worker.models.model import Model
from torchrelay_worker.pipeline.batcher import Batcher
from torchrelay_worker.pipeline.ledger import Hold, Ledger, Work
from torchrelay_worker.pipeline.recorder import Ran, Recorder
from torchrelay_worker.pipeline.watch import GRACE_SECONDS, Watch

log = structlog.get_logger("torchrelay.preparer")

SMALLEST_SLICE = 16  # inputs that one thread prepares at a time
STORE_SECONDS = 30.0  # that an artifact store may be away before the jobs that need it fail
FETCH_SECONDS = 300.0  # that fetching one input may take with that
CANCEL_SECONDS = 5.0  # that `preprocess` may go on for once its job was cancelled


class Preparer:
    """The preparing threads."""

    def __init__(
        self,
        batcher: Batcher[Work],
        recorder: Recorder,
        ledger: Ledger,
        artifacts: Artifacts,
        watch: Watch,
        *,
        threads: int,
        fatal: Callable[[BaseException], None] | None = None,
        box: BlackBox | None = None,
    ) -> None:
        self._batcher = batcher
        self._recorder = recorder
        self._ledger = ledger
        self._artifacts = artifacts
        self._watch = watch
        self._fatal = fatal
        self._box = box or scratch()
        self._order = itertools.count()
        self._closing = threading.Event()
        self._now: dict[int, Work] = {}  # what each thread prepares, by its key in the watch
        self._forsaken: set[int] = set()  # keys whose time was cut
        self._queue: queue.PriorityQueue[tuple[int, int, Hold | None, Sequence[ClaimedJob]]] = queue.PriorityQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"prepare-{n}", daemon=True) for n in range(max(1, threads))
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def put(self, hold: Hold) -> None:
        """Prepare the jobs of a chunk whose model is loaded."""
        assert hold.resident is not None
        jobs = hold.claimed.jobs
        most = hold.resident.limits.size
        size = max(SMALLEST_SLICE, min(most, -(-len(jobs) // len(self._threads))))
        for start in range(0, len(jobs), size):
            self._queue.put((-hold.claimed.priority, next(self._order), hold, jobs[start : start + size]))

    def close(self) -> None:
        """Let the threads end after the input that each prepares now."""
        self._closing.set()
        for _ in self._threads:
            self._queue.put((-100, next(self._order), None, ()))

    def stop(self, timeout: float) -> None:
        """Close, and wait for the threads."""
        self.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout)

    def forsake(self) -> None:
        """Let what is prepared end soon (`CANCEL_SECONDS`) where nobody wants it any more."""
        for key, work in list(self._now.items()):
            if not work.is_wanted:
                self._forsaken.add(key)
                self._watch.cut(key, CANCEL_SECONDS, "the job that was being preprocessed was cancelled")

    def _run(self) -> None:
        slot = self._box.slot()
        try:
            while not self._closing.is_set():
                _, _, hold, jobs = self._queue.get()
                if hold is not None:
                    self._prepare(hold, jobs, slot)
        except BaseException as error:
            log.critical("preparer_failed", exc_info=error)
            if self._fatal is None:
                raise
            self._fatal(error)

    def _prepare(self, hold: Hold, jobs: Sequence[ClaimedJob], slot: Slot) -> None:
        resident = hold.resident
        assert resident is not None
        model = resident.model
        # A job's own timeout is for one input; a slice of several has the model's.
        own = hold.claimed.timeout
        seconds = float(model.timeout) if own is None else own
        preprocess, has_length = model.preprocess, model.has_length
        cell = slot.cell
        works: list[Work] = []
        forgotten: list[Work] = []
        ran = Ran()
        now, is_closing = self._now, self._closing.is_set
        # Most inputs are small JSON: parsed together they cost a third.
        parsed: Iterable[Any] = values.decode_many([job.input for job in jobs]) or repeat(_LATER, len(jobs))
        with self._watch.running(seconds, "preprocessing") as key:
            try:
                for (job, data, failures), value in zip(jobs, parsed, strict=True):
                    if is_closing():
                        return
                    work = Work(hold, job, failures)
                    if hold.dropped or job in hold.cancelled:
                        forgotten.append(work)
                        continue
                    cell[0] = job
                    now[key] = work
                    if own is not None or self._forsaken:
                        self._forsaken.discard(key)
                        self._watch.renew(key, seconds, GRACE_SECONDS)
                    try:
                        work.prepared = preprocess(
                            value if value is not _LATER else values.decode(self._whole(data, key, seconds))
                        )
                        if has_length:
                            work.length = _length(model, work.prepared)
                        works.append(work)
                    except BaseException as error:  # the author's code: whatever it raises is this one job's failure
                        ran.failed.append((work, error))
            finally:
                slot.note(0)
                self._now.pop(key, None)
                self._forsaken.discard(key)
        if works:
            self._batcher.put(resident.version.id, resident.limits, works)
        if forgotten:
            self._ledger.ended(forgotten)
        self._recorder.put(ran)

    def _whole(self, data: bytes, key: int, seconds: float) -> bytes:
        """Return a stored input; one that is an artifact is fetched. A store in trouble is no fault of the job."""
        if data[:1] != _REFERENCE:
            return data
        self._watch.renew(key, FETCH_SECONDS)
        try:
            return self._load(data)
        finally:
            self._watch.renew(key, seconds, GRACE_SECONDS)

    def _load(self, data: bytes) -> bytes:
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unreachable),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5.0),
            stop=tenacity.stop_after_delay(STORE_SECONDS) | tenacity.stop_when_event_set(self._closing),
            sleep=tenacity.sleep_using_event(self._closing),
            reraise=True,
        )
        return attempts(load_large, self._artifacts, data)


_REFERENCE = bytes((values.REFERENCE,))

_LATER: Any = object()  # in the place of an input that is decoded by itself


def _length(model: Model, prepared: Any) -> int:
    length = int(model.length(prepared))
    most = model.max_batch_cost
    if most is not None and length > most and model.oversize == "refuse":
        raise InvalidInput(f"the input has a length of {length}, and this model takes at most {most}")
    return length
