"""A worker's inner process and what its supervisor learns of it: standby, black box, deadlines, recycling, silence."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from sqlalchemy import text

from integration.worker.conftest import Process
from servers import wait_until
from torchrelay import Relay
from torchrelay.broker import make_app
from torchrelay.messages import queue_name
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.states import JobState
from torchrelay_worker.exits import EXIT_RECYCLE

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

Start = Callable[..., Process]


def test_a_spare_does_nothing_until_it_is_told_to_and_then_at_once(relay: Relay, process: Start) -> None:
    relay.register_model("waits", handler="waits")
    job = relay.submit("waits", 1)
    it = process()
    with pytest.raises(TimeoutError):
        it.wait(lambda: it.inner.has_reported or it.held(), "a report or a claim", 8)
    began = time.monotonic()
    it.go()
    assert job.result(timeout=30) == 2
    assert time.monotonic() - began < 10
    it.terminate()
    assert it.end() == 0


def test_a_spare_that_is_not_needed_ends_by_itself(process: Start) -> None:
    it = process()
    assert it.inner.process.stdin is not None
    it.inner.process.stdin.close()
    it.inner.process.stdin = None
    assert it.end() == 0


def test_the_black_box_tells_what_ran_when_it_was_killed(relay: Relay, process: Start) -> None:
    relay.register_model("waits", handler="waits", chunk_size=8)
    it = process().go()
    relay.submit_batch("waits", [-2, -3, -4, -5, 1, 2, 3, 4])
    it.began(-2)
    it.inner.process.send_signal(signal.SIGKILL)
    assert it.end() == -signal.SIGKILL
    jobs = [row.id for row in it.rows()]
    assert it.inner.box.read().jobs == frozenset(jobs[:4]), "the device batch, and none of those that waited"


def test_the_deadline_is_seen_though_forward_keeps_the_interpreter_to_itself(relay: Relay, process: Start) -> None:
    relay.register_model("waits", handler="waits")
    it = process().go()
    relay.submit("waits", -1, timeout=2.0)
    it.began(-1)
    began = it.inner._looked = time.monotonic()  # a supervisor looks all the time; it was not paused
    wait_until(lambda: "limit" in (it.inner.trouble() or ""), 10, "the end of its time")
    assert it.inner.has_overrun
    assert time.monotonic() - began < 5


def test_half_of_the_time_is_told_so_that_a_spare_can_be_started(relay: Relay, process: Start) -> None:
    relay.register_model("waits", handler="waits")
    it = process().go()
    job = relay.submit("waits", -2, timeout=4.0)
    it.began(-2)
    it.inner.read()
    assert not it.inner.is_late
    it.wait(lambda: it.inner.is_late, "the first half", 6)
    assert not it.inner.has_overrun
    it.let_go()
    assert job.result(timeout=20) == -4


def test_after_enough_jobs_it_asks_to_be_replaced_and_holds_nothing(
    relay: Relay, process: Start, database: Database, capfd: pytest.CaptureFixture[str]
) -> None:
    relay.register_model("slow", handler="slow", chunk_size=4)
    it = process(max_jobs=10).go()
    batch = relay.submit_batch("slow", range(60))
    assert it.end() == EXIT_RECYCLE
    assert it.held() == 0
    counts = batch.counts()
    assert 10 <= counts.succeeded < 30
    assert counts.running == counts.failed == 0
    assert not any(row.failures for row in it.rows())
    with database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM attempts")).scalar() == 0
    assert "--max-jobs 10" in capfd.readouterr().err
    process().go()
    assert batch.wait(timeout=60).succeeded == 60


def test_too_much_memory_is_a_reason_too(process: Start) -> None:
    it = process(max_memory=50)
    it.inner.go(it.worker)
    assert it.end() == EXIT_RECYCLE


def test_a_consumer_that_is_silent_is_built_anew(
    settings: Settings, relay: Relay, process: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    relay.register_model("waits", handler="waits")
    it = process({"silent_after": 2.0}).go()
    assert relay.submit("waits", 1).result(timeout=30) == 2
    app = make_app(settings)
    queue = queue_name("waits")
    app.control.cancel_consumer(queue, reply=True, timeout=5)  # alive, idle, and deaf on this ear
    began = time.monotonic()
    job = relay.submit("waits", 2)
    assert job.result(timeout=30) == 4
    assert time.monotonic() - began < 15
    assert "consumer_rebuilt" in capfd.readouterr().err
    assert it.inner.process.poll() is None, "the process need not be replaced for it"
    app.close()


def test_each_job_knows_the_revision_that_served_it(relay: Relay, process: Start) -> None:
    relay.register_model("waits", handler="waits")
    it = process().go()
    relay.submit("waits", 1).result(timeout=30)
    [row] = it.rows()
    assert (row.handler_revision, row.state) == ("r7", JobState.SUCCEEDED)
