"""A transformers model in one .safetensors file: its tensors, and in the header its config and its tokenizer.

So one sha256 covers all that serving needs. Nothing is ever fetched from a hub. Not here: what the models are for
(`text`, `translation`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before transformers is imported: weights come from the artifact store, or from nowhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PretrainedConfig

from torchrelay_storage.errors import Corrupt, InvalidInput
from torchrelay_worker.models.weights import SAFETENSORS, Weights


@dataclass(frozen=True, slots=True)
class Transformer:
    """What such a file holds.

    Attributes:
        module: in eval mode, on the device.
        config: of transformers.
        tokenizer: it cuts texts that are too long, and pads none.
    """

    module: torch.nn.Module
    config: Any
    tokenizer: Tokenizer


def save(module: Any, tokenizer: str, file: Path) -> None:
    """Write a transformers model and the JSON of its tokenizer."""
    kept: dict[int, str] = {}
    tied: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in module.state_dict().items():
        first = kept.setdefault(tensor.data_ptr(), name)
        if first == name:
            tensors[name] = tensor.detach().contiguous()
        else:
            tied[name] = first  # one tensor by two names, such as the embeddings of both sides
    header = {"config": json.dumps(module.config.to_dict(), sort_keys=True), "tokenizer": tokenizer}
    save_file(tensors, file, metadata={**header, "tied": json.dumps(tied), "format": "pt"})


def load(weights: Weights, family: Any, device: torch.device) -> Transformer:
    """Return what `save` wrote.

    Args:
        family: the class of transformers that builds the module from its config, such as AutoModelForSeq2SeqLM.

    Raises:
        InvalidInput: there are no weights, or they are of another kind.
        Corrupt: the file is damaged, or is not what `save` wrote.
    """
    if weights.path is None or weights.path.suffix.lower() not in SAFETENSORS:
        raise InvalidInput("this model needs a .safetensors file that a training run of its recipe wrote")
    try:
        with safe_open(weights.path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        config, tokenizer, tied = json.loads(header["config"]), header["tokenizer"], json.loads(header["tied"])
        tensors |= {name: tensors[first] for name, first in tied.items()}
        module = family.from_config(config_of(config))
        module.load_state_dict(tensors)
        return Transformer(module.eval().to(device), module.config, Tokenizer.from_str(tokenizer))
    except (SafetensorError, KeyError, RuntimeError, ValueError, OSError) as error:
        raise Corrupt(f"{weights.path.name} cannot be read as a transformers model: {error}") from error


def config_of(document: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config that a document describes. Raises ValueError if transformers has no such type of model."""
    document = dict(document)
    for key in ("auto_map", "_name_or_path", "transformers_version", "architectures"):
        document.pop(key, None)  # nothing that names code or a place
    return AutoConfig.for_model(document.pop("model_type", ""), **document)


def text_of(input: Any, keys: Sequence[str]) -> str:
    """Return the text that a job's input is, or has under one of these keys. Raises InvalidInput."""
    expected = f'the input must be a text, or {{"{keys[0]}": a text}}'
    if isinstance(input, Mapping):
        key = next((key for key in keys if key in input), None)
        if key is None:
            raise InvalidInput(expected)
        input = input[key]
    if not isinstance(input, str):
        raise InvalidInput(f"{expected}, not {type(input).__name__}")
    return input


def encoded(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return the tokens of a text, int64 [length]. Raises InvalidInput if it has none."""
    ids = tokenizer.encode(text).ids
    if not ids:
        raise InvalidInput("the text is empty")
    return torch.tensor(ids, dtype=torch.int64)


def padded(ids: Sequence[torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    """Return n texts as "input_ids" int64 [n, longest] and "attention_mask" int64 [n, longest], 1 where a token is."""
    lengths = torch.tensor([len(one) for one in ids])
    together = pad_sequence(list(ids), batch_first=True, padding_value=pad)
    mask = torch.arange(together.shape[1]) < lengths.unsqueeze(1)
    return {"input_ids": together, "attention_mask": mask.long()}
