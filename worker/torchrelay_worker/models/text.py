"""The handler `text-classification`: a text -> its class, by a transformers encoder.

Not here: training (`torchrelay_worker.training.recipes.text`), and the file that it loads (`transformer`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from torchrelay_worker.models import transformer
from torchrelay_worker.models.model import Model
from torchrelay_worker.models.weights import Weights


class TextClassifier(Model):
    """A .safetensors file with its config and tokenizer. The version's config has "classes" and "text", a column."""

    max_batch_size = 64
    max_wait_ms = 5
    max_batch_cost = 16_384  # tokens, with padding

    def load(self, weights: Weights, device: torch.device) -> None:
        """Build the encoder from the file."""
        loaded = transformer.load(weights, AutoModelForSequenceClassification, device)
        self.net, self.tokenizer = loaded.module, loaded.tokenizer
        self.pad = int(loaded.config.pad_token_id or 0)
        self.classes = list(weights.config["classes"])
        self.keys = list(dict.fromkeys(["text", weights.config["text"]]))

    def preprocess(self, input: Any) -> torch.Tensor:
        """Turn one text into tokens, int64 [length]; a text that is too long is cut.

        Args:
            input: a text, or {"text": a text}, also by the name of the column that was trained on.

        Raises:
            InvalidInput: it is neither.
        """
        return transformer.encoded(self.tokenizer, transformer.text_of(input, self.keys))

    def length(self, prepared: torch.Tensor) -> int:
        """Return the number of tokens."""
        return len(prepared)

    def collate(self, prepared: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Pad, and mask what was padded."""
        return transformer.padded(prepared, self.pad)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest classes [n], int64, and their probabilities [n], float32."""
        probabilities, labels = self.net(**batch).logits.float().softmax(1).max(1)
        return labels, probabilities

    def split(self, outputs: tuple[torch.Tensor, torch.Tensor], n: int) -> list[Any]:
        """Turn both columns into Python numbers at once."""
        labels, probabilities = outputs
        return list(zip(labels.tolist(), probabilities.tolist(), strict=True))

    def decode(self, output: tuple[int, float]) -> dict[str, Any]:
        """Return {"label": the class, "probability": 0.0 to 1.0}."""
        label, probability = output
        return {"label": self.classes[label], "probability": round(probability, 6)}
