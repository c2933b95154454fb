"""The recipe `text-classification`: texts to classes through a transformers encoder.

What serves it is `torchrelay_worker.models.text`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from torchrelay import recipes
from torchrelay_worker.models import transformer
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.recipe import Batch, Exported
from torchrelay_worker.training.recipes.labels import Classification
from torchrelay_worker.training.recipes.texts import Texts, texts_of
from torchrelay_worker.training.tokens import PAD, encoder_tokenizer

VOCABULARY = 8_000  # where the hyperparameters say nothing


@dataclass(slots=True)
class Labelled:
    """Texts and their classes.

    Attributes:
        target: class indices int64 [n].
        ids: the tokens of each, int32 [length]; made with the first batch.
    """

    texts: list[str]
    target: torch.Tensor
    ids: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.texts)


class TextClassification(Texts, Classification):
    """Texts to classes, by cross-entropy."""

    Hyperparameters = recipes.TextClassification
    parameters: recipes.TextClassification

    def read(self, table: Table) -> Labelled:
        """Return the texts and classes. Raises InvalidDataset if one is missing."""
        return Labelled(texts_of(table, self.parameters.text), self.read_labels(table, self.parameters.target))

    def labels(self, examples: Labelled) -> list[int]:  # type: ignore[override]
        """Return the classes."""
        return examples.target.tolist()

    def fit(self, examples: Labelled, indices: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
        """Return the tokenizer, learned from the training part or given, and the classes."""
        self.check_trained(examples.target, indices, self.parameters.target)
        learned = None
        if self.parameters.pretrained is None:
            texts = (examples.texts[i] for i in indices.tolist())
            learned = encoder_tokenizer(texts, self.parameters.vocabulary or VOCABULARY)
        return {**self.fit_tokenizer(learned), "classes": list(self.classes)}

    def batch(self, examples: Labelled, indices: torch.Tensor, generator: torch.Generator | None) -> Batch:  # type: ignore[override]
        """Return "input_ids" and "attention_mask" int64 [n, longest], and "target" int64 [n]."""
        if examples.ids is None:
            examples.ids = self.encode_all(examples.texts)
        ids = [examples.ids[i].long() for i in indices.tolist()]
        return {**transformer.padded(ids, self.preprocessing["pad"]), "target": examples.target[indices]}

    def build(self) -> nn.Module:
        """Return the encoder, with a new head for the classes."""
        classes = len(self.preprocessing["classes"])
        if self.parameters.pretrained is not None:
            return self.from_weights(AutoModelForSequenceClassification, num_labels=classes)  # type: ignore[no-any-return]
        small = {
            "vocab_size": self.tokenizer.get_vocab_size(),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "max_position_embeddings": self.parameters.max_length,
            "pad_token_id": PAD,
            "num_labels": classes,
        }
        return self.from_config(BertForSequenceClassification, BertConfig, small)  # type: ignore[no-any-return]

    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits [n, classes]."""
        return module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # type: ignore[no-any-return]

    def export(self, module: nn.Module, folder: Path) -> Exported:
        """Write the encoder with its tokenizer."""
        file = folder / "model.safetensors"
        transformer.save(module, self.preprocessing["tokenizer"], file)
        return Exported(
            "text-classification", file, {"text": self.parameters.text, "classes": self.preprocessing["classes"]}
        )
