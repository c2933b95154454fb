"""What the recipes on texts share: texts that are there, a small model from a config, or given weights.

Not here: which model it is and what it learns (`text`, `translation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from torchrelay import recipes
from torchrelay_storage.errors import InvalidDataset, InvalidHyperparameter
from torchrelay_worker.training import pretrained
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.recipe import Recipe
from torchrelay_worker.training.tokens import PAD, START


class Texts(Recipe):
    """A recipe whose model is one of transformers, and whose preprocessing has its "tokenizer" as JSON."""

    parameters: recipes.TextHyperparameters

    def __init__(self, parameters: recipes.Hyperparameters) -> None:
        super().__init__(parameters)
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was fitted; it cuts texts that are too long."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_str(self.preprocessing["tokenizer"])
        return self._tokenizer

    def encode_all(self, texts: list[str]) -> list[torch.Tensor]:
        """Return the tokens of each text, int32 [length]."""
        found = self.tokenizer.encode_batch(texts)
        if not all(one.ids for one in found):
            row = next(row for row, one in enumerate(found) if not one.ids)
            raise InvalidDataset(f"the text {texts[row]!r} in row {row} has no tokens; leave the row out", row=row)
        return [torch.tensor(one.ids, dtype=torch.int32) for one in found]

    def fit_tokenizer(self, learned: Tokenizer | None) -> dict[str, Any]:
        """Return the learned or the given "tokenizer" as JSON, and the tokens "pad" and "start" (of a translation)."""
        start: int | None
        if learned is not None:
            tokenizer, most, pad, start = learned, self.parameters.max_length, PAD, START
        else:
            with self.given() as given:
                tokenizer, most = Tokenizer.from_str(given.tokenizer), given.max_length(self.parameters.max_length)
                pad = getattr(given.config, "pad_token_id", None) or 0
                start = getattr(given.config, "decoder_start_token_id", None)
        tokenizer.enable_truncation(most)
        tokenizer.no_padding()
        return {"tokenizer": tokenizer.to_str(), "pad": pad, "start": start}

    def given(self) -> Any:
        """Open the given weights, as a context."""
        assert self.parameters.pretrained is not None
        return pretrained.opened(self.fetch(self.parameters.pretrained))

    def from_config(self, family: Any, kind: Any, small: Mapping[str, Any]) -> Any:
        """Return a model of transformers with new weights.

        Args:
            family: its class.
            kind: the class of its config.
            small: the config where the hyperparameter `config` says nothing else.

        Raises:
            InvalidHyperparameter: transformers does not take what `config` says.
        """
        known = kind().to_dict()
        for key in self.parameters.config:
            if key not in known or key in ("model_type", "vocab_size", "num_labels"):
                raise InvalidHyperparameter(
                    f"config.{key}",
                    f"config of the recipe has no key {key!r} that can be set; see {kind.__name__} of transformers",
                )
        try:
            return family(kind(**{**small, **self.parameters.config}))
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise InvalidHyperparameter("config", f"transformers does not take this config: {error}") from error

    def from_weights(self, family: Any, **more: Any) -> Any:
        """Return a model of transformers with the given weights.

        Args:
            more: what its config is to have.

        Raises:
            InvalidHyperparameter: they are no weights of such a model.
        """
        with self.given() as given:
            try:
                return family.from_pretrained(
                    given.folder,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                    **more,
                )
            except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
                raise InvalidHyperparameter(
                    "pretrained", f"pretrained has no weights of a model for this recipe: {error}"
                ) from error


def texts_of(table: Table, column: str) -> list[str]:
    """Return a column of texts. Raises InvalidDataset if one is missing or empty."""
    found: list[str] = []
    for row, text in enumerate(table.texts(column)):
        if not text or not text.strip():
            raise InvalidDataset(
                f"column {column!r} has no text in row {row}; fill it in, or leave the row out", column=column, row=row
            )
        found.append(text)
    return found
