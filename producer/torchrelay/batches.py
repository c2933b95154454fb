"""Batches without handles: storing an iterable slice by slice, and walking over what has ended.

Steps that block and return, so that Batch and AsyncBatch differ only in how they wait between them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

from torchrelay.admission import Place
from torchrelay.checks import check_key
from torchrelay_storage import faults, values
from torchrelay_storage.batch_store import BatchChunk, BatchRow
from torchrelay_storage.errors import InvalidInput, KeyConflict, QueueFull
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.options import Options
from torchrelay_storage.submission import Submission

if TYPE_CHECKING:
    from torchrelay.core import Core

SLICE_JOBS, MOST_JOBS = 4_096, 16_384  # inputs in one transaction at first, and of a fast stream; in whole chunks
FAST_SECONDS = 0.25  # in which a fast stream fills a slice
SLICE_BYTES = 16 << 20
GROUP_JOBS = 512  # inputs taken from the iterable and encoded at once
GROUP_BYTES = 1 << 20
STEP_CHUNKS = 4  # whose ended jobs are read at once


class BatchWriter:
    """Stores the inputs of a batch in order, in constant memory.

    `skip` inputs are stored already, where a key found a batch that somebody began; they are passed to `add` all the
    same, and the first of them is compared. What was added is stored by `flush` at the latest; `close` writes the
    batch's end.

    Raises (all of it):
        InvalidInput: an option, the key, the metadata or an input is refused; of an input, the message has its index.
        KeyConflict: the batch with this key was submitted with other inputs.
        QueueFull: there is no room for all inputs where their number is known, else for more; it says what is stored.
        ModelNotFound, Unreachable.
    """

    def __init__(
        self, core: Core, model: str, options: Options, *, key: str | None, metadata: Mapping[str, Any] | None
    ) -> None:
        options.validate()
        check_key(key)
        core.encode_metadata(metadata)
        self._core = core
        self._options = options
        self._key = key
        self.version = core.fresh_model(model)  # how many jobs travel together may just have been measured
        self.skip = 0
        self._added = 0
        self._stored = 0
        self._place = Place(0)  # what room there is for inputs whose number is known
        self._metadata = metadata
        self._batch: BatchRow | None = None
        self._pending: list[bytes] = []  # as they are stored: in the row, or a reference
        self._pending_bytes = 0
        self._group = 16
        self._slice = self._whole(SLICE_JOBS)
        self._filled_at = time.monotonic()  # when a slice was last full

    def _whole(self, jobs: int) -> int:
        size = max(1, self.version.chunk_size)
        return max(size, jobs // size * size)

    @property
    def batch(self) -> BatchRow:
        """The batch's row."""
        assert self._batch is not None, "open() comes first"
        return self._batch

    @property
    def _shared(self) -> Submission:
        """What all of its jobs have in common."""
        return Submission(self.version, self._options, (), batch=self.batch.id)

    @property
    def group(self) -> int:
        """How many inputs to take from the iterable next: fewer where they are large."""
        return self._group

    def check(self, inputs: Sequence[object]) -> None:
        """Refuse a list that holds a bad input before anything of it is stored."""
        for start in range(0, len(inputs), GROUP_JOBS):
            self._encode(inputs[start : start + GROUP_JOBS], start)

    def open(self, total: int | None = None) -> None:
        """Make the batch's row, or find the one that has the key; `total` is the number of inputs where it is known."""
        core = self._core.ready()
        self._reserve(total)
        batch = core.batches.create(self.version, self._options, key=self._key, metadata=self._metadata)
        self._batch = batch
        if self._key is None:
            return
        self.skip = self._stored = core.batches.stored(batch.id)
        if self.skip and batch.version_id != self.version.id:
            self.version = core.registry.version(batch.version_id)  # it goes on as it began
        if total is not None and (total < self.skip or (batch.closed and total != self.skip)):
            raise self._conflict()

    def _reserve(self, total: int | None) -> None:
        """Take room for all that will come, where it is known how much, before anything is stored; else for a first."""
        admission, version = self._core.admission, self.version
        if not admission.limits(version):
            return
        stores = self._core.batches
        known = stores.of_key(version.model, self._options.tenant, self._key) if self._key is not None else None
        if total is None:
            if known is None:
                admission.admit_some(version, 1).close()
            return
        missing = total - (stores.stored(known.id) if known is not None else 0)
        if missing > 0:
            self._place = admission.admit(version, missing)

    def abandon(self) -> None:
        """No more will come, and the batch stays open."""
        self._place.close()

    def add(self, inputs: Sequence[object]) -> None:
        """Take the next inputs; store a slice when it is full. What came before a bad input is stored."""
        start = self._added
        self._added += len(inputs)
        if start == 0 and self.skip and inputs:
            self._compare_first(inputs[0])
        inputs = inputs[max(self.skip - start, 0) :]
        start = max(start, self.skip)
        if not inputs:
            return
        if self.batch.closed:
            raise self._conflict()  # all that it has is stored, and here is more
        try:
            encoded = self._encode(inputs, start)
        except InvalidInput:
            self._take(list(self._until_bad(inputs)))
            self.flush()
            raise
        self._take(encoded)
        average = max(1, sum(map(len, encoded)) // len(encoded))
        self._group = max(1, min(GROUP_JOBS, GROUP_BYTES // average, self._group * 2))

    def flush(self) -> None:
        """Store what was added and is not stored yet."""
        self._store(len(self._pending))

    def close(self) -> BatchRow:
        """Store the rest, and write that no more will come."""
        self.flush()
        if self._added < self.skip:
            raise self._conflict()
        if not self.batch.closed:
            self._core.batches.close(self.batch.id)
            # Who waits in another process looks into SQL soon; Redis may be silent, and is not on a submit's path.
            self._core.completions.hit((), (self.batch.id,))
        return self.batch

    def _take(self, encoded: Sequence[bytes]) -> None:
        limit, store_input = self._core.settings.inline_limit, self._core.store_input
        if max(map(len, encoded)) > limit:
            encoded = [data if len(data) <= limit else store_input(data) for data in encoded]
        self._pending += encoded
        self._pending_bytes += sum(map(len, encoded))
        while len(self._pending) >= self._slice:
            since, self._filled_at = self._filled_at, time.monotonic()
            self._store(self._slice)
            if self._filled_at - since < FAST_SECONDS:  # a slow one's jobs should not wait for more company
                self._slice = self._whole(min(2 * self._slice, MOST_JOBS))
        if self._pending_bytes >= SLICE_BYTES:
            self.flush()

    def _store(self, count: int) -> None:
        while count:
            with self._admit(count) as place:
                part = min(count, place.count)
                self._core.jobs.extend(self._shared, self._pending[:part])
                place.stored(part)
            faults.reach("committed")
            del self._pending[:part]  # what could not be stored stays, and the next flush tries it again
            self._pending_bytes = sum(map(len, self._pending))
            self._stored += part
            self._core.wake(self.version.name)
            count -= part

    def _admit(self, count: int) -> Place:
        """Room for so many of the pending inputs, or for some. Raises QueueFull, with what was stored before."""
        if self._place.count >= count:
            return self._place
        try:
            # A stream may go on for hours: a limit that is set meanwhile holds for it too.
            return self._core.admission.admit_some(self._core.model(self.version.name), count)
        except QueueFull as full:
            for data in self._pending:
                self._core.forget_input(data)
            self._pending, self._pending_bytes = [], 0
            raise self._stopped(full) from None

    def _stopped(self, full: QueueFull) -> QueueFull:
        name = show(Kind.BATCH, self.batch.id)
        if self._key is not None:
            after = f"the same inputs submitted under the key {self._key!r} go on there"
        else:
            after = f"wait for room before the rest, or cancel {name} (a `key` would let the same inputs go on there)"
        words = f"{full}. The first {self._stored:,} inputs are stored and run as batch {name}, which is open: {after}"
        return QueueFull(words, full.retry_after, batch=name, stored=self._stored)

    def _encode(self, inputs: Sequence[object], start: int) -> list[bytes]:
        try:
            encoded = values.encode_many(inputs)
            if max(map(len, encoded)) <= self._core.settings.max_input_bytes:
                return encoded
        except InvalidInput:
            pass
        encoded = []
        for i, value in enumerate(inputs):
            try:
                encoded.append(self._core.check_size(values.encode(value)))
            except InvalidInput as error:
                raise InvalidInput(f"input {start + i}: {error}") from None
        return encoded

    def _until_bad(self, inputs: Sequence[object]) -> Iterator[bytes]:
        for value in inputs:
            try:
                yield self._core.check_size(values.encode(value))
            except InvalidInput:
                return

    def _compare_first(self, value: object) -> None:
        """A key with other inputs is a mistake. The first stands for all: to compare a million would cost a submit."""
        chunks = self._core.batches.chunks(self.batch.id)
        if not chunks:
            return
        stored = self._core.jobs.get([chunks[0].first], with_input=True, with_output=False)
        row = stored.get(chunks[0].first)
        if row is None or row.input is None:
            return
        encoded = self._encode([value], 0)[0]
        reference = values.as_reference(row.input)
        if reference is not None:
            same = reference.size == len(encoded)
        else:
            same = values.digest(row.input) == values.digest(encoded)
        if not same:
            raise self._conflict()

    def _conflict(self) -> KeyConflict:
        return KeyConflict(self._key or "", show(Kind.BATCH, self.batch.id))


def refuse_no_iterable(inputs: object) -> None:
    """Raise InvalidInput for what iterates, and is one input all the same."""
    if isinstance(inputs, str | bytes | Mapping):
        raise InvalidInput(f"a batch is made of an iterable of inputs; a {type(inputs).__name__} is one input")


def write(writer: BatchWriter, inputs: Iterable[object]) -> BatchRow:
    """Store a whole iterable. Where it raises, what it gave before is stored, and the batch stays open."""
    refuse_no_iterable(inputs)
    if isinstance(inputs, Sequence):
        writer.check(inputs)
    writer.open(len(inputs) if isinstance(inputs, Sized) else None)
    try:
        return _write(writer, iter(inputs))
    finally:
        writer.abandon()


def _write(writer: BatchWriter, source: Iterator[object]) -> BatchRow:
    while True:
        group: list[object] = []
        try:
            group.extend(islice(source, writer.group))
        except Exception:
            writer.add(group)  # extend has kept what came before the error
            writer.flush()
            raise
        if not group:
            return writer.close()
        writer.add(group)


class Arrivals:
    """The jobs of a batch in the order in which they end, each once."""

    def __init__(self, core: Core, batch: int) -> None:
        self._core = core
        self._batch = batch
        self._seen: dict[int, set[int]] = {}  # chunk -> jobs given out, while the chunk is open
        self._done: dict[int, int] = {}  # chunk -> how many were given out in the end
        self._todo: list[BatchChunk] = []

    def step(self) -> tuple[list[JobRow], bool]:
        """Return the next jobs that have ended, and whether that was the end; nothing: wait, and try again."""
        if not self._todo:
            closed = self._core.batches.get(self._batch).closed  # before the chunks: none may come in between
            chunks = self._core.batches.chunks(self._batch)
            self._todo = [c for c in reversed(chunks) if c.ended > self._given(c.id)]
            if not self._todo:
                return [], closed and all(c.ended == c.size for c in chunks)
        part = [self._todo.pop() for _ in range(min(STEP_CHUNKS, len(self._todo)))]
        rows: list[JobRow] = []
        for chunk in part:
            seen = self._seen.setdefault(chunk.id, set())
            fresh = [r for r in self._core.jobs.ended_in([chunk.id]) if r.id not in seen]
            rows.extend(fresh)
            seen.update(r.id for r in fresh)
            if len(seen) >= chunk.size:
                self._done[chunk.id] = len(self._seen.pop(chunk.id))
        rows.sort(key=lambda row: row.finished_at or 0.0)
        return rows, False

    def _given(self, chunk: int) -> int:
        return self._done[chunk] if chunk in self._done else len(self._seen.get(chunk, ()))


class InOrder:
    """The jobs of a batch in the order of their inputs, each as soon as all before it have ended."""

    def __init__(self, core: Core, batch: int) -> None:
        self._core = core
        self._batch = batch
        self._chunks: list[BatchChunk] = []
        self._closed = False
        self._at = 0  # in chunks: all before it are given out
        self._next = 0  # the smallest id that was not given out

    def step(self) -> tuple[list[JobRow], bool]:
        """As `Arrivals.step`."""
        found = self._run()
        if found is None or not all(c.ended == c.size for c in found[1]):
            self._closed = self._core.batches.get(self._batch).closed
            self._chunks = self._core.batches.chunks(self._batch)
            self._at = 0
            found = self._run()
            if found is None:
                return [], self._closed
            if not all(c.ended == c.size for c in found[1]):
                return [], False
        last, members = found
        rows = [r for r in self._core.jobs.ended_in([c.id for c in members]) if self._next <= r.id <= last]
        self._next = last + 1
        return rows, False

    def _run(self) -> tuple[int, list[BatchChunk]] | None:
        """The next run of ids, and every chunk with jobs in it: a job that is tried again moves to another chunk."""
        while self._at < len(self._chunks) and self._chunks[self._at].last < self._next:
            self._at += 1
        if self._at == len(self._chunks):
            return None
        last = self._chunks[self._at].last
        members = []
        for chunk in islice(self._chunks, self._at, None):
            if chunk.first > last:
                break
            if chunk.last >= self._next and chunk.size:
                members.append(chunk)
        return last, members
