"""A model that one of its inputs takes the process down with, each way of dying its own."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

import torch
from torch import Tensor

from integration.system_models import Slow

POISON = 13  # the input


class Poison(Slow):
    """As Slow; the version's config says how the poisonous input ends the process."""

    def load(self, weights: Any, device: torch.device) -> None:
        super().load(weights, device)
        self.how = weights.config["how"]

    def forward(self, batch: Tensor) -> Tensor:
        if (batch == POISON).any():
            match self.how:
                case "segfault":
                    ctypes.string_at(0)
                case "exit":
                    os._exit(3)
                case "killed":  # as the kernel does it to who takes too much memory
                    os.kill(os.getpid(), signal.SIGKILL)
                case "cuda":  # what a device-side assert looks like: the context is unusable from here on
                    raise torch.AcceleratorError("CUDA error: device-side assert triggered")
                case "hang":
                    time.sleep(3600)
        return super().forward(batch)
