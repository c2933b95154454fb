"""The split of a dataset into the part that is trained on and the part that is held out for validation.

Drawn by the run's seed: the same rows, seed and fraction give the same parts on every machine.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchrelay_storage.errors import InvalidDataset
from torchrelay_storage.run_spec import Split
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.pictures import PARTS


@dataclass(frozen=True, slots=True)
class Drawn:
    """A split.

    Attributes:
        train: indices of the examples that are trained on, int64 [n], rising.
        validation: likewise of those held out; of the validation dataset where that is a dataset of its own.
        record: how it was made, as JSON: kept with the run.
    """

    train: torch.Tensor
    validation: torch.Tensor
    record: dict[str, Any]


def take(table: Table, split: Split) -> tuple[Table, list[str | None] | None]:
    """Return the table without the column that says how to split, and that column; None where there is none.

    Raises:
        InvalidDataset: the column that the run names is not there.
    """
    name = split.column or table.split_column
    if name is None:
        return table, None
    return table.without(name), table.texts(name)


def apart(train: int, validation: int) -> Drawn:
    """Return the split where the validation set is a dataset of its own. Raises InvalidDataset if one is empty."""
    for n, what in ((train, "dataset"), (validation, "validation set")):
        if n == 0:
            raise InvalidDataset(f"the {what} is empty")
    return _drawn(torch.arange(train), torch.arange(validation), {"by": "dataset"})


def draw(
    n: int,
    split: Split,
    seed: int,
    labels: Sequence[int] | None = None,
    given: Sequence[str | None] | None = None,
) -> Drawn:
    """Split n examples.

    Args:
        labels: a class for each example; where the split is to be stratified, both parts have some of each class, in
            proportion.
        given: train or validation for each example; then nothing is drawn.

    Raises:
        InvalidDataset: there are too few examples, or `given` holds something else.
    """
    if n == 0:
        raise InvalidDataset("the dataset is empty: it has columns and no rows")
    if given is not None:
        return _by_column(given, split.column or "split")
    if n < 2:
        raise InvalidDataset(
            "too few examples for the split: there is 1, and each part needs one; add examples, or pass a validation "
            "set of its own"
        )
    generator = torch.Generator().manual_seed(seed)
    if labels is not None and split.stratify:
        return _stratified(torch.as_tensor(labels), split.fraction, seed, generator)
    order = torch.randperm(n, generator=generator)
    held = _share(n, split.fraction)
    record = {"by": "fraction", "fraction": split.fraction, "seed": seed, "stratified": False}
    return _drawn(order[held:], order[:held], record)


def _share(n: int, fraction: float) -> int:
    """Return how many of n >= 2 examples are held out: at least one, and at least one is left."""
    return min(max(1, round(n * fraction)), n - 1)


def _stratified(labels: torch.Tensor, fraction: float, seed: int, generator: torch.Generator) -> Drawn:
    train, held = [], []
    for label in torch.unique(labels).tolist():  # sorted
        of_label = (labels == label).nonzero().flatten()
        if len(of_label) < 2:
            row = int(of_label[0])
            raise InvalidDataset(
                f"too few examples for the split: the class of row {row} has only this one, and each part needs one of "
                "each class; add examples of it, leave it out, or split without stratify",
                row=row,
            )
        of_label = of_label[torch.randperm(len(of_label), generator=generator)]
        n = _share(len(of_label), fraction)
        held.append(of_label[:n])
        train.append(of_label[n:])
    record = {"by": "fraction", "fraction": fraction, "seed": seed, "stratified": True}
    return _drawn(torch.cat(train), torch.cat(held), record)


def _by_column(given: Sequence[str | None], column: str) -> Drawn:
    parts = [PARTS.get((part or "").strip().lower()) for part in given]
    if None in parts:
        row = parts.index(None)
        raise InvalidDataset(
            f"column {column!r} says {given[row]!r} in row {row}, which is neither train nor validation",
            column=column,
            row=row,
        )
    count = Counter(parts)
    for part in ("train", "validation"):
        if not count[part]:
            raise InvalidDataset(
                f"too few examples for the split: column {column!r} says {part} in no row", column=column
            )
    train = torch.tensor([part == "train" for part in parts])
    return _drawn(train.nonzero().flatten(), (~train).nonzero().flatten(), {"by": "column", "column": column})


def _drawn(train: torch.Tensor, validation: torch.Tensor, record: dict[str, Any]) -> Drawn:
    train, validation = train.sort().values, validation.sort().values
    # The sum says whether two runs held out the same rows, without keeping the rows.
    held_out = hashlib.sha256(validation.numpy().astype("<i8").tobytes()).hexdigest()
    counts = {"train": len(train), "validation": len(validation), "sha256": held_out}
    return Drawn(train, validation, record | counts)
