"""The handler `translation`: a text -> a text, by a transformers encoder-decoder; each token is the likeliest one.

Not here: training (`torchrelay_worker.training.recipes.translation`), and the file that it loads (`transformer`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from torchrelay_worker.models import transformer
from torchrelay_worker.models.model import Model
from torchrelay_worker.models.weights import Weights


class Translator(Model):
    """A .safetensors file with its config and tokenizer.

    The version's config has "source", the column that was translated, and "longest", the most tokens of a translation.
    """

    max_batch_size = 64
    max_wait_ms = 5
    max_batch_cost = 16_384  # tokens of the texts, with padding

    def load(self, weights: Weights, device: torch.device) -> None:
        """Build the encoder-decoder from the file."""
        loaded = transformer.load(weights, AutoModelForSeq2SeqLM, device)
        self.net, self.config, self.tokenizer = loaded.module, loaded.config, loaded.tokenizer
        self.longest = int(weights.config["longest"])
        self.keys = list(dict.fromkeys(["text", weights.config["source"]]))

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
        return transformer.padded(prepared, int(self.config.pad_token_id))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the tokens of the translations, int64 [n, longest of them]."""
        return translate(self.net, self.config, batch["input_ids"], batch["attention_mask"], self.longest)

    def split(self, outputs: torch.Tensor, n: int) -> list[Any]:
        """Turn all tokens into Python numbers at once."""
        return outputs.tolist()

    def decode(self, output: list[int]) -> str:
        """Return the translation."""
        return self.tokenizer.decode(output)


def translate(
    module: Any, config: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, longest: int
) -> torch.Tensor:
    """Return the likeliest token after each token, int64 [n, up to `longest`], with padding after the last.

    What has been computed of the tokens before is kept. A text's translation does not depend on its mates.

    Args:
        module: an encoder-decoder of transformers, in eval mode; it is only called.
        input_ids: int64 [n, length], `attention_mask` likewise.
    """
    n = len(input_ids)
    pad, end = config.pad_token_id, config.eos_token_id
    last = torch.full((n, 1), config.decoder_start_token_id, device=input_ids.device)
    done = torch.zeros(n, 1, dtype=torch.bool, device=input_ids.device)
    tokens: list[torch.Tensor] = []
    state: dict[str, Any] = {"input_ids": input_ids}
    while len(tokens) < longest:
        step = module(**state, attention_mask=attention_mask, decoder_input_ids=last, use_cache=True)
        last = step.logits[:, -1:].argmax(-1).masked_fill(done, pad)
        tokens.append(last)
        done |= last == end
        if bool(done.all()):
            break
        kept = "cache" if hasattr(step, "cache") else "past_key_values"  # as older transformers call it
        state = {"encoder_outputs": (step.encoder_last_hidden_state,), kept: getattr(step, kept)}
    return torch.cat(tokens, dim=1)
