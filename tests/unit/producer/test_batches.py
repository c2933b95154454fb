"""Batches: streamed, resumed under a key, in order whatever happens, and never spoiled by one input."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from servers import wait_until
from torchrelay import (
    BatchNotFound,
    InvalidInput,
    JobFailed,
    JobState,
    KeyConflict,
    ModelNotFound,
    Relay,
    WaitTimeout,
    batches,
)
from torchrelay.settings import Settings

Work = Callable[..., Any]


def double(value: Any) -> Any:
    return {"twice": value["n"] * 2}


def inputs(n: int, start: int = 0) -> Iterator[dict[str, int]]:
    return ({"n": i} for i in range(start, start + n))


def stored(relay: Relay, batch: Any) -> list[Any]:
    jobs = relay.jobs(batch=batch.id, limit=100_000)
    return [job.input()["n"] for job in reversed(jobs)]


def test_a_batch_goes_all_the_way(relay: Relay, work: Work) -> None:
    batch = relay.submit_batch("double", inputs(50), priority=7, metadata={"a": 1})
    counts = batch.counts()
    assert (counts.total, counts.queued, counts.closed, counts.done) == (50, 50, True, False)
    with work(double):
        assert batch.wait(30).succeeded == 50
        assert [r["twice"] for r in batch.results()] == [2 * n for n in range(50)]
        assert sorted(job.result()["twice"] for job in batch.as_completed()) == [2 * n for n in range(50)]
    again = relay.batch(batch.id)
    assert again == batch
    assert (again.priority, again.metadata, again.model, again.key) == (7, {"a": 1}, "double@1", None)
    assert relay.batches(model="double") == [batch]
    with pytest.raises(BatchNotFound):
        relay.batch("b_0000000000000")


def test_results_come_while_others_still_run(relay: Relay, work: Work) -> None:
    gate = threading.Event()

    def run(value: Any) -> Any:
        assert value["n"] < 8 or gate.wait(30)
        return double(value)

    batch = relay.submit_batch("double", inputs(12))  # chunks of four
    with work(run):
        results = batch.results(timeout=30)
        assert [next(results)["twice"] for _ in range(8)] == [2 * n for n in range(8)]
        arrived = batch.as_completed(timeout=30)
        assert sorted(next(arrived).result()["twice"] for _ in range(8)) == [2 * n for n in range(8)]
        gate.set()
        assert [r["twice"] for r in results] == [16, 18, 20, 22]
        assert len(list(arrived)) == 4


def test_results_keep_their_order_through_retries(relay: Relay, work: Work) -> None:
    tries: dict[int, int] = {}

    def run(value: Any) -> Any:
        n = value["n"]
        tries[n] = tries.get(n, 0) + 1
        if n % 3 == 0 and tries[n] < 3:
            raise ValueError("not yet")
        return double(value)

    batch = relay.submit_batch("double", inputs(40))
    with work(run):
        assert [r["twice"] for r in batch.results(timeout=30)] == [2 * n for n in range(40)]
        assert len({job.id for job in batch.as_completed(timeout=30)}) == 40


def test_one_failed_job_does_not_hide_the_others(relay: Relay, work: Work) -> None:
    def run(value: Any) -> Any:
        if value["n"] == 2:
            raise ValueError("two")
        return double(value)

    batch = relay.submit_batch("double", inputs(6), max_attempts=1)
    with work(run):
        assert batch.wait(30).failed == 1
    results = list(batch.results(return_exceptions=True))
    assert [type(r) for r in results] == [dict, dict, JobFailed, dict, dict, dict]
    with pytest.raises(JobFailed, match="two"):
        list(batch.results())
    assert batch.retry_failed() == 1
    assert batch.retry_failed() == 0
    assert batch.counts().queued == 1
    with work(double):
        assert batch.wait(30).succeeded == 6
    assert [r["twice"] for r in batch.results()] == [0, 2, 4, 6, 8, 10]


def test_cancel_pause_and_resume(relay: Relay, work: Work) -> None:
    batch = relay.submit_batch("double", inputs(6))
    batch.pause()
    with work(double):
        with pytest.raises(WaitTimeout, match=batch.id):
            batch.wait(0.2)
        batch.resume()
        assert batch.wait(30).succeeded == 6
    other = relay.submit_batch("double", inputs(6))
    assert other.cancel() == 6
    assert other.cancel() == 0
    assert other.wait(5).cancelled == 6
    assert [job.state for job in other.as_completed()] == [JobState.CANCELLED] * 6


def test_progress_is_shown_on_the_standard_error(relay: Relay, work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    batch = relay.submit_batch("double", inputs(6), max_attempts=1)
    with work(lambda value: 1 / value["n"]):
        batch.wait(30, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "6/6" in err
    assert "1 failed" in err


def test_an_empty_batch_is_done(relay: Relay) -> None:
    batch = relay.submit_batch("double", [])
    assert batch.wait(5).total == 0
    assert list(batch.results(5)) == []
    assert list(batch.as_completed(5)) == []


@pytest.mark.parametrize("what", ["text", b"bytes", {"n": 1}, 5])
def test_what_is_no_batch_is_refused(relay: Relay, what: Any) -> None:
    with pytest.raises((InvalidInput, TypeError)):
        relay.submit_batch("double", what)
    assert relay.jobs() == []


def test_a_list_with_a_bad_input_is_refused_whole(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SLICE_JOBS", 8)
    monkeypatch.setattr(batches, "GROUP_JOBS", 4)
    values: list[Any] = list(inputs(50))
    values[40] = {"n": {1, 2}}
    with pytest.raises(InvalidInput, match=r"input 40: .*set cannot be stored"):
        relay.submit_batch("double", values)
    assert relay.jobs() == []
    assert relay.batches() == []
    with pytest.raises(InvalidInput, match="priority"):
        relay.submit_batch("double", inputs(5), priority=11)
    with pytest.raises(ModelNotFound):
        relay.submit_batch("nobody", inputs(5))
    assert relay.batches() == []


def test_of_a_stream_what_comes_before_a_bad_input_is_stored(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SLICE_JOBS", 8)
    bad = [{"n": float("nan")}]
    with pytest.raises(InvalidInput, match=r"input 21: .*NaN"):
        relay.submit_batch("double", itertools.chain(inputs(21), bad, inputs(5)), key="k")
    [batch] = relay.batches()
    assert stored(relay, batch) == list(range(21))
    assert not batch.counts().closed
    mended = relay.submit_batch("double", inputs(30), key="k")
    assert mended == batch
    assert stored(relay, batch) == list(range(30))
    assert batch.counts().closed


def test_a_generator_that_raises_leaves_its_batch_open_and_a_key_goes_on(
    relay: Relay, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "SLICE_JOBS", 8)

    def source(fail_at: int | None) -> Iterator[dict[str, int]]:
        for value in inputs(100):
            if value["n"] == fail_at:
                raise OSError("the disk is gone")
            yield value

    with work(double):
        for fail_at in (0, 1, 37, 63):
            with pytest.raises(OSError, match="disk is gone"):
                relay.submit_batch("double", source(fail_at), key="night")
            [batch] = relay.batches()
            counts = batch.counts()
            assert (counts.total, counts.closed) == (fail_at, False)
            with pytest.raises(WaitTimeout):
                batch.wait(0.1)
        assert relay.submit_batch("double", source(None), key="night") == batch
        assert batch.wait(30).succeeded == 100
        assert [r["twice"] for r in batch.results(30)] == [2 * n for n in range(100)]


def test_a_batch_that_is_whole_comes_back_under_its_key(relay: Relay) -> None:
    batch = relay.submit_batch("double", inputs(10), key="k")
    assert relay.submit_batch("double", list(inputs(10)), key="k") == batch
    assert relay.submit_batch("double", inputs(10), key="k") == batch
    assert relay.submit_batch("double", inputs(10), key="k", tenant="other") != batch
    for other in (list(inputs(9)), inputs(9), list(inputs(11)), inputs(11), inputs(10, start=1), []):
        with pytest.raises(KeyConflict, match=batch.id):
            relay.submit_batch("double", other, key="k")
    assert batch.counts().total == 10


def test_a_resumed_batch_keeps_its_model_version(relay: Relay) -> None:
    def failing() -> Iterator[dict[str, int]]:
        yield from inputs(3)
        raise OSError

    with pytest.raises(OSError):
        relay.submit_batch("double", failing(), key="k")
    relay.register_model("double", handler="double")
    batch = relay.submit_batch("double", inputs(6), key="k")
    assert {job.model for job in relay.jobs(batch=batch.id)} == {"double@1"}


def test_large_inputs_are_artifacts(relay: Relay, work: Work) -> None:
    arrays = [np.full(50_000, n, dtype=np.float32) for n in range(5)]
    batch = relay.submit_batch("double", iter(arrays), key="k")
    assert relay.submit_batch("double", arrays, key="k") == batch
    with work(lambda value: value + 1):
        for n, result in enumerate(batch.results(30)):
            np.testing.assert_array_equal(result, arrays[n] + 1)
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert relay.submit_batch("double", rows).counts().total == 3  # an array iterates over its rows


def test_a_stream_takes_constant_memory(sqlite_settings: Settings) -> None:
    taken: list[int] = []

    def source(n: int) -> Iterator[Any]:
        for i in range(n):
            taken.append(i)
            yield {"text": "x" * 1000, "n": i}

    with Relay(settings=sqlite_settings) as relay:
        relay.register_model("double", handler="double")
        relay.submit_batch("double", source(2_000))
        gc.collect()
        tracemalloc.start()
        relay.submit_batch("double", source(40_000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 30e6  # of 45 MB of inputs, a slice or two


def test_a_slice_runs_before_the_stream_has_ended(relay: Relay, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SLICE_JOBS", 8)
    monkeypatch.setattr(batches, "GROUP_JOBS", 4)
    ended = threading.Event()

    def source() -> Iterator[dict[str, int]]:
        yield from inputs(40)
        wait_until(lambda: len(worker.starts) >= 16, 20)
        ended.set()

    with work(double) as worker:
        relay.submit_batch("double", source()).wait(30)
    assert ended.is_set()


def test_waiting_ends_soon_after_the_last_job(relay: Relay, work: Work) -> None:
    with work(double):
        relay.submit_batch("double", inputs(4)).wait(30)
        began = time.monotonic()
        for _ in range(10):
            relay.submit_batch("double", inputs(4)).wait(30)
        assert time.monotonic() - began < 15  # polling alone would take two seconds a batch
    with pytest.raises(InvalidInput, match="timeout"):
        relay.submit_batch("double", inputs(1)).wait(-1)
