"""The device's thread: one forward pass after the other, and what is done when one fails.

The forward of this batch runs beside the preparing of the next (other threads), the copy of the next to a CUDA device
(launched before this one is waited for), and the recording of the last. Not here: what runs together (`batcher`).
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from torchrelay_storage import faults
from torchrelay_worker.blackbox import BlackBox, scratch
from torchrelay_worker.models.model import Model, move, nan_rows
from torchrelay_worker.models.residency import Residency
from torchrelay_worker.pipeline.batcher import Batch, Batcher
from torchrelay_worker.pipeline.ledger import Hold, Ledger, Work, all_wanted, holds_of
from torchrelay_worker.pipeline.outcomes import BadOutput, NotANumber, Timeout, limit
from torchrelay_worker.pipeline.recorder import Ran, Recorder
from torchrelay_worker.pipeline.watch import GRACE_SECONDS, Watch

log = structlog.get_logger("torchrelay.device")

IDLE_SECONDS = 1.0  # between two looks at an empty batcher; anything put wakes it at once
CANCEL_SECONDS = 5.0  # that a device batch may go on for once all of its jobs were cancelled


class DeviceLost(RuntimeError):
    """The device's context is broken: nothing runs in this process any more."""


@dataclass(slots=True)
class Launched:
    """A batch on the device. `error` is what was raised when it was launched."""

    version: int
    model: Model
    works: list[Work]
    started: float
    watched: int
    noted: int
    outputs: Any = None
    error: BaseException | None = None


class Device:
    """Runs device batches on one device, in a thread of its own."""

    def __init__(
        self,
        batcher: Batcher[Work],
        recorder: Recorder,
        ledger: Ledger,
        residency: Residency,
        watch: Watch,
        *,
        fatal: Callable[[BaseException], None] | None = None,
        busy: Callable[[bool], object] = lambda busy: None,
        box: BlackBox | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it.

        Args:
            box: where the supervisor finds what ran when the process dies.
            busy: told when the device begins to have work (True) and when it has none (False).
        """
        self._tell_busy = busy
        self._is_busy = False
        self._batcher = batcher
        self._recorder = recorder
        self._ledger = ledger
        self._residency = residency
        self._is_apart = residency.device.type != "cpu"  # its memory is not the CPU's, and tensors must be moved
        self._watch = watch
        self._fatal = fatal
        self._clock = clock
        self._box = box or scratch()
        self._closing = threading.Event()
        self._turn = threading.Lock()  # held from the look at `_closing` until what was taken is in `_flying`
        self._flying: list[Sequence[Work]] = []
        self._launched: list[Launched] = []
        self._settled_at = 0.0
        self._is_recording = False
        self.turns = 0  # how often the loop has come round
        self.batches = 0  # since the start
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> set[Hold]:
        """Take nothing more, and return the chunks of which something runs now."""
        with self._turn:
            self._closing.set()
            busy = {work.hold for works in self._flying for work in works}
        self._batcher.poke()
        return busy

    def stop(self, timeout: float) -> bool:
        """End after the batch that runs now; False if it still runs after `timeout` seconds."""
        self.close()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def forsake(self) -> None:
        """Let what runs end soon (`CANCEL_SECONDS`) if nobody wants any of it any more."""
        for launched in list(self._launched):
            if not any(work.is_wanted for work in launched.works):
                self._watch.cut(launched.watched, CANCEL_SECONDS, "all jobs of the device batch were cancelled")

    @property
    def has_waiting(self) -> bool:
        """Whether inputs wait and nothing runs; what waits for the recorder, and so for the database, is no such."""
        return not self._launched and not self._is_recording and bool(self._batcher.counts())

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            log.critical("device_failed", exc_info=error)
            if self._fatal is None:
                raise
            self._fatal(error)

    def _loop(self) -> None:
        pending: Launched | None = None
        while not self._closing.is_set() or pending is not None:
            self.turns += 1
            with self._turn:
                batch = None
                if not self._closing.is_set():
                    batch = self._batcher.next_batch(pending is None, self._residency.resident())
                if batch is not None:
                    self._flying.append(batch.items)
            self._note_busy(batch is not None or pending is not None)
            launched = self._launch(batch) if batch is not None else None
            if batch is not None and launched is None:
                self._flying.pop()
            if pending is not None:
                self._settle(pending)
                pending = None
            if launched is not None:
                # On CUDA a launch returns at once, so the next batch is prepared while this one runs.
                if launched.error is None and self._residency.device.type == "cuda":
                    pending = launched
                else:
                    self._settle(launched)
            elif batch is None and not self._closing.is_set():
                self._batcher.wait(IDLE_SECONDS)

    def _note_busy(self, busy: bool) -> None:
        if busy is not self._is_busy:
            self._is_busy = busy
            self._tell_busy(busy)

    # --- one batch ----------------------------------------------------------------------------------------

    def _launch(self, batch: Batch[Work]) -> Launched | None:
        works = batch.items
        holds = holds_of(works)
        if not all_wanted(holds):
            self._ledger.ended([w for w in works if not w.is_wanted])
            works = [w for w in works if w.is_wanted]
            if not works:
                return None
        resident = works[0].hold.resident
        assert resident is not None
        model = resident.model
        watched = self._watch.begin(limit(holds, model), "a device batch", GRACE_SECONDS)
        noted = self._box.launched([work.job for work in works])
        launched = Launched(batch.version, model, works, self._clock(), watched, noted)
        self._launched.append(launched)
        try:
            launched.outputs = self._forward(model, works)
        except BaseException as error:  # the author's code: whatever it raises is the failure of these jobs
            launched.error = error
        return launched

    def _forward(self, model: Model, works: Sequence[Work]) -> Any:
        with torch.inference_mode():
            inputs = model.collate([w.prepared for w in works])
            if self._is_apart:
                inputs = move(inputs, self._residency.device)
            return model.forward(inputs)

    def _settle(self, launched: Launched) -> None:
        try:
            ran = self._results(launched)
        finally:
            self._watch.end(launched.watched)
            self._launched.remove(launched)
        self._box.landed(launched.noted)  # not where the device was lost: the supervisor must find what did it
        faults.reach("forwarded")
        now = self._clock()
        elapsed = now - max(launched.started, self._settled_at)
        self._settled_at = now
        self.batches += 1
        for work in launched.works:
            work.prepared = None  # its memory is wanted for the next
        self._is_recording = True
        self._recorder.put(_late(ran, elapsed))
        self._is_recording = False
        with self._turn:
            self._flying.pop(0)  # what was launched first is settled first; the recorder knows of it now

    def _results(self, launched: Launched) -> Ran:
        error = launched.error
        if error is None:
            try:
                return self._collect(launched.model, launched.works, launched.outputs)
            except BaseException as late:  # on CUDA an error of the forward shows here
                error = late
        launched.outputs = launched.error = None
        ran = Ran()
        self._by_parts(launched, launched.works, error, ran)
        return ran

    def _collect(self, model: Model, works: Sequence[Work], outputs: Any) -> Ran:
        if self._is_apart:
            outputs = move(outputs, torch.device("cpu"))
        n = len(works)
        bad = nan_rows(outputs, n) if model.check_nan else set()
        parts = model.split(outputs, n)
        if len(parts) != n:
            raise BadOutput(f"split returned {len(parts)} outputs for a batch of {n}")
        if not bad:
            return Ran(done=list(zip(works, parts, strict=True)))
        ran = Ran()
        for i, (work, part) in enumerate(zip(works, parts, strict=True)):
            if i in bad:
                ran.failed.append((work, NotANumber("the model's output for this input holds a NaN")))
            else:
                ran.done.append((work, part))
        return ran

    # --- when it fails ------------------------------------------------------------------------------------

    def _by_parts(self, launched: Launched, works: Sequence[Work], error: BaseException, ran: Ran) -> None:
        """Run a batch that failed in halves, so that only the guilty input fails, or none if it was too large."""
        if is_lost(error):
            raise DeviceLost(str(error)) from error
        short = is_out_of_memory(error)
        if short:
            error = error.with_traceback(None)  # its frames hold the tensors that are in the way
            gc.collect()  # as may cycles that the author's code has made
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(works) == 1:
            ran.failed.append((works[0], error))
            return
        model = launched.model
        middle = len(works) // 2
        for half in (works[:middle], works[middle:]):
            half_error: BaseException | None = None
            self._watch.renew(launched.watched, limit(holds_of(half), model), GRACE_SECONDS)
            try:
                part = self._collect(model, half, self._forward(model, half))
            except BaseException as again:
                half_error = again
            if half_error is not None:
                self._by_parts(launched, half, half_error, ran)
                continue
            ran.done.extend(part.done)
            ran.failed.extend(part.failed)
            if short:
                self._remember(launched.version, half)

    def _remember(self, version: int, works: Sequence[Work]) -> None:
        limits = self._batcher.limits(version)
        if limits is not None:
            fitted = self._batcher.shrink(version, size=len(works), cost=limits.of(works))
            if fitted != limits:
                log.warning("device_batch_halved", version=version, size=len(works), reason="out of memory")


def _late(ran: Ran, elapsed: float) -> Ran:
    """Fail a job that ran alone and took too long. Several keep their results: nobody knows whose fault it was."""
    if len(ran.done) == 1 and not ran.failed:
        work = ran.done[0][0]
        timeout = work.hold.claimed.timeout
        if timeout is not None and elapsed > timeout:
            late = Timeout(f"its device batch took {elapsed:.2f} s, its timeout is {timeout:g} s")
            return Ran(failed=[(work, late)])
    return ran


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might do."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def is_lost(error: BaseException) -> bool:
    """Whether the device's context is broken, so that only a new process helps."""
    if is_out_of_memory(error):
        return False
    kind = getattr(torch, "AcceleratorError", None)
    if kind is not None and isinstance(error, kind):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)
