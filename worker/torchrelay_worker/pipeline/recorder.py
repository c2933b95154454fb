"""The last step: outputs decoded, encoded, and written in one transaction for one or several device batches.

Keeps what it has while the database is away. Not here: the statement (`JobStore.finish`), nor how failures are worded
(`outcomes`).
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, Protocol

import structlog
import tenacity

from torchrelay_storage import faults, values
from torchrelay_storage.artifacts import Artifacts, job_path, store_large
from torchrelay_storage.errors import RelayError, Unreachable
from torchrelay_storage.outcomes import Finished, Outcome, Successes
from torchrelay_worker.blackbox import BlackBox, scratch
from torchrelay_worker.pipeline import outcomes
from torchrelay_worker.pipeline.ledger import Hold, Ledger, Work, all_wanted, holds_of
from torchrelay_worker.pipeline.outcomes import BadOutput
from torchrelay_worker.pipeline.pace import Pace
from torchrelay_worker.pipeline.watch import Watch

log = structlog.get_logger("torchrelay.recorder")

TOGETHER = 4_096  # jobs in one transaction: more would gain nothing, and hold SQLite's one writer up
WAITING = 8_192  # jobs that may wait to be recorded before the device waits for them


@dataclass(slots=True)
class Ran:
    """What became of a device batch, or of inputs that never got into one."""

    done: list[tuple[Work, Any]] = field(default_factory=list)  # outputs not decoded yet
    failed: list[tuple[Work, BaseException]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.done) + len(self.failed)

    def works(self) -> Iterator[Work]:
        """The jobs in it."""
        for work, _ in (*self.done, *self.failed):
            yield work


class Finishes(Protocol):
    """What the recorder needs of a JobStore."""

    def finish(self, outcomes: Sequence[Outcome], worker: int, successes: Sequence[Successes] = ()) -> Finished: ...


class Recorder:
    """A thread that writes ends. `put` is called by the device's and the preparing threads."""

    def __init__(
        self,
        store: Finishes,
        ledger: Ledger,
        artifacts: Artifacts,
        publish: Callable[[Sequence[int], Sequence[int]], object],
        *,
        worker: int,
        inline_limit: int,
        pace: Pace | None = None,
        fatal: Callable[[BaseException], None] | None = None,
        longest_wait: float = 5.0,
        box: BlackBox | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._artifacts = artifacts
        self._publish = publish
        self._worker = worker
        self._inline_limit = inline_limit
        self._pace = pace or Pace()
        self._fatal = fatal
        self._longest_wait = longest_wait
        self._slot = (box or scratch()).slot()
        self._watch = watch or Watch()
        self._changed = threading.Condition()
        self._waiting: deque[Ran] = deque()
        self._jobs = 0
        self._busy: Sequence[Ran] = ()  # what is being recorded
        self._closing = threading.Event()
        self.recorded = 0  # jobs, since the start
        self.is_waiting = False  # for a database or an object store that is away
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, ran: Ran) -> None:
        """Hand over ends. Waits while many have not been recorded yet, so that the device does not run away."""
        if not len(ran):
            return
        with self._changed:
            self._changed.wait_for(lambda: self._jobs < WAITING or self._closing.is_set())
            self._waiting.append(ran)
            self._jobs += len(ran)
            self._changed.notify_all()

    def holds(self) -> set[Hold]:
        """Return the chunks of which something waits to be recorded, or is being recorded."""
        with self._changed:
            return {work.hold for ran in (*self._waiting, *self._busy) for work in ran.works()}

    def flush(self, timeout: float) -> bool:
        """Wait until all is recorded; False if it is not after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def stop(self, timeout: float) -> bool:
        """Record what there is, for at most `timeout` seconds, and end the thread; False if something is left."""
        done = self.flush(timeout)
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1.0 if not done else 10.0)
        return done

    def _run(self) -> None:
        try:
            while (some := self._take()) is not None:
                self._record(some)
                with self._changed:
                    self._busy = ()
                    self._changed.notify_all()
        except BaseException as error:
            log.critical("recorder_failed", exc_info=error)
            if self._fatal is None:
                raise
            self._fatal(error)

    def _take(self) -> list[Ran] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            if not self._waiting:
                return None
            some: list[Ran] = []
            n = 0
            while self._waiting and (not some or n + len(self._waiting[0]) <= TOGETHER):
                some.append(self._waiting.popleft())
                n += len(some[-1])
            self._jobs -= n
            self._busy = some
            self._changed.notify_all()
            return some

    def _record(self, some: Sequence[Ran]) -> None:
        works: list[Work] = []
        written: list[Outcome] = []
        successes: list[Successes] = []
        for ran in some:
            for work, error in ran.failed:
                works.append(work)
                if work.is_wanted:
                    written.append(outcomes.failed(work, error))
            if ran.done:
                self._encode(ran, successes, written)
                works.extend(map(_WORK, ran.done))
        holds = holds_of(works)
        for hold in holds:
            hold.recording = True
        finished = None
        if written or successes:
            finished = self._patiently(lambda: self._store.finish(written, self._worker, successes))
        if finished is not None:
            self.recorded += finished.recorded
            faults.reach("recorded")
            if finished.dropped:
                log.info("chunks_refused", chunks=len(finished.dropped))
                self._ledger.drop(finished.dropped)
            self._publish(finished.chunks, finished.batches)
        elif written or successes:
            lost = len(written) + sum(len(one.jobs) for one in successes)
            log.warning("results_lost", jobs=lost, reason="the database was away until the worker had to end")
        self._note(works, holds)
        for hold in holds:
            hold.recording = False

    def _note(self, works: Sequence[Work], holds: Mapping[Hold, int]) -> None:
        jobs: Counter[int] = Counter()
        for hold, n in holds.items():
            jobs[hold.claimed.model] += n
        chunks = self._ledger.ended(works)
        for model, n in jobs.items():
            self._pace.ended(model, n, chunks.get(model, 0), self._ledger.ahead(model)[1])

    def _encode(self, ran: Ran, successes: list[Successes], written: list[Outcome]) -> None:
        """Decode and encode the outputs of a device batch, and add what became of them to two lists."""
        by_hold: dict[Hold, list[tuple[Work, Any]]] = defaultdict(list)
        for done in ran.done:
            by_hold[done[0].hold].append(done)
        for hold, some in by_hold.items():
            wanted = some if all_wanted((hold,)) else [done for done in some if done[0].is_wanted]
            if wanted:
                self._encode_of(hold, wanted, successes, written)

    def _encode_of(
        self, hold: Hold, done: Sequence[tuple[Work, Any]], successes: list[Successes], written: list[Outcome]
    ) -> None:
        assert hold.resident is not None
        decode = hold.resident.model.decode
        works: list[Work] = []
        decoded: list[Any] = []
        cell = self._slot.cell
        seconds = outcomes.limit((hold,), hold.resident.model)
        with self._watch.running(seconds, "decoding the outputs of a device batch"):
            for work, output in done:
                cell[0] = work.job
                try:
                    decoded.append(decode(output))
                except BaseException as error:  # the author's code: whatever it raises is this one job's failure
                    written.append(outcomes.failed(work, error))
                else:
                    works.append(work)
            cell[0] = 0
        encoded: Sequence[bytes | RelayError]
        try:
            encoded = plain = values.encode_many(decoded)
        except RelayError:
            encoded = [_encode(value) for value in decoded]
        else:
            if max(map(len, plain), default=0) <= self._inline_limit:
                successes.append(_successes(hold, works, plain))
                return
        for work, data in zip(works, encoded, strict=True):
            stored = data if isinstance(data, RelayError) else self._stored(work, data)
            if isinstance(stored, RelayError):
                written.append(outcomes.failed(work, stored))
            else:
                successes.append(_successes(hold, [work], [stored]))

    def _stored(self, work: Work, data: bytes) -> bytes | RelayError:
        """Return what is to be written for an encoded output: itself, or where it is large, where it was put."""
        if len(data) <= self._inline_limit:
            return data
        path = job_path(work.job, "output")
        try:
            stored = self._patiently(lambda: store_large(self._artifacts, data, path, self._inline_limit))
        except RelayError as error:
            return error
        if stored is None:
            return Unreachable("the artifact store was away when the result was recorded")
        return bytes(stored)

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Do it again and again while the other side is away; None if the worker had to end before."""
        try:
            return call()
        except Unreachable as error:
            log.warning("recording_waits", reason=str(error))
            self.is_waiting = True
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unreachable),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=self._longest_wait),
            stop=tenacity.stop_when_event_set(self._closing),
            sleep=tenacity.sleep_using_event(self._closing),
            reraise=True,
        )
        try:
            result = attempts(call)
        except Unreachable:
            return None
        finally:
            self.is_waiting = False
        log.info("recording_goes_on")
        return result


def _encode(value: object) -> bytes | RelayError:
    try:
        return values.encode(value)
    except RelayError as error:
        return BadOutput(f"decode returned what cannot be stored: {error}")


_WORK = itemgetter(0)
_JOB = attrgetter("job")


def _successes(hold: Hold, works: Sequence[Work], outputs: Sequence[bytes]) -> Successes:
    return Successes(hold.claimed.chunk, hold.claimed.token, list(map(_JOB, works)), outputs)
