"""Group commit: single submits of one process at one time share a transaction and, where they may, a chunk.

While one group commits, the next gathers; so a lone caller waits for nobody, and a thousand callers cost a few commits.
Not here: checking what is submitted (`core`), and batches, which fill their transactions themselves (`batches`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from torchrelay.admission import FREE, Admission, Place
from torchrelay_storage import faults
from torchrelay_storage.errors import KeyConflict, QueueFull, RelayError, Unreachable
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.submission import NewJob, Submission, Submitted
from torchrelay_storage.waiting import Announced

MOST_JOBS = 2_000  # in one transaction
MOST_BYTES = 16 << 20
IDLE_SECONDS = 30.0  # without work after which the thread ends; the next submit starts another


class Stores(Protocol):
    """What is needed of the JobStore."""

    def submit(self, submissions: Sequence[Submission]) -> list[list[Submitted | KeyConflict]]: ...


@dataclass(slots=True)
class _Entry:
    version: ModelVersion
    options: Options
    job: NewJob
    future: Future[Submitted] = field(default_factory=Future)
    place: Place = FREE


class Submitter:
    """Stores single jobs in groups, on a thread of its own that starts with the first job.

    Args:
        store: the JobStore.
        on_commit: called after each commit with the names of the models of which something waits to be announced, and,
            by model, what is announced already and must be sent; must not raise, nor take long.
        admission: says whether there is room for a job; None: there always is.
        window: how many chunks of a model, by its name, may be announced by the transaction that stores them.
    """

    def __init__(
        self,
        store: Stores,
        on_commit: Callable[[Collection[str], Mapping[str, Sequence[Announced]]], None],
        admission: Admission | None = None,
        window: Callable[[str], int] = lambda model: 0,
    ) -> None:
        self._store = store
        self._on_commit = on_commit
        self._admission = admission
        self._window = window
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, version: ModelVersion, options: Options, job: NewJob) -> Future[Submitted]:
        """Queue a job; the future is done when its transaction is.

        It raises KeyConflict, QueueFull, Unreachable, or what else kept this very job out. A future that is cancelled
        before its group is formed leaves nothing behind.
        """
        entry = _Entry(version, options, job)
        with self._changed:
            if self._closing:
                raise RelayError("the relay is closed; make another one")
            self._queue.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="torchrelay-submitter", daemon=True)
                self._thread.start()
            self._changed.notify()
        return entry.future

    def close(self) -> None:
        """Commit what is queued, then end the thread."""
        with self._changed:
            self._closing = True
            thread = self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        changed = self._changed
        while True:
            with changed:
                changed.wait_for(lambda: self._closing or self._queue, IDLE_SECONDS)
                if not self._queue:
                    self._thread = None
                    return
                group = self._take()
            group = self._admit(group)
            if group:
                self._commit(group)

    def _take(self) -> list[_Entry]:
        group: list[_Entry] = []
        size = 0
        while self._queue and len(group) < MOST_JOBS and size < MOST_BYTES:
            entry = self._queue.popleft()
            if entry.future.set_running_or_notify_cancel():
                group.append(entry)
                size += len(entry.job.input)
        return group

    def _admit(self, group: list[_Entry]) -> list[_Entry]:
        """Leave out what there is no room for. Here, and not at the submit: an event loop must not wait for a count."""
        admission = self._admission
        if admission is None or not any(admission.limits(entry.version) for entry in group):
            return group
        admitted: list[_Entry] = []
        broken: Exception | None = None  # the database's: the next would wait for it in vain too
        for entry in group:
            try:
                if broken is not None and admission.limits(entry.version):
                    raise broken
                entry.place = admission.admit_job(entry.version, entry.options.tenant, entry.job.key)
            except Exception as error:
                entry.future.set_exception(error)
                broken = None if isinstance(error, QueueFull) else error
            else:
                admitted.append(entry)
        return admitted

    def _commit(self, group: Sequence[_Entry]) -> None:
        """Store a group in one transaction; where that fails for any reason but the database's, one by one."""
        alike: dict[tuple[int, Options], list[_Entry]] = defaultdict(list)
        for entry in group:
            alike[entry.version.id, entry.options].append(entry)
        submissions = [
            Submission(es[0].version, es[0].options, [e.job for e in es], window=self._window(es[0].version.name))
            for es in alike.values()
        ]
        try:
            placed = self._store.submit(submissions)
        except Exception as error:
            if len(group) == 1 or isinstance(error, Unreachable):
                for entry in group:
                    entry.place.close()
                    entry.future.set_exception(error)
            else:  # one of them is to blame, and the others must not suffer for it
                for entry in group:
                    self._commit([entry])
            return
        faults.reach("committed")
        waiting: set[str] = set()
        announced: dict[str, dict[int, Announced]] = defaultdict(dict)
        told: list[tuple[Future[Submitted], Submitted]] = []
        for entries, results in zip(alike.values(), placed, strict=True):
            model = entries[0].version.name
            for entry, result in zip(entries, results, strict=True):
                if isinstance(result, KeyConflict):
                    entry.place.close()
                    entry.future.set_exception(result)
                    continue
                if result.existed:
                    entry.place.close()
                else:
                    entry.place.stored()
                if result.announced:
                    announced[model][result.chunk] = Announced(result.chunk, entry.options.priority)
                else:
                    waiting.add(model)
                told.append((entry.future, result))
        # Before the callers run on, and ask how it stands.
        self._on_commit(waiting, {model: list(chunks.values()) for model, chunks in announced.items()})
        for future, result in told:
            future.set_result(result)


_all: weakref.WeakSet[Submitter] = weakref.WeakSet()


def _forget() -> None:
    # A forked child has none of its parent's threads; what its parent queued, its parent stores.
    for submitter in _all:
        submitter._reset()


os.register_at_fork(after_in_child=_forget)
