"""`Recipe`: the class that an author of training writes. One instance trains one model, once.

Not here: when the hooks are called (`loop`), and where the data comes from (`data`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchrelay import recipes
from torchrelay_worker.models.model import collate
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.schedules import schedule

Batch = Mapping[str, torch.Tensor]


class Examples(Protocol):
    """What `Recipe.read` returns: anything with a length. Only the recipe looks inside."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Exported:
    """A trained model as a file, and what its handler needs to know beside it.

    Attributes:
        handler: the name under which workers find the `Model` class that serves it.
        file: a torch.export program (.pt2) or tensors (.safetensors), in the folder that `export` was given.
        config: JSON for the handler: preprocessing and decoding.
    """

    handler: str
    file: Path
    config: dict[str, Any] = field(default_factory=dict)


class Recipe:
    """How one kind of model is trained. The hooks are called in this order, those marked * by each process of a run:

        read(table) -> examples                *   checked and cleaned; once for the dataset, once for a validation set
        labels(examples) -> [int] | None       *   what the split keeps in proportion
        fit(examples, indices) -> dict         *   preprocessing, from the training part only; kept as JSON
        build() -> module                      *   with the weights drawn from torch's seeded generator
        optimizer(module), schedule(...)       *
        batch(examples, indices, generator)    *   each step: tensors [n, ...]
        loss(module, batch) -> loss, outputs   *   each step
        statistics(outputs, batch) -> sums     *   each batch of a validation; summed over batches and processes
        summarize(sums) -> metrics                 once a validation
        export(module, folder) -> Exported         at the end, with the best weights

    Attributes:
        parameters: the hyperparameters, an instance of `Hyperparameters` (the class below names its own).
        preprocessing: what `fit` returned; set before `build`, also where a run goes on from a checkpoint.
        fetch: returns the local copy of a file that a hyperparameter names by its URI, such as pretrained weights.
            Raises NotFound, Unreachable; InvalidInput for a URI that runs may not read.
    """

    Hyperparameters: ClassVar[type[recipes.Hyperparameters]] = recipes.Hyperparameters
    """The recipe's typed, documented hyperparameters. Clients learn of them from the workers."""

    metric: ClassVar[str] = "validation_loss"
    """The metric that says which weights are best: `validation_loss`, or a key of what `summarize` returns."""

    greater_is_better: ClassVar[bool] = False

    step_timeout: ClassVar[float] = 600.0
    """Seconds without a step finished after which the run counts as hung, and its process is replaced."""

    def __init__(self, parameters: recipes.Hyperparameters) -> None:
        self.parameters = parameters
        self.preprocessing: dict[str, Any] = {}
        self.fetch: Callable[[str], Path] = Path

    # --- data ---------------------------------------------------------------------------------------------

    def read(self, table: Table) -> Examples:
        """Turn a raw table into clean examples.

        Raises:
            InvalidDataset: it names the column and the row at fault.
        """
        raise NotImplementedError(f"{type(self).__name__} has no read")

    def labels(self, examples: Examples) -> Sequence[int] | None:
        """Return a class for each example, for a stratified split; None: there are no classes."""
        return None

    def fit(self, examples: Examples, indices: torch.Tensor) -> dict[str, Any]:
        """Fit the preprocessing on the training part only.

        Args:
            indices: of the training part, int64 [n].

        Returns:
            JSON: means, vocabularies, class names; it is kept with checkpoints and with the model.
        """
        return {}

    def batch(self, examples: Examples, indices: torch.Tensor, generator: torch.Generator | None) -> Batch:
        """Return the examples with these indices, preprocessed, as tensors [n, ...] on the CPU.

        Args:
            indices: int64 [n].
            generator: for augmentation, and for nothing else; None in validation.
        """
        rows = [self.encode(examples, int(i), generator) for i in indices]
        return collate(rows)  # type: ignore[no-any-return]

    def encode(self, examples: Examples, index: int, generator: torch.Generator | None) -> Mapping[str, torch.Tensor]:
        """Return one example, preprocessed: tensors without a batch dimension. Not needed where `batch` is."""
        raise NotImplementedError(f"{type(self).__name__} has neither encode nor batch")

    # --- model --------------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """Return the module to train, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} has no build")

    def loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Return the mean loss over the batch, a scalar, and the outputs that `statistics` takes.

        `module` may be wrapped for several processes: call it, do not reach inside.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def optimizer(self, module: nn.Module) -> Optimizer:
        """Return the optimiser. The default is AdamW, with weight decay on matrices only (Loshchilov, Hutter 2019)."""
        decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.parameters.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=self.parameters.learning_rate)

    def schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """Return the schedule of the learning rate over `steps` steps; the default is the one that is asked for."""
        return schedule(optimizer, self.parameters.schedule, steps, warmup=self.parameters.warmup)

    # --- validation ---------------------------------------------------------------------------------------

    def statistics(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Return sums over this batch, from which `summarize` makes the metrics."""
        return {}

    def summarize(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the metrics of a validation, such as accuracy, from the sums over all its batches, on the CPU."""
        return {}

    # --- the end ------------------------------------------------------------------------------------------

    def export(self, module: nn.Module, folder: Path) -> Exported:
        """Write the trained module, in eval mode on the CPU, so that a handler can serve it."""
        raise NotImplementedError(f"{type(self).__name__} has no export")
