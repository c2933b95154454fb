"""Pictures of handwritten digits for a benchmark, and a small net that knows them, trained in a few seconds.

    python bench/digits_model.py digits.pt2

The pictures are scikit-learn's 1,797, again and again; the net is a torch.export program, as the handler `digits` takes
one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

EPOCHS, BATCH, RATE = 6, 64, 2e-3
SEED = 7


@cache
def pictures() -> tuple[tuple[dict[str, list[int]], ...], tuple[int, ...]]:
    """Return each picture as an application submits it, and the digit that it shows."""
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs = tuple({"pixels": row} for row in data.data.astype(int).tolist())
    return inputs, tuple(data.target.tolist())


def inputs(n: int) -> Iterator[dict[str, list[int]]]:
    """Yield n of them, from the start again where they end."""
    return islice(cycle(pictures()[0]), n)


def train(path: Path) -> float:
    """Train the net, write its program, and return the part of all pictures that it knows."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    images = torch.tensor([one["pixels"] for one in pictures()[0]], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    labels = torch.tensor(pictures()[1])
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        for i in range(0, len(images), BATCH):
            some = order[i : i + BATCH]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[some]), labels[some]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    net.eval()
    shapes = ({0: torch.export.Dim("pictures", min=1)},)
    with torch.no_grad():
        known = float((net(images).argmax(1) == labels).float().mean())
        example: tuple[Any, ...] = (torch.zeros(2, 1, 8, 8),)
        torch.export.save(torch.export.export(net, example, dynamic_shapes=shapes), str(path))
    return known


if __name__ == "__main__":
    print(f"knows {train(Path(sys.argv[1])):.1%}")
