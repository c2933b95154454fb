"""The model of the chaos runs: what it answers anybody can compute anew, and its inputs can ask for every trouble."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrelay_worker import InvalidInput, Model

TROUBLE = ("", "raise", "segfault", "exit", "hang")


class Answer(Model):
    """{"n": 5, "do": ""} in, `journal.answer(5)` out. A device batch takes as long as the version's config says."""

    max_batch_size = 8

    def load(self, weights: Any, device: torch.device) -> None:
        self.seconds = float(weights.config.get("seconds", 0.01))

    def preprocess(self, input: Any) -> dict[str, Tensor]:
        do = input.get("do", "")
        if do == "invalid":
            raise InvalidInput("an input that can never run")
        return {"n": torch.tensor(input["n"]), "do": torch.tensor(TROUBLE.index(do))}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        _note(batch["n"].tolist())
        time.sleep(self.seconds)
        wanted = {TROUBLE[i] for i in batch["do"].tolist()}
        if "segfault" in wanted:
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)
        if "exit" in wanted:
            os._exit(3)
        if "hang" in wanted:
            time.sleep(600)
        if "raise" in wanted:
            raise ValueError("an input that this model cannot take")
        return (batch["n"] * 2_654_435_761 + 12_345) % 2_147_483_647

    def decode(self, output: Tensor) -> int:
        return int(output)


class Long(Answer):
    """The same, one at a time."""

    max_batch_size = 1


def _note(numbers: list[int]) -> None:
    """Append what a forward pass runs to the run's file, in one write: side effects may happen more than once."""
    path = os.environ.get("CHAOS_RUNS")
    if path:
        with Path(path).open("a") as file:
            file.write("".join(f"{n}\n" for n in numbers))
