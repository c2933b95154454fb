"""A worker's inner process that is asked to end: what has not begun goes back at once, what runs may end first."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from integration.worker.conftest import Process
from servers import wait_until
from torchrelay import Relay
from torchrelay_storage.states import JobState

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

Start = Callable[..., Process]


def two_chunks(relay: Relay, process: Process) -> None:
    """Have it run a device batch that waits, and hold a second chunk that has not begun."""
    relay.register_model("waits", handler="waits", chunk_size=4)
    process.go()
    relay.submit_batch("waits", [-2, -3, -4, -5])
    process.began(-2)
    relay.submit_batch("waits", [1, 2, 3, 4])
    process.wait(lambda: process.held() == 2, "both chunks")


def test_what_has_not_begun_goes_back_at_once_and_what_runs_ends(relay: Relay, process: Start) -> None:
    it = process()
    two_chunks(relay, it)
    it.terminate()
    asked = time.monotonic()
    wait_until(lambda: it.held() == 1, 5, "the hand-back of what waits")
    assert time.monotonic() - asked < 3.0, "a second is promised on a machine that does nothing else"
    assert it.inner.process.poll() is None, "the device batch runs on"
    it.let_go()
    assert it.end() == 0
    assert it.held() == 0
    rows = it.rows()
    assert [row.state for row in rows] == [JobState.SUCCEEDED] * 4 + [JobState.QUEUED] * 4
    assert not any(row.failures for row in rows)


def test_a_forward_that_never_returns_is_given_up_when_the_grace_is_over(relay: Relay, process: Start) -> None:
    it = process(grace=1.0)
    two_chunks(relay, it)
    it.terminate()
    assert it.end(20) == 0
    assert it.held() == 0
    assert {job.state for job in relay.jobs(model="waits")} == {JobState.QUEUED}


def test_a_cancel_frees_the_device_also_while_the_worker_drains(relay: Relay, process: Start) -> None:
    relay.register_model("waits", handler="waits", chunk_size=4)
    it = process(grace=60.0).go()
    batch = relay.submit_batch("waits", [-2, -3])
    it.began(-2)
    it.terminate()
    deadline = it.inner.box.deadline()
    assert deadline is not None
    assert deadline - time.monotonic() > 30
    batch.cancel()
    wait_until(lambda: (it.inner.box.deadline() or 0) < deadline, 5, "the shorter time")
    assert (it.inner.box.deadline() or 0) - time.monotonic() <= 5.0
    it.inner.read()
    it.wait(lambda: "cancelled" in (it.inner.reason or ""), "the reason")


def test_a_drain_ends_though_redis_is_silent(relay: Relay, process: Start, redis_server: object) -> None:
    relay.register_model("waits", handler="waits", chunk_size=4)
    it = process().go()
    job = relay.submit("waits", -2)
    it.began(-2)
    redis_server.pause()  # type: ignore[attr-defined]
    try:
        it.terminate()
        it.let_go()
        assert it.end(40) in (0, 75)
    finally:
        redis_server.resume()  # type: ignore[attr-defined]
    job.refresh()
    assert job.state == JobState.SUCCEEDED
