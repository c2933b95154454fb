"""How asyncio reaches the blocking core: a few threads of its own, and futures for what is waited for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar

from torchrelay.core import Core
from torchrelay_storage import values
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.tensors import Tensors

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 8  # each holds a database connection while it works


class AsyncCore:
    """A Core whose calls are awaited."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._threads: tuple[int, ThreadPoolExecutor] | None = None

    async def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what blocks on a thread."""
        if self._threads is None or self._threads[0] != os.getpid():  # a forked child has none of its parent's threads
            self._threads = (os.getpid(), ThreadPoolExecutor(THREADS, thread_name_prefix="torchrelay-async"))
        return await asyncio.get_running_loop().run_in_executor(self._threads[1], partial(work, *args, **kwargs))

    async def outcome(self, row: JobRow, tensors: Tensors | None) -> Any:
        """As `Core.outcome`: at once where the result is at hand, on a thread where it must be fetched."""
        if row.output is not None and values.as_reference(row.output) is None:
            return self.core.outcome(row, tensors)
        return await self.call(self.core.outcome, row, tensors)

    @staticmethod
    def soon(loop: asyncio.AbstractEventLoop, wake: Callable[[], Any]) -> None:
        """Call `wake` in the loop, from another thread; a loop that has ended wants no news."""
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(wake)

    async def close(self) -> None:
        """End the core and the threads."""
        await asyncio.to_thread(self.core.close)
        if self._threads is not None:
            await asyncio.to_thread(self._threads[1].shutdown)
            self._threads = None
