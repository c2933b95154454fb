"""The limit for EfficientNet-Lite0: the bare PyTorch loop over the same photographs, one thread, no queue.

    python bench/limits/efficientnet.py --pictures 200 [--size 4]

From JPEG to Python values by the handler's own preprocess and forward, in batches of a fixed size: all are tried on a
sample unless one is named; the best of them runs over all pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

SIZES = (1, 2, 4, 8, 16, 32)
SAMPLE = 64  # pictures on which all sizes are tried


class Bare:
    """The model without a queue."""

    def __init__(self) -> None:
        import torch
        from handlers.efficientnet import EfficientNet
        from photos import weights_file

        from torchrelay_worker.models import weights

        torch.set_num_threads(1)
        self._model = EfficientNet()
        self._model.load(weights.local(weights_file()), torch.device("cpu"))

    def run(self, pictures: list[bytes], size: int) -> tuple[float, list[dict[str, Any]]]:
        """Return the pictures per second, and the outputs."""
        import torch

        model = self._model
        outputs: list[dict[str, Any]] = []
        began = time.perf_counter()
        with torch.inference_mode():
            for i in range(0, len(pictures), size):
                batch = torch.stack([model.preprocess(picture) for picture in pictures[i : i + size]])
                classes, probabilities = model.forward(batch)
                pairs = zip(classes.tolist(), probabilities.tolist(), strict=True)
                outputs.extend({"class": label, "probability": round(sure, 6)} for label, sure in pairs)
        return len(pictures) / (time.perf_counter() - began), outputs


def measure(n: int, size: int | None = None) -> dict[str, Any]:
    """Return the rate at the best batch size, that size, and the rates of all that were tried."""
    from photos import photos

    pictures = photos(n)
    bare = Bare()
    bare.run(pictures[:4], 1)
    tried = {} if size else {size: bare.run(pictures[:SAMPLE], size)[0] for size in SIZES}
    best = size or max(tried, key=tried.__getitem__)
    rate, outputs = bare.run(pictures, best)
    return {
        "pictures_per_s": round(rate, 2),
        "size": best,
        "sample": {str(size): round(rate, 2) for size, rate in tried.items()},
        "classes": [output["class"] for output in outputs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--size", type=int, help="of a batch; else the best of several")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.pictures, arguments.size)))


if __name__ == "__main__":
    main()
