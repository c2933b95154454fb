"""Models for the tests of the whole system: real handlers, run by real workers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrelay_worker import InvalidInput, Model


def _note(what: list[Any]) -> None:
    """Append what a forward pass ran to the file of the test: a line an input, in one write."""
    runs = os.environ.get("TEST_RUNS")
    if runs:
        with Path(runs).open("a") as file:
            file.write("".join(f"{os.getpid()} {int(x)}\n" for x in what))


class Double(Model):
    """A number in, twice that number out; notes each input that it ran."""

    max_batch_size = 64

    def forward(self, batch: Tensor) -> Tensor:
        _note(batch.tolist())
        return batch * 2


class Slow(Double):
    """The same, a device batch taking as long as the version's config says."""

    max_batch_size = 8

    def load(self, weights: Any, device: torch.device) -> None:
        self.seconds = float(weights.config.get("seconds", 0.05))

    def forward(self, batch: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return super().forward(batch)


class Moody(Model):
    """Fails as the input says, and only for that input."""

    max_batch_size = 16
    check_nan = True

    def preprocess(self, input: Any) -> Tensor:
        if input == "invalid":
            raise InvalidInput("this input can never run")
        if input == "broken":
            raise RuntimeError("preprocess broke")
        return torch.tensor(
            {"guilty": -1.0, "nan": float("nan")}.get(input, input) if isinstance(input, str) else input
        )

    def forward(self, batch: Tensor) -> Tensor:
        if (batch == -1).any():
            raise ValueError("the guilty one is in this batch")
        return batch.float() + 1


class Shapes(Model):
    """An array in, the same array out with its sum: tensors through the codec and the object store."""

    def preprocess(self, input: Any) -> Tensor:
        return torch.as_tensor(input["array"])

    def collate(self, prepared: list[Tensor]) -> list[Tensor]:
        return prepared

    def forward(self, batch: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"array": x, "sum": x.sum()} for x in batch]

    def decode(self, output: dict[str, Tensor]) -> dict[str, Any]:
        return {"array": output["array"], "sum": output["sum"].item()}


class Unloadable(Model):
    """Cannot be loaded."""

    def load(self, weights: Any, device: torch.device) -> None:
        raise RuntimeError("the weights are gone")
