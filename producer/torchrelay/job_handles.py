"""Job and its asyncio twin over one base. A handle is an id and what was last read: cheap, and as many as one likes.

Not here: SQL (`core`), and how waiting is done (`completions`).
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from torchrelay_storage.attempts import Attempt
from torchrelay_storage.errors import RelayError, WaitTimeout
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_error import JobError
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.states import TERMINAL, JobState
from torchrelay_storage.tensors import Tensors

if TYPE_CHECKING:
    from torchrelay.async_core import AsyncCore
    from torchrelay.completions import Delivery
    from torchrelay.core import Core


LOOK_SECONDS = 0.5  # between two looks at a run whose progress is shown


class _JobBase:
    """What both kinds of job know without waiting. All but `id` is as of the last `refresh`, or the submit."""

    def __init__(self, core: Core, row: JobRow, submitted_at: float = -math.inf) -> None:
        self._core = core
        self._row = row
        self._submitted_at = submitted_at  # by the monotonic clock, where this process has just submitted it

    @property
    def id(self) -> str:
        """The job's id, such as `j_0c8ks4t2m1x7f`: give it to `relay.job` to get the job back."""
        return show(Kind.JOB, self._row.id)

    @property
    def state(self) -> JobState:
        """`scheduled`, `queued`, `running`, `retrying`, `succeeded`, `failed`, `cancelled` or `expired`."""
        return self._row.state

    @property
    def done(self) -> bool:
        """Whether the state is a terminal one."""
        return self._row.state in TERMINAL

    @property
    def model(self) -> str:
        """The model as `name@version`."""
        return f"{self._row.model}@{self._row.version}"

    @property
    def batch_id(self) -> str | None:
        """The id of its batch, if it is part of one."""
        return show(Kind.BATCH, self._row.batch) if self._row.batch is not None else None

    @property
    def priority(self) -> int:
        """0 to 9, 9 the most urgent."""
        return self._row.priority

    @property
    def key(self) -> str | None:
        """The key that it was submitted under."""
        return self._row.key

    @property
    def tenant(self) -> str:
        """The tenant, or an empty string."""
        return self._row.tenant

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What was passed as `metadata`."""
        return self._row.metadata

    @property
    def failures(self) -> int:
        """How often it has failed so far."""
        return self._row.failures

    @property
    def max_attempts(self) -> int:
        """How often it may fail."""
        return self._row.max_attempts

    @property
    def error(self) -> JobError | None:
        """Why it failed, or why its last try did: type, message, traceback."""
        return self._row.error

    @property
    def worker(self) -> str | None:
        """The name of the worker that runs it, or recorded its end."""
        return self._row.worker

    @property
    def handler_revision(self) -> str | None:
        """Which revision of its model's handler computed the result; None before the end, and where it is not known."""
        return self._row.handler_revision

    @property
    def created_at(self) -> float:
        """When it was submitted: seconds since 1970."""
        return self._row.created_at

    @property
    def finished_at(self) -> float | None:
        """When it ended: seconds since 1970 on the database's clock."""
        return self._row.finished_at

    def as_dict(self) -> dict[str, Any]:
        """Return what is known as plain JSON values."""
        error = self._row.error
        return {
            "id": self.id,
            "state": str(self.state),
            "model": self.model,
            "batch": self.batch_id,
            "priority": self.priority,
            "key": self.key,
            "tenant": self.tenant,
            "failures": self.failures,
            "max_attempts": self.max_attempts,
            "error": {"type": error.type, "message": error.message} if error is not None else None,
            "worker": self.worker,
            "handler_revision": self.handler_revision,
            "created_at": self.created_at,
            "not_before": self._row.not_before,
            "finished_at": self.finished_at,
            "metadata": dict(self.metadata),
        }

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.model} {self.state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _JobBase) and other._row.id == self._row.id

    def __hash__(self) -> int:
        return hash(self._row.id)

    def _timeout(self, seconds: float | None) -> WaitTimeout:
        return WaitTimeout(
            f"job {self.id} has not ended after {seconds:g} seconds; it goes on: wait again, or look at "
            f"`torchrelay status {self.id}`"
        )


class Job(_JobBase):
    """A job as a handle."""

    def refresh(self) -> Job:
        """Read the job's present state and return self. Raises JobNotFound."""
        self._row = self._core.job(self._row.id)
        return self

    def wait(self, timeout: float | None = None) -> Job:
        """Wait until the job has ended, however it ended, and return self.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises:
            WaitTimeout: it has not ended by then; it goes on.
        """
        if not self.done:
            self._row = self._ended(timeout)
        return self

    def result(self, timeout: float | None = None, *, tensors: Tensors | None = None) -> Any:
        """Wait until the job has ended and return its result.

        Args:
            timeout: seconds; None: as long as it takes.
            tensors: "numpy" or "torch": as what arrays come back; None: as they were.

        Raises:
            JobFailed, JobCancelled, JobExpired: how it ended instead.
            WaitTimeout: it has not ended by then; it goes on.
        """
        self.wait(timeout)
        return self._core.outcome(self._row, tensors)

    def input(self, *, tensors: Tensors | None = None) -> Any:
        """Return the job's input, read anew."""
        return self._core.decode(self._core.job(self._row.id, with_input=True, with_output=False).input, tensors)

    def attempts(self) -> list[Attempt]:
        """Return its tries, the oldest first: when, by which worker, how each ended. Raises JobNotFound.

        Those from before a `retry` stay. A worker that ends in good order hands its jobs back, which is no try.
        """
        return self._core.ready().jobs.attempts(self._row.id)

    def cancel(self) -> bool:
        """Cancel it: at once while it waits, else its result is dropped. False: it had ended already."""
        cancelled = self._core.cancel([self._row.id]) > 0
        self.refresh()
        return cancelled

    def retry(self) -> bool:
        """Run it again after it failed, expired or was cancelled, with all its attempts. False: there is nothing to."""
        retried = self._core.retry(self._row.id, self._row.model) > 0
        self.refresh()
        return retried

    def _ended(self, timeout: float | None, look: Callable[[], None] | None = None) -> JobRow:
        """Wait for the end, and call `look` now and then meanwhile."""
        arrived = threading.Event()
        news: list[Delivery] = []

        def deliver(delivery: Delivery) -> None:
            news.append(delivery)
            arrived.set()

        ticket = self._core.ready().completions.wait_for(self._row.id, self._row.chunk, deliver, self._submitted_at)
        try:
            end = None if timeout is None else time.monotonic() + timeout
            while not arrived.wait(_next_look(end, look)):
                if end is not None and time.monotonic() >= end:
                    raise self._timeout(timeout)
                if look is not None:
                    look()
        finally:
            self._core.completions.drop(ticket)
        return _opened(news[0])


class AsyncJob(_JobBase):
    """A job as a handle for asyncio: `Job`'s methods, awaitable."""

    def __init__(self, shared: AsyncCore, row: JobRow, submitted_at: float = -math.inf) -> None:
        super().__init__(shared.core, row, submitted_at)
        self._shared = shared

    async def refresh(self) -> AsyncJob:
        """As `Job.refresh`."""
        self._row = await self._shared.call(self._core.job, self._row.id)
        return self

    async def wait(self, timeout: float | None = None) -> AsyncJob:
        """As `Job.wait`."""
        if not self.done:
            self._row = await self._ended(timeout)
        return self

    async def result(self, timeout: float | None = None, *, tensors: Tensors | None = None) -> Any:
        """As `Job.result`."""
        await self.wait(timeout)
        return await self._shared.outcome(self._row, tensors)

    async def input(self, *, tensors: Tensors | None = None) -> Any:
        """As `Job.input`."""
        return await self._shared.call(Job(self._core, self._row).input, tensors=tensors)

    async def attempts(self) -> list[Attempt]:
        """As `Job.attempts`."""
        return await self._shared.call(Job(self._core, self._row).attempts)

    async def cancel(self) -> bool:
        """As `Job.cancel`."""
        cancelled = await self._shared.call(self._core.cancel, [self._row.id]) > 0
        await self.refresh()
        return cancelled

    async def retry(self) -> bool:
        """As `Job.retry`."""
        retried = await self._shared.call(self._core.retry, self._row.id, self._row.model) > 0
        await self.refresh()
        return retried

    def __await__(self) -> Any:
        """`await job` is `await job.result()`."""
        return self.result().__await__()

    async def _ended(self, timeout: float | None, look: Callable[[], Awaitable[None]] | None = None) -> JobRow:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[Delivery] = loop.create_future()

        def deliver(delivery: Delivery) -> None:
            self._shared.soon(loop, lambda: None if arrived.done() else arrived.set_result(delivery))

        if self._core.closed:
            raise RelayError("the relay is closed; make another one")
        ticket = self._core.completions.wait_for(self._row.id, self._row.chunk, deliver, self._submitted_at)
        try:
            async with asyncio.timeout(timeout):
                while look is not None and not (await asyncio.wait([arrived], timeout=LOOK_SECONDS))[0]:
                    await look()
                news = await arrived
        except TimeoutError:
            raise self._timeout(timeout) from None
        finally:
            self._core.completions.drop(ticket)
        return _opened(news)


def _next_look(end: float | None, look: Callable[[], None] | None) -> float | None:
    """Seconds until there is something to do without news; None: never."""
    left = None if end is None else max(end - time.monotonic(), 0.0)
    if look is None:
        return left
    return LOOK_SECONDS if left is None else min(left, LOOK_SECONDS)


def _opened(news: Delivery) -> JobRow:
    if isinstance(news, Exception):
        raise news
    return news
