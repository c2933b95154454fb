"""Given weights of a transformers model: a zip file with config.json, model.safetensors and tokenizer.json.

Not here: fetching it (`Recipe.fetch`), and tokenizers that are learned from the data (`tokens`).
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torchrelay_storage.errors import InvalidHyperparameter
from torchrelay_worker.models.transformer import config_of

FILES = ("config.json", "model.safetensors", "tokenizer.json")
OFFSET = frozenset({"camembert", "roberta", "xlm-roberta"})  # they number positions from after the padding on


@dataclass(frozen=True, slots=True)
class Pretrained:
    """An opened zip file.

    Attributes:
        folder: with the three files, as long as it is open.
        config: of transformers.
        tokenizer: JSON.
    """

    folder: Path
    config: Any
    tokenizer: str

    def max_length(self, wanted: int) -> int:
        """Return how many tokens the model takes, at most as many as wanted."""
        positions = getattr(self.config, "max_position_embeddings", None) or wanted
        if self.config.model_type in OFFSET:
            positions -= self.config.pad_token_id + 1
        return min(wanted, positions)


@contextmanager
def opened(path: Path) -> Iterator[Pretrained]:
    """Unpack a local copy for a while.

    Raises:
        InvalidHyperparameter: it is no such zip file.
    """
    with tempfile.TemporaryDirectory(prefix="torchrelay-pretrained-") as name:
        folder = Path(name)
        try:
            with zipfile.ZipFile(path) as archive:
                inside = {PurePosixPath(entry).name: entry for entry in archive.namelist()}
                for file in FILES:  # by their names, wherever they lie: nothing else is unpacked
                    with archive.open(inside[file]) as source, (folder / file).open("wb") as target:
                        while piece := source.read(2**20):
                            target.write(piece)
            config = config_of(json.loads((folder / "config.json").read_text("utf-8")))
            tokenizer = (folder / "tokenizer.json").read_text("utf-8")
        except (KeyError, OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise InvalidHyperparameter(
                "pretrained",
                f"pretrained must be a zip file of {', '.join(FILES)}, and cannot be read as such: {error}",
            ) from error
        yield Pretrained(folder, config, tokenizer)
