"""The recipe `image-classification`: pictures to classes through a small convolutional net.

The exported program takes raw pixels, so that what serves it needs no copy of the normalisation. How a picture becomes
a tensor is in `torchrelay_worker.models.images`, for training and serving alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from torchrelay import recipes
from torchrelay_storage.errors import InvalidDataset
from torchrelay_worker.models.images import fitted
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.pictures import Pictures
from torchrelay_worker.training.recipe import Batch, Exported
from torchrelay_worker.training.recipes.labels import Classification

IN_MEMORY = 2**30  # bytes of pixels that are unpacked once, instead of once an epoch
PROBED = 100  # pictures that are looked at to learn whether there are colours, where not all are unpacked
AT_ONCE = 1024  # pictures of one step of the fit
SMALLEST = 4  # pixels of an edge
GROUPS = 8  # of channels that are normalised together: unlike batches, they are the same on any number of devices
SHIFT = 0.1  # of an edge, by which pictures are moved at most
BRIGHT = 127  # whole levels above this mean that the levels go to 255


@dataclass(slots=True)
class Photos:
    """Pictures of one size, and their classes.

    Attributes:
        pixels: [n, channels, height, width], or pictures that are unpacked when they are needed.
        target: class indices int64 [n].
        shape: channels, height and width.
        resize: whether pictures of other sizes are brought to this one.
    """

    pixels: torch.Tensor | Pictures
    target: torch.Tensor
    shape: tuple[int, int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.target)

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """Return these pictures as float32 [n, channels, height, width]. Raises InvalidDataset if one is damaged."""
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels[indices].float()
        return torch.stack([_one(self.pixels, row, self.shape, self.resize).float() for row in indices.tolist()])


class Net(nn.Module):
    """[n, channels, height, width] as they are -> logits [n, classes], by 3x3 convolutions, wider with each halving."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, preprocessing: Mapping[str, Any], width: int, dropout: float) -> None:
        super().__init__()
        channels, height, wide = preprocessing["shape"]
        classes = len(preprocessing["classes"])
        self.register_buffer(
            "mean", torch.tensor(preprocessing["mean"], dtype=torch.float32).reshape(1, channels, 1, 1)
        )
        self.register_buffer("std", torch.tensor(preprocessing["std"], dtype=torch.float32).reshape(1, channels, 1, 1))
        # Halved until an edge has 4 to 7 pixels, at least once.
        halvings = max(1, int(math.log2(min(height, wide) / 4)))
        layers = [*_block(channels, width), *_block(width, 2 * width)]
        width *= 2
        for i in range(halvings):
            wider = 2 * width if i < 2 else width
            layers += [nn.MaxPool2d(2), *_block(width, wider)]
            width = wider
        self.layers = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(width, classes)
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.layers((pictures - self.mean) / self.std)  # type: ignore[no-any-return]


def _block(channels: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.GroupNorm(math.gcd(GROUPS, width), width),
        nn.ReLU(),
    ]


class ImageClassification(Classification):
    """Pictures to classes, by cross-entropy."""

    Hyperparameters = recipes.ImageClassification
    parameters: recipes.ImageClassification

    def __init__(self, parameters: recipes.Hyperparameters) -> None:
        super().__init__(parameters)
        self._shape: tuple[int, int, int] | None = None

    def read(self, table: Table) -> Photos:
        """Return the pictures. The first table read says of which size they are, and whether they have colours.

        Raises:
            InvalidDataset: a picture is damaged or of another size, or the column holds no pictures.
        """
        name = self.parameters.image
        column = table.column(name)
        target = self.read_labels(table, self.parameters.target)
        if isinstance(column, Pictures):
            pixels, shape = self._unpacked(column)
        elif isinstance(column, np.ndarray):
            pixels, shape = self._arrays(name, column)
        else:
            raise InvalidDataset(
                f"column {name!r} holds texts; it must hold pictures: an array [n, height, width] or "
                "[n, height, width, 3], or a zip of CLASS/NAME.png",
                column=name,
            )
        if self._shape is None:
            self._shape = shape
            if min(shape[1:]) < SMALLEST:
                raise InvalidDataset(
                    f"the pictures have {shape[2]}x{shape[1]} pixels; each edge needs {SMALLEST}, or set `size`",
                    column=name,
                )
        elif shape != self._shape:
            raise InvalidDataset(
                f"the pictures of the validation set are of the shape {list(shape)} where those of the dataset are of "
                f"{list(self._shape)} (channels, height, width); set `size` and `channels`",
                column=name,
            )
        return Photos(pixels, target, shape, self.parameters.size is not None)

    def _arrays(self, name: str, values: np.ndarray[Any, Any]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        if values.ndim == 3:
            values = values[..., None]
        if values.ndim != 4 or values.shape[3] not in (1, 3):
            raise InvalidDataset(
                f"column {name!r} is of shape {list(values.shape)}; pictures are [n, height, width] or "
                "[n, height, width, 3]",
                column=name,
            )
        if values.dtype.kind == "f":
            bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
            if bad.any():
                row = int(np.argmax(bad))
                raise InvalidDataset(
                    f"column {name!r} holds NaN or an infinite number in row {row}; leave the row out",
                    column=name,
                    row=row,
                )
        pixels = torch.from_numpy(values if values.dtype == np.uint8 else values.astype(np.float32))
        size, channels = self.parameters.size, self.parameters.channels or values.shape[3]
        edges = tuple(values.shape[1:3]) if size is None else (size, size)
        if edges != tuple(values.shape[1:3]) or channels != values.shape[3]:
            pixels = torch.stack([fitted(picture, channels, edges) for picture in pixels])
        else:
            pixels = pixels.permute(0, 3, 1, 2).contiguous()
        return pixels, (channels, edges[0], edges[1])

    def _unpacked(self, pictures: Pictures) -> tuple[torch.Tensor | Pictures, tuple[int, int, int]]:
        """Return the pictures unpacked if they find room, which shows at once whether one is damaged."""
        size = self.parameters.size
        first = pictures[0]
        height, width = first.shape[:2] if size is None else (size, size)
        channels = self.parameters.channels or (None if self._shape is None else self._shape[0])
        if len(pictures) * height * width * (channels or 3) > IN_MEMORY:
            if channels is None:
                channels = max(1 if pictures[row].ndim == 2 else 3 for row in range(min(PROBED, len(pictures))))
            return pictures, (channels, height, width)
        shape = (channels or 0, height, width)
        found = [_one(pictures, row, shape, size is not None) for row in range(len(pictures))]
        channels = channels or max(len(picture) for picture in found)
        return torch.stack([picture.expand(channels, -1, -1) for picture in found]), (channels, height, width)

    def labels(self, examples: Photos) -> list[int]:  # type: ignore[override]
        """Return the classes."""
        return examples.target.tolist()

    def fit(self, examples: Photos, indices: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
        """Return mean, deviation and range of the pixels, the pictures' shape and the classes."""
        self.check_trained(examples.target, indices, self.parameters.target)
        total = squares = torch.zeros(examples.shape[0], dtype=torch.float64)
        n = 0
        low, high, whole = math.inf, -math.inf, True
        for part in torch.split(indices, AT_ONCE):
            pixels = examples.take(part).double()
            total, squares = total + pixels.sum((0, 2, 3)), squares + pixels.square().sum((0, 2, 3))
            n += pixels.numel() // pixels.shape[1]
            low, high = min(low, float(pixels.min())), max(high, float(pixels.max()))
            whole = whole and bool((pixels == pixels.round()).all())
        mean = total / n
        std = (squares / n - mean.square()).clamp(min=0).sqrt()
        if isinstance(examples.pixels, Pictures) or (whole and low >= 0 and BRIGHT < high <= 255):
            low, high = 0.0, 255.0  # levels of eight bits, whether or not the brightest is there
        return {
            "shape": list(examples.shape),
            "mean": mean.tolist(),
            "std": [value if value > 0 else 1.0 for value in std.tolist()],
            "low": low,
            "high": high,
            "classes": list(self.classes),
        }

    def batch(self, examples: Photos, indices: torch.Tensor, generator: torch.Generator | None) -> Batch:  # type: ignore[override]
        """Return "image" float32 [n, channels, height, width] and "target" int64 [n]."""
        pictures = examples.take(indices)
        if generator is not None and self.parameters.augment:
            pictures = _moved(pictures, self.parameters.mirror, generator)
        return {"image": pictures, "target": examples.target[indices]}

    def build(self) -> nn.Module:
        """Return the net."""
        return Net(self.preprocessing, self.parameters.width, self.parameters.dropout)

    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits [n, classes]."""
        return module(batch["image"])  # type: ignore[no-any-return]

    def export(self, module: nn.Module, folder: Path) -> Exported:
        """Write a program that takes any number of pictures."""
        channels, height, width = self.preprocessing["shape"]
        example = (torch.zeros(2, channels, height, width),)
        program = torch.export.export(module, example, dynamic_shapes=({0: torch.export.Dim("pictures", min=1)},))
        file = folder / "model.pt2"
        torch.export.save(program, str(file))
        config = {
            "channels": channels,
            "height": height,
            "width": width,
            "resize": self.parameters.size is not None,
            "low": self.preprocessing["low"],
            "high": self.preprocessing["high"],
            "classes": self.preprocessing["classes"],
        }
        return Exported("image-classification", file, config)


def _one(pictures: Pictures, row: int, shape: tuple[int, int, int], resize: bool) -> torch.Tensor:
    """Return a picture as uint8 [channels, height, width].

    Args:
        shape: channels (0: as it has them), height and width.

    Raises:
        InvalidDataset: it is damaged, or of another size and not to be resized.
    """
    picture = pictures[row]
    channels, height, width = shape
    if not resize and picture.shape[:2] != (height, width):
        raise InvalidDataset(
            f"the picture {pictures.names[row]} has {picture.shape[1]}x{picture.shape[0]} pixels where the first has "
            f"{width}x{height}; set `size` to resize them",
            column=pictures.column,
            row=row,
        )
    channels = channels or (1 if picture.ndim == 2 else 3)
    return fitted(picture, channels, (height, width) if resize else None)


def _moved(pictures: torch.Tensor, mirror: bool, generator: torch.Generator) -> torch.Tensor:
    """Return pictures [n, c, h, w] each shifted at random, the border going on outside; half of them mirrored."""
    n, _, height, width = pictures.shape
    most = max(1, round(SHIFT * min(height, width)))
    padded = functional.pad(pictures, (most, most, most, most), mode="replicate")
    down, right = torch.randint(0, 2 * most + 1, (2, n, 1), generator=generator)
    rows = (down + torch.arange(height)).reshape(n, 1, height, 1)
    columns = (right + torch.arange(width)).reshape(n, 1, 1, width)
    channels = torch.arange(pictures.shape[1]).reshape(1, -1, 1, 1)
    moved = padded[torch.arange(n).reshape(n, 1, 1, 1), channels, rows, columns]
    if not mirror:
        return moved
    turned = torch.rand(n, generator=generator) < 0.5
    return torch.where(turned.reshape(n, 1, 1, 1), moved.flip(3), moved)
