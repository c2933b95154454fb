"""Models for the tests of the inner process: they run until the test lets them go on."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from torchrelay_worker import Model

FOLDER = "TEST_FOLDER"
BUSY = -1  # as an input of Waits: keeps the interpreter to itself, for longer than any test


class Waits(Model):
    """A number in, twice that number out; a negative one waits until the test's folder holds a file `go`."""

    max_batch_size = 4
    max_wait_ms = 0
    timeout = 60.0
    revision = "r7"

    def forward(self, batch: Tensor) -> Tensor:
        folder = Path(os.environ[FOLDER])
        (folder / f"began-{int(batch[0])}").touch()
        if int(batch[0]) == BUSY:
            re.match(r"(a+)+b", "a" * 60)  # never ends, and no other thread runs meanwhile
        while batch.min() < 0 and not (folder / "go").exists():
            time.sleep(0.01)
        return batch * 2


class Slow(Model):
    """A number in, that number out, a tenth of a second each."""

    max_batch_size = 1

    def forward(self, batch: Any) -> Any:
        time.sleep(0.1)
        return batch
