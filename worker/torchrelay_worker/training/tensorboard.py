"""A run's metrics as a TensorBoard event file, made of their rows: whole, however often the run was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchrelay_storage.run_writer import Point

GROUPS = {"train_loss": "loss/train", "validation_loss": "loss/validation", "learning_rate": "learning_rate"}


def write_events(folder: Path, points: Sequence[Point]) -> Path:
    """Write an event file into an empty folder and return its path. Both losses are in one chart.

    Raises:
        OSError: the folder cannot be written.
    """
    from tensorboardX import SummaryWriter

    with SummaryWriter(logdir=str(folder), write_to_disk=True) as events:
        for point in points:
            events.add_scalar(GROUPS.get(point.name, f"validation/{point.name}"), point.value, point.step)
    (path,) = folder.glob("events.out.tfevents.*")
    return path
