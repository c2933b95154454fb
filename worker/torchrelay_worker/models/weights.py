"""A version's weights: fetched from the artifact store once, checked against the recorded sha256 at each load, read.

safetensors, state_dict files through `weights_only`, and torch.export programs (`programs`); never a pickle that could
run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch

from torchrelay_storage.artifacts import Artifacts, file_sha256
from torchrelay_storage.errors import Corrupt, InvalidInput
from torchrelay_storage.registry import ModelVersion
from torchrelay_worker.models.programs import load_program

SAFETENSORS = frozenset({".safetensors"})
STATE_DICTS = frozenset({".pt", ".pth", ".bin"})
PROGRAMS = frozenset({".pt2"})


@dataclass(frozen=True, slots=True)
class Weights:
    """What `Model.load` gets.

    Attributes:
        path: the local file, already checked; None where the version was registered without weights.
        config: the version's own settings, as they were registered.
    """

    path: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def state_dict(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Return the tensors of a .safetensors file or of a state_dict file (.pt, .pth, .bin) on a device.

        Raises:
            InvalidInput: there are no weights, or they are of another kind.
            Corrupt: the file cannot be read as what its name says, or holds more than tensors.
        """
        path = self._need()
        suffix = path.suffix.lower()
        try:
            if suffix in SAFETENSORS:
                from safetensors.torch import load_file

                return dict(load_file(path, device=str(device)))
            if suffix in STATE_DICTS:
                loaded = torch.load(path, map_location=device, weights_only=True)
                if not isinstance(loaded, dict):
                    raise Corrupt(f"{path.name} holds a {type(loaded).__name__}, not a state_dict")
                return loaded
        except Corrupt:
            raise
        except Exception as error:
            raise Corrupt(f"{path.name} cannot be read as weights: {error}") from error
        raise InvalidInput(f"{path.name} is no state_dict; its name must end in .safetensors, .pt, .pth or .bin")

    def program(self) -> torch.nn.Module:
        """Return the module of a torch.export program (.pt2), on the CPU.

        Raises:
            InvalidInput: there are no weights, or they are of another kind.
            Corrupt: the file is no program that this torch can read, or does more than PyTorch's operators do.
        """
        path = self._need()
        if path.suffix.lower() not in PROGRAMS:
            raise InvalidInput(f"{path.name} is no torch.export program; its name must end in .pt2")
        return load_program(path)

    def _need(self) -> Path:
        if self.path is None:
            raise InvalidInput("this model version was registered without weights; register it with a weights file")
        return self.path


class WeightsCache:
    """A local folder with the weights that this machine has loaded, by their sha256."""

    def __init__(self, artifacts: Artifacts, folder: Path) -> None:
        self._artifacts = artifacts
        self._folder = folder

    def fetch(self, version: ModelVersion) -> Weights:
        """Return the version's weights; they are fetched if they are not here, and their sha256 is checked either way.

        Raises:
            Corrupt: the file is not what was registered.
            NotFound, Unreachable: the artifact store has no such file, or does not answer.
        """
        if version.weights is None:
            return Weights(None, version.config)
        if version.sha256 is None:
            raise Corrupt(f"{version.ref} has weights without a recorded sha256; register it anew")
        suffix = "".join(PurePosixPath(urlsplit(version.weights).path).suffixes[-1:])
        path = self._artifacts.fetch(version.weights, self._folder / f"{version.sha256}{suffix}", version.sha256)
        return Weights(path, version.config)


def local(path: Path, sha256: str | None = None, config: Mapping[str, Any] | None = None) -> Weights:
    """Return weights from a local file, for dry runs and tests. Raises Corrupt if its sha256 is another."""
    if not path.is_file():
        raise InvalidInput(f"there is no file {path}")
    if sha256 is not None and file_sha256(path) != sha256:
        raise Corrupt(f"{path} has not the sha256 {sha256}: it was changed or damaged")
    return Weights(path, config or {})
