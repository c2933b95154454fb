"""A model that does nothing, at no cost: what is left is the queue's."""

from __future__ import annotations

from typing import Any

from torchrelay_worker import Model


class Noop(Model):
    """A JSON value in, `{"y": 1}` out."""

    max_batch_size = 1000

    def preprocess(self, input: Any) -> Any:
        return input

    def collate(self, prepared: list[Any]) -> list[Any]:
        return prepared

    def forward(self, batch: list[Any]) -> list[Any]:
        return batch

    def decode(self, output: Any) -> Any:
        return {"y": 1}
