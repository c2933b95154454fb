"""A model that sleeps as a CPU does while a GPU computes: each device batch takes the same time and no core."""

from __future__ import annotations

import time
from typing import Any

from noop_model import Noop

BATCH = 32  # inputs of a device batch
SECONDS = 0.05  # that it takes
RATE = BATCH / SECONDS  # jobs per second of one worker at best


class Sleeper(Noop):
    """A JSON value in, `{"y": 1}` out, at most RATE a second."""

    max_batch_size = BATCH

    def forward(self, batch: list[Any]) -> list[Any]:
        time.sleep(SECONDS)
        return batch
