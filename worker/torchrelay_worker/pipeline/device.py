"""The device's thread: one forward pass after the other, and what is done when one fails.

The forward of this batch runs beside the preparing of the next (other threads), the copy of the next to a CUDA device
(launched before this one is waited for), and the recording of the last. Not here: what runs together (`batcher`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from torchrelay_worker.models.model import Model, move, nan_rows
from torchrelay_worker.models.residency import Residency
from torchrelay_worker.pipeline.batcher import Batch, Batcher
from torchrelay_worker.pipeline.ledger import Ledger, Work
from torchrelay_worker.pipeline.outcomes import BadOutput, NotANumber, Timeout
from torchrelay_worker.pipeline.recorder import Ran, Recorder
from torchrelay_worker.pipeline.watch import Watch

log = structlog.get_logger("torchrelay.device")

IDLE_SECONDS = 1.0  # between two looks at an empty batcher; anything put wakes it at once
GRACE_SECONDS = 1.0  # beyond a device batch's limit, so that a batch that ends just in time is not killed


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it.

        Args:
            busy: told when the device begins to have work (True) and when it has none (False).
        """
        self._tell_busy = busy
        self._is_busy = False
        self._batcher = batcher
        self._recorder = recorder
        self._ledger = ledger
        self._residency = residency
        self._watch = watch
        self._fatal = fatal
        self._clock = clock
        self._closing = threading.Event()
        self._settled_at = 0.0
        self.batches = 0  # since the start
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """End after the batch that runs now; False if it still runs after `timeout` seconds."""
        self._closing.set()
        self._batcher.poke()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

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
            batch = None
            if not self._closing.is_set():
                batch = self._batcher.next_batch(pending is None, self._residency.resident())
            self._note_busy(batch is not None or pending is not None)
            launched = self._launch(batch) if batch is not None else None
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
        works = [w for w in batch.items if w.is_wanted]
        if len(works) < len(batch.items):
            self._ledger.ended([w for w in batch.items if not w.is_wanted])
        if not works:
            return None
        resident = works[0].hold.resident
        assert resident is not None
        model = resident.model
        watched = self._watch.begin(limit(works, model) + GRACE_SECONDS)
        launched = Launched(batch.version, model, works, self._clock(), watched)
        try:
            launched.outputs = self._forward(model, works)
        except BaseException as error:  # the author's code: whatever it raises is the failure of these jobs
            launched.error = error
        return launched

    def _forward(self, model: Model, works: Sequence[Work]) -> Any:
        with torch.inference_mode():
            inputs = move(model.collate([w.prepared for w in works]), self._residency.device)
            return model.forward(inputs)

    def _settle(self, launched: Launched) -> None:
        try:
            ran = self._results(launched)
        finally:
            self._watch.end(launched.watched)
        now = self._clock()
        elapsed = now - max(launched.started, self._settled_at)
        self._settled_at = now
        self.batches += 1
        for work in launched.works:
            work.prepared = None  # its memory is wanted for the next
        self._recorder.put(_late(ran, elapsed))

    def _results(self, launched: Launched) -> Ran:
        error = launched.error
        if error is None:
            try:
                return self._collect(launched.model, launched.works, launched.outputs)
            except BaseException as late:  # on CUDA an error of the forward shows here
                error = late
        launched.outputs = launched.error = None
        ran = Ran()
        self._by_parts(launched.version, launched.model, launched.works, error, ran)
        return ran

    def _collect(self, model: Model, works: Sequence[Work], outputs: Any) -> Ran:
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

    def _by_parts(self, version: int, model: Model, works: Sequence[Work], error: BaseException, ran: Ran) -> None:
        """Run a batch that failed in halves, so that only the guilty input fails, or none if it was too large."""
        if is_lost(error):
            raise DeviceLost(str(error)) from error
        short = is_out_of_memory(error)
        if short:
            error = error.with_traceback(None)  # its frames hold the tensors that are in the way
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(works) == 1:
            ran.failed.append((works[0], error))
            return
        middle = len(works) // 2
        for half in (works[:middle], works[middle:]):
            half_error: BaseException | None = None
            try:
                part = self._collect(model, half, self._forward(model, half))
            except BaseException as again:
                half_error = again
            if half_error is not None:
                self._by_parts(version, model, half, half_error, ran)
                continue
            ran.done.extend(part.done)
            ran.failed.extend(part.failed)
            if short:
                self._remember(version, half)

    def _remember(self, version: int, works: Sequence[Work]) -> None:
        limits = self._batcher.limits(version)
        if limits is not None:
            fitted = self._batcher.shrink(version, size=len(works), cost=limits.of(works))
            if fitted != limits:
                log.warning("device_batch_halved", version=version, size=len(works), reason="out of memory")


def limit(works: Sequence[Work], model: Model) -> float:
    """Return the seconds that a device batch may take: the longest of its jobs' timeouts, where none, the model's."""
    timeouts = {w.hold.claimed.timeout for w in works}
    return max(float(model.timeout) if t is None else t for t in timeouts)


def _late(ran: Ran, elapsed: float) -> Ran:
    if not any(w.hold.claimed.timeout is not None and elapsed > w.hold.claimed.timeout for w, _ in ran.done):
        return ran
    kept = []
    for work, output in ran.done:
        timeout = work.hold.claimed.timeout
        if timeout is not None and elapsed > timeout:
            ran.failed.append((work, Timeout(f"its device batch took {elapsed:.2f} s, its timeout is {timeout:g} s")))
        else:
            kept.append((work, output))
    ran.done = kept
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
