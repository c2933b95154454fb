"""AsyncRelay: the same methods as Relay, awaitable, and a loop that is never held up."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from torchrelay import (
    AsyncBatch,
    AsyncJob,
    AsyncRelay,
    AsyncRun,
    Batch,
    InvalidInput,
    Job,
    JobFailed,
    JobState,
    KeyConflict,
    ModelNotFound,
    Relay,
    RelayError,
    Run,
    WaitTimeout,
    batches,
)
from torchrelay.settings import Settings

T = TypeVar("T")
Work = Callable[..., Any]


def double(value: Any) -> Any:
    return {"twice": value["n"] * 2}


@pytest.fixture
def run(sqlite_settings: Settings) -> Callable[[Callable[[AsyncRelay], Awaitable[T]]], T]:
    """`run(main)` runs `main(relay)` in a loop of its own."""

    def run(main: Callable[[AsyncRelay], Awaitable[T]]) -> T:
        async def whole() -> T:
            async with AsyncRelay(settings=sqlite_settings) as relay:
                await relay.register_model("double", handler="double", chunk_size=4)
                return await main(relay)

        return asyncio.run(whole())

    return run


@pytest.mark.parametrize(
    ("plain", "twin"), [(Relay, AsyncRelay), (Job, AsyncJob), (Batch, AsyncBatch), (Run, AsyncRun)]
)
def test_the_twins_have_the_same_methods_and_parameters(plain: type, twin: type) -> None:
    def methods(cls: type) -> dict[str, Any]:
        return {name: member for name, member in inspect.getmembers(cls) if not name.startswith("_")}

    ours, theirs = methods(plain), methods(twin)
    assert set(ours) == set(theirs)
    for name, member in ours.items():
        if inspect.isfunction(member):
            assert list(inspect.signature(member).parameters) == list(inspect.signature(theirs[name]).parameters), name
            blocks = not (inspect.iscoroutinefunction(theirs[name]) or inspect.isasyncgenfunction(theirs[name]))
            assert blocks == (name == "as_dict"), name


def test_a_job_goes_all_the_way(run: Any, work: Work) -> None:
    async def main(relay: AsyncRelay) -> None:
        with work(double):
            job = await relay.submit("double", {"n": 21}, priority=9, key="k", metadata={"a": 1})
            assert await job.result(timeout=30) == {"twice": 42}
            assert await job == {"twice": 42}
            assert job.state is JobState.SUCCEEDED
        again = await relay.job(job.id)
        assert again == job
        assert await again.input() == {"n": 21}
        assert await (await again.refresh()).wait() is again
        assert await relay.submit("double", {"n": 21}, key="k") == job
        with pytest.raises(KeyConflict):
            await relay.submit("double", {"n": 22}, key="k")
        assert [j.id for j in await relay.jobs(state="succeeded")] == [job.id]
        assert [row.newest.name for row in await relay.models()] == ["double"]
        assert len(await relay.workers()) == 1

    run(main)


def test_refusals(run: Any) -> None:
    async def main(relay: AsyncRelay) -> None:
        with pytest.raises(InvalidInput):
            await relay.submit("double", {"n": object()})
        with pytest.raises(InvalidInput):
            await relay.submit("double", {}, priority=11)
        with pytest.raises(ModelNotFound):
            await relay.submit("nobody", {})
        with pytest.raises(InvalidInput, match="input 1"):
            await relay.submit_batch("double", [{}, {"n": object()}])
        assert await relay.jobs() == []

    run(main)


def test_a_thousand_waiters_share_a_thread(run: Any, work: Work) -> None:
    async def main(relay: AsyncRelay) -> None:
        jobs = await asyncio.gather(*(relay.submit("double", {"n": n}) for n in range(1000)))
        assert len({job._row.chunk for job in jobs}) < 1000
        with work(double):
            results = await asyncio.gather(*(job.result(60) for job in jobs))
        assert [r["twice"] for r in results] == [2 * n for n in range(1000)]
        names = [t.name for t in threading.enumerate()]
        assert names.count("torchrelay-subscription") == 1
        assert names.count("torchrelay-completions") == 1

    run(main)


def test_failures_timeouts_cancel_and_retry(run: Any, work: Work) -> None:
    async def main(relay: AsyncRelay) -> None:
        job = await relay.submit("double", {"n": 1}, max_attempts=1)
        with pytest.raises(WaitTimeout, match=job.id):
            await job.result(0.05)
        assert relay._core.completions.waiting == 0
        waiting = asyncio.create_task(job.wait())
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert relay._core.completions.waiting == 0
        assert await job.cancel()
        assert job.state is JobState.CANCELLED
        assert await job.retry()
        with work(lambda value: 1 / 0), pytest.raises(JobFailed, match="ZeroDivisionError"):
            await job.result(30)

    run(main)


def test_batches(run: Any, work: Work) -> None:
    async def main(relay: AsyncRelay) -> None:
        batch = await relay.submit_batch("double", ({"n": n} for n in range(20)), metadata={"a": 1})
        with work(double):
            assert (await batch.wait(30)).succeeded == 20
        assert [r["twice"] async for r in batch.results()] == [2 * n for n in range(20)]
        assert sorted([(await job.result())["twice"] async for job in batch.as_completed()]) == [
            2 * n for n in range(20)
        ]
        assert await relay.batch(batch.id) == batch
        assert await relay.batches() == [batch]
        other = await relay.submit_batch("double", [{"n": 1}] * 3)
        await other.pause()
        await other.resume()
        assert await other.cancel() == 3
        assert (await other.counts()).cancelled == 3
        results = [r async for r in other.results(5, return_exceptions=True)]
        assert all(isinstance(r, RelayError) for r in results)
        with pytest.raises(RelayError):
            [r async for r in other.results(5)]
        assert await other.retry_failed() == 0
        await relay.pause("double")
        await relay.resume("double")

    run(main)


def test_an_async_iterable_streams_and_goes_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SLICE_JOBS", 8)

    async def source(n: int, fail_at: int | None = None) -> AsyncIterator[dict[str, int]]:
        for i in range(n):
            if i == fail_at:
                raise OSError("gone")
            yield {"n": i}

    async def main(relay: AsyncRelay) -> None:
        with pytest.raises(OSError, match="gone"):
            await relay.submit_batch("double", source(50, fail_at=21), key="k")
        [batch] = await relay.batches()
        counts = await batch.counts()
        assert (counts.total, counts.closed) == (21, False)
        assert await relay.submit_batch("double", source(50), key="k") == batch
        counts = await batch.counts()
        assert (counts.total, counts.closed) == (50, True)

    run(main)


def test_the_loop_goes_on_while_something_large_is_submitted(run: Any, tmp_path: Path) -> None:
    async def main(relay: AsyncRelay) -> None:
        ticks, stop = 0, False

        async def tick() -> None:
            nonlocal ticks
            while not stop:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.create_task(tick())
        job = await relay.submit("double", np.zeros(2_000_000, dtype=np.float32))
        await relay.submit_batch("double", ({"n": n} for n in range(20_000)))
        stop = True
        await ticking
        assert ticks > 10  # a loop that is held up would see one or two
        np.testing.assert_array_equal(await job.input(), np.zeros(2_000_000, dtype=np.float32))

    run(main)


def test_loops_one_after_the_other_share_a_relay(sqlite_settings: Settings, work: Work) -> None:
    relay = AsyncRelay(settings=sqlite_settings)

    async def once(n: int) -> Any:
        if n == 0:
            await relay.register_model("double", handler="double")
        return await (await relay.submit("double", {"n": n})).result(30)

    with work(double):
        assert [asyncio.run(once(n)) for n in range(3)] == [{"twice": 0}, {"twice": 2}, {"twice": 4}]
    asyncio.run(relay.close())
    with pytest.raises(RelayError, match="closed"):
        asyncio.run(once(1))
