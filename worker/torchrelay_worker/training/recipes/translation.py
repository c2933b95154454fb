"""The recipe `translation`: texts to texts through a transformers encoder-decoder.

What serves it is `torchrelay_worker.models.translation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel

from torchrelay import recipes
from torchrelay_storage.errors import InvalidHyperparameter
from torchrelay_worker.models import transformer
from torchrelay_worker.models.translation import translate
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.recipe import Batch, Exported
from torchrelay_worker.training.recipes.texts import Texts, texts_of
from torchrelay_worker.training.tokens import END, PAD, START, translation_tokenizer

EXAMINED = 256  # examples of each validation that are translated; the loss is of all of them
LEAST, PER_PIECE, MOST = 260, 50, 8_000  # the vocabulary: pieces that rarely occur are learned badly
IGNORED = -100  # what stands in the target where there is no token


@dataclass(slots=True)
class Pairs:
    """Texts and their translations.

    Attributes:
        examined: which of them are translated where they are held out, bool [n].
        ids: the tokens of each text and of its translation; made with the first batch.
    """

    sources: list[str]
    targets: list[str]
    examined: torch.Tensor | None = None
    ids: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Logits [n, length, vocabulary], and in validation the translations of those that are examined."""

    logits: torch.Tensor
    translations: torch.Tensor | None


class Translation(Texts):
    """Texts to texts: each token from the text and the right tokens before it, by cross-entropy."""

    Hyperparameters = recipes.Translation
    parameters: recipes.Translation

    metric = "token_accuracy"  # where a task is hard, no translation is exact for many epochs, and none would be better
    greater_is_better = True

    def __init__(self, parameters: recipes.Hyperparameters) -> None:
        super().__init__(parameters)
        self._has_read = False
        self._config: Any = None

    def read(self, table: Table) -> Pairs:
        """Return the pairs. Raises InvalidDataset if a text is missing."""
        pairs = Pairs(texts_of(table, self.parameters.source), texts_of(table, self.parameters.target))
        if self._has_read:  # a validation set: all of it is held out
            pairs.examined = _marked(len(pairs), _spread(torch.arange(len(pairs))))
        self._has_read = True
        return pairs

    def fit(self, examples: Pairs, indices: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
        """Return the tokenizer, learned from the training part or given, and the length of the longest translation."""
        rows = indices.tolist()
        learned = None
        if self.parameters.pretrained is None:
            few = min(MOST, LEAST + len(rows) // PER_PIECE)
            most = self.parameters.vocabulary or (few if self.parameters.tokens == "pieces" else MOST)
            texts = (side[i] for i in rows for side in (examples.sources, examples.targets))
            learned = translation_tokenizer(texts, self.parameters.tokens, most)
        self.preprocessing = self.fit_tokenizer(learned)
        if self.preprocessing["start"] is None:
            raise InvalidHyperparameter(
                "pretrained", "pretrained has no decoder_start_token_id: it is no encoder-decoder"
            )
        longest = max(len(ids) for ids in self._tokens(examples)[1])
        held_out = torch.ones(len(examples), dtype=torch.bool)
        held_out[indices] = False
        return {
            **self.preprocessing,
            # A translation may be somewhat longer than those that were seen; without a bound a bad one never ends.
            "longest": min(self.parameters.max_length, longest + longest // 2 + 4),
            "examined": _spread(held_out.nonzero().flatten()).tolist(),
        }

    def _tokens(self, examples: Pairs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if examples.ids is None:
            examples.ids = self.encode_all(examples.sources), self.encode_all(examples.targets)
        return examples.ids

    def batch(self, examples: Pairs, indices: torch.Tensor, generator: torch.Generator | None) -> Batch:  # type: ignore[override]
        """Return the tokens of the texts, of the translations (-100 after the last), and those moved by one.

        "input_ids" and "attention_mask" int64 [n, longest]; "target" and "decoder_input_ids" int64 [n, longest
        translation]; "examined" bool [n], in training nowhere.
        """
        sources, targets = self._tokens(examples)
        rows = indices.tolist()
        target = nn.utils.rnn.pad_sequence([targets[i].long() for i in rows], batch_first=True, padding_value=IGNORED)
        start = torch.full((len(rows), 1), self.preprocessing["start"])
        before = torch.cat([start, target[:, :-1]], dim=1)
        if examples.examined is None:
            examples.examined = _marked(len(examples), torch.tensor(self.preprocessing["examined"]))
        return {
            **transformer.padded([sources[i].long() for i in rows], self.preprocessing["pad"]),
            "decoder_input_ids": before.masked_fill(before == IGNORED, self.preprocessing["pad"]),
            "target": target,
            "examined": examples.examined[indices] & (generator is None),
        }

    def build(self) -> nn.Module:
        """Return the encoder-decoder."""
        if self.parameters.pretrained is not None:
            module = self.from_weights(AutoModelForSeq2SeqLM)
        else:
            small = {
                "vocab_size": self.tokenizer.get_vocab_size(),
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 256,
                "decoder_ffn_dim": 256,
                "activation_function": "gelu",
                "scale_embedding": True,
                "max_position_embeddings": self.parameters.max_length,
                "pad_token_id": PAD,
                "bos_token_id": START,
                "eos_token_id": END,
                "forced_eos_token_id": None,
                "decoder_start_token_id": START,
            }
            module = self.from_config(MarianMTModel, MarianConfig, small)
        self._config = module.config
        return module  # type: ignore[no-any-return]

    def loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, Outputs]:
        """Return the cross-entropy of a token, averaged over each translation and then over all, and the outputs."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")}
        logits = module(**inputs, use_cache=False).logits
        # Flat: the kernel for sequences has no deterministic implementation on CUDA.
        target = batch["target"]
        flat = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
        each = flat.reshape(target.shape)
        loss = (each.sum(1) / (target != IGNORED).sum(1)).mean()
        translations = None
        if not module.training and bool(batch["examined"].any()):
            ids, mask = (batch[key][batch["examined"]] for key in ("input_ids", "attention_mask"))
            translations = translate(module, self._config, ids, mask, self.preprocessing["longest"])
        return loss, Outputs(logits, translations)

    def statistics(self, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """Return how many tokens are right, and how many of the examined translations."""
        target = batch["target"]
        there = target != IGNORED
        exact = 0
        if outputs.translations is not None:
            wanted = target[batch["examined"]].masked_fill(~there[batch["examined"]], self.preprocessing["pad"])
            pairs = zip(*(self.tokenizer.decode_batch(t.tolist()) for t in (outputs.translations, wanted)), strict=True)
            exact = sum(translation == text for translation, text in pairs)
        return {
            "tokens": there.sum(),
            "right": ((outputs.logits.argmax(-1) == target) & there).sum(),
            "examined": batch["examined"].sum(),
            "exact": torch.tensor(exact, device=target.device),
        }

    def summarize(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return which part of the tokens, and of the translations as a whole, is right."""
        return {
            "token_accuracy": float(sums["right"] / sums["tokens"]),
            "exact_match": float(sums["exact"] / sums["examined"]),
        }

    def export(self, module: nn.Module, folder: Path) -> Exported:
        """Write the encoder-decoder with its tokenizer."""
        file = folder / "model.safetensors"
        transformer.save(module, self.preprocessing["tokenizer"], file)
        return Exported(
            "translation", file, {"source": self.parameters.source, "longest": self.preprocessing["longest"]}
        )


def _spread(indices: torch.Tensor) -> torch.Tensor:
    """Return at most EXAMINED of the indices, evenly from all of them."""
    if len(indices) <= EXAMINED:
        return indices
    return indices[torch.linspace(0, len(indices) - 1, EXAMINED).round().long()]


def _marked(n: int, indices: torch.Tensor) -> torch.Tensor:
    marked = torch.zeros(n, dtype=torch.bool)
    marked[indices.long()] = True
    return marked
