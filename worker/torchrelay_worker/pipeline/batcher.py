"""Which inputs run together: device batches that are even, full, and let nothing starve.

Pure: no torch, no clock but the one passed in, nothing of jobs but their priority, length and arrival. Not here: making
tensors of a batch (`Model.collate`) and running it (`device`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

WINDOW = 8  # device batches' worth of inputs that are sorted by length at a time: evener with more, fairer with fewer
LOAD_PATIENCE = 2.0  # seconds for which models that are on the device go before those that would push them off


class Item(Protocol):
    """What the batcher knows of a prepared input."""

    @property
    def priority(self) -> int:
        """0 to 9, 9 the most urgent."""

    @property
    def length(self) -> int | None:
        """What padding is counted in, or None where the model has no lengths."""

    @property
    def arrived(self) -> float:
        """When its chunk was claimed, on the batcher's clock."""


T = TypeVar("T", bound=Item)


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a model's device batches may be."""

    size: int  # inputs
    wait: float = 0.005  # seconds that an input may wait for mates while the device is busy
    cost: int | None = None  # padded length x inputs
    padding: float = 0.1  # part of a batch that may be padding

    def of(self, items: Sequence[Item]) -> int | None:
        """Return the cost of a batch, or None where inputs have no length."""
        lengths = [item.length for item in items]
        return max(n or 0 for n in lengths) * len(items) if lengths and lengths[0] is not None else None


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """One forward pass to be: inputs of one model version."""

    version: int
    items: list[T]


def cut(items: Sequence[Item], limits: Limits) -> list[list[int]]:
    """Cut inputs, oldest first, into even batches of their indices; the batch with the oldest input first.

    No batch exceeds the size or the cost (but for a single input above it), and none is padded by more than
    `limits.padding`. Inputs without a length keep their order.
    """
    if not items or items[0].length is None:
        return [list(range(i, min(i + limits.size, len(items)))) for i in range(0, len(items), limits.size)]
    order = sorted(range(len(items)), key=lambda i: items[i].length or 0)
    runs: list[list[int]] = []
    run: list[int] = []
    total = 0
    for i in order:
        length = items[i].length or 0
        padded = length * (len(run) + 1)
        fits = (
            len(run) < limits.size
            and (limits.cost is None or padded <= limits.cost)
            and padded - (total + length) <= limits.padding * padded
        )
        if run and not fits:
            runs.append(run)
            run, total = [], 0
        run.append(i)
        total += length
    if run:
        runs.append(run)
    for run in runs:
        run.sort()
    runs.sort()
    return runs


class _Candidate(NamedTuple, Generic[T]):
    """An input among those of which the next device batch is chosen, and how many were served before it was."""

    item: T
    since: int


class Buffer(Generic[T]):
    """The prepared inputs of one model version, in the order of priority, then arrival. Not thread-safe.

    Of inputs with a length the first `size * WINDOW` are cut anew whenever some were added, and the fullest of these
    batches is next: what fits badly now waits for better mates, until as many others were served before it.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: dict[int, deque[T]] = {}
        self._pool: list[_Candidate[T]] = []  # by priority, then arrival, as the waiting
        self._runs: list[list[_Candidate[T]]] = []  # the pool, cut
        self._cut_by: Limits | None = None  # None: it is to be cut anew
        self._served = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, items: Sequence[T]) -> None:
        """Add inputs of one priority, in their order."""
        if items:
            self._waiting.setdefault(items[0].priority, deque()).extend(items)
            self._count += len(items)

    def priority(self) -> int:
        """Return the highest priority that waits; -1 if nothing does."""
        urgent = max((p for p, queue in self._waiting.items() if queue), default=-1)
        return max(urgent, self._pool[0].item.priority) if self._pool else urgent

    def oldest(self) -> float:
        """Return when the oldest input arrived; infinity if there is none."""
        heads = [queue[0].arrived for queue in self._waiting.values() if queue]
        heads.extend(item.arrived for item, _ in self._pool)
        return min(heads, default=float("inf"))

    def is_full(self) -> bool:
        """Whether a whole device batch waits."""
        return self._count >= self.limits.size or self._reaches_cost()

    def _reaches_cost(self) -> bool:
        if self.limits.cost is None:
            return False
        total = sum(item.length or 0 for item, _ in self._pool)
        for queue in self._waiting.values():
            for item in queue:  # fewer than `size`, or the buffer is full anyway
                total += item.length or 0
        return total >= self.limits.cost

    def next(self) -> list[T]:
        """Remove and return the next device batch. The buffer must not be empty."""
        if not self._pool and next(queue[0] for queue in self._waiting.values() if queue).length is None:
            batch = self._first()
        else:
            batch = self._fullest()
        self._count -= len(batch)
        self._served += len(batch)
        return batch

    def _first(self) -> list[T]:
        batch: list[T] = []
        for p in sorted(self._waiting, reverse=True):
            queue = self._waiting[p]
            while queue and len(batch) < self.limits.size:
                batch.append(queue.popleft())
        return batch

    def _fullest(self) -> list[T]:
        self._gather()
        if self._cut_by is not self.limits:
            items = [item for item, _ in self._pool]
            self._runs = [[self._pool[i] for i in run] for run in cut(items, self.limits)]
            self._cut_by = self.limits
        first = self._pool[0]
        if self._served - first.since >= self._most:
            run = self._runs[0]
        else:  # the oldest of equals
            run = max((r for r in self._runs if r[0].item.priority == first.item.priority), key=self._fullness)
        gone = set(map(id, run))
        self._runs = [other for other in self._runs if other is not run]
        self._pool = [candidate for candidate in self._pool if id(candidate) not in gone]
        return [item for item, _ in run]

    @property
    def _most(self) -> int:
        return self.limits.size * WINDOW

    def _gather(self) -> None:
        """Let into the pool what is among the first, the more urgent also where it is full."""
        before = len(self._pool)
        for p in sorted((p for p, queue in self._waiting.items() if queue), reverse=True):
            queue = self._waiting[p]
            room = self._most - sum(1 for item, _ in self._pool if item.priority >= p)
            self._pool.extend(_Candidate(queue.popleft(), self._served) for _ in range(min(room, len(queue))))
        if len(self._pool) > before:
            self._pool.sort(key=lambda candidate: -candidate.item.priority)
            self._cut_by = None

    def _fullness(self, run: Sequence[_Candidate[T]]) -> float:
        by_size = len(run) / self.limits.size
        if self.limits.cost is None:
            return by_size
        return max(by_size, sum(item.length or 0 for item, _ in run) / self.limits.cost)

    def discard(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Remove and return the inputs that are no longer wanted."""
        gone: list[T] = []
        for p, queue in self._waiting.items():
            gone.extend(item for item in queue if unwanted(item))
            self._waiting[p] = deque(item for item in queue if not unwanted(item))
        kept: list[_Candidate[T]] = []
        for candidate in self._pool:
            if unwanted(candidate.item):
                gone.append(candidate.item)
            else:
                kept.append(candidate)
        if len(kept) < len(self._pool):
            self._pool, self._cut_by = kept, None
        self._count -= len(gone)
        return gone


class Batcher(Generic[T]):
    """The buffers of all models of a worker, handed whole lists by the preparing threads and emptied by the device's.

    Thread-safe; the lock is held once a list or batch, never once a job.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buffers: dict[int, Buffer[T]] = {}
        self._changed = threading.Condition()
        self._poked = False

    def put(self, version: int, limits: Limits, items: Sequence[T]) -> None:
        """Add prepared inputs of one priority of a model version.

        Args:
            limits: those of the model; what `shrink` has learned since the version's first input stays.
        """
        with self._changed:
            buffer = self._buffers.get(version)
            if buffer is None:
                buffer = self._buffers[version] = Buffer(limits)
            buffer.put(items)
            self._changed.notify_all()

    def next_batch(self, idle: bool, resident: Collection[int] = ()) -> Batch[T] | None:
        """Remove and return the next device batch, or None if there is none to run yet.

        A full batch comes at once; one that is not full when the device is idle, or when its oldest input has waited
        as long as its model lets it. Among models: the most urgent, then whose oldest is overdue, then the fullest.

        Args:
            idle: the device has nothing to do.
            resident: the versions that are on the device; others wait for LOAD_PATIENCE while these have work.
        """
        with self._changed:
            now = self._clock()
            best: tuple[tuple[int, bool, float, float], int] | None = None
            for version, buffer in self._buffers.items():
                if not len(buffer):
                    continue
                waited = now - buffer.oldest()
                overdue = waited >= buffer.limits.wait
                if not (idle or overdue or buffer.is_full()):
                    continue
                near = not resident or version in resident or waited > LOAD_PATIENCE
                rank = (buffer.priority(), near, waited if overdue else 0.0, len(buffer) / buffer.limits.size)
                if best is None or rank > best[0]:
                    best = (rank, version)
            return Batch(best[1], self._buffers[best[1]].next()) if best else None

    def wait(self, timeout: float, idle: bool = True) -> None:
        """Return when something was put, when `poke` was called, when an input is overdue, or after `timeout` seconds.

        Args:
            idle: the device has nothing to do, so that anything that waits is a reason to return at once.
        """
        with self._changed:
            if not self._poked:
                buffers = [buffer for buffer in self._buffers.values() if len(buffer)]
                if any(idle or buffer.is_full() for buffer in buffers):
                    return
                now = self._clock()
                dues = [buffer.oldest() + buffer.limits.wait - now for buffer in buffers]
                self._changed.wait(max(0.0, min([timeout, *dues])))
            self._poked = False

    def poke(self) -> None:
        """Wake who waits."""
        with self._changed:
            self._poked = True
            self._changed.notify_all()

    def discard(self, unwanted: Callable[[T], bool], versions: Iterable[int] | None = None) -> list[T]:
        """Remove and return the inputs that are no longer wanted, such as cancelled ones."""
        with self._changed:
            chosen = self._buffers if versions is None else [v for v in versions if v in self._buffers]
            return [item for version in chosen for item in self._buffers[version].discard(unwanted)]

    def shrink(self, version: int, *, size: int, cost: int | None) -> Limits | None:
        """Remember that a batch of this size and cost fitted where a larger one did not; return the new limits."""
        with self._changed:
            buffer = self._buffers.get(version)
            if buffer is None:
                return None
            old = buffer.limits
            if cost is None:
                buffer.limits = replace(old, size=max(1, min(old.size, size)))
            else:  # memory goes with padded length x inputs, so short inputs keep their large batches
                buffer.limits = replace(old, cost=max(1, min(old.cost or cost, cost)))
            return buffer.limits

    def limits(self, version: int) -> Limits | None:
        """Return what is known of a version's limits."""
        with self._changed:
            buffer = self._buffers.get(version)
            return buffer.limits if buffer is not None else None

    def counts(self) -> dict[int, int]:
        """Return how many inputs of each version wait."""
        with self._changed:
            return {version: len(buffer) for version, buffer in self._buffers.items() if len(buffer)}
