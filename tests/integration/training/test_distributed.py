"""A run on two devices: two processes over gloo learn as one does, go on as one does, and end together."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import psutil
import pytest
import torch

from servers import free_port, wait_until
from torchrelay_storage.job_reader import JobError
from torchrelay_storage.run_writer import RunHold, RunWriter
from torchrelay_storage.states import JobState
from torchrelay_worker.exits import EXIT_LOST
from training_runs import RunProcess, Scene

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Two:
    """The two processes of a run, as the elastic launcher starts them, without the seconds that it takes."""

    def __init__(self, scene: Scene, hold: RunHold) -> None:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        shared |= {"LOCAL_WORLD_SIZE": "2"}
        self._stack = ExitStack()
        self.processes: list[RunProcess] = []
        for rank in (0, 1):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = scene.start(hold, rank=rank, environment=environment)
            self.processes.append(self._stack.enter_context(process))

    def wait(self) -> list[int]:
        return [process.wait() for process in self.processes]

    @property
    def log(self) -> str:
        return "\n".join(process.log for process in self.processes)

    def __enter__(self) -> Two:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def train(scene: Scene, job: int) -> str:
    with Two(scene, scene.claim(job)) as two:
        assert two.wait() == [0, 0], two.log
        return two.log


# 96 examples: of 25, so that shares are uneven; of 19, so that the last batch has one, and one process none.
@pytest.mark.parametrize("batch_size", [25, 19])
def test_two_processes_have_the_loss_curve_of_one(scene: Scene, batch_size: int) -> None:
    fields: dict[str, Any] = {"epochs": 4, "batch_size": batch_size, "momentum": 0.9, "clip_norm": 0.5}
    alone, together = scene.submit(**fields), scene.submit(**fields, devices=2)
    scene.train(alone)
    log = train(scene, together)
    assert "tiny on 2 x cpu" in log
    one, two = scene.points(alone), scene.points(together)
    assert [(p.name, p.step, p.epoch) for p in one] == [(p.name, p.step, p.epoch) for p in two]
    assert [p.value for p in two] == pytest.approx([p.value for p in one], rel=2e-4, abs=1e-5)
    ours, theirs = scene.weights(together), scene.weights(alone)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)
    assert scene.result(together)["best_step"] == scene.result(alone)["best_step"]


def test_killed_they_go_on_from_a_checkpoint_and_end_alike(scene: Scene) -> None:
    fields = {
        "epochs": 5, "dropout": 0.3, "augment": 0.1, "numpy_noise": True, "devices": 2,
        "checkpoints": {"steps": 2, "minutes": None}, "seconds": 0.02,
    }  # fmt: skip
    undisturbed, job = scene.submit(**fields), scene.submit(**fields)
    train(scene, undisturbed)
    hold = scene.claim(job)
    with Two(scene, hold) as two:
        wait_until(lambda: scene.runs.checkpoints(job), 60, "a checkpoint")
        for process in two.processes:
            process.kill()
    assert RunWriter(scene.database, hold).died(JobError("WorkerLost", "killed"), retry_in=0.0)
    assert "goes on from step" in train(scene, job)
    ours, theirs = scene.weights(job), scene.weights(undisturbed)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert scene.points(job) == scene.points(undisturbed)


def test_an_error_in_one_process_is_the_run_s_and_ends_both(scene: Scene) -> None:
    job = scene.submit(trouble="rank 1", attempts=1, devices=2)
    with Two(scene, scene.claim(job)) as two:
        assert two.wait() == [EXIT_LOST, EXIT_LOST], two.log  # so that the elastic launcher ends as well
    error = scene.job(job).error
    assert error is not None
    assert (error.type, error.message) == ("ValueError", "only the second process fails")


def test_a_process_that_is_killed_leaves_the_verdict_to_the_launcher(scene: Scene) -> None:
    job = scene.submit(seconds=0.05, devices=2)
    with Two(scene, scene.claim(job)) as two:
        wait_until(lambda: scene.row(job).step > 0, 60, "its first steps")
        two.processes[1].kill()
        assert two.processes[0].wait() == EXIT_LOST, two.log
    assert scene.job(job).state is JobState.RUNNING
    assert scene.job(job).failures == 0


# --- under torch's elastic launcher, as a worker starts them ----------------------------------------------------------


def started(scene: Scene, job: int) -> tuple[RunProcess, list[psutil.Process]]:
    process = scene.start(scene.claim(job), fresh=True, devices=2)
    wait_until(lambda: scene.row(job).step > 0 or process.process.poll() is not None, 120, "its first steps")
    family = psutil.Process(process.process.pid).children(recursive=True)
    assert len(family) >= 2, process.log
    return process, family


def test_sigterm_through_the_elastic_launcher_hands_the_run_back_and_leaves_no_process(scene: Scene) -> None:
    job = scene.submit(epochs=500, seconds=0.02, devices=2)
    process, family = started(scene, job)
    with process:
        process.terminate()
        process.wait()
        _, left = psutil.wait_procs(family, timeout=30)
        assert not left, process.log
    assert scene.job(job).state is JobState.QUEUED, process.log
    assert len(scene.runs.checkpoints(job)) == 1


def test_when_the_worker_is_gone_all_its_processes_end(scene: Scene) -> None:
    job = scene.submit(epochs=500, seconds=0.02, devices=2)
    process, family = started(scene, job)
    with process:
        process.drop()
        process.wait()
        _, left = psutil.wait_procs(family, timeout=30)
        assert not left, process.log
    assert scene.job(job).state is JobState.RUNNING
