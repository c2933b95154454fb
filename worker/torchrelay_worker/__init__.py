"""The device's side of torchrelay. A model's author needs one name: `from torchrelay_worker import Model`.

Importing this package does not import torch: the supervisor, which must stay small, lives in it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchrelay_storage.errors import InvalidInput

if TYPE_CHECKING:
    from torchrelay_worker.models.model import Model
    from torchrelay_worker.models.weights import Weights

__all__ = ["InvalidInput", "Model", "Weights"]


def __getattr__(name: str) -> Any:
    if name == "Model":
        from torchrelay_worker.models.model import Model

        return Model
    if name == "Weights":
        from torchrelay_worker.models.weights import Weights

        return Weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
