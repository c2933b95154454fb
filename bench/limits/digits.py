"""The limit for the digits CNN: the bare PyTorch loop over the same pictures, one thread, no queue.

    python bench/limits/digits.py digits.pt2 --pictures 100000 [--size 256]

Three loops, from what a queue must do for each picture to nothing of it, in batches of whatever size serves best:

    hooks      the handler's own hooks, each called as often as a worker does, from JSON values to JSON values
    values     from the same JSON values to the same, a whole batch at a time where that can be
    tensors    the pictures lie ready in one tensor; only the outputs are made Python values, picture by picture
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

SIZES = (64, 128, 256, 512, 1024)
SAMPLE = 6_000  # pictures on which all sizes are tried
LOOPS = ("hooks", "values", "tensors")

Inputs = list[dict[str, list[int]]]
Loop = Callable[[Inputs, int], Iterator[list[dict[str, Any]]]]


class Bare:
    """The model without a queue."""

    def __init__(self, program: Path) -> None:
        import torch

        from torchrelay_worker.models import weights
        from torchrelay_worker.models.digits import Digits

        torch.set_num_threads(1)
        self._model = Digits()
        self._model.load(weights.local(program), torch.device("cpu"))
        self._ready: torch.Tensor = torch.empty(0)

    def make_ready(self, inputs: Inputs) -> None:
        """Make the one tensor of the loop that starts from it."""
        import torch

        pixels = torch.tensor([one["pixels"] for one in inputs], dtype=torch.float32)
        self._ready = pixels.reshape(-1, 1, 8, 8) / 16.0

    def hooks(self, inputs: Inputs, size: int) -> Iterator[list[dict[str, Any]]]:
        """Call each hook as often as a worker does."""
        from limits.hooks import hooks

        run = hooks(self._model)
        for i in range(0, len(inputs), size):
            yield run(inputs[i : i + size])

    def values(self, inputs: Inputs, size: int) -> Iterator[list[dict[str, Any]]]:
        """Make one tensor of a batch's numbers at once."""
        import torch

        for i in range(0, len(inputs), size):
            grey = bytearray().join([bytes(one["pixels"]) for one in inputs[i : i + size]])
            pixels = torch.frombuffer(grey, dtype=torch.uint8)
            yield self._outputs(pixels.reshape(-1, 1, 8, 8) / 16.0)

    def tensors(self, inputs: Inputs, size: int) -> Iterator[list[dict[str, Any]]]:
        """Take slices of what is ready."""
        for i in range(0, len(inputs), size):
            yield self._outputs(self._ready[i : min(i + size, len(inputs))])

    def _outputs(self, batch: Any) -> list[dict[str, Any]]:
        labels, probabilities = self._model.forward(batch)
        pairs = zip(labels.tolist(), probabilities.tolist(), strict=True)
        return [{"label": label, "probability": round(probability, 6)} for label, probability in pairs]


def run(loop: Loop, inputs: Inputs, size: int) -> tuple[float, list[dict[str, Any]]]:
    """Return the pictures per second, and the outputs."""
    import torch

    outputs: list[dict[str, Any]] = []
    began = time.perf_counter()
    with torch.inference_mode():
        for some in loop(inputs, size):
            outputs.extend(some)
    return len(inputs) / (time.perf_counter() - began), outputs


def measure(program: Path, n: int, size: int | None = None) -> dict[str, Any]:
    """Return the rate of each loop at its best batch size, and that size; and what the pictures were taken for."""
    from digits_model import inputs as some_inputs
    from digits_model import pictures

    bare = Bare(program)
    inputs = list(some_inputs(n))
    bare.make_ready(inputs)
    right = pictures()[1]
    found: dict[str, Any] = {}
    for name in LOOPS:
        loop = getattr(bare, name)
        run(loop, inputs[:2000], 256)
        sizes = (size,) if size else SIZES
        best = max(sizes, key=lambda size: run(loop, inputs[:SAMPLE], size)[0]) if len(sizes) > 1 else sizes[0]
        rate, outputs = run(loop, inputs, best)
        known = sum(one["label"] == label for one, label in zip(outputs, right, strict=False)) / min(n, len(right))
        found[name] = {"pictures_per_s": round(rate, 1), "size": best, "known": round(known, 4)}
        found["labels"] = [one["label"] for one in outputs[: len(right)]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--size", type=int, help="of a batch; else the best of several")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.program, arguments.pictures, arguments.size)))


if __name__ == "__main__":
    main()
