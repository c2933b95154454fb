"""What a queue peer is to say of itself, and how its callers are timed: one in bulk, many at once, one that waits.

Not here: workers, and what is measured of them (driving.py).
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asked import Asked

CALLERS = 64
BIN = Path(sys.executable).parent  # where the peers' own commands are

Value = dict[str, int]


class Peer:
    """A queue peer with a synchronous client. What each must say comes first; the rest is how it is timed."""

    settings = ""
    keeps = ""
    version = ""
    keeps_results = False

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def prepare(self) -> None:
        """Make tables, connect: not timed."""

    def worker(self) -> list[str]:
        """Return the command of one worker process."""
        raise NotImplementedError

    def enqueue(self, values: list[Value]) -> None:
        """Enqueue all in the best bulk way that one caller has."""
        raise NotImplementedError

    def enqueue_one(self, value: Value) -> None:
        """Enqueue one; called by many threads."""
        raise NotImplementedError

    def result(self, value: Value) -> Any:
        """Enqueue one and wait for its result."""
        raise NotImplementedError

    def kept(self) -> int | None:
        """Return how many jobs the store knows to have succeeded; None where it keeps nothing."""
        return None

    def drained(self) -> float | None:
        """Return the jobs per second between the first end and the last by the store's own clock, if it has one."""
        return None

    def worker_processes(self) -> int:
        """Return how often to start `worker()`."""
        return self.asked.processes

    # --- how it is timed --------------------------------------------------------------------------------------

    def time_prepare(self) -> None:
        self.prepare()

    def time_enqueue(self, values: list[Value]) -> float:
        """Return the seconds that one caller takes to enqueue all."""
        began = time.perf_counter()
        self.enqueue(values)
        return time.perf_counter() - began

    def time_callers(self, values: list[Value]) -> float:
        """Return the seconds that concurrent callers take to enqueue all, each one job at a time."""
        gate = threading.Barrier(CALLERS + 1)
        errors: list[BaseException] = []

        def call(mine: list[Value]) -> None:
            gate.wait()
            try:
                for value in mine:
                    self.enqueue_one(value)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=call, args=(values[k::CALLERS],), daemon=True) for k in range(CALLERS)]
        for thread in threads:
            thread.start()
        gate.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return time.perf_counter() - began

    def time_results(self, values: list[Value]) -> list[float]:
        """Return the seconds of each enqueue up to its result."""
        return [_timed(self.result, value) for value in values]


class AsyncPeer(Peer):
    """A peer with an asynchronous client: `prepare`, `enqueue`, `enqueue_one`, `result` and `kept` are coroutines."""

    def __init__(self, asked: Asked) -> None:
        import uvloop

        super().__init__(asked)
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)

    def time_prepare(self) -> None:
        self._runner.run(self.prepare())

    def time_enqueue(self, values: list[Value]) -> float:
        return self._runner.run(self._time_enqueue(values))

    def time_callers(self, values: list[Value]) -> float:
        return self._runner.run(self._time_callers(values))

    def time_results(self, values: list[Value]) -> list[float]:
        return self._runner.run(self._time_results(values))

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the peer's loop."""
        return self._runner.run(coroutine)

    async def _time_enqueue(self, values: list[Value]) -> float:
        began = time.perf_counter()
        await self.enqueue(values)
        return time.perf_counter() - began

    async def _time_callers(self, values: list[Value]) -> float:
        async def call(mine: list[Value]) -> None:
            for value in mine:
                await self.enqueue_one(value)

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for k in range(CALLERS):
                group.create_task(call(values[k::CALLERS]))
        return time.perf_counter() - began

    async def _time_results(self, values: list[Value]) -> list[float]:
        seconds = []
        for value in values:
            began = time.perf_counter()
            await self.result(value)
            seconds.append(time.perf_counter() - began)
        return seconds


def _timed(call: Callable[[Value], Any], value: Value) -> float:
    began = time.perf_counter()
    call(value)
    return time.perf_counter() - began
