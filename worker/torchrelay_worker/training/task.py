"""What the loop is given, and what it gives back. Not here: how a task is made (`materials`), and the loop (`loop`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from torch import nn

from torchrelay_storage.run_spec import RunSpec
from torchrelay_worker.training.batches import Part
from torchrelay_worker.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be trained, and on what. The recipe's preprocessing is fitted.

    Attributes:
        split: how the examples were split, as JSON.
        data: the sha256 of the dataset, and of the validation set if that is another.
    """

    recipe: Recipe
    spec: RunSpec
    train: Part
    validation: Part
    split: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str | None] = field(default_factory=dict)


class End(Enum):
    """Why the loop returned."""

    DONE = auto()  # the epochs are over, or the patience is
    LEFT = auto()  # it was asked to leave, and has written a checkpoint
    LOST = auto()  # the run is another's now, or nobody's


@dataclass(frozen=True, slots=True)
class Ended:
    """What the loop returns. All but `end` only where it is done.

    Attributes:
        steps, epochs: how many were made.
        best_step: after which the weights were the best.
        metrics: of the validation there, and the mean training loss of the epoch before it.
        module: with those weights, in eval mode on the CPU; only in the process that writes.
    """

    end: End
    steps: int = 0
    epochs: int = 0
    best_step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    module: nn.Module | None = None
