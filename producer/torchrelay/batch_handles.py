"""Batch and its asyncio twin over one base. Not here: which jobs come next (`batches`), who wakes (`completions`)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from torchrelay.batches import Arrivals, InOrder
from torchrelay.job_handles import AsyncJob, Job
from torchrelay.progress import Progress
from torchrelay_storage.batch_store import BatchRow, Counts
from torchrelay_storage.errors import InvalidInput, RelayError, WaitTimeout
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.tensors import Tensors

if TYPE_CHECKING:
    from torchrelay.async_core import AsyncCore
    from torchrelay.core import Core

T = TypeVar("T")

PAUSE = 0.02  # seconds between two looks at a batch, so that its thousand announcements do not make a thousand queries


class _BatchBase:
    """What both kinds of batch know without waiting."""

    def __init__(self, core: Core, row: BatchRow) -> None:
        self._core = core
        self._row = row

    @property
    def id(self) -> str:
        """The batch's id, such as `b_0c8ks4t2m1x7f`: give it to `relay.batch` to get the batch back."""
        return show(Kind.BATCH, self._row.id)

    @property
    def model(self) -> str:
        """The model as `name@version`."""
        return f"{self._row.model}@{self._row.version}"

    @property
    def key(self) -> str | None:
        """The key that it was submitted under."""
        return self._row.key

    @property
    def priority(self) -> int:
        """0 to 9, 9 the most urgent."""
        return self._row.priority

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What was passed as `metadata`."""
        return self._row.metadata

    @property
    def created_at(self) -> float:
        """When it was begun: seconds since 1970 on the database's clock."""
        return self._row.created_at

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.model}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BatchBase) and other._row.id == self._row.id

    def __hash__(self) -> int:
        return hash(self._row.id)

    def _timeout(self, seconds: float | None) -> WaitTimeout:
        return WaitTimeout(
            f"batch {self.id} has not ended after {seconds:g} seconds; it goes on: wait again, or look at "
            f"`torchrelay status {self.id}`"
        )

    def _progress(self, wanted: bool) -> AbstractContextManager[Progress | None]:
        return Progress(self.model) if wanted else nullcontext()


class Batch(_BatchBase):
    """A batch as a handle."""

    def counts(self) -> Counts:
        """Return how many jobs are in each state; `closed` says whether the batch's end is written."""
        return self._core.ready().batches.counts(self._row.id)

    def wait(self, timeout: float | None = None, *, progress: bool = False) -> Counts:
        """Wait until the batch's end is written and all its jobs have ended; return the counts.

        Args:
            timeout: seconds; None: as long as it takes, which is for ever where a client died while it submitted.
            progress: show a bar on the standard error.

        Raises:
            WaitTimeout: some job has not ended by then; the batch goes on.
        """
        with self._progress(progress) as bar, _Watch(self, timeout) as watch:
            while True:
                counts = self.counts()
                if bar is not None:
                    bar.show(counts)
                if counts.done:
                    return counts
                watch.pause()

    def as_completed(self, timeout: float | None = None) -> Iterator[Job]:
        """Yield the jobs in the order in which they end, each with its result at hand.

        A job that is retried meanwhile comes again. Raises WaitTimeout where no more have ended by then.
        """
        yield from (Job(self._core, row) for row in self._walk(Arrivals(self._core, self._row.id), timeout))

    def results(
        self, timeout: float | None = None, *, return_exceptions: bool = False, tensors: Tensors | None = None
    ) -> Iterator[Any]:
        """Yield the results in the order of the inputs, each as soon as all before it have ended, in constant memory.

        Args:
            timeout: seconds for the whole; None: as long as it takes.
            return_exceptions: yield the JobFailed, JobCancelled or JobExpired of a job in the place of its result,
                so that one job does not hide the others; False: raise it.
            tensors: as in `Job.result`.
        """
        for row in self._walk(InOrder(self._core, self._row.id), timeout):
            try:
                result = self._core.outcome(row, tensors)
            except RelayError as error:
                if not return_exceptions:
                    raise
                result = error
            yield result

    def cancel(self) -> int:
        """Cancel every job that has not ended; return how many. Running ones' results are dropped."""
        return self._core.ready().cancel_batch(self._row.id)

    def retry_failed(self) -> int:
        """Run the failed jobs again, with all their attempts; return how many."""
        return self._core.ready().retry_failed(self._row.id, self._row.model)

    def pause(self) -> None:
        """Let nothing of the batch be started until `resume`; it survives every restart."""
        self._core.ready().pause_batch(self._row.id)

    def resume(self) -> None:
        """End a pause."""
        self._core.ready().resume_batch(self._row.id, self._row.model)

    def _walk(self, walk: Arrivals | InOrder, timeout: float | None) -> Iterator[JobRow]:
        self._core.ready()
        with _Watch(self, timeout) as watch:
            while True:
                rows, done = walk.step()
                yield from rows
                if done:
                    return
                if not rows:
                    watch.pause()


class AsyncBatch(_BatchBase):
    """A batch as a handle for asyncio: `Batch`'s methods, awaitable, and its iterators for `async for`."""

    def __init__(self, shared: AsyncCore, row: BatchRow) -> None:
        super().__init__(shared.core, row)
        self._shared = shared
        self._plain = Batch(shared.core, row)

    async def counts(self) -> Counts:
        """As `Batch.counts`."""
        return await self._shared.call(self._plain.counts)

    async def wait(self, timeout: float | None = None, *, progress: bool = False) -> Counts:
        """As `Batch.wait`."""
        with self._progress(progress) as bar, _AsyncWatch(self, timeout) as watch:
            while True:
                counts = await self.counts()
                if bar is not None:
                    bar.show(counts)
                if counts.done:
                    return counts
                await watch.pause()

    async def as_completed(self, timeout: float | None = None) -> AsyncIterator[AsyncJob]:
        """As `Batch.as_completed`."""
        async for row in self._walk(Arrivals(self._core, self._row.id), timeout):
            yield AsyncJob(self._shared, row)

    async def results(
        self, timeout: float | None = None, *, return_exceptions: bool = False, tensors: Tensors | None = None
    ) -> AsyncIterator[Any]:
        """As `Batch.results`."""
        async for row in self._walk(InOrder(self._core, self._row.id), timeout):
            try:
                result = await self._shared.outcome(row, tensors)
            except RelayError as error:
                if not return_exceptions:
                    raise
                result = error
            yield result

    async def cancel(self) -> int:
        """As `Batch.cancel`."""
        return await self._shared.call(self._plain.cancel)

    async def retry_failed(self) -> int:
        """As `Batch.retry_failed`."""
        return await self._shared.call(self._plain.retry_failed)

    async def pause(self) -> None:
        """As `Batch.pause`."""
        await self._shared.call(self._plain.pause)

    async def resume(self) -> None:
        """As `Batch.resume`."""
        await self._shared.call(self._plain.resume)

    async def _walk(self, walk: Arrivals | InOrder, timeout: float | None) -> AsyncIterator[JobRow]:
        with _AsyncWatch(self, timeout) as watch:
            while True:
                rows, done = await self._shared.call(walk.step)
                for row in rows:
                    yield row
                if done:
                    return
                if not rows:
                    await watch.pause()


class _WatchBase:
    """A place in the queue for a batch's news, and the time that is left."""

    def __init__(self, batch: _BatchBase, timeout: float | None) -> None:
        if timeout is not None and timeout < 0:
            raise InvalidInput(f"timeout must be seconds, not {timeout!r}")
        self._batch = batch
        self._timeout = timeout
        self._end = None if timeout is None else time.monotonic() + timeout
        self._completions = batch._core.completions

    def _next_look(self) -> float:
        """Seconds until SQL is asked without news. Raises WaitTimeout where no time is left."""
        seconds = self._completions.poll_seconds
        if self._end is None:
            return seconds
        left = self._end - time.monotonic()
        if left <= 0:
            raise self._batch._timeout(self._timeout)
        return min(seconds, left)

    def wake(self) -> None:
        """Called from another thread."""
        raise NotImplementedError

    def __enter__(self: T) -> T:
        self._completions.watch(self._batch._row.id, self.wake)  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        self._completions.unwatch(self._batch._row.id, self.wake)


class _Watch(_WatchBase):
    def __init__(self, batch: _BatchBase, timeout: float | None) -> None:
        super().__init__(batch, timeout)
        self._news = threading.Event()

    def wake(self) -> None:
        self._news.set()

    def pause(self) -> None:
        """Wait for news, or until it is time to look."""
        self._news.wait(self._next_look())
        time.sleep(PAUSE)
        self._news.clear()


class _AsyncWatch(_WatchBase):
    def __init__(self, batch: AsyncBatch, timeout: float | None) -> None:
        super().__init__(batch, timeout)
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._soon = batch._shared.soon

    def wake(self) -> None:
        self._soon(self._loop, self._news.set)

    async def pause(self) -> None:
        """As `_Watch.pause`."""
        try:
            async with asyncio.timeout(self._next_look()):
                await self._news.wait()
        except TimeoutError:
            pass
        await asyncio.sleep(PAUSE)
        self._news.clear()
