"""The first step: messages in, chunks claimed, as many as this worker will soon run.

A Celery task hands over a chunk's id and waits until it is claimed; what is claimed goes to the preparing threads once
its model is loaded (`loader`). While Redis is away, chunks are claimed straight from SQL. A chunk whose last holder
died may have been the cause, and runs alone. A training run is handed to whoever starts its process. Not here: Celery
(`consumer`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from torchrelay_storage import faults
from torchrelay_storage.chunk_store import Claimed
from torchrelay_storage.errors import Unreachable
from torchrelay_worker.models.residency import Resident
from torchrelay_worker.pipeline.batcher import WINDOW
from torchrelay_worker.pipeline.ledger import Hold, Ledger
from torchrelay_worker.pipeline.loader import Loader
from torchrelay_worker.pipeline.pace import Pace
from torchrelay_worker.pipeline.preparer import Preparer

log = structlog.get_logger("torchrelay.intake")

TICK_SECONDS = 0.5  # between two looks around when nothing comes
QUIET_SECONDS = 1.0  # without a message after which Redis is asked whether it is there
RETRY_SECONDS = 0.5  # between two tries while the database is away
WAKE_SECONDS = 0.02  # between two wakes of the announcer for one model
SQL_LIMIT = 8  # chunks claimed at a time while Redis is away


class Claims(Protocol):
    """What the intake needs of a ChunkStore."""

    def claim(self, chunks: Sequence[int], worker: int) -> list[Claimed]: ...
    def claim_next(self, models: Sequence[int], worker: int, limit: int) -> list[Claimed]: ...
    def run_alone(self, chunk: int, token: int, worker: int) -> bool: ...


class Runs(Protocol):
    """What the intake needs of a Launcher of training runs."""

    def has_room(self) -> bool: ...
    def start(self, claimed: Claimed) -> None: ...


class NoRuns:
    """Of a worker that does not train."""

    def has_room(self) -> bool:
        """Never."""
        return False

    def start(self, claimed: Claimed) -> None:
        """Cannot be: no lane is served."""
        raise AssertionError(f"chunk {claimed.chunk} is a training run, and this worker does not train")


@dataclass(slots=True, eq=False)
class _Offer:
    model: str
    chunk: int
    answered: threading.Event = field(default_factory=threading.Event)
    taken: bool = False


class Intake:
    """Claims chunks, in a thread of its own."""

    def __init__(
        self,
        store: Claims,
        ledger: Ledger,
        preparer: Preparer,
        loader: Loader,
        *,
        pace: Pace,
        worker: int,
        served: Callable[[], Mapping[str, int]],
        wake: Callable[[str], object],
        redis_is_up: Callable[[], bool],
        opened: Callable[[], object] = lambda: None,
        loads_wait: Callable[[], bool] = lambda: False,
        lanes: Callable[[], Collection[int]] = frozenset,
        runs: Runs | None = None,
        fatal: Callable[[BaseException], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it.

        Args:
            served: the models that this worker serves: name -> id.
            lanes: which of them are lanes of training runs.
            runs: who starts these.
            wake: has a model's next chunks announced.
            opened: called when there is room again.
            loads_wait: whether a load waits for a loaded model to be free, so that nothing should be claimed for those.
        """
        self._store = store
        self._ledger = ledger
        self._preparer = preparer
        self._loader = loader
        self._pace = pace
        self._worker = worker
        self._served = served
        self._wake = wake
        self._redis_is_up = redis_is_up
        self._opened = opened
        self._loads_wait = loads_wait
        self._lanes = lanes
        self._runs = runs or NoRuns()
        self._fatal = fatal
        self._clock = clock
        self._changed = threading.Condition()
        self._offers: list[_Offer] = []
        # model -> inputs of a full device batch, and of how many it is chosen; once one of its versions is loaded
        self._sizes: dict[int, tuple[int | None, int]] = {}
        self._suspects: deque[Hold] = deque()  # each runs alone
        self._is_alone = False
        self._woken: dict[str, float] = {}
        self._to_wake: set[str] = set()
        self._closing = False
        self._nudged = False
        self.turns = 0  # how often the claiming thread has come round
        self.heard_at = clock()  # when a message last came
        self._thread = threading.Thread(target=self._guard, args=(self._run,), name="intake", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Claim nothing more, answer who waits, and end the thread."""
        with self._changed:
            self._closing = True
            offers, self._offers = self._offers, []
            self._changed.notify_all()
        for offer in offers:
            offer.answered.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # --- called by Celery's threads -----------------------------------------------------------------------

    def offer(self, model: str, chunk: int) -> bool:
        """Wait until a chunk whose message came is claimed, or found to be not ours to claim.

        Returns:
            False: this worker ends, and somebody else should get the message.
        """
        offer = _Offer(model, chunk)
        with self._changed:
            if self._closing or self._is_full_lane(model):
                return False
            self._offers.append(offer)
            self.heard_at = self._clock()
            self._changed.notify_all()
        offer.answered.wait()
        return offer.taken

    def has_room(self, model: str) -> bool:
        """Whether another message of this model should be pulled."""
        if self._closing:
            return False
        number = self._served().get(model)
        return number is None or self._has_room(number)

    def _is_full_lane(self, model: str) -> bool:
        """A run takes hours: a message that comes too late for this worker's place is another worker's at once."""
        return self._served().get(model) in self._lanes() and not self._runs.has_room()

    def _has_room(self, model: int) -> bool:
        if model in self._lanes():
            return self._runs.has_room()
        if self._suspects or self._is_alone:
            return False
        chunks, jobs = self._ledger.ahead(model)
        if self._loads_wait() and chunks:
            return False
        return self._pace.has_room(model, chunks, jobs, *self._sizes.get(model, (None, 0)))

    def has_loaded(self, resident: Resident) -> None:
        """Know how much of a model is a full device batch."""
        size = resident.limits.size
        self._sizes[resident.version.model] = size, WINDOW * size if resident.model.has_length else 0

    @property
    def is_offered(self) -> bool:
        """Whether messages came that are not claimed yet."""
        return bool(self._offers)

    @property
    def has_waiting(self) -> bool:
        """Whether messages wait to be claimed that there is room for."""
        return bool(self._ready())

    def nudge(self) -> None:
        """Say that there may be room again."""
        with self._changed:
            self._nudged = True
            self._changed.notify_all()
        self._opened()

    # --- the claiming thread ------------------------------------------------------------------------------

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            log.critical("intake_failed", exc_info=error)
            if self._fatal is None:
                raise
            self._fatal(error)

    def _run(self) -> None:
        away = False
        while True:
            with self._changed:
                seconds = WAKE_SECONDS if self._to_wake else TICK_SECONDS
                self._changed.wait_for(lambda: self._closing or self._nudged or self._ready(), seconds)
                self._nudged = False
                self.turns += 1
                if self._closing:
                    return
                ready = self._ready()
            try:
                if ready:
                    self._claim(ready)
                elif self._clock() - self.heard_at > QUIET_SECONDS:
                    self._claim_without_redis()
                self._turn_away()
                if self._suspects or self._is_alone:
                    self._send_next_suspect()
                self._wake_announcer()
                if away:
                    away = False
                    log.info("database_reachable")
            except Unreachable as error:
                if not away:
                    away = True
                    log.warning("database_unreachable", reason=str(error), effect="nothing is claimed until it is back")
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, RETRY_SECONDS)

    def _ready(self) -> list[_Offer]:
        return [offer for offer in self._offers if self.has_room(offer.model)]

    def _claim(self, ready: Sequence[_Offer]) -> None:
        # Several small chunks that wait are claimed by one statement; their jobs share device batches anyway.
        # Of runs one at a time: each takes a place.
        first = next((offer for offer in ready if self._served().get(offer.model) in self._lanes()), None)
        offers = [offer for offer in ready if offer is first or self._served().get(offer.model) not in self._lanes()]
        self._enter(self._store.claim([offer.chunk for offer in offers], self._worker))
        answered = set(map(id, offers))
        with self._changed:
            self._offers = [offer for offer in self._offers if id(offer) not in answered]
        for offer in offers:
            offer.taken = True
            offer.answered.set()
        self._to_wake.update(offer.model for offer in offers)

    def _turn_away(self) -> None:
        """Give back the messages of runs that came before this worker's place was taken by another."""
        with self._changed:
            full = [offer for offer in self._offers if self._is_full_lane(offer.model)]
            self._offers = [offer for offer in self._offers if offer not in full]
        for offer in full:
            offer.answered.set()

    def _wake_announcer(self) -> None:
        """Have announced what may follow what was claimed; for each model not more often than WAKE_SECONDS."""
        now = self._clock()
        for model in [m for m in self._to_wake if now - self._woken.get(m, 0.0) >= WAKE_SECONDS]:
            self._to_wake.discard(model)
            self._woken[model] = now
            self._wake(model)

    def _claim_without_redis(self) -> None:
        models = [number for number in self._served().values() if self._has_room(number)]
        if not models or self._redis_is_up():
            return
        lanes = [number for number in models if number in self._lanes()]
        for lane in lanes:
            if self._has_room(lane):
                self._enter(self._store.claim_next([lane], self._worker, 1))
        models = [number for number in models if number not in lanes]
        while models:
            claimed = self._store.claim_next(models, self._worker, SQL_LIMIT)
            self._enter(claimed)
            if not claimed or self._closing:
                return
            models = [number for number in models if self._has_room(number)]

    def _enter(self, claimed: Sequence[Claimed]) -> None:
        if claimed:
            faults.reach("claimed")
        lanes = self._lanes()
        for run in (c for c in claimed if c.model in lanes):
            self._runs.start(run)
        for hold in self._ledger.claim([c for c in claimed if c.model not in lanes]):
            if hold.claimed.suspect:
                self._suspects.append(hold)
            else:
                self._send(hold)

    def _send(self, hold: Hold) -> None:
        """Send a chunk to the preparing threads, or have its model loaded first."""
        self._pace.began(hold.claimed.model)
        if not hold.claimed.jobs:
            self._ledger.drop([hold.claimed.chunk])
        elif self._loader.pin(hold):
            self._preparer.put(hold)
        else:
            self._loader.put(hold)

    def _send_next_suspect(self) -> None:
        """Once nothing else runs, send the next chunk that must run alone.

        Should it take the process down, the database knows whom to blame, and that it is nobody else.
        """
        while self._suspects and self._suspects[0].dropped:
            self._suspects.popleft()
        if len(self._ledger) > len(self._suspects):
            return  # something runs
        if self._suspects:
            claimed = self._suspects[0].claimed
            self._is_alone = True
            ours = self._store.run_alone(claimed.chunk, claimed.token, self._worker)
            hold = self._suspects.popleft()
            if ours:
                self._send(hold)
            else:
                self._ledger.drop([claimed.chunk])
        elif self._is_alone:
            self._is_alone = False
            self._opened()
