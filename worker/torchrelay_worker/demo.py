"""Trains the demo's model: a small convolutional net on scikit-learn's 8x8 digits, exported with torch.export.

    python -m torchrelay_worker.demo --out DIR [--json]

A plain loop until training jobs exist. Not here: the rest of `torchrelay demo`, which runs this in a process of its own
because the application's side has no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

SEED = 7
HELD_OUT = 0.2  # of the pictures, none of which is trained on
EPOCHS = 20
BATCH = 64
BEST_RATE = 3e-3  # learning rate at the top of the one-cycle schedule


class Net(nn.Module):
    """[n, 1, 8, 8] float32 -> logits [n, 10]; 24 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64, 10),
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.layers(pictures)  # type: ignore[no-any-return]


def split(labels: torch.Tensor, held_out: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices to train on and those held out, with the same share of each label in both."""
    train, held = [], []
    for label in range(int(labels.max()) + 1):
        of_label = (labels == label).nonzero().flatten()
        of_label = of_label[torch.randperm(len(of_label), generator=generator)]
        n = round(len(of_label) * held_out)
        held.append(of_label[:n])
        train.append(of_label[n:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def train(pictures: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Net:
    """Return a net trained on pictures [n, 1, 8, 8] from 0 to 1 and labels [n]."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=BEST_RATE, weight_decay=1e-2)
    steps = EPOCHS * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BEST_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels), BATCH):
            batch = order[start : start + BATCH]
            loss = nn.functional.cross_entropy(net(pictures[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


def accuracy(net: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of pictures whose likeliest label is right."""
    with torch.inference_mode():
        return float((net(pictures).argmax(1) == labels).float().mean())


def export(net: nn.Module, path: Path) -> None:
    """Write the net as a torch.export program that takes any number of pictures."""
    example = torch.zeros(2, 1, 8, 8)
    shapes = ({0: torch.export.Dim("pictures", min=1)},)
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=shapes), str(path))


def run(out: Path) -> dict[str, object]:
    """Train, check, export to `out`/digits.pt2 and describe in `out`/digits.json."""
    from sklearn.datasets import load_digits

    started = time.monotonic()
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(data.target)
    trained_on, held_out = split(labels, HELD_OUT, generator)
    net = train(pictures[trained_on], labels[trained_on], generator)
    found = accuracy(net, pictures[held_out], labels[held_out])
    out.mkdir(parents=True, exist_ok=True)
    export(net, out / "digits.pt2")
    result: dict[str, object] = {
        "accuracy": round(found, 4),
        "pictures": len(labels),
        "held_out": held_out.tolist(),
        "seconds": round(time.monotonic() - started, 2),
        "weights": str(out / "digits.pt2"),
    }
    (out / "digits.json").write_text(json.dumps(result))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="torchrelay_worker.demo", description="Trains the demo's model.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    result = run(arguments.out)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"accuracy on the held-out part: {result['accuracy']:.2%}, in {result['seconds']} s: {result['weights']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
