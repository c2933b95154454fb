"""Runs through real workers: killed, paused, cancelled, drained, beside inference; the weights end the same."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from servers import RedisServer, wait_until
from torchrelay import InvalidHyperparameter, JobFailed, Relay, Run
from torchrelay.settings import Settings
from torchrelay_storage.artifacts import Artifacts
from training_runs import RECIPES, examples

BRISK = {"TORCHRELAY_HEARTBEAT": "0.5", "TORCHRELAY_STALE_AFTER": "2.0"}
DISTURBED = {"dropout": 0.3, "momentum": 0.9, "augment": 0.1, "learning_rate": 0.05, "seed": 5}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return Settings.load(**{**settings.model_dump(exclude_none=True), "recipes": RECIPES})


@pytest.fixture
def trainer(start: Callable[..., Any], relay: Relay) -> Callable[..., Any]:
    """Start a worker that trains, and nothing else where it is not told so; wait until its recipes are known."""

    def go(train: str = "only", **more: Any) -> Any:
        environment = {**BRISK, **more.pop("environment", {})}
        worker = start("--train", train, "--torch-threads", "1", environment=environment, **more)
        wait_until(lambda: "tiny" in relay.recipes(), 60, "the worker to publish its recipes")
        return worker

    return go


@pytest.fixture
def weights(settings: Settings, relay: Relay, tmp_path: Path) -> Callable[[Run], dict[str, torch.Tensor]]:
    """Return the weights of the version that a run has registered."""

    def of(run: Run) -> dict[str, torch.Tensor]:
        [version] = [v for v in relay.versions("m") if v.ref == run.refresh().model]
        assert version.weights is not None
        path = Artifacts(settings.artifacts_url).fetch(version.weights, tmp_path / f"{run.id}.safetensors")
        return dict(load_file(path))

    return of


def train(relay: Relay, **options: Any) -> Run:
    return relay.train("m", recipe="tiny", dataset=examples(), **options)


def run_process(worker: Any) -> psutil.Process | None:
    """The process of the run that this worker has started."""
    for child in worker.children:
        try:
            if "torchrelay_worker.training.process" in " ".join(child.cmdline()):
                return child
        except psutil.NoSuchProcess:
            pass
    return None


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def points(run: Run) -> list[tuple[str, int, float]]:
    return [(p.name, p.step, p.value) for p in run.metrics()]


@pytest.mark.timeout(400)
def test_ten_kills_end_in_the_undisturbed_weights(
    relay: Relay, trainer: Callable[..., Any], weights: Callable[[Run], dict[str, torch.Tensor]]
) -> None:
    """Of the run's process, of the process that started it, or of the whole worker: nine times, and a tenth."""
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    print(f"kills drawn with seed {seed}")
    workers = [trainer(), trainer()]
    plan = {**DISTURBED, "epochs": 60, "seconds": 0.02, "checkpoint_steps": 7, "max_attempts": 50}
    run = train(relay, **plan)
    kills = 0
    deadline = time.monotonic() + 300
    while kills < 10 and time.monotonic() < deadline:
        time.sleep(draw.uniform(0.3, 2.0))
        if run.refresh().done:
            break
        [*holders] = [(worker, process) for worker in workers if (process := run_process(worker)) is not None]
        if not holders:
            continue
        worker, process = holders[0]
        victim = draw.choice(["run", "run", "inner", "worker"])
        try:
            if victim == "run":
                process.kill()
            elif victim == "inner":
                process.parent().kill()
            else:
                workers.remove(worker)
                worker.kill()
                workers.append(trainer())
        except psutil.NoSuchProcess:
            continue
        kills += 1
    assert kills == 10, f"the run ended after {kills} kills: {run}"
    run.wait(timeout=200)
    assert run.state == "succeeded", run.error
    calm = train(relay, **{**plan, "seconds": 0.0})
    calm.wait(timeout=100)
    assert same(weights(run), weights(calm))
    assert points(run) == points(calm)
    assert run.model != calm.model, "each registered one version"
    assert len(relay.versions("m")) == 2


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_cancel_keeps_the_last_checkpoint_and_retry_goes_on_from_it(
    relay: Relay, trainer: Callable[..., Any], weights: Callable[[Run], dict[str, torch.Tensor]]
) -> None:
    worker = trainer()
    plan = {**DISTURBED, "epochs": 20, "checkpoint_steps": 5}
    run = train(relay, **plan, seconds=0.1)
    wait_until(lambda: len(run.checkpoints()) >= 1, 60, "a checkpoint")
    asked = time.monotonic()
    assert run.cancel()
    wait_until(lambda: run_process(worker) is None, 30, "the end of its process")
    assert time.monotonic() - asked < 15, "within seconds"
    kept = run.checkpoints()[0].step
    assert run.refresh().state == "cancelled"
    assert run.retry()
    wait_until(lambda: f"goes on from step {kept}" in "\n".join(run.logs()), 60, "that it goes on")
    run.wait(timeout=100)
    calm = train(relay, **plan, seconds=0.0)
    calm.wait(timeout=100)
    assert same(weights(run), weights(calm))


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_pause_frees_the_place_and_resume_goes_on(
    relay: Relay, trainer: Callable[..., Any], weights: Callable[[Run], dict[str, torch.Tensor]]
) -> None:
    worker = trainer()
    plan = {**DISTURBED, "epochs": 12}
    run = train(relay, **plan, seconds=0.05)
    wait_until(lambda: run.refresh().progress.step > 3, 60, "some steps")
    run.pause()
    wait_until(lambda: run_process(worker) is None, 30, "the end of its process")
    assert run.refresh().paused
    assert run.state == "queued"
    assert len(run.checkpoints()) == 1
    calm = train(relay, **plan, seconds=0.0)
    calm.wait(timeout=100)
    assert run.refresh().state == "queued", "the other had its place, and it still waits"
    run.resume()
    run.wait(timeout=100)
    assert run.state == "succeeded", run.error
    assert run.failures == 0
    assert same(weights(run), weights(calm))


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_worker_that_ends_hands_its_run_to_another(relay: Relay, trainer: Callable[..., Any]) -> None:
    first = trainer()
    run = train(relay, epochs=12, seconds=0.05)
    wait_until(lambda: run.refresh().progress.step > 3, 60, "some steps")
    step = run.refresh().progress.step
    second = trainer()
    assert first.stop() == 0
    assert run.refresh().state in ("queued", "running")
    assert run.checkpoints()[0].step >= step
    run.wait(timeout=100)
    assert run.state == "succeeded", run.error
    assert run.worker == second.name
    assert run.failures == 0
    assert not first.children


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_inference_goes_on_beside_a_run_and_the_run_beside_inference(relay: Relay, trainer: Callable[..., Any]) -> None:
    relay.register_model("double", handler="double")
    worker = trainer("also")
    run = train(relay, epochs=400, seconds=0.01)
    wait_until(lambda: run.refresh().state == "running" and run.progress.step > 0, 60, "the run")
    assert relay.submit("double", 21).result(timeout=30) == 42
    before = run.refresh().progress.step
    batch = relay.submit_batch("double", range(5000))
    assert batch.wait(timeout=100).succeeded == 5000
    wait_until(lambda: run.refresh().progress.step > before, 30, "that the run has gone on")
    second = train(relay, epochs=1)
    assert second.refresh().state == "queued", "one run at a time"
    assert run_process(worker) is not None
    run.cancel()
    second.wait(timeout=60)
    assert second.state == "succeeded", second.error


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_two_devices_give_the_curve_of_one_and_leave_nothing_behind(relay: Relay, trainer: Callable[..., Any]) -> None:
    worker = trainer()
    plan = {"epochs": 4, "momentum": 0.9, "learning_rate": 0.05}
    one, two = train(relay, **plan), train(relay, **plan, devices=2)
    one.wait(timeout=60)
    two.wait(timeout=100)
    assert [one.state, two.state] == ["succeeded", "succeeded"], two.error
    for single, double in zip(points(one), points(two), strict=True):
        assert single[:2] == double[:2]
        assert single[2] == pytest.approx(double[2], rel=1e-3, abs=1e-4)

    long = train(relay, epochs=200, seconds=0.05, devices=2)
    wait_until(lambda: long.refresh().progress.step > 3, 100, "some steps")
    assert len([c for c in worker.children if "training.process" in " ".join(c.cmdline())]) == 3, "two, and torch's"
    assert worker.stop() == 0
    assert long.refresh().state == "queued"
    assert long.checkpoints()
    assert "Traceback" not in worker.log


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("fault", ["dead", "emptied"])
def test_runs_are_found_without_redis(
    relay: Relay, trainer: Callable[..., Any], redis_server: RedisServer, fault: str
) -> None:
    worker = trainer()
    first = train(relay, epochs=8, seconds=0.05)
    wait_until(lambda: run_process(worker) is not None, 60, "the first run")
    second = train(relay, epochs=1)
    redis_server.kill() if fault == "dead" else redis_server.flush()
    try:
        first.wait(timeout=100)
        second.wait(timeout=100)
    finally:
        redis_server.ensure()
    assert [first.state, second.state] == ["succeeded", "succeeded"]
    assert [first.failures, second.failures] == [0, 0]


def test_what_is_wrong_is_said(relay: Relay, trainer: Callable[..., Any]) -> None:
    trainer()
    with pytest.raises(InvalidHyperparameter, match="epoch") as refused:
        train(relay, epoch=3)
    assert refused.value.key == "epoch"
    with pytest.raises(InvalidHyperparameter):
        train(relay, epochs=0)
    assert relay.runs() == []

    poor = train(relay, trouble="nan", epochs=10, checkpoint_steps=2)
    with pytest.raises(JobFailed) as failed:
        poor.result(timeout=60)
    assert failed.value.kind == "NonFinite"
    assert poor.checkpoints()[0].step in (2, 4), "before the step that failed"
    wait_until(lambda: any("NonFinite" in line for line in poor.logs()), 20, "the end of the log")

    data = examples()
    data["x"][3, 2] = float("nan")
    broken = relay.train("m", recipe="regression", dataset={"a": data["x"][:, 2], "b": data["x"][:, 1]}, target="b")
    with pytest.raises(JobFailed) as failed:
        broken.result(timeout=60)
    assert failed.value.kind == "InvalidDataset"
    assert "'a'" in failed.value.message
    assert "row 3" in failed.value.message
    assert relay.models() == [], "nothing was registered"


@pytest.fixture
def relay(settings: Settings) -> Iterator[Relay]:
    with Relay(settings=settings) as relay:
        yield relay
