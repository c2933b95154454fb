"""The hooks of a model as the bare loop calls them: each one as often as a worker does, in one thread."""

from __future__ import annotations

from typing import Any

from limits.postgresql import Run

from torchrelay_worker import Model


def hooks(model: Model) -> Run:
    """Return what turns the decoded inputs of a chunk into the values that are its results."""

    def run(values: list[Any]) -> list[Any]:
        prepared = [model.preprocess(value) for value in values]
        outputs = model.split(model.forward(model.collate(prepared)), len(prepared))
        return [model.decode(output) for output in outputs]

    return run
