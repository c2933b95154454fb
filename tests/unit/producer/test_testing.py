"""InlineRelay: a user's tests without Redis and workers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from torchrelay import (
    Backoff,
    InvalidDataset,
    InvalidHyperparameter,
    InvalidInput,
    JobExpired,
    JobFailed,
    JobNotFound,
    JobState,
    KeyConflict,
    ModelNotFound,
    WaitTimeout,
)
from torchrelay.testing import AsyncInlineRelay, InlineRelay, assert_submitted
from torchrelay_storage.run_spec import RunSpec


@pytest.fixture
def inline_models() -> Mapping[str, Callable[[Any], Any]]:
    return {"double": lambda value: value * 2}


def test_a_job_runs_where_it_is_submitted(inline_relay: InlineRelay) -> None:
    job = inline_relay.submit("double", 21, priority=9, key="k", metadata={"a": 1})
    assert job.state is JobState.SUCCEEDED
    assert job.result() == 42
    assert inline_relay.submit("double", 21, key="k") == job
    with pytest.raises(KeyConflict):
        inline_relay.submit("double", 22, key="k")
    np.testing.assert_array_equal(inline_relay.submit("double", np.arange(3)).result(), [0, 2, 4])
    large = inline_relay.submit("double", np.ones(100_000))
    assert large.result().sum() == 200_000


def test_the_checks_are_the_real_ones(inline_relay: InlineRelay) -> None:
    with pytest.raises(InvalidInput):
        inline_relay.submit("double", object())
    with pytest.raises(ModelNotFound):
        inline_relay.submit("other", 1)
    with pytest.raises(InvalidInput):
        inline_relay.submit("double", 1, priority=10)


def succeeds_at_the_third(calls: list[Any]) -> Callable[[Any], Any]:
    """Return a model that fails twice, and notes what it is called with."""

    def flaky(value: Any) -> Any:
        calls.append(value)
        if len(calls) < 3:
            raise ValueError("not yet")
        return "done"

    return flaky


def test_failures_are_retried_and_told(inline_relay: InlineRelay) -> None:
    calls: list[Any] = []

    inline_relay.add_model("flaky", succeeds_at_the_third(calls))
    assert inline_relay.submit("flaky", 1).result() == "done"
    assert calls == [1, 1, 1]

    def refuses(value: Any) -> Any:
        calls.append(value)
        raise InvalidInput("no")

    inline_relay.add_model("refuses", refuses)
    job = inline_relay.submit("refuses", 2)
    assert calls[3:] == [2]
    with pytest.raises(JobFailed, match="InvalidInput: no") as caught:
        job.result()
    assert "refuses" in (caught.value.traceback or "")
    inline_relay.add_model("odd", lambda value: object())
    with pytest.raises(JobFailed, match="cannot be stored"):
        inline_relay.submit("odd", 1).result()


def test_a_backoff_waits_for_the_clock(inline_relay: InlineRelay) -> None:
    calls: list[Any] = []

    inline_relay.add_model("flaky", succeeds_at_the_third(calls))
    job = inline_relay.submit("flaky", 1, backoff=Backoff(seconds=2, factor=3))
    assert job.state is JobState.RETRYING
    assert inline_relay.advance(1.9) == 0
    with pytest.raises(WaitTimeout, match="retrying"):
        job.result()
    assert inline_relay.advance(0.2) == 1
    assert inline_relay.advance(5.9) == 0
    assert inline_relay.advance(0.2) == 1
    assert job.result() == "done"
    assert [(a.number, a.outcome, a.worker) for a in job.attempts()] == [
        (1, "failed", "inline"), (2, "failed", "inline"), (3, "succeeded", "inline"),
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match="no 'second'"):
        inline_relay.submit("flaky", 1, backoff={"second": 2})


def test_retry_by_a_filter(inline_relay: InlineRelay) -> None:
    broken = True

    def mends(value: Any) -> Any:
        if broken:
            raise ValueError("broken")
        return value

    inline_relay.add_model("mends", mends)
    jobs = [inline_relay.submit("mends", i, max_attempts=2) for i in range(3)]
    assert {job.state for job in jobs} == {JobState.FAILED}
    assert inline_relay.retry(model="mends") == 3  # each once, though they all fail again
    assert {job.refresh().state for job in jobs} == {JobState.FAILED}
    broken = False
    assert inline_relay.retry(state="failed") == 3
    assert [job.result() for job in jobs if job.refresh()] == [0, 1, 2]
    assert inline_relay.retry(state="failed") == 0
    assert [a.outcome for a in jobs[0].attempts()] == ["failed"] * 4 + ["succeeded"]

    async def twin() -> None:
        async with AsyncInlineRelay({"double": lambda value: value * 2}) as relay:
            job = await relay.submit("double", 1, backoff={"seconds": 1})
            assert [a.outcome for a in await job.attempts()] == ["succeeded"]
            assert await relay.retry(state="failed") == 0

    asyncio.run(twin())


def test_a_run_waits_out_its_backoff(inline_relay: InlineRelay) -> None:
    tries: list[RunSpec] = []

    def train(spec: RunSpec) -> Mapping[str, float]:
        tries.append(spec)
        if len(tries) == 1:
            raise ValueError("not yet")
        return {"accuracy": 1.0}

    inline_relay.add_recipe("mine", train)
    columns = {"x": [1.0, 2.0], "y": [0, 1]}
    run = inline_relay.train("new", recipe="mine", dataset=columns, backoff={"seconds": 5, "jitter": False})
    assert run.state is JobState.RETRYING
    assert inline_relay.advance(4) == 0
    assert inline_relay.advance(2) == 1
    assert run.refresh().state is JobState.SUCCEEDED
    assert [a.outcome for a in run.attempts()] == ["failed", "succeeded"]


def test_batches(inline_relay: InlineRelay) -> None:
    batch = inline_relay.submit_batch("double", range(1000), key="k")
    assert batch.wait().succeeded == 1000
    assert list(batch.results()) == list(range(0, 2000, 2))
    assert len(list(batch.as_completed())) == 1000


def test_nothing_waits_for_what_nobody_runs(inline_relay: InlineRelay) -> None:
    inline_relay.pause("double")
    job = inline_relay.submit("double", 1)
    batch = inline_relay.submit_batch("double", [1, 2])
    for call in (job.result, batch.wait, lambda: list(batch.results()), lambda: list(batch.as_completed())):
        with pytest.raises(WaitTimeout, match="nothing else will run"):
            call()
    inline_relay.resume("double")
    assert job.result() == 2
    assert list(batch.results()) == [2, 4]


def test_the_clock_moves_by_hand(inline_relay: InlineRelay) -> None:
    job = inline_relay.submit("double", 1, delay=3600)
    assert job.state is JobState.SCHEDULED
    assert inline_relay.advance(1800) == 0
    with pytest.raises(WaitTimeout, match="scheduled"):
        job.result()
    assert inline_relay.advance(1801) == 1
    assert job.result() == 2
    late = inline_relay.submit("double", 1, delay=10, expires_in=5)
    inline_relay.advance(20)
    with pytest.raises(JobExpired):
        late.result()


def test_a_session_on_its_database_runs_the_job_at_the_commit(inline_relay: InlineRelay) -> None:
    engine = create_engine(inline_relay.settings.database_url)
    with Session(engine) as session:
        lost = inline_relay.submit("double", 1, session=session)
        session.rollback()
        kept = inline_relay.submit("double", 2, session=session)
        assert kept.state is JobState.QUEUED
        session.commit()
    engine.dispose()
    assert kept.result() == 4
    with pytest.raises(JobNotFound):
        lost.refresh()


def test_a_handler_may_submit(inline_relay: InlineRelay) -> None:
    inline_relay.add_model("outer", lambda value: inline_relay.submit("double", value).id)
    job = inline_relay.submit("outer", 4)
    assert inline_relay.job(job.result()).result() == 8


def test_threads_may_share_one(inline_relay: InlineRelay) -> None:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(inline_relay.submit("double", n).refresh().id))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    inline_relay.run_due()
    assert sorted(inline_relay.job(name).result() for name in results) == [2 * n for n in range(8)]


def test_assert_submitted(inline_relay: InlineRelay) -> None:
    with pytest.raises(AssertionError, match=r"0 jobs of 'double'.*expected at least 1.*\n  nothing"):
        assert_submitted(inline_relay, "double")
    assert_submitted(inline_relay, "double", count=0)
    inline_relay.submit("double", {"a": 1, "b": [2]}, priority=9, metadata={"x": 1}, key="order-17")
    inline_relay.submit("double", np.arange(3))
    inline_relay.submit_batch("double", [7, 8])
    assert [j.input() for j in assert_submitted(inline_relay, "double", count=4)][2:] == [7, 8]
    [job] = assert_submitted(inline_relay, "double", input={"b": [2], "a": 1}, priority=9, metadata={"x": 1})
    assert job.key == "order-17"
    assert_submitted(inline_relay, "double", input=np.arange(3), count=1)
    with pytest.raises(AssertionError, match=r"1 jobs .* with key='order-17', expected 2.*\n  order-17: "):
        assert_submitted(inline_relay, "double", key="order-17", count=2)


def test_the_asyncio_twin() -> None:
    async def main() -> None:
        async with AsyncInlineRelay({"double": lambda value: value * 2}) as relay:
            job = await relay.submit("double", 21)
            assert await job.result() == 42
            batch = await relay.submit_batch("double", [1, 2])
            assert (await batch.wait()).succeeded == 2
            assert [r async for r in batch.results()] == [2, 4]
            later = await relay.submit("double", 1, delay=60)
            with pytest.raises(WaitTimeout):
                await later.result()
            assert relay.advance(61) == 1
            assert_submitted(relay, "double", count=4)
            relay.add_recipe("regression", lambda spec: {"rmse": 1.0})
            run = await relay.train("line", recipe="regression", dataset={"x": [1], "y": [2]}, target="y")
            assert (await run)["metrics"] == {"rmse": 1.0}
            assert [r.model for r in await relay.runs()] == ["line@1"]

    asyncio.run(main())


def test_a_recipe_that_is_a_function(inline_relay: InlineRelay) -> None:
    specs: list[RunSpec] = []

    def learn(spec: RunSpec) -> dict[str, float]:
        specs.append(spec)
        return {"accuracy": 0.5 + len(specs) / 10}

    data = {"image": [[0.0]], "label": [1]}
    waits = inline_relay.train("digits", recipe="image-classification", dataset=data, epochs=3)
    assert waits.state is JobState.QUEUED
    with pytest.raises(WaitTimeout, match="add_recipe"):
        waits.wait()
    inline_relay.add_recipe("image-classification", learn)
    result = waits.result()
    assert result["model"] == waits.model == "digits@1"
    assert result["metrics"] == {"accuracy": 0.6}
    assert (specs[0].hyperparameters["epochs"], specs[0].dataset.format) == (3, "jsonl")
    run = inline_relay.train("digits", recipe="image-classification", dataset=data, promote="champion", key="k")
    assert (run.state, run.model, run.progress.phase) == (JobState.SUCCEEDED, "digits@2", "")
    assert inline_relay.train(
        "digits", recipe="image-classification", dataset=data, promote="champion", key="k"
    ) == run  # fmt: skip
    assert [(p.name, p.value) for p in run.metrics()] == [("accuracy", 0.7)]
    [version, _] = inline_relay.versions("digits")
    assert (version.metrics, version.aliases, version.lineage["recipe"]) == (
        {"accuracy": 0.7}, ("champion",), "image-classification",
    )  # fmt: skip
    assert version.weights is not None
    assert inline_relay._core.artifacts.get(version.weights)
    served = inline_relay.submit("digits@champion", 1)
    assert (served.state, served.model) == (JobState.QUEUED, "digits@2")
    inline_relay.add_model("digits", lambda value: value + 1)  # serves the versions that are there
    assert served.result() == 2
    assert [v.version for v in inline_relay.versions("digits")] == [2, 1]
    with pytest.raises(InvalidHyperparameter):  # the checks are the real ones
        inline_relay.train("digits", recipe="image-classification", dataset=data, epochs=0)
    assert len(specs) == 2


def test_an_authors_recipe_that_fails(inline_relay: InlineRelay) -> None:
    calls: list[Any] = []

    def learn(spec: RunSpec) -> dict[str, float]:
        calls.append(spec.hyperparameters)
        if len(calls) < 2:
            raise ValueError("not yet")
        if spec.model == "bad":
            raise InvalidDataset("column 'x'", column="x")
        return {}

    inline_relay.add_recipe("mine", learn)
    run = inline_relay.train("good", recipe="mine", dataset={"x": [1]}, anything=[1])
    assert (run.model, run.failures, calls) == ("good@1", 1, [{"anything": [1]}] * 2)
    bad = inline_relay.train("bad", recipe="mine", dataset={"x": [1]})
    with pytest.raises(JobFailed, match="InvalidDataset: column 'x'"):
        bad.result()
    assert len(calls) == 3  # bad data is not tried again
    assert {row.newest.name for row in inline_relay.models()} == {"double", "good"}  # and no "bad"


def test_each_has_a_database_of_its_own_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with InlineRelay({"m": str}) as one, InlineRelay({"m": str}) as two:
        one.submit("m", 1)
        assert two.jobs() == []
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("torchrelay-")]


def test_nothing_of_this_machine_reaches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torchrelay.toml").write_text("nonsense")
    monkeypatch.setenv("TORCHRELAY_DATABASE", "postgresql://127.0.0.1:1/x")
    with InlineRelay({"m": lambda value: value}) as relay:
        assert relay.submit("m", 1).result() == 1
    assert not Path(".torchrelay").exists()


def test_it_costs_a_test_less_than_fifty_milliseconds() -> None:
    InlineRelay({"m": lambda value: value}).close()  # the schema is made once a process
    times = []
    for _ in range(5):
        began = time.process_time()  # this machine's other work is not ours to answer for
        with InlineRelay({"m": lambda value: value}) as relay:
            assert relay.submit("m", 1).result() == 1
        times.append(time.process_time() - began)
    assert min(times) < 0.05


def test_the_plugin_gives_the_fixture_to_a_users_tests(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(
        "import sys, pytest\n"
        "assert 'torchrelay_storage' not in sys.modules\n"
        "@pytest.fixture\n"
        "def inline_models():\n"
        "    return {'digits': lambda input: {'label': 3}}\n"
        "def test_it(inline_relay):\n"
        "    from torchrelay.testing import assert_submitted\n"
        "    assert inline_relay.submit('digits', {'pixels': [0]}).result() == {'label': 3}\n"
        "    assert_submitted(inline_relay, 'digits', count=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
