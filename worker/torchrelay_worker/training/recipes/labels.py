"""What the recipes with classes share: labels as numbers, cross-entropy, accuracy and F1.

Not here: what the examples are (`tabular`, `images`, `text`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from torchrelay_storage.errors import InvalidDataset
from torchrelay_worker.training.columns import as_text
from torchrelay_worker.training.data import Label, Table
from torchrelay_worker.training.recipe import Batch, Recipe


class Classification(Recipe):
    """A recipe whose batches have a "target", int64 [n], and whose outputs are logits [n, classes].

    Attributes:
        classes: the labels of the dataset, sorted; known once it was read.
    """

    metric = "accuracy"
    greater_is_better = True

    classes: Sequence[Label] = ()

    def read_labels(self, table: Table, column: str) -> torch.Tensor:
        """Return the labels as indices into the classes, int64 [n]. The first table read says which classes there are.

        Raises:
            InvalidDataset: a label is missing; or, in a validation set, it is none of the dataset's.
        """
        labels = table.classes(column)
        if not self.classes:
            self.classes = sorted(set(labels))
            if len(self.classes) < 2:
                raise InvalidDataset(
                    f"column {column!r} holds {labels[0]!r} in all rows; there must be at least two classes",
                    column=column,
                )
        if isinstance(self.classes[0], str):
            # A few of the labels may look like numbers where those of the whole dataset do not.
            labels = [label if isinstance(label, str) else as_text(label) for label in labels]
        index = {label: i for i, label in enumerate(self.classes)}
        for row, label in enumerate(labels):
            if label not in index:
                raise InvalidDataset(
                    f"label out of range: row {row} of the validation set has {label!r} in column {column!r}, which "
                    f"the dataset does not have; it has {_some(self.classes)}",
                    column=column,
                    row=row,
                )
        return torch.tensor([index[label] for label in labels])

    def check_trained(self, target: torch.Tensor, indices: torch.Tensor, column: str) -> None:
        """Raise InvalidDataset if examples that are held out have a label that none of the training part has."""
        trained = torch.zeros(len(self.classes), dtype=torch.bool)
        trained[target[indices]] = True
        if not bool(trained.all()):
            row = int((~trained[target]).nonzero()[0])
            label = self.classes[int(target[row])]
            raise InvalidDataset(
                f"label out of range: row {row} is held out and has {label!r} in column {column!r}, which no row of "
                "the training part has; add examples of it, leave it out, or let the split be stratified",
                column=column,
                row=row,
            )

    def loss(self, module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy and the logits."""
        logits = self.logits(module, batch)
        return functional.cross_entropy(logits, batch["target"]), logits

    def logits(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the module's logits [n, classes] for a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no logits")

    def statistics(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Return for each class how often it is right, predicted and there: the margins of the confusion matrix."""
        target, predicted = batch["target"], outputs.argmax(1)
        n = outputs.shape[1]
        return {
            "right": torch.bincount(target[predicted == target], minlength=n),
            "predicted": torch.bincount(predicted, minlength=n),
            "actual": torch.bincount(target, minlength=n),
        }

    def summarize(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return accuracy, and F1 averaged over the classes that are there or are predicted."""
        right, predicted, actual = (sums[key].double() for key in ("right", "predicted", "actual"))
        seen = (predicted + actual) > 0
        f1 = 2 * right[seen] / (predicted + actual)[seen]
        return {"accuracy": float(right.sum() / actual.sum()), "f1": float(f1.mean())}


def _some(classes: Sequence[Label]) -> str:
    return ", ".join(map(repr, classes[:10])) + (", …" if len(classes) > 10 else "")
