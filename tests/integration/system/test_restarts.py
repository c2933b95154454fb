"""Workers that are restarted, replaced, stopped and woken again: nothing is lost, nothing finished is repeated."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest
from sqlalchemy import text

from servers import wait_until
from torchrelay import Relay, Unreachable

ON_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
BRISK = {"TORCHRELAY_HEARTBEAT": "0.5", "TORCHRELAY_STALE_AFTER": "2.0"}


def held(relay: Relay) -> int:
    with relay._core.db.read() as connection:
        return int(connection.execute(text("SELECT count(*) FROM chunks WHERE state = 2")).scalar_one())


def lives(relay: Relay, name: str) -> bool:
    return any(worker.alive for worker in relay.workers() if worker.name == name)


def suspend(relay: Relay, family: list[psutil.Process]) -> None:
    """Stop these processes, but not in the middle of a transaction: SQLite's lock would be theirs until they go on."""
    for _ in range(20):
        for process in family:
            process.suspend()
        try:
            with relay._core.db.write() as connection:
                connection.execute(text("UPDATE workers SET host = host"))
            return
        except Unreachable:
            for process in family:
                process.resume()
            time.sleep(0.1)
    raise TimeoutError("they were in a transaction each time")


@ON_POSTGRESQL
def test_a_rolling_restart_of_four_workers_under_load(relay: Relay, start: Callable[..., Any], runs: Any) -> None:
    relay.register_model("slow", handler="slow", config={"seconds": 0.1}, chunk_size=16)
    workers = [start(name=f"w{i}", wait=False) for i in range(4)]
    batch = relay.submit_batch("slow", range(2_000), max_attempts=1)
    wait_until(lambda: len({pid for pid, _ in runs.all()}) == 4, 120, "all four to run")
    for i, worker in enumerate(workers):
        assert worker.stop() == 0
        start(name=f"w{i}", wait=False)
    counts = batch.wait(timeout=180)
    assert counts.succeeded == 2_000
    assert max(Counter(runs.inputs()).values()) == 1, "nothing ran twice"
    with relay._core.db.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM attempts")).scalar() == 0, "a hand-back is no try"


@ON_POSTGRESQL
def test_ten_restarts_spend_nothing(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("slow", handler="slow", config={"seconds": 600}, chunk_size=16)
    job = relay.submit("slow", 1, max_attempts=1)
    for _ in range(10):
        worker = start("--grace", "0")
        wait_until(lambda: relay.job(job.id).state == "running", 60, "it to run")
        worker.stop()
        assert held(relay) == 0, "handed back at once"
    assert job.refresh().failures == 0
    assert job.state == "queued"
    assert job.attempts() == []


@ON_POSTGRESQL
@pytest.mark.parametrize("how", ["twice", "grace"])
def test_an_end_that_forward_cannot_hold_up(how: str, relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("slow", handler="slow", config={"seconds": 600}, chunk_size=16)
    worker = start("--grace", "600" if how == "twice" else "1")
    batch = relay.submit_batch("slow", range(64))
    wait_until(lambda: batch.counts().running, 60, "it to run")
    time.sleep(1.0)
    began = time.monotonic()
    worker.process.terminate()
    if how == "twice":
        time.sleep(2.0)
        worker.process.terminate()
    worker.process.wait(30)
    assert time.monotonic() - began < 20
    assert held(relay) == 0
    counts = batch.counts()
    assert (counts.queued, counts.failed) == (64, 0)


def test_a_paused_worker_that_comes_back_writes_nothing_and_goes_on(
    relay: Relay, start: Callable[..., Any], runs: Any
) -> None:
    relay.register_model("slow", handler="slow", config={"seconds": 1.0}, chunk_size=8)
    first = start(name="first", environment=BRISK)
    batch = relay.submit_batch("slow", range(32))
    wait_until(lambda: batch.counts().running, 60, "it to run")
    family = [psutil.Process(first.process.pid), *first.children]
    suspend(relay, family)
    try:
        second = start(name="second", environment=BRISK)
        assert batch.wait(timeout=90).succeeded == 32, "another one has run what it held"
        assert not lives(relay, "first")
        before = [job.finished_at for job in relay.jobs(batch=batch.id, limit=100)]
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.resume()
    wait_until(lambda: lives(relay, "first"), 60, "it to register anew")
    assert [job.finished_at for job in relay.jobs(batch=batch.id, limit=100)] == before
    assert second.stop() == 0
    again = relay.submit_batch("slow", range(32, 64))
    assert again.wait(timeout=90).succeeded == 32, "it works again"


@ON_POSTGRESQL
def test_a_restart_under_the_old_name_strands_nothing(relay: Relay, start: Callable[..., Any], runs: Any) -> None:
    relay.register_model("slow", handler="slow", config={"seconds": 0.2}, chunk_size=8)
    first = start(name="same")
    batch = relay.submit_batch("slow", range(64))
    wait_until(lambda: batch.counts().running, 60, "it to run")
    first.kill()
    began = time.monotonic()
    start(name="same")  # with the default limits: what it held is freed by the new incarnation, not by time
    assert batch.wait(timeout=60).succeeded == 64
    assert time.monotonic() - began < 30
    assert set(runs.inputs()) == set(range(64))


def test_recycling_loses_and_repeats_nothing(relay: Relay, start: Callable[..., Any], runs: Any) -> None:
    relay.register_model("slow", handler="slow", config={"seconds": 0.02}, chunk_size=32)
    worker = start("--max-jobs", "100")
    batch = relay.submit_batch("slow", range(300), max_attempts=1)
    assert batch.wait(timeout=120).succeeded == 300
    assert sorted(runs.inputs()) == list(range(300))
    assert len({pid for pid, _ in runs.all()}) >= 2, "another process went on"
    assert worker.process.poll() is None


@ON_POSTGRESQL
def test_whoever_is_left_does_everything(relay: Relay, start: Callable[..., Any], runs: Any) -> None:
    """The leader among them: announcing, rescue and the rest are any worker's to do."""
    relay.register_model("slow", handler="slow", config={"seconds": 0.05}, chunk_size=16)
    workers = [start(name=f"w{i}", environment=BRISK) for i in range(3)]
    batch = relay.submit_batch("slow", range(800))
    wait_until(lambda: len(runs.inputs()) > 40, 60, "some device batches")
    for worker in workers[:2]:
        os.kill(worker.process.pid, signal.SIGKILL)
        time.sleep(1.0)
    later = relay.submit("slow", 1_000, delay=1.0)
    assert batch.wait(timeout=90).succeeded == 800
    assert later.result(timeout=30) == 2_000
