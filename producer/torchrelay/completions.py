"""Who waits for what, and waking them: thousands of waiters of a process share one subscription and its SQL queries.

Redis only says where to look; what is true is read from SQL. Where Redis is away, SQL is read now and then instead.
Not here: what a waiter does with the news (`handles`).

Two threads: `torchrelay-subscription` reads the channel, `torchrelay-completions` reads SQL and wakes. Both end when
nobody has waited for a while.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torchrelay import messages
from torchrelay_storage.errors import JobNotFound, RelayError
from torchrelay_storage.events import get_logger
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.states import TERMINAL

log = get_logger("torchrelay.completions")

POLL_SUBSCRIBED = 2.0  # seconds: a message of Redis's pub/sub can get lost, so SQL is asked all the same
POLL_FIRST, POLL_MOST, POLL_GROWTH = 0.05, 1.0, 1.5  # seconds, while there is no subscription
READ_SECONDS = 0.25  # for which the subscription's thread reads before it looks whether it should end
PING_SECONDS = 5.0  # of silence after which the subscription is tried
SILENT_SECONDS = 12.0  # of silence after which it counts as dead
IDLE_SECONDS = 10.0  # without a waiter after which the threads end
RECONNECT_SECONDS = 1.0
YOUNG_SECONDS = 0.005  # for which a job is young that was submitted while its end could be heard
PATIENCE = 0.02  # seconds until a young job is looked up, should nothing be heard of it

Delivery = JobRow | Exception


class Subscription(Protocol):
    """What is needed of redis-py's PubSub."""

    def subscribe(self, channel: str) -> Any: ...
    def get_message(self, *, timeout: float) -> Mapping[str, Any] | None: ...
    def ping(self) -> Any: ...
    def close(self) -> None: ...


class JobWait:
    """One waiter for one job. `deliver` is called once, from another thread, with the ended job's row or an error."""

    __slots__ = ("chunk", "deliver", "job")

    def __init__(self, job: int, chunk: int, deliver: Callable[[Delivery], None]) -> None:
        self.job = job
        self.chunk = chunk
        self.deliver = deliver


class Completions:
    """Wakes waiters. Threads start with the first waiter; a forked child gets threads of its own.

    Args:
        read: job ids -> the rows of those that exist, with their outputs.
        subscribe: opens a connection for the channel; raises what redis-py raises where Redis is away.
    """

    def __init__(
        self, read: Callable[[Sequence[int]], Mapping[int, JobRow]], subscribe: Callable[[], Subscription]
    ) -> None:
        self._read = read
        self._subscribe = subscribe
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waits: dict[int, set[JobWait]] = defaultdict(set)  # by job
        self._by_chunk: dict[int, set[int]] = defaultdict(set)  # chunk -> jobs waited for in it
        self._watches: dict[int, set[Callable[[], None]]] = defaultdict(set)  # by batch
        self._fresh: set[int] = set()  # jobs to look up now
        self._young: dict[int, float] = {}  # jobs to look up later, and when
        self._has_younger = False  # since the thread has last seen when the next of them is to be looked up
        self._hits: set[int] = set()  # chunks of which something ended
        self._subscribed_at = math.inf
        self._look_at_all = False
        self._closing = False
        self._threads: dict[str, threading.Thread] = {}

    # --- waiters ------------------------------------------------------------------------------------------

    @property
    def _subscribed(self) -> bool:
        return self._subscribed_at < math.inf

    def wait_for(
        self, job: int, chunk: int, deliver: Callable[[Delivery], None], submitted_at: float = -math.inf
    ) -> JobWait:
        """Call `deliver` once the job has ended, or at once where it has. Give the ticket to `drop` in the end.

        Args:
            submitted_at: by the monotonic clock, where this process has submitted it, so that it cannot have ended long
                ago: a look at such a job now would be in vain, and its end is heard.
        """
        now = time.monotonic()
        ticket = JobWait(job, chunk, deliver)
        with self._changed:
            self._waits[job].add(ticket)
            self._by_chunk[chunk].add(job)
            if self._subscribed_at < submitted_at and now - submitted_at < YOUNG_SECONDS:
                self._young[job] = now + PATIENCE
                self._has_younger = True
            else:
                self._fresh.add(job)
            self._start()
            self._changed.notify_all()
        return ticket

    def drop(self, ticket: JobWait) -> None:
        """Forget a waiter, delivered to or not."""
        with self._changed:
            waits = self._waits.get(ticket.job)
            if waits is not None:
                waits.discard(ticket)
                if not waits:
                    self._forget_job(ticket.job, ticket.chunk)

    def watch(self, batch: int, wake: Callable[[], None]) -> None:
        """Call `wake` whenever something of the batch may have ended, until `unwatch`.

        Whoever watches looks at SQL now and then by itself: `poll_seconds` says how often.
        """
        with self._changed:
            self._watches[batch].add(wake)
            self._start()
            self._changed.notify_all()

    def unwatch(self, batch: int, wake: Callable[[], None]) -> None:
        """End a watch."""
        with self._changed:
            self._watches[batch].discard(wake)
            if not self._watches[batch]:
                del self._watches[batch]

    @property
    def poll_seconds(self) -> float:
        """After how many seconds without news a watcher should look into SQL."""
        return POLL_SUBSCRIBED if self._subscribed else POLL_MOST / 2

    def hit(self, chunks: Iterable[int], batches: Iterable[int]) -> None:
        """Something ended in these chunks and batches: wake whom it concerns."""
        with self._changed:
            self._hits.update(c for c in chunks if c in self._by_chunk)
            wakes = [wake for b in batches if b in self._watches for wake in self._watches[b]]
            if self._hits:
                self._changed.notify_all()
        for wake in wakes:
            wake()

    @property
    def waiting(self) -> int:
        """How many jobs and batches are waited for."""
        return len(self._waits) + len(self._watches)

    def close(self) -> None:
        """End the threads. Who still waits gets an error."""
        with self._changed:
            self._closing = True
            left = [ticket for waits in self._waits.values() for ticket in waits]
            threads = list(self._threads.values())
            self._changed.notify_all()
        for ticket in left:
            ticket.deliver(RelayError("the relay was closed while something waited for a job"))
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(2 * READ_SECONDS + 1.0)

    # --- the threads --------------------------------------------------------------------------------------

    def _start(self) -> None:
        for name, run in (("torchrelay-completions", self._notify), ("torchrelay-subscription", self._listen)):
            if name not in self._threads:
                self._threads[name] = threading.Thread(target=run, name=name, daemon=True)
                self._threads[name].start()

    def _wanted(self) -> bool:
        return self._closing or bool(self._waits or self._watches)

    def _is_idle(self, name: str) -> bool:
        """Wait, holding the lock, for somebody to work for; after a while without, or at the end, a thread is over."""
        if not self._wanted():
            self._changed.wait_for(self._wanted, IDLE_SECONDS)
        if self._closing or not self._wanted():
            del self._threads[name]
            return True
        return False

    def _notify(self) -> None:
        changed, pause, looked_at = self._changed, POLL_FIRST, -math.inf
        while True:
            with changed:
                if self._is_idle("torchrelay-completions"):
                    return
                due = looked_at + (POLL_SUBSCRIBED if self._subscribed else pause)
                self._has_younger = False
                soonest = min(due, min(self._young.values(), default=due))
                changed.wait_for(self._has_news, max(soonest - time.monotonic(), 0.0) if self._waits else IDLE_SECONDS)
                grown = [job for job, at in self._young.items() if at <= time.monotonic()]
                self._fresh.update(grown)
                if self._fresh:
                    pause = POLL_FIRST
                if self._look_at_all or time.monotonic() >= due:
                    jobs = set(self._waits)
                    looked_at, pause = time.monotonic(), min(pause * POLL_GROWTH, POLL_MOST)
                else:
                    jobs = {job for chunk in self._hits for job in self._by_chunk.get(chunk, ())}
                    jobs |= self._fresh & self._waits.keys()
                self._look_at_all = False
                for job in jobs.intersection(self._young).union(grown):
                    del self._young[job]
                self._fresh.clear()
                self._hits.clear()
            if jobs:
                self._look(sorted(jobs))

    def _has_news(self) -> bool:
        return bool(self._closing or self._fresh or self._hits or self._look_at_all or self._has_younger)

    def _look(self, jobs: Sequence[int]) -> None:
        found: Mapping[int, JobRow]
        failure: Exception | None = None
        try:
            found = self._read(jobs)
        except Exception as error:  # each waiter raises it to its own caller
            found, failure = {}, error
        deliveries: list[tuple[JobWait, Delivery]] = []
        with self._changed:
            for job in jobs:
                row = found.get(job)
                if row is not None and row.state not in TERMINAL:
                    self._follow(job, row.chunk)
                    continue
                news: Delivery = row or failure or JobNotFound(
                    f"no job has the id {show(Kind.JOB, job)}; it was purged, or its transaction was rolled back"
                )  # fmt: skip
                for ticket in self._waits.get(job, ()):
                    deliveries.append((ticket, news))
                    chunk = ticket.chunk
                if job in self._waits:
                    self._forget_job(job, chunk)
        for ticket, news in deliveries:
            ticket.deliver(news)

    def _follow(self, job: int, chunk: int) -> None:
        """A job that is tried again has moved to another chunk."""
        for ticket in self._waits.get(job, ()):
            if ticket.chunk != chunk:
                self._leave(job, ticket.chunk)
                ticket.chunk = chunk
                self._by_chunk[chunk].add(job)

    def _forget_job(self, job: int, chunk: int) -> None:
        self._waits.pop(job, None)
        self._young.pop(job, None)
        self._leave(job, chunk)

    def _leave(self, job: int, chunk: int) -> None:
        jobs = self._by_chunk.get(chunk)
        if jobs is not None:
            jobs.discard(job)
            if not jobs:
                del self._by_chunk[chunk]

    def _listen(self) -> None:
        changed, warned = self._changed, False
        while True:
            with changed:
                if self._is_idle("torchrelay-subscription"):
                    return
            try:
                self._read_channel()
                warned = False
            except Exception as error:  # whatever ails the subscription: polling goes on, and another try follows
                if not warned and not self._closing:
                    log.warning("subscription_lost", reason=str(error), effect="results are polled until it is back")
                warned = True
            with changed:
                self._subscribed_at = math.inf
                changed.notify_all()
                if warned:
                    changed.wait_for(lambda: self._closing, RECONNECT_SECONDS)

    def _read_channel(self) -> None:
        """Read until nobody waits any more; raises what redis-py raises."""
        changed, subscription = self._changed, self._subscribe()
        try:
            subscription.subscribe(messages.CHANNEL)
            heard = pinged = wanted = time.monotonic()
            while True:
                message = subscription.get_message(timeout=READ_SECONDS)
                now = time.monotonic()
                if message is not None:
                    heard = now
                    self._heard(message)
                elif now - heard > SILENT_SECONDS:
                    raise ConnectionError("Redis has been silent for too long")
                elif now - max(heard, pinged) > PING_SECONDS:
                    subscription.ping()
                    pinged = now
                with changed:
                    wanted = now if self._waits or self._watches else wanted
                    if self._closing or now - wanted > IDLE_SECONDS:
                        return
        finally:
            subscription.close()

    def _heard(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "subscribe":
            with self._changed:  # what ended before that was not heard
                self._subscribed_at = time.monotonic()
                self._look_at_all = True
                wakes = [wake for watches in self._watches.values() for wake in watches]
                self._changed.notify_all()
            for wake in wakes:
                wake()
        elif message["type"] == "message":
            ended = messages.decode_ended(message["data"])
            self.hit(ended.chunks, ended.batches)


_all: weakref.WeakSet[Completions] = weakref.WeakSet()


def _forget() -> None:
    # A forked child has none of its parent's threads and waiters.
    for completions in _all:
        completions._reset()


os.register_at_fork(after_in_child=_forget)
