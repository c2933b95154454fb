"""The process of a run, from its job's row to the registered version: how it ends, and what it leaves behind."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import redis
import torch

from servers import wait_until
from torchrelay import messages
from torchrelay.settings import Settings
from torchrelay_storage.artifacts import file_sha256
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.run_spec import Dataset, Split
from torchrelay_storage.run_writer import RunWriter
from torchrelay_storage.states import JobState
from torchrelay_worker.exits import EXIT_LOST
from torchrelay_worker.training.gate import Gate
from training_runs import Scene, examples

sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def scalars(path: Path) -> dict[str, list[int]]:
    """Read an event file: the steps of each of its scalars."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[int]] = {}
    data = path.read_bytes()
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(event.step)
    return found


# --- the good end -----------------------------------------------------------------------------------------------------


def test_a_run_registers_what_it_has_trained_and_says_where_it_comes_from(scene: Scene, settings: Settings) -> None:
    listening = redis.Redis.from_url(settings.broker_url).pubsub()
    listening.subscribe(messages.CHANNEL)
    job = scene.submit(epochs=4, seed=3, promote="champion", split=Split(fraction=0.25))
    log = scene.train(job)
    row, result, version = scene.row(job), scene.result(job), scene.version(job)

    assert scene.job(job).state is JobState.SUCCEEDED
    assert (result["model"], result["steps"], result["epochs"]) == ("m@1", 24, 4)
    assert result["best_step"] in (6, 12, 18, 24)
    assert (version.run, version.handler, version.aliases) == (job, "tiny", ("champion",))
    assert version.metrics == result["metrics"]
    assert result["metrics"].keys() == {"validation_loss", "accuracy", "train_loss"}
    assert scene.weights(job).keys() >= {"first.weight", "last.bias"}, "fetched by its sha256"

    assert (row.version_ref, row.step, row.steps, row.epoch, row.epochs) == ("m@1", 24, 24, 4, 4)
    assert (row.best, row.best_step) == (result["metrics"]["accuracy"], result["best_step"])
    assert (row.split["train"], row.split["validation"], row.split["stratified"]) == (90, 30, True)
    assert row.dataset_sha256 == scene.dataset.sha256

    lineage = version.lineage
    assert lineage["dataset_sha256"] == scene.dataset.sha256
    assert lineage["validation_sha256"] is None
    assert (lineage["seed"], lineage["run"], lineage["split"]) == (3, show(Kind.JOB, job), dict(row.split))
    assert lineage["hyperparameters"]["epochs"] == 4
    assert lineage["hyperparameters"]["dropout"] == 0.0, "defaults are recorded too"
    assert lineage["code"]["recipe"] == "training_runs:Tiny"
    assert lineage["code"]["sha256"] == file_sha256(Path(__file__).parents[2] / "training_runs.py")
    assert lineage["torch"] == torch.__version__

    names = {point.name for point in scene.points(job)}
    assert names == {"train_loss", "learning_rate", "validation_loss", "accuracy"}
    events = scalars(scene.artifacts.fetch(result["tensorboard"], settings.home / "events"))
    assert events["loss/train"] == list(range(1, 25))
    assert events["validation/accuracy"] == events["loss/validation"] == [6, 12, 18, 24]

    assert re.search(r"epoch 4/4  step 24/24  train_loss [\d.]+  validation_loss [\d.]+  accuracy", log)
    assert not list((scene.settings.home / "runs").iterdir()), "its local files are gone"
    wait_until(lambda: (m := listening.get_message()) and m["type"] == "message", 10, "the news of its end")


@sqlite
def test_the_same_seed_gives_the_same_weights_and_metrics_and_another_does_not(scene: Scene) -> None:
    runs = [scene.submit(dropout=0.2, seed=seed) for seed in (1, 1, 2)]
    for job in runs:
        scene.train(job)
    one, same, other = (scene.weights(job) for job in runs)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert scene.points(runs[0]) == scene.points(runs[1])
    assert not torch.equal(one["last.weight"], other["last.weight"])
    assert scene.result(runs[2])["model"] == "m@3"


@sqlite
def test_a_validation_set_of_its_own_and_a_dataset_from_another_place(scene: Scene, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.savez(elsewhere / "train.npz", **examples(50))  # type: ignore[arg-type]
    np.savez(elsewhere / "held-out.npz", **examples(20, seed=1))  # type: ignore[arg-type]
    scene.settings = scene.settings.model_copy(update={"datasets": [f"file://{elsewhere}"]})
    job = scene.submit(
        dataset=Dataset(uri=f"file://{elsewhere}/train.npz", format="npz"),
        validation=Dataset(uri=f"file://{elsewhere}/held-out.npz", format="npz"),
    )
    scene.train(job)
    row, lineage = scene.row(job), scene.version(job).lineage
    assert (row.split["by"], row.split["train"], row.split["validation"]) == ("dataset", 50, 20)
    assert row.dataset_sha256 == lineage["dataset_sha256"] == file_sha256(elsewhere / "train.npz")
    assert lineage["validation_sha256"] == file_sha256(elsewhere / "held-out.npz")


@sqlite
def test_redis_is_not_needed(scene: Scene) -> None:
    scene.settings = scene.settings.model_copy(update={"broker": "redis://127.0.0.1:1/0"})
    job = scene.submit(epochs=1)
    scene.train(job)
    assert scene.job(job).state is JobState.SUCCEEDED


@sqlite
def test_a_gate_that_is_held_does_not_stop_a_run(scene: Scene, tmp_path: Path) -> None:
    with Gate.make(tmp_path / "gate") as gate:
        gate.hold()
        job = scene.submit(epochs=1, batch_size=60)
        scene.train(job, gate=gate.path)
    assert scene.result(job)["steps"] == 2


# --- it leaves --------------------------------------------------------------------------------------------------------


def started(scene: Scene, job: int) -> Any:
    """Start a run's process and wait until it trains."""
    process = scene.start(scene.claim(job))
    wait_until(lambda: scene.row(job).step > 0 or process.process.poll() is not None, 60, "the first steps")
    return process


@pytest.fixture
def undisturbed(scene: Scene) -> Callable[..., dict[str, torch.Tensor]]:
    def train(**fields: Any) -> dict[str, torch.Tensor]:
        job = scene.submit(**fields)
        scene.train(job)
        return scene.weights(job)

    return train


SLOW = {"epochs": 8, "dropout": 0.2, "momentum": 0.9}


def test_sigterm_writes_a_checkpoint_and_hands_the_run_back(scene: Scene, undisturbed: Any) -> None:
    job = scene.submit(**SLOW, seconds=0.05)
    with started(scene, job) as process:
        process.terminate()
        assert process.wait() == 0, process.log
    assert scene.job(job).state is JobState.QUEUED
    assert scene.job(job).failures == 0
    (checkpoint,) = scene.runs.checkpoints(job)
    assert 0 < checkpoint.step < 48
    assert max(point.step for point in scene.points(job)) <= checkpoint.step, "points that could be missed are not"
    log = scene.train(job)
    assert f"goes on from step {checkpoint.step}" in log
    whole = undisturbed(**SLOW, seconds=0.0)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in scene.weights(job).items())


@sqlite
def test_a_pause_gives_the_device_free_and_resume_goes_on(scene: Scene) -> None:
    job = scene.submit(**SLOW, seconds=0.05)
    with started(scene, job) as process:
        assert scene.runs.pause(job)
        assert process.wait() == 0, process.log
    assert scene.row(job).paused
    assert scene.job(job).state is JobState.QUEUED
    (checkpoint,) = scene.runs.checkpoints(job)
    assert scene.runs.resume(job)
    assert f"goes on from step {checkpoint.step}" in scene.train(job)
    assert scene.job(job).state is JobState.SUCCEEDED


@sqlite
def test_a_cancelled_run_ends_and_retry_goes_on_from_its_last_checkpoint(scene: Scene) -> None:
    job = scene.submit(**SLOW, seconds=0.05, checkpoints={"steps": 2, "minutes": None})
    with started(scene, job) as process:
        wait_until(lambda: scene.runs.checkpoints(job), what="a checkpoint")
        JobStore(scene.database).cancel([job])
        step = scene.row(job).step
        assert process.wait() == 0, process.log
    assert scene.job(job).state is JobState.CANCELLED
    assert scene.row(job).step == step, "it wrote nothing more"
    kept = scene.runs.checkpoints(job)
    assert all(uri in scene.files(job) for checkpoint in kept for uri in checkpoint.files.values())
    JobStore(scene.database).retry([job])
    assert f"goes on from step {kept[0].step}" in scene.train(job)
    assert scene.job(job).state is JobState.SUCCEEDED


@sqlite
def test_a_process_that_lost_the_run_writes_no_version(scene: Scene) -> None:
    job = scene.submit(epochs=1)
    hold = scene.claim(job)
    RunWriter(scene.database, hold).hand_back()
    with scene.start(hold) as process:
        assert process.wait() == 0, process.log
    assert scene.job(job).state is JobState.QUEUED
    assert scene.row(job).version is None
    assert scene.artifacts.under("models") == []


@sqlite
def test_the_process_ends_at_once_when_its_launcher_lets_go(scene: Scene) -> None:
    job = scene.submit(seconds=30.0)
    with scene.start(scene.claim(job), fresh=True) as process:
        wait_until(lambda: scene.row(job).steps > 0, 90, "its start")
        process.drop()
        assert process.wait() == EXIT_LOST, process.log
    assert scene.job(job).state is JobState.RUNNING, "the launcher, or the rescue, says what became of it"


@sqlite
def test_the_process_ends_when_its_parent_is_killed_and_the_leash_is_still_held(scene: Scene) -> None:
    job = scene.submit(epochs=500, seconds=0.02)
    parent = "import os, signal\nif os.fork():\n    signal.pause()"  # as the elastic launcher is one
    with scene.start(scene.claim(job), script=parent) as process:
        wait_until(lambda: scene.row(job).step > 0, 60, "its first steps")
        family = psutil.Process(process.process.pid).children()
        assert len(family) == 1
        process.kill()
        _, left = psutil.wait_procs(family, timeout=30)
        assert not left, process.log


# --- it fails ---------------------------------------------------------------------------------------------------------


@sqlite
@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"trouble": "nan"}, "NonFinite", r"training loss is nan at step 5 \(epoch 1, learning rate"),
        ({"trouble": "memory"}, "OutOfMemory", r"at step 5 \(epoch 1\) with batch_size 16: lower batch_size"),
        ({"depth": 3}, "InvalidHyperparameter", "'depth'"),
        ({"precision": "fp16"}, "InvalidInput", "fp16 needs a CUDA device"),
        ({"recipe": "tine"}, "RecipeNotFound", "tiny"),
        ({"split": {"column": "part"}}, "InvalidDataset", "no column 'part'"),
    ],
)
def test_what_another_try_would_meet_again_fails_at_once(
    scene: Scene, fields: dict[str, Any], kind: str, message: str
) -> None:
    job = scene.submit(**fields, checkpoints={"steps": 2, "minutes": None})
    log = scene.train(job)
    row = scene.job(job)
    assert row.state is JobState.FAILED
    assert row.error is not None
    assert row.error.type == kind
    assert re.search(message, row.error.message), row.error
    assert row.error.message in log
    if "trouble" in fields:
        assert scene.runs.checkpoints(job)[0].step in (2, 3, 4), "the last checkpoint is kept, and is from before"


@sqlite
def test_a_dataset_that_is_not_there_or_not_what_it_was_fails_the_run_by_name(scene: Scene) -> None:
    gone = scene.dataset.model_copy(update={"uri": scene.dataset.uri + "x"})
    other = scene.dataset.model_copy(update={"sha256": "0" * 64})
    outside = Dataset(uri="file:///etc/passwd", format="csv")
    for dataset, kind in ((gone, "NotFound"), (other, "Corrupt"), (outside, "InvalidInput")):
        job = scene.submit(dataset=dataset)
        scene.train(job)
        error = scene.job(job).error
        assert scene.job(job).state is JobState.FAILED
        assert error is not None
        assert error.type == kind
        assert dataset.uri in error.message


def test_an_error_of_the_author_s_is_tried_again_and_shows_where(scene: Scene) -> None:
    job = scene.submit(trouble="error", attempts=2)
    log = scene.train(job)
    row = scene.job(job)
    assert (row.state, row.failures) == (JobState.RETRYING, 1)
    assert row.error is not None
    assert row.error.type == "KeyError"
    assert "have_trouble" in (row.error.traceback or "")
    assert "Traceback" in log
    scene.train(job)
    assert scene.job(job).state is JobState.FAILED


@sqlite
def test_a_step_that_hangs_ends_the_process_and_shows_where(scene: Scene) -> None:
    job = scene.submit(trouble="hang")
    script = "import training_runs; training_runs.Tiny.step_timeout = 1.0"
    with scene.start(scene.claim(job), script=script) as process:
        assert process.wait() not in (0, None)
        assert "have_trouble" in process.log
    assert scene.job(job).state is JobState.RUNNING


@sqlite
def test_a_job_that_is_no_run_of_this_release_is_corrupt(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy import text

    job = scene.submit()
    with scene.database.write() as connection:
        connection.execute(text("UPDATE jobs SET input = :x WHERE id = :job"), {"x": b'{"model": "m"}', "job": job})
    scene.train(job)
    error = scene.job(job).error
    assert error is not None
    assert error.type == "Corrupt"


@sqlite
def test_progress_is_reported_while_a_step_takes_long(scene: Scene) -> None:
    job = scene.submit(seconds=3.0, epochs=1, batch_size=60)
    with scene.start(scene.claim(job)) as process:
        wait_until(lambda: scene.row(job).phase == "training", 60, "its start")
        before = scene.row(job).updated_at
        wait_until(
            lambda: (scene.row(job).updated_at or 0) > (before or 0) and scene.row(job).step == 0, 30, "a report"
        )
        process.kill()
