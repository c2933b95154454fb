"""The device's side of torchrelay. A model's author needs `Model`, an author of training `Recipe` and `Exported`.

Importing this package does not import torch: the supervisor, which must stay small, lives in it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchrelay_storage.errors import InvalidDataset, InvalidInput
from torchrelay_storage.options import Backoff

if TYPE_CHECKING:
    from torchrelay_worker.models.model import Model
    from torchrelay_worker.models.weights import Weights
    from torchrelay_worker.training.data import Table
    from torchrelay_worker.training.recipe import Exported, Recipe

__all__ = ["Backoff", "Exported", "InvalidDataset", "InvalidInput", "Model", "Recipe", "Table", "Weights"]

_MODULES = {
    "Exported": "torchrelay_worker.training.recipe",
    "Model": "torchrelay_worker.models.model",
    "Recipe": "torchrelay_worker.training.recipe",
    "Table": "torchrelay_worker.training.data",
    "Weights": "torchrelay_worker.models.weights",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
