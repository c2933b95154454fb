"""Killed with -9 at any point, a run goes on from its last checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from servers import wait_until
from torchrelay_storage.artifacts import file_sha256
from torchrelay_storage.job_reader import JobError
from torchrelay_storage.run_spec import Dataset
from torchrelay_storage.run_writer import Point, Progress, RunHold, RunWriter
from torchrelay_storage.states import JobState
from training_runs import RunProcess, Scene, examples

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

KILLS = 5

# Whatever can be random is: dropout, batch norm, momentum, augmentation, noise from NumPy's global generator.
RESTLESS: dict[str, Any] = {
    "epochs": 10, "dropout": 0.3, "momentum": 0.9, "augment": 0.1, "numpy_noise": True,
    "checkpoints": {"steps": 1, "minutes": None}, "attempts": 50,
}  # fmt: skip


def rescue(scene: Scene, hold: RunHold) -> None:
    """Let a run wait again whose process was killed, as its launcher does."""
    assert RunWriter(scene.database, hold).died(JobError("WorkerLost", "killed"), retry_in=0.0)


def assert_ends_alike(scene: Scene, job: int, undisturbed: int) -> None:
    assert scene.job(job).state is JobState.SUCCEEDED
    ours, theirs = scene.weights(job), scene.weights(undisturbed)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert scene.points(job) == scene.points(undisturbed)
    kept, named = scene.result(job), scene.result(undisturbed)
    for same in ("metrics", "steps", "epochs", "best_step"):
        assert kept[same] == named[same]
    rows = scene.runs.checkpoints(job)
    assert set(scene.files(job)) == {uri for row in rows for uri in row.files.values()}, "no file is left without a row"


def wait_for_steps(scene: Scene, job: int, process: RunProcess, at_least: int) -> None:
    wait_until(lambda: scene.row(job).step >= at_least or process.process.poll() is not None, 60, "its first steps")


def test_killed_at_random_moments_it_ends_with_the_undisturbed_weights(scene: Scene) -> None:
    undisturbed = scene.submit(**RESTLESS)
    scene.train(undisturbed)
    job = scene.submit(**RESTLESS, seconds=0.02)  # 1.2 s of steps, a checkpoint with nearly each
    chance = random.Random(7)
    went_on = []
    for _ in range(KILLS):
        hold = scene.claim(job)
        with scene.start(hold) as process:
            wait_until(lambda p=process: " steps" in p.log or p.process.poll() is not None, 60, "its start")
            time.sleep(chance.uniform(0.0, 0.5))
            process.kill()
            went_on.append(" goes on from step " in process.log)
        if scene.job(job).state is JobState.SUCCEEDED:
            break
        rescue(scene, hold)
    else:
        scene.train(job)
    assert any(went_on), "no kill came after the first checkpoint"
    assert_ends_alike(scene, job, undisturbed)


DIES = """
import os, signal
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.run_writer import RunWriter
put_file, checkpoint, delete = Artifacts.put_file, RunWriter.checkpoint, Artifacts.delete
reached = [False]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def put(self, path, local):
    if reached[0] and WHERE == "between its files" and path.endswith("state.pt"):
        die()
    return put_file(self, path, local)

def write(self, step, files, value, keep):
    reached[0] = step >= AFTER
    if reached[0] and WHERE == "before its row":
        die()
    written = checkpoint(self, step, files, value, keep)
    if reached[0] and WHERE == "before the pruned files are deleted":
        die()
    return written

Artifacts.put_file, RunWriter.checkpoint = put, write
"""


@pytest.mark.parametrize("after", [4, 8])  # the first epoch has six steps
@pytest.mark.parametrize("where", ["between its files", "before its row", "before the pruned files are deleted"])
def test_killed_in_the_middle_of_a_checkpoint_it_goes_on_from_the_one_before(
    scene: Scene, where: str, after: int
) -> None:
    fields = RESTLESS | {"epochs": 3, "seconds": 0.02}
    undisturbed = scene.submit(**fields)
    scene.train(undisturbed)
    job = scene.submit(**fields)
    hold = scene.claim(job)
    with scene.start(hold, script=f"WHERE, AFTER = {where!r}, {after}{DIES}") as process:
        assert process.wait() == -9, process.log
    before = [row.step for row in scene.runs.checkpoints(job)]
    orphans = set(scene.files(job)) - {u for row in scene.runs.checkpoints(job) for u in row.files.values()}
    assert orphans, "it died between the files and the row"
    rescue(scene, hold)
    log = scene.train(job)
    assert f" goes on from step {before[0]}: " in log
    assert_ends_alike(scene, job, undisturbed)


def test_a_run_without_any_checkpoint_starts_again(scene: Scene) -> None:
    fields = RESTLESS | {"epochs": 3, "checkpoints": {"steps": None, "minutes": None}, "seconds": 0.02}
    undisturbed = scene.submit(**fields)
    scene.train(undisturbed)
    job = scene.submit(**fields)
    hold = scene.claim(job)
    with scene.start(hold) as process:
        wait_for_steps(scene, job, process, 1)
        process.kill()
    ahead = Progress("training", 900, 900, 3, 3)  # of a process that was further when it died
    RunWriter(scene.database, hold).report(ahead, [Point("train_loss", 900, 3, 0.1)], (900, 1.0))
    rescue(scene, hold)
    assert " starts: " in scene.train(job)
    assert_ends_alike(scene, job, undisturbed)


def test_adam_and_tied_weights_go_on_alike_too(scene: Scene) -> None:
    fields = {"epochs": 6, "tied": True, "seconds": 0.02, "checkpoints": {"steps": 3, "minutes": None}}
    undisturbed = scene.submit(**fields)
    scene.train(undisturbed)
    job = scene.submit(**fields)
    hold = scene.claim(job)
    with scene.start(hold) as process:
        wait_until(lambda: scene.runs.checkpoints(job), 60, "a checkpoint")
        process.kill()
    rescue(scene, hold)
    assert "goes on" in scene.train(job)
    assert_ends_alike(scene, job, undisturbed)


def test_a_run_does_not_go_on_with_another_dataset_than_it_began_with(scene: Scene) -> None:
    import numpy as np

    path = scene.settings.home / "changing.npz"
    np.savez(path, **examples(60))  # type: ignore[arg-type]
    uri, _ = scene.artifacts.put_file("datasets/changing.npz", path)
    job = scene.submit(**RESTLESS | {"dataset": Dataset(uri=uri, format="npz"), "seconds": 0.05})
    hold = scene.claim(job)
    with scene.start(hold) as process:
        wait_until(lambda: scene.runs.checkpoints(job), 60, "a checkpoint")
        process.kill()
    was = file_sha256(path)
    np.savez(path, **examples(60, seed=2))  # type: ignore[arg-type]
    scene.artifacts.put_file("datasets/changing.npz", path)
    rescue(scene, hold)
    scene.train(job)
    error = scene.job(job).error
    assert error is not None
    assert error.type == "InvalidDataset"
    assert was in error.message
    assert file_sha256(path) in error.message
