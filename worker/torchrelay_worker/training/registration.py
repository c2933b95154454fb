"""The end of a run: the best weights exported, uploaded, and registered as the model's next version, with where from.

Files first, then one transaction that names them: a run registers one version, whatever dies on the way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import tenacity
import torch

from torchrelay_storage import values
from torchrelay_storage.artifacts import Artifacts, file_sha256, model_path
from torchrelay_storage.errors import InvalidInput, Unreachable
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.run_writer import NewVersion, RunWriter
from torchrelay_storage.runs import RunStore
from torchrelay_worker.training.recipe import Recipe
from torchrelay_worker.training.task import Ended, Task
from torchrelay_worker.training.tensorboard import write_events

PATIENCE = 300.0  # seconds for which a store that is away is waited for: hours of training are at stake

T = TypeVar("T")


def register(
    task: Task, ended: Ended, folder: Path, *, writer: RunWriter, runs: RunStore, artifacts: Artifacts
) -> ModelVersion | None:
    """Export what was trained, register it, and end the run.

    Args:
        folder: a local one for the files.

    Returns:
        The version, or None if the run was not held any more.

    Raises:
        InvalidInput: the recipe exported something else than a file.
        Unreachable: a store was away for PATIENCE seconds.
    """
    hold, spec = writer.hold, task.spec
    run = show(Kind.JOB, hold.job)
    assert ended.module is not None
    folder.mkdir(parents=True, exist_ok=True)
    exported = task.recipe.export(ended.module, folder)
    if not exported.file.is_file():
        raise InvalidInput(f"`export` of the recipe {type(task.recipe).__name__} has written no file {exported.file}")

    # Named after the claim too: a process that was given up for dead cannot write over what its successor wrote.
    uri, sha256 = patiently(
        lambda: artifacts.put_file(model_path(spec.model, run, f"{hold.token}-{exported.file.name}"), exported.file)
    )
    points = patiently(lambda: runs.metrics(hold.job))
    events = write_events(folder / "tensorboard", points)
    events_uri, _ = patiently(
        lambda: artifacts.put_file(model_path(spec.model, run, f"{hold.token}-{events.name}"), events)
    )

    def output(registered: ModelVersion) -> bytes:
        return values.encode(
            {
                "model": registered.ref,
                "metrics": dict(ended.metrics),
                "steps": ended.steps,
                "epochs": ended.epochs,
                "best_step": ended.best_step,
                "tensorboard": events_uri,
            }
        )

    new = NewVersion(
        handler=exported.handler,
        weights=uri,
        sha256=sha256,
        config=exported.config,
        metrics=ended.metrics,
        lineage=lineage(task, run),
        promote=spec.promote,
    )
    registered = patiently(lambda: writer.complete(new, output))
    if registered is None:
        artifacts.delete([uri, events_uri])
    return registered


def lineage(task: Task, run: str) -> dict[str, Any]:
    """Return what a version comes from: what it takes to train the same again."""
    return {
        **task.data,
        "code": code_of(type(task.recipe)),
        "recipe": task.spec.recipe,
        "hyperparameters": task.recipe.parameters.model_dump(mode="json"),
        "seed": task.spec.seed,
        "split": dict(task.split),
        "precision": task.spec.precision,
        "devices": task.spec.devices,
        "run": run,
        "torch": torch.__version__,
    }


def code_of(recipe: type[Recipe]) -> dict[str, str | None]:
    """Return which code a recipe is: the release of torchrelay, the class, and the sha256 of its source file."""
    source = inspect.getsourcefile(recipe)
    return {
        "torchrelay": version("torchrelay"),
        "recipe": f"{recipe.__module__}:{recipe.__qualname__}",
        "sha256": file_sha256(source) if source is not None and Path(source).is_file() else None,
    }


def patiently(call: Callable[[], T]) -> T:
    """Do it again and again while the other side is away. Raises Unreachable after PATIENCE seconds."""
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unreachable),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=10.0),
        stop=tenacity.stop_after_delay(PATIENCE),
        reraise=True,
    )
    return attempts(call)
