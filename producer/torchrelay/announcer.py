"""announce(model): chunks that wait in SQL go out through Redis, as many as the workers need for a moment.

The one mechanism behind new jobs, delayed jobs, retries, lost messages, an emptied Redis, and fairness. Clients call it
after a submit, workers when a queue runs low, the maintenance leader where it sees that something waits; calls may
overlap. Lone jobs that nobody waits before are announced by the transaction that stores them, and only sent here.
Not here: which chunk is next (`ChunkStore.announce`), and how messages are sent (`broker`).
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from torchrelay import messages
from torchrelay.broker import Broker
from torchrelay_storage import faults
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import RelayError, Unreachable
from torchrelay_storage.events import get_logger
from torchrelay_storage.fleet import Fleet, WorkerRow
from torchrelay_storage.registry import LANE, Registry
from torchrelay_storage.waiting import Announced

log = get_logger("torchrelay.announcer")

HELD_SECONDS = 1.0  # of work that a worker holds itself (`pace.AHEAD_SECONDS`), and that is not in Redis
WAY_SECONDS = 0.25  # that a chunk may take from SQL through Redis to a worker, and that a rate may be off by
PER_WORKER = 2  # chunks: one to run and one to prepare
LEAST = 4  # chunks, where no worker is known yet
DRY = 5  # times: idle workers take in as many windows of two chunks each before they run any (8 messages, 2 held)
MOST = 512  # chunks: half a megabyte of Redis, more than any model's workers take in a moment
FLEET_SECONDS = 1.0  # for which the answer about the workers is used again
LOOK_SECONDS = 3.0  # between two looks at which messages of a model are still there
LOST_AFTER = 1.5  # seconds: what was announced before that and is in no queue was lost, or is being claimed right now
IDLE_SECONDS = 30.0  # without work after which the thread ends; the next wake starts another
RETRY_SECONDS = 1.0  # between two tries while Redis is away


def window(model: str, workers: Sequence[WorkerRow], seconds: float) -> int:
    """Return how many chunks of a model should be in Redis.

    A worker tells in its heartbeat's stats how many chunks a second it runs: {"rates": {"digits": 12.5}}.

    Args:
        seconds: of work that are announced and not begun, what the workers hold included.
    """
    serving = [w for w in workers if w.alive and (w.models is None or model in w.models)]
    rates = (_rate(w.stats, model) for w in serving)
    seconds = max(seconds - HELD_SECONDS - WAY_SECONDS, seconds / 4)
    wanted = max(math.ceil(seconds * sum(rates)), PER_WORKER * len(serving), LEAST)
    return min(wanted, max(MOST, PER_WORKER * len(serving)))


def _rate(stats: Mapping[str, Any], model: str) -> float:
    rates = stats.get("rates")
    rate = rates.get(model) if isinstance(rates, Mapping) else None
    return float(rate) if isinstance(rate, int | float) and math.isfinite(rate) else 0.0


def room(depths: Mapping[int, int], size: int) -> dict[int, int]:
    """Return for each priority how many chunks as urgent or more may still go, given what waits in the queue."""
    left, ahead = {}, 0
    for priority in sorted(messages.PRIORITIES, reverse=True):
        ahead += depths.get(priority, 0)
        left[priority] = max(size - ahead, 0)
    return left


class Demand:
    """How much more than its window a model's queue should hold, since it ran dry again and again.

    Heartbeats tell of a rate after seconds, and chunks of few jobs are gone in milliseconds: the queue doubles as long
    as it runs dry, and halves while it does not (as TCP's slow start, RFC 5681, does with what is on its way).
    """

    __slots__ = ("_dry", "grown", "is_full")

    def __init__(self) -> None:
        self.grown = 0  # chunks
        self._dry = 0  # how often in a row
        self.is_full = False  # after what was sent last

    def found(self, waiting: int, size: int) -> int:
        """Return how many chunks should be in Redis, where `waiting` were found there and `size` is the window."""
        wanted = max(self.grown, size)
        if self.is_full and not waiting:
            self._dry += 1
            if self._dry >= DRY:
                self.grown = min(2 * wanted, max(MOST, size))
        else:
            self._dry = 0
            if 2 * waiting > wanted:
                self.grown //= 2
        return max(self.grown, size)


class Announcer:
    """Moves chunks from SQL to Redis. Thread-safe; holds no state but what it may forget."""

    def __init__(self, db: Database, broker: Broker) -> None:
        self._chunks = ChunkStore(db)
        self._fleet = Fleet(db)
        self._registry = Registry(db)
        self._broker = broker
        self._settings = broker.settings
        self._models: dict[str, int] = {}
        self._workers: tuple[float, Sequence[WorkerRow]] = (-math.inf, ())
        self._looked: dict[str, float] = {}
        self._demand: dict[str, Demand] = defaultdict(Demand)

    def announce(self, model: str) -> int:
        """Announce what there is room for, the most urgent first, and return how many chunks went out.

        The move to `announced` is committed before anything is sent: a message never names a chunk that SQL does not
        know as announced. Where the sending fails, the chunks stay `announced`, and `announce_again` sends them later;
        they are not put back, since some may have arrived.

        Raises:
            Unreachable: Redis or the database does not answer.
            ModelNotFound: there is no such model.
        """
        depths, demand = self._broker.depths(messages.queue_name(model)), self._demand[model]
        waiting = sum(depths.values())
        size = demand.found(waiting, self._window(model))
        left = room(depths, size)
        sent = self.send(model, self._chunks.announce(self._id(model), left)) if any(left.values()) else 0
        demand.is_full = waiting + sent >= size
        return sent

    def announce_again(self, model: str) -> int:
        """Send anew what was announced and got lost: at once when the queue is empty, else by age.

        What still waits in the queue is not sent again, however long it waits. A message too many is harmless: the
        second claim of a chunk gets nothing. Raises as `announce`.
        """
        queue = messages.queue_name(model)
        size = max(self._window(model), self._demand[model].grown)
        if not any(self._broker.depths(queue).values()):
            return self.send(model, self._chunks.announce_again(self._id(model), LOST_AFTER, max(size, LEAST)))
        if time.monotonic() - self._looked.get(model, -math.inf) < min(LOOK_SECONDS, self._settings.announce_again):
            return 0
        self._looked[model] = time.monotonic()
        waiting = self._broker.waiting(queue)
        # A message that a worker holds and has no room for is missing here: a long queue must not fill up with copies.
        limit = max(size - len(waiting), 0 if model.startswith(LANE) else LEAST)
        if limit <= 0:
            return 0
        lost = self._chunks.announce_again(self._id(model), self._settings.announce_again, limit, waiting)
        return self.send(model, lost)

    def send(self, model: str, announced: Sequence[Announced]) -> int:
        """Send chunks that are committed as announced. Raises Unreachable."""
        if not announced:
            return 0
        faults.reach("announced")
        queue = messages.queue_name(model)
        return self._broker.send([(queue, a.priority, a.chunk) for a in announced])

    def window(self, model: str) -> int:
        """Return how many chunks of a model should be in Redis, as far as is known without asking the database."""
        read_at, workers = self._workers
        if time.monotonic() - read_at > FLEET_SECONDS:
            return LEAST
        return window(model, workers, self._settings.window)

    def _id(self, model: str) -> int:
        number = self._models.get(model)
        if number is None:
            lane = self._registry.find_lane(model.removeprefix(LANE)) if model.startswith(LANE) else None
            number = self._models[model] = (lane or self._registry.resolve(model)).model
        return number

    def _window(self, model: str) -> int:
        read_at, workers = self._workers
        if time.monotonic() - read_at > FLEET_SECONDS:
            workers = self._fleet.workers(self._settings.stale_after)
            self._workers = (time.monotonic(), workers)
        return window(model, workers, self._settings.window)


class Announces(Protocol):
    """What the thread needs of an Announcer."""

    def announce(self, model: str) -> int: ...
    def announce_again(self, model: str) -> int: ...
    def send(self, model: str, announced: Sequence[Announced]) -> int: ...
    def window(self, model: str) -> int: ...


class AnnouncerThread:
    """Announces off the caller's path, so that a submit never waits for Redis. A context manager; starts at first use.

    Wakes for one model coalesce. While Redis is away there is one warning, and a try a second until it is back.
    """

    def __init__(self, announcer: Announces, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._announcer = announcer
        self._retry_seconds = retry_seconds
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._pending: set[str] = set()
        self._outbox: dict[str, list[Announced]] = {}  # what is announced and to be sent, by model
        self._busy: str | None = None
        self._down_since: float | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def is_down(self) -> bool:
        """Whether the last try found Redis (or the database) away."""
        return self._down_since is not None

    def wake(self, model: str) -> None:
        """Announce this model soon. Returns at once; never raises."""
        self.send_many((model,), {})

    def window(self, model: str) -> int:
        """Return how many chunks of a model may be announced by whoever stores them, and given to `send_many`."""
        return 0 if self.is_down or self._closing else self._announcer.window(model)

    def send_many(self, models: Iterable[str], announced: Mapping[str, Sequence[Announced]]) -> None:
        """Send soon what is announced already, by model, and announce more of `models`. Returns at once; never raises.

        What is not sent before the process ends is sent by the maintenance leader, as what was lost.
        """
        with self._changed:
            if self._closing:
                return
            self._pending.update(models)
            for model, chunks in announced.items():
                self._outbox.setdefault(model, []).extend(chunks)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="torchrelay-announcer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until everything was announced, at most `timeout` seconds; at once where Redis is known to be away.

        Returns False where something was not: it stays in SQL, and the maintenance leader announces it.
        """
        with self._changed:
            return self._changed.wait_for(self._is_settled, timeout) and not self._has_work()

    def _has_work(self) -> bool:
        return bool(self._pending or self._outbox)

    def _is_settled(self) -> bool:
        return (not self._has_work() and self._busy is None) or self.is_down

    def close(self, timeout: float = 1.0) -> None:
        """Flush for at most `timeout` seconds, then end the thread."""
        self.flush(timeout)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def __enter__(self) -> AnnouncerThread:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        changed = self._changed  # a fork gives the object another one
        while True:
            with changed:
                if self.is_down:  # something was asked for and could not be done: no faster for being asked again
                    changed.wait_for(lambda: self._closing, self._retry_seconds)
                changed.wait_for(lambda: self._closing or self._has_work(), IDLE_SECONDS)
                if self._closing or not self._has_work():
                    self._thread = None  # an idle thread ends, so that a relay that nobody closed can be collected
                    return
                model = self._busy = next(iter(self._outbox or self._pending))
                chunks = self._outbox.pop(model, [])
                waits = model in self._pending
                self._pending.discard(model)
            done = self._announce(model, chunks, waits=waits)
            with changed:
                self._busy = None
                if not done:  # it may be sent twice, which is harmless
                    self._pending.add(model)
                    if chunks:
                        self._outbox[model] = [*chunks, *self._outbox.get(model, ())]
                changed.notify_all()

    def _announce(self, model: str, chunks: Sequence[Announced], *, waits: bool) -> bool:
        was_down = self._down_since
        try:
            self._announcer.send(model, chunks)
            if waits:
                self._announcer.announce(model)
            if was_down is not None:  # what was announced to a Redis that died may be lost
                self._announcer.announce_again(model)
        except Unreachable as error:
            if was_down is None:
                self._down_since = time.monotonic()
                log.warning("redis_unreachable", reason=str(error), effect="jobs wait in SQL until it is back")
            return False
        except RelayError as error:
            log.warning("announce_refused", model=model, reason=str(error))
        except Exception:
            log.exception("announce_failed", model=model)  # the maintenance leader tries it again soon
        if was_down is not None:
            self._down_since = None
            log.info("redis_reachable", seconds=round(time.monotonic() - was_down, 1))
        return True


_all: weakref.WeakSet[AnnouncerThread] = weakref.WeakSet()


def _forget() -> None:
    # A forked child has none of its parent's threads; the parent announces what it was asked to.
    for thread in _all:
        thread._reset()


os.register_at_fork(after_in_child=_forget)
