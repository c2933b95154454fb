"""Backpressure: whether there is room for what is submitted, under the limits on queued jobs; else QueueFull.

A model's limit stands in the registry, that of all models together is the setting `max_queued`. Training runs do not
count. Not here: storing what was admitted (`submitter`, `batches`, `sessions`).
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from torchrelay_storage.errors import QueueFull
from torchrelay_storage.registry import ModelVersion

COUNT_SECONDS = 1.0  # for which a count is used again while it leaves room
RECOUNT_SECONDS = 0.1  # and where only this client's own submits since then have filled it up: they may have run by now
COUNT_SHARE, RECOUNT_SHARE = 5, 20  # times as long as a count took: one that is slow is not made often
RATE_SECONDS = 60.0  # for which it is remembered how fast jobs left the queue

RETRY_SECONDS = 5.0  # where it is not known how fast they do
SHORTEST_RETRY = COUNT_SECONDS
LONGEST_RETRY = 60.0


class Jobs(Protocol):
    """What is needed of the JobStore."""

    def queued(self, model: int | None = None) -> int: ...

    def of_key(self, model: int, tenant: str, key: str) -> tuple[int, bytes] | None: ...


class Versions(Protocol):
    """What is needed of the Registry."""

    def version(self, number: int) -> ModelVersion: ...


class Gauge:
    """How many jobs of one model wait (or, without one, of all models), as far as this client can tell.

    What it knows is a count, and what it has stored itself since: `queued` is never too small by the client's own jobs,
    and too large by what has left the queue since the count.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit: int | None = limit
        self.counted_at = -math.inf
        self.pending = 0  # admitted; whether they were stored is not known yet
        self.stored = 0  # ever, by this client
        self.rate: float | None = None  # jobs a second that leave the queue, less those that others submit
        self._clock = clock
        self._count = 0
        self._counted = 0  # of `stored`: in the count for certain
        self._took = 0.0
        self._basis: tuple[float, int, int] | None = None  # of the rate: when, the count, what was stored

    @property
    def queued(self) -> int:
        """How many wait."""
        return self._count + self.stored - self._counted + self.pending

    @property
    def room(self) -> float:
        """How many more may come."""
        return math.inf if self.limit is None else max(self.limit - self.queued, 0)

    def is_stale(self, wanted: int, seconds: float) -> bool:
        """Whether to count anew before so many more are admitted or refused."""
        age = self._clock() - self.counted_at
        seconds *= max(1.0, COUNT_SHARE * self._took / COUNT_SECONDS)
        if self.room < wanted and self.stored > self._counted:
            return age >= min(seconds, max(RECOUNT_SECONDS, RECOUNT_SHARE * self._took))
        return age >= seconds

    def count(self, read: Callable[[], tuple[int, int | None]]) -> None:
        """Read the count and the limit anew."""
        began, before = self._clock(), self.stored  # what is stored while it reads may be in the count, or not
        self._count, self.limit = read()
        self._counted, self.counted_at = before, began
        self._took = self._clock() - began
        self._learn(began)

    def _learn(self, now: float) -> None:
        basis = self._basis
        if basis is not None and now - basis[0] < COUNT_SECONDS:
            return  # too short a time to judge by
        self._basis = now, self._count, self._counted
        self.rate = None
        if basis is not None and now - basis[0] < RATE_SECONDS:
            left = basis[1] + self._counted - basis[2] - self._count
            self.rate = left / (now - basis[0]) if left > 0 else None

    def retry_after(self, wanted: int) -> float:
        """Seconds until there should be room for so many."""
        if self.limit is not None and wanted > self.limit:
            return LONGEST_RETRY
        if self.rate is None:
            return RETRY_SECONDS
        return round(min(max((wanted - self.room) / self.rate, SHORTEST_RETRY), LONGEST_RETRY), 1)


class Place:
    """Room that was taken for jobs, until they are stored.

    What is not stored is given back, at the latest when nobody has the place any more: a task was cancelled, a session
    dropped.
    """

    __slots__ = ("_admission", "_gauges", "count")

    def __init__(self, count: int, gauges: tuple[Gauge, ...] = (), admission: Admission | None = None) -> None:
        self.count = count
        self._gauges = gauges
        self._admission = admission

    def stored(self, count: int | None = None) -> None:
        """So many of them are stored, or all."""
        self._leave(self.count if count is None else count, stored=True)

    def close(self) -> None:
        """The others will not be stored. Twice is harmless."""
        self._leave(self.count, stored=False)

    def _leave(self, count: int, *, stored: bool) -> None:
        if self._admission is None or not count:
            return
        with self._admission.lock:  # in a forked child another than when the room was taken
            self.count -= count
            for gauge in self._gauges:
                gauge.pending -= count
                gauge.stored += count if stored else 0

    def __enter__(self) -> Place:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self.close()

    def __del__(self) -> None:
        self.close()


FREE = Place(1)  # where there is no limit: nothing is counted


class Admission:
    """Says whether jobs may be submitted, and counts what it has admitted. Thread-safe.

    Args:
        jobs, versions: the JobStore and the Registry, which it reads the counts and limits from.
        total: the limit for all models together; None: none.
        seconds: for which a count is used again; 0: it never is.

    Where no limit is set nothing is read. Where one is, the count is read at most once a second while there is room
    (up to ten times a second where only the client's own submits since then have filled it), and what the client has
    submitted since is added. So one client never overshoots a limit. Several do by what the others submit within the
    second between two counts: n clients that find the same room at the same moment may each fill it, which is at worst
    n - 1 times that room, once, and nothing any more in the second after. Jobs that are retried are queued whatever
    the limit; those in a caller's own transaction are counted by others once it has committed.
    """

    def __init__(
        self,
        jobs: Jobs,
        versions: Versions,
        total: int | None,
        *,
        seconds: float = COUNT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = jobs
        self._versions = versions
        self._total = total
        self._seconds = seconds
        self._clock = clock
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        # A place may be given back by the garbage collector, in a thread that has the lock.
        self.lock = threading.RLock()
        self._gauges: dict[int | None, Gauge] = {}  # by the model's id; None: of all models

    def limits(self, version: ModelVersion) -> bool:
        """Whether a limit applies to jobs of this version."""
        return version.max_queued is not None or self._total is not None

    def forget(self) -> None:
        """Count anew before the next job: a limit was changed."""
        with self.lock:
            for gauge in self._gauges.values():
                gauge.counted_at = -math.inf

    def admit(self, version: ModelVersion, count: int) -> Place:
        """Take room for so many jobs, all or none. Raises QueueFull, and what a query raises."""
        return self._admit(version, count, count)

    def admit_some(self, version: ModelVersion, most: int) -> Place:
        """Take room for as many as there is room for, at least one. Raises as `admit`."""
        return self._admit(version, most, 1)

    def admit_job(self, version: ModelVersion, tenant: str, key: str | None) -> Place:
        """Take room for one job; one whose key is known needs none, since nothing will be stored. Raises as `admit`."""
        if not self.limits(version):
            return FREE
        try:
            return self._admit(version, 1, 1)
        except QueueFull:
            if key is not None and self._jobs.of_key(version.model, tenant, key) is not None:
                return FREE
            raise

    def _admit(self, version: ModelVersion, most: int, least: int) -> Place:
        if not self.limits(version) or not most:
            return Place(most)
        with self.lock:
            gauges = self._counted(version, most)
            for model, gauge in gauges.items():
                if gauge.room < least:
                    raise _full(version, model, gauge, least)
            count = int(min(most, *(gauge.room for gauge in gauges.values())))
            for gauge in gauges.values():
                gauge.pending += count
            return Place(count, tuple(gauges.values()), self)

    def _counted(self, version: ModelVersion, wanted: int) -> dict[int | None, Gauge]:
        """The gauges that a version's jobs count in, as fresh as they need to be."""
        limits = {version.model: version.max_queued, None: self._total}
        found: dict[int | None, Gauge] = {}
        for model, limit in limits.items():
            if limit is None:
                continue
            gauge = self._gauges.get(model)
            if gauge is None:
                gauge = self._gauges[model] = Gauge(limit, self._clock)
            if gauge.is_stale(wanted, self._seconds):
                gauge.count(self._reading(version, model))
            found[model] = gauge
        return found

    def _reading(self, version: ModelVersion, model: int | None) -> Callable[[], tuple[int, int | None]]:
        if model is None:
            return lambda: (self._jobs.queued(), self._total)
        return lambda: (self._jobs.queued(model), self._versions.version(version.id).max_queued)


def _full(version: ModelVersion, model: int | None, gauge: Gauge, wanted: int) -> QueueFull:
    wait = gauge.retry_after(wanted)
    limit = gauge.limit or 0
    if model is None:
        what = f"the queue of all models has {gauge.queued:,} of at most {limit:,} jobs (setting max_queued)"
        more = "raise the limit"
    else:
        what = f"the queue of model {version.name!r} has {gauge.queued:,} of at most {limit:,} jobs"
        more = f"raise the limit (`torchrelay models limit {version.name} N`)"
    if wanted > limit:
        fewer = "submit fewer, or pass a generator, which is stored as far as there is room"
        advice = "nothing fits" if wanted == 1 else f"{wanted:,} never fit at once: {fewer}"
        return QueueFull(f"{what}; {advice}; or {more}", wait)
    jobs = "another" if wanted == 1 else f"{wanted:,} more"
    return QueueFull(f"{what}: there is no room for {jobs}; try again in {wait:g} s, add workers, or {more}", wait)


_all: weakref.WeakSet[Admission] = weakref.WeakSet()


def _forget() -> None:
    # A thread that had the lock is not there in a forked child; and what its parent submits, the child reads.
    for admission in _all:
        admission._reset()


os.register_at_fork(after_in_child=_forget)
