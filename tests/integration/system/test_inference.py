"""The main job: submitted, announced, claimed, batched, run, recorded, read; by real workers on both databases."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from servers import wait_until
from torchrelay import AsyncRelay, InvalidInput, JobCancelled, JobExpired, JobFailed, Relay
from torchrelay.settings import Settings

ON_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def claimed_chunks(relay: Relay) -> int:
    with relay._core.db.read() as connection:
        return int(connection.execute(text("SELECT count(*) FROM chunks WHERE state = 2")).scalar_one())


def test_single_jobs_and_a_batch(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("double", handler="double")
    start()
    job = relay.submit("double", 21, metadata={"who": "me"})
    assert job.result(timeout=60) == 42
    job.refresh()
    assert (job.state, job.failures, job.metadata) == ("succeeded", 0, {"who": "me"})
    assert job.worker is not None
    batch = relay.submit_batch("double", (i for i in range(3000)))
    assert list(batch.results(timeout=60)) == [2 * i for i in range(3000)], "in the order of the inputs"
    assert batch.counts().succeeded == 3000
    assert {j.id for j in batch.as_completed(timeout=10)} == {j.id for j in relay.jobs(batch=batch.id, limit=5000)}


def test_a_model_registered_later_is_served_without_a_restart(relay: Relay, start: Callable[..., Any]) -> None:
    start()
    relay.register_model("late", handler="double")
    assert relay.submit("late", 1).result(timeout=60) == 2
    relay.register_model("late", handler="slow", config={"seconds": 0.0})
    job = relay.submit("late", 2)
    assert job.model == "late@2"
    assert job.result(timeout=60) == 4
    assert relay.submit("late@1", 3).result(timeout=60) == 6


@ON_POSTGRESQL
def test_two_workers_share_a_batch_and_run_each_job_once(relay: Relay, start: Callable[..., Any], runs: Any) -> None:
    relay.register_model("double", handler="slow", config={"seconds": 0.001}, chunk_size=64)
    start(wait=False)
    start()
    batch = relay.submit_batch("double", range(20_000))
    assert batch.wait(timeout=180).succeeded == 20_000
    assert sorted(runs.inputs()) == list(range(20_000)), "each job ran once"
    by_worker = Counter(pid for pid, _ in runs.all())
    assert len(by_worker) == 2
    assert min(by_worker.values()) > 2_000, by_worker


def test_jobs_of_a_thousand_transactions_run_exactly_if_committed(
    settings: Settings, relay: Relay, start: Callable[..., Any], runs: Any
) -> None:
    relay.register_model("double", handler="double")
    start()
    rng = random.Random(17)
    url = relay._core.db.engine.url
    # As everybody must who has a PgBouncer between: what one prepares there, another trips over.
    engine = create_engine(url, connect_args={} if url.drivername == "sqlite" else {"prepare_threshold": None})
    committed = []
    for i in range(1000):
        with Session(engine) as session:
            session.execute(text("SELECT 1"))
            job = relay.submit("double", i, session=session)
            if rng.random() < 0.5:
                session.commit()
                committed.append((i, job))
    engine.dispose()
    for _, job in committed:
        job.wait(timeout=60)
    assert sorted(runs.inputs()) == [i for i, _ in committed]
    with relay._core.db.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar() == len(committed)


def test_only_the_guilty_input_fails(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("moody", handler="moody")
    start()
    inputs = [1, 2, "invalid", 3, "guilty", 4, "nan", 5, "broken", 6]
    batch = relay.submit_batch("moody", inputs, max_attempts=1)
    results = list(batch.results(timeout=60, return_exceptions=True))
    for given, got in zip(inputs, results, strict=True):
        if isinstance(given, int):
            assert got == given + 1
    kinds = {g: r.kind for g, r in zip(inputs, results, strict=True) if isinstance(r, JobFailed)}
    assert kinds["invalid"] == "InvalidInput"
    assert kinds["guilty"] == "ValueError"
    assert kinds["broken"] == "RuntimeError"
    assert "nan" in kinds
    guilty = results[4]
    assert isinstance(guilty, JobFailed)
    assert guilty.message == "the guilty one is in this batch"
    assert "system_models.py" in (guilty.traceback or "")
    assert batch.counts().failed == 4


def test_a_failure_is_tried_again_and_can_be_retried(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("moody", handler="moody")
    start()
    job = relay.submit("moody", "guilty", max_attempts=2)
    with pytest.raises(JobFailed):
        job.result(timeout=60)
    assert job.refresh().failures == 2
    assert job.retry()
    assert not job.done
    with pytest.raises(JobFailed):
        job.result(timeout=60)
    batch = relay.submit_batch("moody", ["guilty", 1], max_attempts=1)
    assert batch.wait(timeout=60).failed == 1
    assert batch.retry_failed() == 1
    counts = batch.wait(timeout=60)
    assert (counts.succeeded, counts.failed) == (1, 1)


def test_cancel_while_waiting_and_while_running(relay: Relay, start: Callable[..., Any], runs: Any) -> None:
    relay.register_model("slow", handler="slow", config={"seconds": 0.3}, chunk_size=8)
    waiting = relay.submit("slow", 1)
    assert waiting.cancel()
    assert not waiting.cancel()
    with pytest.raises(JobCancelled):
        waiting.result(timeout=5)
    start()
    batch = relay.submit_batch("slow", range(100, 200))
    wait_until(lambda: len(runs.inputs()) > 0, 60, "the first device batch")
    cancelled = batch.cancel()
    counts = batch.wait(timeout=5)
    assert counts.cancelled == cancelled > 50
    assert counts.succeeded + counts.cancelled == 100
    wait_until(lambda: claimed_chunks(relay) == 0, 20, "the worker letting go")
    assert 1 not in runs.inputs()
    assert len(runs.inputs()) <= 24, "what was cancelled is dropped at the next boundary"


def test_pause_survives_a_restart(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("double", handler="double")
    first = start()
    relay.pause("double")
    batch = relay.submit_batch("double", range(10))
    first.stop()
    start()
    other = relay.submit_batch("double", range(10))
    other.pause()
    assert batch.counts().queued == 10
    relay.resume("double")
    assert batch.wait(timeout=60).succeeded == 10
    assert other.counts().queued == 10
    other.resume()
    assert other.wait(timeout=60).succeeded == 10


def test_expired_and_timed_out(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("slow", handler="slow", config={"seconds": 1.0})
    late = relay.submit("slow", 1, expires_in=0.01)
    start()
    with pytest.raises(JobExpired):
        late.result(timeout=30)
    slow = relay.submit("slow", 2, timeout=0.2, max_attempts=1)
    with pytest.raises(JobFailed, match="Timeout"):
        slow.result(timeout=30)


def test_a_delayed_job_runs_after_its_time(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("double", handler="double")
    start()
    job = relay.submit("double", 4, delay=1.5)
    assert job.state == "scheduled"
    assert job.result(timeout=60) == 8
    row = job.refresh()
    assert row.finished_at is not None
    assert row.finished_at - row.created_at >= 1.5


def test_tensors_and_large_values_come_back_exactly(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("shapes", handler="shapes")
    start()
    arrays = [np.arange(12, dtype=np.float32).reshape(3, 4), np.ones((300, 300), dtype=np.int64), np.float64(2.5)[None]]
    jobs = [relay.submit("shapes", {"array": a}) for a in arrays]
    for job, array in zip(jobs, arrays, strict=True):
        result = job.result(timeout=60)
        got = np.asarray(result["array"])
        assert got.dtype == array.dtype
        assert np.array_equal(got, array)
        assert result["sum"] == array.sum()
    tensor = torch.randn(4, 5, dtype=torch.bfloat16)
    back = relay.submit("shapes", {"array": tensor}).result(timeout=60, tensors="torch")["array"]
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, tensor)


def test_several_models_share_a_worker_that_holds_one(relay: Relay, start: Callable[..., Any]) -> None:
    for name in ("a", "b", "c"):
        relay.register_model(name, handler="double")
    start("--max-loaded", "1")
    batches = [relay.submit_batch(name, range(50)) for name in ("a", "b", "c", "a")]
    for batch in batches:
        assert batch.wait(timeout=90).succeeded == 50


def test_what_cannot_load_fails_alone(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("unloadable", handler="unloadable")
    relay.register_model("elsewhere", handler="a-handler-of-other-workers")
    relay.register_model("double", handler="double")
    start()
    lost = relay.submit("unloadable", 1, max_attempts=1)
    foreign = relay.submit("elsewhere", 1)
    assert relay.submit("double", 1).result(timeout=60) == 2
    with pytest.raises(JobFailed, match="the weights are gone"):
        lost.result(timeout=60)
    assert foreign.refresh().state == "queued", "it waits for a worker that knows its handler"


def test_asyncio_and_a_thousand_waiters(settings: Settings, relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("double", handler="double")
    start()

    async def main() -> tuple[list[int], int]:
        async with AsyncRelay(settings=settings) as aio:
            jobs = await asyncio.gather(*(aio.submit("double", i) for i in range(1000)))
            results = await asyncio.gather(*(job.result(timeout=90) for job in jobs))
            redis = relay._core.broker.redis
            return results, sum(int(n) for _, n in redis.pubsub_numsub("torchrelay.ended"))

    results, subscribers = asyncio.run(main())
    assert results == [2 * i for i in range(1000)]
    assert subscribers <= 2, "one subscription for this relay's process side, one for the other relay's"


@ON_SQLITE
def test_concurrent_single_submits_share_chunks(settings: Settings, relay: Relay) -> None:
    relay.register_model("double", handler="double")

    async def main() -> None:
        async with AsyncRelay(settings=settings) as aio:
            await asyncio.gather(*(aio.submit("double", i) for i in range(500)))

    asyncio.run(main())
    with relay._core.db.read() as connection:
        jobs, chunks = connection.execute(
            text("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM chunks)")
        ).one()
    assert jobs == 500
    assert chunks < 100


def test_bad_input_is_refused_before_anything_is_stored(relay: Relay) -> None:
    relay.register_model("double", handler="double")
    for bad in ({"priority": 11}, {"delay": -1}, {"max_attempts": 0}, {"metadata": {"x": object()}}, {"key": ""}):
        with pytest.raises(InvalidInput):
            relay.submit("double", 1, **bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="2"):
        relay.submit_batch("double", [1, 2, object(), 4])
    with relay._core.db.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar() == 0


def test_celery_sees_the_worker(settings: Settings, relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("double", handler="double")
    process = start()
    assert relay.submit("double", 1).result(timeout=60) == 2
    app = Celery("anyone", broker=settings.broker_url, set_as_current=False)  # as Flower, which knows the URL only
    try:
        replies = app.control.inspect(timeout=3).ping() or {}
        assert [name for name in replies if name.startswith(process.name)], replies
        queues = app.control.inspect(timeout=3).active_queues() or {}
        assert any(q["name"] == "torchrelay.double" for qs in queues.values() for q in qs)
        replies = app.control.broadcast("enable_events", reply=True, timeout=3)
        assert [list(reply.values()) for reply in replies] == [[{"ok": "task events enabled"}]]
    finally:
        app.close()
