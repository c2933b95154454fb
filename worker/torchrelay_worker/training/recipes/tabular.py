"""The recipes `tabular-classification` and `regression`: rows of numbers and categories through a perceptron.

The exported program takes raw numbers, so that what serves it needs no copy of the preprocessing
(`torchrelay_worker.models.tabular`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from torchrelay import recipes
from torchrelay_storage.errors import InvalidDataset
from torchrelay_worker.models.tabular import category
from torchrelay_worker.training.columns import MISSING
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.recipe import Batch, Exported, Recipe
from torchrelay_worker.training.recipes.labels import Classification

RARE = 1  # a category that the training part has no more often counts as unknown: nothing could be learned of it


@dataclass(slots=True)
class Rows:
    """Clean rows of a table.

    Attributes:
        numbers: float32 [n, columns of numbers], as they were.
        texts: each column of categories, by name.
        target: class indices int64 [n], or numbers float64 [n].
        categories: the texts as indices into the known categories, int64 [n, columns]; made with the first batch.
    """

    numbers: torch.Tensor
    texts: dict[str, list[str | None]]
    target: torch.Tensor
    categories: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)


class Net(nn.Module):
    """numbers float32 [n, k] as they are, categories int64 [n, m] (0: unknown) -> [n, outputs], or [n] for a number."""

    mean: torch.Tensor
    std: torch.Tensor
    target_mean: torch.Tensor
    target_std: torch.Tensor

    def __init__(
        self, preprocessing: Mapping[str, Any], hidden: Sequence[int], dropout: float, outputs: int | None
    ) -> None:
        super().__init__()
        columns = preprocessing["columns"]
        numbers = [column for column in columns if column["kind"] == "number"]
        counts = [len(column["categories"]) for column in columns if column["kind"] == "category"]
        self.register_buffer("mean", torch.tensor([column["mean"] for column in numbers], dtype=torch.float32))
        self.register_buffer("std", torch.tensor([column["std"] for column in numbers], dtype=torch.float32))
        embeddings = [nn.Embedding(1 + count, _width(count)) for count in counts]
        for embedding in embeddings:
            nn.init.zeros_(embedding.weight[0])  # unknown says nothing, until it is learned
        self.embeddings = nn.ModuleList(embeddings)
        width = len(numbers) + sum(map(_width, counts))
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1 if outputs is None else outputs))
        self.is_number = outputs is None
        target = preprocessing.get("target", {"mean": 0.0, "std": 1.0})
        self.register_buffer("target_mean", torch.tensor(target["mean"], dtype=torch.float32))
        self.register_buffer("target_std", torch.tensor(target["std"], dtype=torch.float32))

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        """Return logits, or numbers in the unit of the target."""
        parts = [(numbers - self.mean) / self.std]
        parts += [embedding(categories[:, i]) for i, embedding in enumerate(self.embeddings)]
        outputs = self.layers(torch.cat(parts, dim=1))
        if self.is_number:
            return outputs.squeeze(1) * self.target_std + self.target_mean  # type: ignore[no-any-return]
        return outputs  # type: ignore[no-any-return]


def _width(categories: int) -> int:
    return min(50, max(1, int(1.6 * math.pow(categories, 0.56) + 0.5)))  # fastai's rule of thumb


class Tabular(Recipe):
    """What both recipes on tables share."""

    parameters: recipes.TabularHyperparameters

    def __init__(self, parameters: recipes.Hyperparameters) -> None:
        super().__init__(parameters)
        self._kinds: dict[str, str] = {}

    def read(self, table: Table) -> Rows:
        """Return the rows. The first table read says which columns hold numbers, and which categories.

        Raises:
            InvalidDataset: a column is missing; or a row of a column of numbers holds a text, NaN or nothing.
        """
        target = self.read_target(table)
        if not self._kinds:
            self._kinds = {name: self._kind(table, name) for name in self._features(table)}
        numbers = [_float32(table, name) for name, kind in self._kinds.items() if kind == "number"]
        texts = {name: _categories(table, name) for name, kind in self._kinds.items() if kind == "category"}
        stacked = np.stack(numbers, axis=1) if numbers else np.empty((len(table), 0), dtype=np.float32)
        return Rows(torch.from_numpy(stacked), texts, target)

    def read_target(self, table: Table) -> torch.Tensor:
        """Return the column to predict."""
        raise NotImplementedError

    def _features(self, table: Table) -> list[str]:
        target = self.parameters.target
        if self.parameters.features is None:
            names = [name for name in table.columns if name != target]
        else:
            names = list(dict.fromkeys(self.parameters.features))
            if target in names:
                raise InvalidDataset(f"column {target!r} is both the target and a feature; name it once", column=target)
        if not names:
            raise InvalidDataset(f"there is no column to predict {target!r} from")
        return names

    def _kind(self, table: Table, name: str) -> str:
        if name in self.parameters.categories:
            table.texts(name)
            return "category"
        values = table.column(name)
        if not isinstance(values, list):
            table.numbers(name)
            return "number"
        present = [value for value in values if value is not None]
        if not present:
            raise InvalidDataset(f"column {name!r} is empty in all rows; leave it out by `features`", column=name)
        if sum(map(_is_number, present)) > len(present) / 2:
            try:
                table.numbers(name)
            except InvalidDataset as error:
                hint = f"{error}; correct it, or name the column in `categories` if its numbers are names"
                raise InvalidDataset(hint, column=error.column, row=error.row) from None
        return "category"

    def fit(self, examples: Rows, indices: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
        """Return mean and deviation of each column of numbers, and the categories of the others."""
        numbers = examples.numbers[indices].double()
        means = numbers.mean(0)
        # A column that never changes says nothing; it must not be divided by 0.
        stds = [std if std > 0 else 1.0 for std in (numbers - means).square().mean(0).sqrt().tolist()]
        numeric = iter(zip(means.tolist(), stds, strict=True))
        rows = indices.tolist()
        columns: list[dict[str, Any]] = []
        for name, kind in self._kinds.items():
            if kind == "number":
                mean, std = next(numeric)
                columns.append({"name": name, "kind": kind, "mean": mean, "std": std})
            else:
                count = Counter(text for row in rows if (text := examples.texts[name][row]) is not None)
                known = sorted(text for text, n in count.items() if n > RARE)
                columns.append({"name": name, "kind": kind, "categories": known})
        return {"columns": columns, "target": {"mean": 0.0, "std": 1.0}}

    def batch(self, examples: Rows, indices: torch.Tensor, generator: torch.Generator | None) -> Batch:  # type: ignore[override]
        """Return "numbers" float32 [n, k], "categories" int64 [n, m] and "target" [n]."""
        if examples.categories is None:
            examples.categories = self._known(examples)
        return {
            "numbers": examples.numbers[indices],
            "categories": examples.categories[indices],
            "target": examples.target[indices],
        }

    def _known(self, examples: Rows) -> torch.Tensor:
        found = torch.zeros(len(examples), len(examples.texts), dtype=torch.int64)
        columns = [column for column in self.preprocessing["columns"] if column["kind"] == "category"]
        for i, column in enumerate(columns):
            index = {text: j for j, text in enumerate(column["categories"], start=1)}
            found[:, i] = torch.tensor([index.get(text or "", 0) for text in examples.texts[column["name"]]])
        return found

    def export(self, module: nn.Module, folder: Path) -> Exported:
        """Write a program that takes numbers and categories of any number of rows."""
        columns = self.preprocessing["columns"]
        n_categories = sum(column["kind"] == "category" for column in columns)
        inputs = (torch.zeros(2, len(columns) - n_categories), torch.zeros(2, n_categories, dtype=torch.int64))
        rows = {0: torch.export.Dim("rows", min=1)}
        program = torch.export.export(module, inputs, dynamic_shapes=(rows, rows))
        file = folder / "model.pt2"
        torch.export.save(program, str(file))
        config: dict[str, Any] = {
            "columns": [
                {key: column[key] for key in ("name", "kind", "categories") if key in column} for column in columns
            ]
        }
        return Exported(self.handler, file, config)

    handler = ""


class TabularClassification(Tabular, Classification):
    """Rows of a table to classes, by cross-entropy."""

    Hyperparameters = recipes.TabularClassification
    handler = "tabular-classification"

    def read_target(self, table: Table) -> torch.Tensor:
        """Return the classes."""
        return self.read_labels(table, self.parameters.target)

    def labels(self, examples: Rows) -> list[int]:  # type: ignore[override]
        """Return the classes."""
        return examples.target.tolist()

    def fit(self, examples: Rows, indices: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
        """Return the columns' preprocessing and the classes."""
        self.check_trained(examples.target, indices, self.parameters.target)
        return super().fit(examples, indices) | {"classes": list(self.classes)}

    def build(self) -> nn.Module:
        """Return the perceptron."""
        classes = len(self.preprocessing["classes"])
        return Net(self.preprocessing, self.parameters.hidden, self.parameters.dropout, classes)

    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits [n, classes]."""
        return module(batch["numbers"], batch["categories"])  # type: ignore[no-any-return]

    def export(self, module: nn.Module, folder: Path) -> Exported:
        """Write the program; the config names the columns and the classes."""
        exported = super().export(module, folder)
        exported.config["classes"] = self.preprocessing["classes"]
        return exported


class Regression(Tabular):
    """Rows of a table to a number, by mean squared error in units of the target's deviation."""

    Hyperparameters = recipes.Regression
    metric = "rmse"
    handler = "regression"

    def read_target(self, table: Table) -> torch.Tensor:
        """Return the numbers to predict, float64 [n]."""
        return torch.from_numpy(table.numbers(self.parameters.target).astype(np.float64))

    def fit(self, examples: Rows, indices: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
        """Return the columns' preprocessing, and mean and deviation of the target."""
        target = examples.target[indices]
        std = float(target.std(correction=0))
        if not std > 0:
            name = self.parameters.target
            raise InvalidDataset(
                f"column {name!r} holds {float(target[0]):g} in all rows of the training part: nothing can be learned",
                column=name,
            )
        return super().fit(examples, indices) | {"target": {"mean": float(target.mean()), "std": std}}

    def build(self) -> nn.Module:
        """Return the perceptron."""
        return Net(self.preprocessing, self.parameters.hidden, self.parameters.dropout, None)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean squared error, in squares of the target's deviation, and the predictions [n] in its unit."""
        std = self.preprocessing["target"]["std"]
        predicted = module(batch["numbers"], batch["categories"])
        return functional.mse_loss(predicted / std, batch["target"].float() / std), predicted

    def statistics(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Return sums of errors and of targets, from the mean of the training part so that nothing cancels out."""
        error = outputs.double() - batch["target"]
        target = batch["target"] - self.preprocessing["target"]["mean"]
        return {
            "n": torch.tensor(len(error), dtype=torch.float64, device=error.device),
            "squares": error.square().sum(),
            "absolutes": error.abs().sum(),
            "target": target.sum(),
            "target_squares": target.square().sum(),
        }

    def summarize(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return rmse, mae and, where the targets differ, r2."""
        n, squares, absolutes, target, target_squares = (
            float(sums[key]) for key in ("n", "squares", "absolutes", "target", "target_squares")
        )
        metrics = {"rmse": (squares / n) ** 0.5, "mae": absolutes / n}
        spread = target_squares - target**2 / n
        return metrics | ({"r2": 1.0 - squares / spread} if spread > 0 else {})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip().lower() not in MISSING


def _float32(table: Table, name: str) -> np.ndarray[Any, Any]:
    values = table.numbers(name)
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        row = int(np.argmin(np.isfinite(found)))
        raise InvalidDataset(
            f"column {name!r} holds {values[row]:g} in row {row}, which is too large for float32; scale the column",
            column=name,
            row=row,
        )
    return found


def _categories(table: Table, name: str) -> list[str | None]:
    return [category(name, text) or None for text in table.texts(name)]
