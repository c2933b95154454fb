"""The limit for MiniLM: the bare PyTorch loop at its best over the same texts, one thread, no queue.

    python bench/limits/minilm.py --texts 500 [--way "sorted, 512 tokens, 10% padding"]
    python bench/limits/minilm.py --texts 16 --vectors     the vectors that everybody's are compared with

Texts to tokens to vectors to Python lists. The ways to form batches: every fixed size in order of arrival; sorted by
tokens; and sorted and cut where a batch would hold more padded tokens, or more padding, than so much. All are tried on
a sample unless one is named; the two best of it run over all texts, and the best counts. All texts are known to the
loop before it starts, which no queue can have.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

SAMPLE = 150  # texts on which all ways are tried
SIZES = (1, 2, 4, 8, 16, 32)
TOKENS = (256, 512, 1024, 2048)  # padded ones of a batch
PADDING = (0.05, 0.1, 0.2)  # part of a batch
MOST = 64  # texts of a batch that is cut by its tokens

Batches = list[list[int]]
Way = Callable[[Sequence[int]], Batches]  # the texts' lengths in tokens -> their indices in batches


def ways() -> dict[str, Way]:
    """Return the ways to form batches, by name."""
    found: dict[str, Way] = {f"in order, {size} a batch": partial(_in_order, size=size) for size in SIZES}
    found |= {f"sorted, {size} a batch": partial(_by_length, size=size) for size in SIZES[2:]}
    for tokens in TOKENS:
        for padding in PADDING:
            name = f"sorted, {tokens} tokens, {padding:.0%} padding"
            found[name] = partial(_cut, tokens=tokens, padding=padding)
    return found


def _in_order(lengths: Sequence[int], size: int) -> Batches:
    return [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]


def _by_length(lengths: Sequence[int], size: int) -> Batches:
    order = _sorted(lengths)
    return [order[i : i + size] for i in range(0, len(order), size)]


def _sorted(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def _cut(lengths: Sequence[int], tokens: int, padding: float) -> Batches:
    batches: Batches = []
    batch: list[int] = []
    real = 0
    for i in _sorted(lengths):
        real += lengths[i]
        padded = lengths[i] * (len(batch) + 1)
        if batch and (len(batch) == MOST or padded > tokens or padded - real > padding * padded):
            batches.append(batch)
            batch, real = [], lengths[i]
        batch.append(i)
    batches.append(batch)
    return batches


class Bare:
    """The model without a queue."""

    def __init__(self) -> None:
        import torch
        from handlers.embeddings import MAX_TOKENS, folder
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(1)
        self._most = MAX_TOKENS
        self._tokenizer = AutoTokenizer.from_pretrained(folder())
        self._encoder = AutoModel.from_pretrained(folder()).eval()

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self._most)["input_ids"]
        return ids

    def run(self, texts: list[str], way: Way) -> tuple[float, list[list[float]]]:
        """Return the seconds that it took, and the vector of each text."""
        import torch

        vectors: list[list[float]] = [[]] * len(texts)
        began = time.perf_counter()
        ids = self.tokens(texts)
        with torch.inference_mode():
            for batch in way([len(one) for one in ids]):
                for i, vector in zip(batch, self._forward([ids[i] for i in batch]), strict=True):
                    vectors[i] = vector
        return time.perf_counter() - began, vectors

    def _forward(self, batch: list[list[int]]) -> list[list[float]]:
        import torch
        from torch.nn.functional import normalize

        lengths = [len(ids) for ids in batch]
        longest = max(lengths)
        if min(lengths) == longest:  # nothing is padded: no mask, which costs a little
            hidden = self._encoder(input_ids=torch.tensor(batch)).last_hidden_state
            mean = hidden.mean(1)
        else:
            pad = self._tokenizer.pad_token_id
            ids = torch.tensor([one + [pad] * (longest - len(one)) for one in batch])
            mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
            hidden = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        vectors: list[list[float]] = normalize(mean, dim=1).tolist()
        return vectors


def best(bare: Bare, texts: list[str], named: str | None = None) -> dict[str, Any]:
    """Return the rate of the best way over all texts, its name, and the rates of all ways that were tried."""
    found = ways()
    bare.run(texts[:16], found["in order, 1 a batch"])
    tried: dict[str, float] = {}
    finalists = [named] if named else []
    if not named:
        sample = texts[:SAMPLE]
        tried = {name: len(sample) / bare.run(sample, way)[0] for name, way in found.items()}
        finalists = sorted(tried, key=tried.__getitem__)[-2:]
    rates = {name: len(texts) / bare.run(texts, found[name])[0] for name in finalists}
    way = max(rates, key=rates.__getitem__)
    return {
        "texts_per_s": round(rates[way], 2),
        "way": way,
        "finalists": {name: round(rate, 2) for name, rate in rates.items()},
        "sample": {name: round(rate, 2) for name, rate in tried.items()},
    }


def main() -> None:
    from texts import texts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--way", choices=list(ways()))
    parser.add_argument("--vectors", action="store_true", help="time nothing; print the vectors, one by one made")
    arguments = parser.parse_args()
    some = texts(arguments.texts)
    if arguments.vectors:
        print(json.dumps(Bare().run(some, ways()["in order, 1 a batch"])[1]))
    else:
        print(json.dumps(best(Bare(), some, arguments.way)))


if __name__ == "__main__":
    main()
