"""The inner process's command line, which the supervisor writes (`inner`), and the device that it names.

Not here: what an operator writes (`__main__`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from torchrelay_storage.errors import InvalidInput
from torchrelay_worker import logs


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read what the supervisor passes."""
    parser = argparse.ArgumentParser(prog="torchrelay_worker.worker", description="started by the supervisor")
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--black-box-fd", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--models", type=lambda text: [m for m in text.split(",") if m] or None, default=None)
    parser.add_argument("--train", choices=("no", "also", "only"), default="no")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-threads", type=int, default=None)
    parser.add_argument("--max-loaded", type=int, default=None)
    parser.add_argument("--max-jobs", type=int, default=None)
    parser.add_argument("--max-memory", type=int, default=None)  # MiB
    parser.add_argument("--grace", type=float, default=30.0)
    parser.add_argument("--log-level", choices=logs.LEVELS, default="warning")
    return parser.parse_args(argv)


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:1`. Raises InvalidInput if this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise InvalidInput(f"device {name!r}: this torch ({torch.__version__}) finds no CUDA device")
            index = device.index if device.index is not None else 0
            if index >= torch.cuda.device_count():
                raise InvalidInput(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"device {name!r} cannot be used: {error}") from error
    return device
