"""MiniLM through the queue: every vector equals the bare model's, whatever batch it fell into."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchrelay import JobFailed, Relay
from torchrelay.settings import Settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "embeddings"


def texts() -> list[str]:
    """Real texts of mixed length: docstrings of the standard library, from a word to several hundred tokens."""
    import argparse
    import collections
    import json
    import logging
    import math
    import random as random_module

    found = []
    for module in (argparse, collections, json, logging, math, random_module):
        for name in dir(module):
            doc = getattr(module, name).__doc__
            if isinstance(doc, str) and doc.strip():
                found.append(doc)
    return sorted(set(found))[:240]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], np.ndarray[Any, Any]]:
    """The model without torchrelay's batches: one text at a time, by the same mathematics written once more."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from transformers import AutoModel, AutoTokenizer

    sys.modules.pop("model", None)
    import model

    tokenizer = AutoTokenizer.from_pretrained(model.folder())
    encoder = AutoModel.from_pretrained(model.folder()).eval()

    def embed(text: str) -> np.ndarray[Any, Any]:
        tokens = tokenizer(text, truncation=True, max_length=model.MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            hidden = encoder(**tokens).last_hidden_state[0]
        mean = hidden.mean(0).numpy().astype(np.float64)
        return mean / np.linalg.norm(mean)

    return embed


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_vectors_equal_the_bare_model_s(
    settings: Settings, worker: Callable[..., Any], bare: Callable[[str], np.ndarray[Any, Any]]
) -> None:
    given = texts()
    assert len(given) > 150
    random.Random(17).shuffle(given)
    with Relay(settings=settings) as relay:
        relay.register_model("minilm", handler="embeddings")
        worker(handlers={"embeddings": "model:Embeddings"}, environment={"PYTHONPATH": str(EXAMPLE)})
        batch = relay.submit_batch("minilm", [*given, ""], max_attempts=1)
        vectors = list(batch.results(timeout=180, return_exceptions=True))
    assert isinstance(vectors[-1], JobFailed)
    assert vectors[-1].kind == "InvalidInput"
    for text, vector in zip(given, vectors[:-1], strict=True):
        got, wanted = np.asarray(vector), bare(text)
        cosine = float(got @ wanted / np.linalg.norm(got))
        assert cosine >= 0.99999, (cosine, text[:80])
