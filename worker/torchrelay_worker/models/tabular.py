"""The handlers `tabular-classification` and `regression`: a row of a table -> its class, or a number.

Not here: training (`torchrelay_worker.training.recipes.tabular`). The program has the standardisation inside.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchrelay_storage.errors import InvalidInput
from torchrelay_worker.models.model import Model
from torchrelay_worker.models.weights import Weights


class Rows(Model):
    """A torch.export program of numbers float32 [n, k] and categories int64 [n, m].

    The config has "columns", each with a "name", a "kind" and, of the kind "category", "categories".
    """

    max_batch_size = 256
    max_wait_ms = 5

    def load(self, weights: Weights, device: torch.device) -> None:
        """Take the program from the weights, and the columns from the config."""
        self.net = weights.program().to(device)
        self.columns: list[str] = []
        # By column: None for numbers, else the index of each category; 0 is an unknown one.
        self.categories: list[dict[str, int] | None] = []
        for column in weights.config["columns"]:
            self.columns.append(column["name"])
            known = column.get("categories")
            self.categories.append(None if known is None else {text: i for i, text in enumerate(known, start=1)})

    def preprocess(self, input: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn one row into numbers float32 [k] and categories int64 [m].

        Args:
            input: {"column": value, ...}, or the values in the order of the columns, as a list, array or tensor.
                A category may be missing, None or one that was not trained on.

        Raises:
            InvalidInput: a column is missing, or is no finite number where one is expected.
        """
        numbers: list[float] = []
        categories: list[int] = []
        for name, known, value in zip(self.columns, self.categories, self._values(input), strict=True):
            if known is None:
                numbers.append(_number(name, value))
            else:
                categories.append(known.get(category(name, value), 0))
        prepared = torch.tensor(numbers, dtype=torch.float32)
        if numbers and not bool(prepared.isfinite().all()):
            name = [c for c, known in zip(self.columns, self.categories, strict=True) if known is None][
                int(prepared.isfinite().int().argmin())
            ]
            raise InvalidInput(f"column {name!r} is NaN, infinite or too large; it must be a number")
        return prepared, torch.tensor(categories, dtype=torch.int64)

    def _values(self, input: Any) -> Sequence[Any]:
        if isinstance(input, Mapping):
            values = []
            for name, known in zip(self.columns, self.categories, strict=True):
                if name not in input and known is None:
                    near = difflib.get_close_matches(name, map(str, input), n=1)
                    hint = f"; did you write it {near[0]!r}?" if near else ""
                    raise InvalidInput(f"the input has no column {name!r}{hint}")
                values.append(input.get(name))
            return values
        if isinstance(input, torch.Tensor) or hasattr(input, "__array__"):
            input = torch.as_tensor(input).tolist()
        if not isinstance(input, list | tuple):
            raise InvalidInput(
                f'the input must be {{"column": value, …}} or a list of values, not {type(input).__name__}'
            )
        if len(input) != len(self.columns):
            raise InvalidInput(
                f"the input has {len(input)} values; it must have {len(self.columns)}: {', '.join(self.columns)}"
            )
        return input

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """Return the program's outputs [n, ...]."""
        return self.net(*batch)


class TabularClassifier(Rows):
    """A row to its class."""

    def load(self, weights: Weights, device: torch.device) -> None:
        """Take the classes from the config too."""
        super().load(weights, device)
        self.classes = list(weights.config["classes"])

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest classes [n], int64, and their probabilities [n], float32."""
        probabilities, labels = self.net(*batch).softmax(1).max(1)
        return labels, probabilities

    def split(self, outputs: tuple[torch.Tensor, torch.Tensor], n: int) -> list[Any]:
        """Turn both columns into Python numbers at once."""
        labels, probabilities = outputs
        return list(zip(labels.tolist(), probabilities.tolist(), strict=True))

    def decode(self, output: tuple[int, float]) -> dict[str, Any]:
        """Return {"label": the class, "probability": 0.0 to 1.0}."""
        label, probability = output
        return {"label": self.classes[label], "probability": round(probability, 6)}


class Regressor(Rows):
    """A row to a number."""

    def split(self, outputs: torch.Tensor, n: int) -> list[Any]:
        """Turn the column into Python numbers at once."""
        return outputs.tolist()

    def decode(self, output: float) -> float:
        """Return the number, in the unit of the column that was trained on."""
        return output


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            raise InvalidInput(f"column {name!r} is too large a number") from None
    if (isinstance(value, torch.Tensor) or hasattr(value, "__array__")) and torch.as_tensor(value).numel() == 1:
        return float(value)
    raise InvalidInput(f"column {name!r} must be a number, not {str(value)[:40]!r}")


def category(name: str, value: Any) -> str:
    """Return a value as the text of its category, in training as here: 3.0 is `3`, True is `true`, None is empty."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(int(value)) if isinstance(value, int) or value.is_integer() else str(value)
    raise InvalidInput(f"column {name!r} must be a text or a number, not {type(value).__name__}")
