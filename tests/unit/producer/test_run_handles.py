"""Run and AsyncRun: what a run's process has written is read, steered and waited for."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from servers import wait_until
from torchrelay import (
    AsyncRelay,
    JobCancelled,
    JobFailed,
    JobState,
    Relay,
    Run,
    Unreachable,
    WaitTimeout,
    job_handles,
    run_handles,
    training,
)
from torchrelay.messages import queue_name
from torchrelay.progress import RunProgress
from torchrelay.settings import Settings
from torchrelay_storage.errors import Corrupt
from torchrelay_storage.job_reader import JobError
from torchrelay_storage.run_writer import Order, Progress
from torchrelay_storage.runs import RunRow

Trainer = Any  # of conftest.py
QUEUE = queue_name("train:image-classification")


def train(relay: Relay, **options: Any) -> Run:
    data = {"image": [[0.0]], "label": [1]}
    return relay.train("digits", recipe="image-classification", dataset=data, **options)


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[threading.Event]:
    """Do `work` on a thread once the event is set."""
    go = threading.Event()

    def run() -> None:
        assert go.wait(60)
        work()

    thread = threading.Thread(target=run, name="meanwhile")
    thread.start()
    try:
        yield go
    finally:
        go.set()
        thread.join()


def test_a_run_from_its_submit_to_the_version(relay: Relay, runs_trainer: Trainer) -> None:
    run = train(relay)
    assert (run.progress, run.split, run.started_at, run.best) == (Progress("", 0, 0, 0, 0), {}, None, None)
    assert (run.metrics(), run.logs(), run.checkpoints()) == ([], [], [])
    writer = runs_trainer.begin()
    for step in (10, 20):
        assert runs_trainer.report(writer, step) is Order.GO
    writer.log([(1.0, "first"), (2.0, "second")])
    writer.checkpoint(20, {"model.safetensors": "file:///a/20"}, 0.5, 2)
    assert run.refresh() is run
    assert (run.state, run.model, run.worker) == (JobState.RUNNING, "digits", "trainer")
    assert run.progress == Progress("train", 20, 40, 2, 4, 123.0, 20.0)
    assert (run.best, run.best_step, run.split) == (0.05, 20, {"train": 80, "validation": 20})
    assert run.started_at is not None
    assert [(p.name, p.step, p.value) for p in run.metrics(["train_loss"])] == [
        ("train_loss", 10, 0.1),
        ("train_loss", 20, 0.05),
    ]
    assert [(p.name, p.step) for p in run.metrics(after=10)] == [("accuracy", 20), ("train_loss", 20)]
    assert run.logs() == ["first", "second"]
    [line] = run.log_lines(after=run.log_lines(limit=1)[0].id)
    assert (line.line, line.at) == ("second", 2.0)
    assert [(c.step, c.value) for c in run.checkpoints()] == [(20, 0.5)]
    assert run.as_dict()["step"] == 20

    relay.register_model("digits", handler="digits")  # somebody else's version, which the name stands for till now
    assert relay.submit("digits", {}).model == "digits@1"
    with meanwhile(lambda: runs_trainer.finish(writer, promote="champion")) as go:
        go.set()
        assert run.wait(60) is run
    assert (run.state, run.model) == (JobState.SUCCEEDED, "digits@2")
    assert run.result() == {"model": "digits@2", "metrics": {"accuracy": 0.9}}
    assert relay.submit("digits", {}).model == "digits@2"  # at once
    [version, _] = relay.versions("digits")
    assert (version.metrics, version.aliases, version.run) == ({"accuracy": 0.9}, ("champion",), run._row.id)
    assert [move.by for move in relay.alias_history("digits")] == [run.id]
    assert run.spec.recipe == run.recipe == "image-classification"


def test_long_logs_are_read_in_pages(relay: Relay, runs_trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(relay)
    runs_trainer.begin().log([(float(n), f"line {n}") for n in range(25)])
    monkeypatch.setattr(run_handles, "LOG_PAGE", 10)
    assert run.logs() == [f"line {n}" for n in range(25)]


def test_a_pause_is_an_order_and_resume_lets_it_be_claimed(relay: Relay, runs_trainer: Trainer) -> None:
    run = train(relay)
    assert run.pause()
    assert (run.paused, run.state) == (True, JobState.QUEUED)
    assert runs_trainer.claims() == []
    assert run.resume()
    assert not run.paused
    writer = runs_trainer.begin()
    assert relay.run(run.id).pause()
    assert runs_trainer.report(writer, 10) is Order.PAUSE
    assert writer.hand_back()
    assert run.refresh().paused
    depths = relay._core.broker.depths
    relay._core.announcer.flush(5)
    relay._core.broker.redis.flushdb()
    assert run.resume()
    wait_until(lambda: sum(depths(QUEUE).values()) == 1)  # announced by the resume
    runs_trainer.finish(runs_trainer.begin())
    assert not run.wait(60).paused
    assert not run.pause()
    assert not run.resume()


def test_cancel_retry_and_failure(relay: Relay, runs_trainer: Trainer) -> None:
    run = train(relay)
    writer = runs_trainer.begin()
    writer.checkpoint(10, {"model.safetensors": "file:///a/10"}, None, 2)
    assert run.cancel()
    assert runs_trainer.report(writer, 20) is Order.LOST
    with pytest.raises(JobCancelled):
        run.result(timeout=30)
    assert len(run.checkpoints()) == 1
    assert run.retry()
    assert (run.state, run.hyperparameters["epochs"]) == (JobState.QUEUED, run.spec.hyperparameters["epochs"])
    assert runs_trainer.begin().fail(JobError("InvalidDataset", "column 'x'", "tb"), retry_in=None)
    with pytest.raises(JobFailed, match="InvalidDataset: column 'x'"):
        run.result(timeout=30)
    assert run.error is not None
    assert not run.cancel()


def test_a_wait_that_takes_too_long(relay: Relay) -> None:
    run = train(relay)
    for progress in (False, True):
        with pytest.raises(WaitTimeout, match=f"job {run.id} has not ended after 0.1 seconds"):
            run.wait(0.1, progress=progress)


class Screen:
    """In the place of the bar."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.shown: list[RunRow] = []
        self.saw = threading.Event()
        screens.append(self)

    def show(self, run: RunRow) -> None:
        self.shown.append(run)
        self.saw.set()

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        pass


screens: list[Screen] = []


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Screen]:
    """`screen()` is the bar that is shown, once it is."""
    screens.clear()
    monkeypatch.setattr(run_handles, "RunProgress", Screen)
    monkeypatch.setattr(job_handles, "LOOK_SECONDS", 0.02)

    def first() -> Screen:
        wait_until(lambda: bool(screens))
        return screens[0]

    return first


def test_waiting_shows_how_far_it_is(
    relay: Relay, runs_trainer: Trainer, screen: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(relay)
    writer = runs_trainer.begin()
    failed: list[bool] = []
    read = training.read

    def unsure(*arguments: Any) -> Any:
        if not failed and screens:
            failed.append(True)
            raise Unreachable("for a moment")
        return read(*arguments)

    monkeypatch.setattr(training, "read", unsure)

    def work() -> None:
        runs_trainer.report(writer, 10)
        wait_until(lambda: any(row.step == 10 for row in screen().shown))
        runs_trainer.finish(writer)

    with meanwhile(work) as go:
        go.set()
        run.wait(60, progress=True)
    assert failed  # one look that could not be had ends nothing
    assert (run.model, screen().title) == ("digits@1", "digits")
    assert screen().shown[-1].version == 1


def test_the_async_twin(
    relay: Relay, sqlite_settings: Settings, runs_trainer: Trainer, screen: Callable[[], Screen]
) -> None:
    name = train(relay).id

    async def main() -> None:
        async with AsyncRelay(settings=sqlite_settings) as other:
            run = await other.run(name)
            assert await run.pause()
            assert run.paused
            assert await run.resume()
            assert not run.paused
            writer = runs_trainer.begin()
            runs_trainer.report(writer, 10)
            writer.log([(1.0, "first")])
            writer.checkpoint(10, {}, None, 2)
            assert (await run.refresh()).progress.step == 10
            assert len(await run.metrics(["accuracy"], after=5)) == 1
            assert await run.logs() == ["first"]
            assert [line.line for line in await run.log_lines()] == ["first"]
            assert len(await run.checkpoints()) == 1
            with pytest.raises(WaitTimeout):
                await run.wait(0.1, progress=True)
            screens.clear()

            def work() -> None:
                wait_until(lambda: bool(screen().shown))
                runs_trainer.finish(writer)

            with meanwhile(work) as go:
                go.set()
                assert await run.wait(60, progress=True) is run
            assert (run.model, screens[0].shown[-1].version) == ("digits@1", 1)
            assert (await run)["model"] == "digits@1"
            assert not await run.pause()
            assert (await run.input())["model"] == "digits"

    asyncio.run(main())


def test_a_spec_of_another_release(relay: Relay) -> None:
    run = train(relay)
    facts = (replace(run._row, input=b'{"model": "digits", "new": 1}'), run._run)
    later = Run(relay._core, facts)
    assert later.as_dict() == run.as_dict()  # what a list shows does not depend on it
    with pytest.raises(Corrupt, match="no run that this release knows"):
        _ = later.spec


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "waits for a worker that trains"),
        ({"phase": "train", "step": 5, "steps": 40, "epoch": 1, "epochs": 4}, "5/40.*train, epoch 1/4"),
        ({"phase": "train", "examples_per_s": 1234.5, "eta": 3725.0}, r"1,23[45] examples/s, 1:02:05 left"),
        ({"phase": "train", "eta": 61.0}, "1:01 left"),
        ({"phase": "train", "eta": 61.0, "paused": True}, "paused"),
    ],
)
def test_the_bar(
    relay: Relay,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    run = train(relay)
    with RunProgress("digits") as bar:
        bar.show(replace(run._run, **changed))
    shown = capsys.readouterr().err.replace("\n", " ")
    assert re.search(says, re.sub(r"\s+", " ", shown)), shown
