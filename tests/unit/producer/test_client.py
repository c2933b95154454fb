"""Relay and Job: what is refused, what is stored, and how one waits."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forking import run_in_child
from servers import RedisServer, wait_until
from torchrelay import (
    InvalidInput,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    JobState,
    KeyConflict,
    ModelNotFound,
    Relay,
    RelayError,
    SchemaMismatch,
    WaitTimeout,
)
from torchrelay.messages import queue_name
from torchrelay.settings import Settings

Work = Callable[..., Any]


def double(value: Any) -> Any:
    return {"twice": value["n"] * 2}


def test_a_job_goes_all_the_way(relay: Relay, work: Work) -> None:
    with work(double):
        job = relay.submit("double", {"n": 21}, priority=9, metadata={"who": "ü"}, tenant="t", key="k", timeout=60)
        assert job.result(timeout=30) == {"twice": 42}
        assert job.state is JobState.SUCCEEDED
    again = relay.job(job.id)
    assert again == job
    assert again.result() == {"twice": 42}
    assert (again.priority, again.metadata, again.tenant, again.key) == (9, {"who": "ü"}, "t", "k")
    assert (again.model, again.batch_id, again.failures, again.worker) == ("double@1", None, 0, "thread")
    assert again.input() == {"n": 21}
    assert again.as_dict()["state"] == "succeeded"
    assert "succeeded" in repr(again)


def test_what_was_submitted_is_known_without_reading_it(relay: Relay) -> None:
    job = relay.submit("double@1", {"n": 1}, priority=3, max_attempts=7, metadata={"a": 1})
    fresh = relay.job(job.id)
    assert job._row.chunk == fresh._row.chunk
    assert {**job.as_dict(), "created_at": 0} == {**fresh.as_dict(), "created_at": 0}
    assert abs(job.created_at - fresh.created_at) < 5
    assert relay.submit("double", {"n": 1}, delay=60).state is JobState.SCHEDULED


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"priority": 10}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"delay": -1}, "delay"),
        ({"expires_in": 0}, "expires_in"),
        ({"timeout": float("nan")}, "timeout"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"key": ""}, "key must be"),
        ({"key": "x" * 257}, "key must be"),
        ({"key": "a\0b"}, "key must be"),
        ({"key": "\ud800"}, "surrogate"),
        ({"key": 5}, "key must be"),
        ({"metadata": [1]}, "metadata must be a dict"),
        ({"metadata": {1: 2}}, "string keys"),
        ({"metadata": {"a": float("nan")}}, "metadata must be JSON"),
        ({"metadata": {"a": object()}}, "metadata must be JSON"),
        ({"metadata": {"a": "x" * 20_000}}, "limit is 16,384"),
        ({"delay": 1, "not_before": 5.0}, "same thing"),
        ({"session": "s"}, "must be a SQLAlchemy Session"),
    ],
)
def test_bad_options_are_refused_before_anything_is_stored(relay: Relay, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        relay.submit("double", {"n": 1}, **arguments)
    assert relay.jobs() == []


def test_bad_inputs_and_models_are_refused(sqlite_settings: Settings) -> None:
    with Relay(settings=sqlite_settings.model_copy(update={"max_input_bytes": 2048})) as relay:
        relay.register_model("double", handler="double")
        with pytest.raises(InvalidInput, match=r"'b'.*type object cannot be stored"):
            relay.submit("double", {"a": 1, "b": object()})
        with pytest.raises(InvalidInput, match="limit is 2,048"):
            relay.submit("double", "x" * 3000)
        with pytest.raises(ModelNotFound, match="double"):
            relay.submit("dubble", {})
        with pytest.raises(InvalidInput, match="named by a string"):
            relay.submit(None, {})  # type: ignore[arg-type]
        assert relay.jobs() == []


def test_a_key_gives_the_same_job_and_no_other_input(relay: Relay, work: Work) -> None:
    job = relay.submit("double", {"n": 1, "m": 2}, key="order-17")
    assert relay.submit("double", {"m": 2, "n": 1}, key="order-17") == job
    assert relay.submit("double", {"n": 1, "m": 2}, key="order-17", tenant="other") != job
    with pytest.raises(KeyConflict, match=job.id):
        relay.submit("double", {"n": 2}, key="order-17")
    with work(double):
        job.wait(30)
    again = relay.submit("double", {"n": 1, "m": 2}, key="order-17")
    assert again.state is JobState.SUCCEEDED
    assert again.result() == {"twice": 2}


def test_large_inputs_and_outputs_are_artifacts_and_none_is_left_over(relay: Relay, work: Work, tmp_path: Path) -> None:
    def artifacts() -> int:
        return sum(path.is_file() for path in (tmp_path / "artifacts").rglob("*"))

    array = np.arange(100_000, dtype=np.int32)
    job = relay.submit("double", array, key="large")
    assert artifacts() == 1
    assert relay.submit("double", array, key="large") == job
    with pytest.raises(KeyConflict):
        relay.submit("double", array + 1, key="large")
    assert artifacts() == 1
    with work(lambda value: value * 2):
        np.testing.assert_array_equal(job.result(30), array * 2)
    np.testing.assert_array_equal(job.input(), array)
    assert artifacts() == 2


def test_a_failed_job_tells_why(relay: Relay, work: Work) -> None:
    with work(lambda value: 1 / 0):
        job = relay.submit("double", {"n": 1}, max_attempts=2)
        with pytest.raises(JobFailed) as caught:
            job.result(30)
    error = caught.value
    assert (error.job, error.kind, error.message) == (job.id, "ZeroDivisionError", "division by zero")
    assert caught.value.traceback == "tb"
    assert job.failures == 2
    assert job.error is not None
    assert job.retry()
    assert not job.retry()
    assert job.state is JobState.QUEUED
    with work(double):
        assert job.result(30) == {"twice": 2}


def test_cancel(relay: Relay, work: Work) -> None:
    job = relay.submit("double", {"n": 1})
    waiter = ThreadPoolExecutor(1)
    waiting = waiter.submit(relay.job(job.id).wait, 30)
    wait_until(lambda: relay._core.completions.waiting)
    assert job.cancel()
    assert not job.cancel()
    assert waiting.result(10).state is JobState.CANCELLED
    with pytest.raises(JobCancelled):
        job.result()
    assert job.retry()
    with work(double):
        assert job.result(30) == {"twice": 2}
    waiter.shutdown()


def test_an_expired_job(relay: Relay) -> None:
    job = relay.submit("double", {"n": 1}, expires_in=0.001)
    time.sleep(0.01)
    relay._core.tell(relay._core.chunks.expire())
    with pytest.raises(JobExpired):
        job.result(30)


def test_a_wait_that_runs_out_leaves_the_job(relay: Relay) -> None:
    job = relay.submit("double", {"n": 1})
    began = time.monotonic()
    with pytest.raises(WaitTimeout, match=job.id) as caught:
        job.result(timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    assert time.monotonic() - began < 10
    assert relay._core.completions.waiting == 0


def test_who_waits_is_woken_by_redis_and_without_it_by_polling(relay: Relay, work: Work) -> None:
    with work(double, tell=True):
        relay.submit("double", {"n": 0}).result(30)  # the subscription stands
        began = time.monotonic()
        for n in range(20):
            relay.submit("double", {"n": n}).result(30)
        assert time.monotonic() - began < 20  # polling alone would take two seconds a job
    with work(double, tell=False):
        assert relay.submit("double", {"n": 0}).result(30) == {"twice": 0}


def test_a_thousand_waiters_of_one_process(relay: Relay, work: Work) -> None:
    jobs = [relay.submit("double", {"n": n}) for n in range(300)]
    with ThreadPoolExecutor(300) as pool, work(double):
        results = list(pool.map(lambda job: job.result(60)["twice"], jobs))
    assert results == [2 * n for n in range(300)]
    assert len([t for t in threading.enumerate() if t.name == "torchrelay-subscription"]) == 1


def test_submits_at_one_time_share_chunks(relay: Relay) -> None:
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda n: relay.submit("double", {"n": n}), range(400)))
    assert len({job.id for job in jobs}) == 400
    assert len({job._row.chunk for job in jobs}) < 400
    assert [relay.job(job.id).input()["n"] for job in jobs[::40]] == list(range(0, 400, 40))


def test_a_silent_redis_does_not_hold_up_a_submit(relay: Relay, redis_server: RedisServer) -> None:
    relay.submit("double", {"n": 0})
    assert relay._core.announcer.flush(5)
    redis_server.pause()
    try:
        times = []
        for n in range(5):
            began = time.monotonic()
            relay.submit("double", {"n": n})
            relay.submit_batch("double", [{"n": n}])
            times.append(time.monotonic() - began)
        assert max(times) < 1, "the promise: each within a second"
        wait_until(lambda: relay._core.announcer.is_down)
    finally:
        redis_server.resume()
    wait_until(lambda: sum(relay._core.broker.depths(queue_name("double")).values()) >= 4)


def test_a_short_script_announces_what_it_submitted(sqlite_settings: Settings) -> None:
    with Relay(settings=sqlite_settings) as relay:
        relay.register_model("double", handler="double")
        relay.submit("double", {"n": 1})
        broker = relay._core.broker
    assert sum(broker.depths(queue_name("double")).values()) == 1
    broker.close()


def test_lists_and_pages(relay: Relay, work: Work) -> None:
    relay.register_model("other", handler="other")
    jobs = [relay.submit("double", {"n": n}) for n in range(5)]
    other = relay.submit("other", {"n": 1}, tenant="t")
    jobs[0].cancel()
    assert [j.id for j in relay.jobs(model="double")] == [j.id for j in reversed(jobs)]
    first = relay.jobs(model="double", limit=2)
    assert [j.id for j in relay.jobs(model="double", limit=9, before=first[-1].id)] == [j.id for j in jobs[2::-1]]
    assert relay.jobs(state="cancelled") == [jobs[0]]
    assert relay.jobs(state=["cancelled", JobState.QUEUED], tenant="t") == [other]
    for arguments, error in (
        ({"state": "done"}, InvalidInput),
        ({"limit": 0}, InvalidInput),
        ({"model": "nobody"}, ModelNotFound),
        ({"before": "b_0000000000000"}, JobNotFound),
    ):
        with pytest.raises(error):
            relay.jobs(**arguments)
    with pytest.raises(JobNotFound):
        relay.job("j_0000000000000")
    assert {row.newest.name: row.waiting for row in relay.models()} == {"double": 4, "other": 1}
    with work(double):
        wait_until(lambda: [w.name for w in relay.workers() if w.alive] == ["thread"])


def test_pause_holds_a_model_and_resume_lets_it_go(relay: Relay, work: Work) -> None:
    relay.pause("double")
    job = relay.submit("double", {"n": 1})
    with work(double):
        with pytest.raises(WaitTimeout):
            job.result(0.2)
        relay.resume("double")
        assert job.result(30) == {"twice": 2}


def test_weights_are_uploaded_and_pinned(relay: Relay, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"weights")
    version = relay.register_model("double", handler="double", weights=weights, config={"a": 1})
    assert version.ref == "double@2"
    assert version.weights is not None
    assert relay._core.artifacts.get(version.weights) == b"weights"
    assert version.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert relay.submit("double", {}).model == "double@2"
    with pytest.raises(InvalidInput, match="no file of weights"):
        relay.register_model("double", handler="double", weights=tmp_path / "missing")


def test_the_embedded_database_upgrades_itself_and_another_does_not(tmp_path: Path) -> None:
    with Relay(home=tmp_path / "home") as relay:
        assert relay.jobs() == []
        assert relay.settings.is_embedded
    with (
        Relay(database=f"sqlite:///{tmp_path / 'empty.db'}") as relay,
        pytest.raises(SchemaMismatch, match="torchrelay db upgrade"),
    ):
        relay.jobs()


def test_a_closed_relay_says_so(relay: Relay) -> None:
    job = relay.submit("double", {"n": 1})
    relay.close()
    relay.close()
    for call in (lambda: relay.submit("double", {}), relay.jobs, lambda: job.wait(1), job.refresh):
        with pytest.raises(RelayError, match="closed"):
            call()
    assert not [t for t in threading.enumerate() if t.name.startswith("torchrelay-")]


def test_a_repr_holds_no_password(tmp_path: Path) -> None:
    with Relay(home=tmp_path, database="postgresql://u:geheim@127.0.0.1:1/d", broker="redis://:geheim@h") as relay:
        assert "geheim" not in repr(relay)


def test_a_forked_child_goes_on_with_its_parents_relay(relay: Relay, work: Work) -> None:
    job = relay.submit("double", {"n": 1})
    with pytest.raises(WaitTimeout):
        job.wait(0.05)

    def child() -> None:
        mine = relay.submit("double", {"n": 5})
        with work(double):
            assert mine.result(50) == {"twice": 10}
            assert job.result(50) == {"twice": 2}

    run_in_child(child)
    assert job.result(10) == {"twice": 2}
