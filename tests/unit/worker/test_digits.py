"""The handler `digits`: inputs of every kind, what is refused, and what a program that it serves must take."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torchrelay_worker import InvalidInput, check
from torchrelay_worker.models import weights
from torchrelay_worker.models.digits import Digits


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that knows digits: a linear layer, fitted to all of them by least squares."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = torch.tensor(data.data / 16.0, dtype=torch.float32)
    wanted = nn.functional.one_hot(torch.tensor(data.target), 10).float()
    layer = nn.Linear(64, 10, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.lstsq(pictures, wanted, driver="gelsd").solution.T)
    net = nn.Sequential(nn.Flatten(), layer).eval()
    shapes = ({0: torch.export.Dim("pictures", min=1)},)
    path = tmp_path_factory.mktemp("digits") / "digits.pt2"
    torch.export.save(torch.export.export(net, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes), str(path))
    return path


def test_the_program_takes_batches_of_any_size_and_passes_the_dry_run(program: Path) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    loaded = weights.local(program)
    report = check.try_model(Digits, loaded, {"pixels": data.data[0].tolist()}, torch.device("cpu"), "digits@1")
    assert report.output["label"] == data.target[0]
    assert report.batch == 4
    model = Digits()
    model.load(loaded, torch.device("cpu"))
    with torch.inference_mode():
        for n in (1, 2, 7, 256):
            prepared = [model.preprocess(data.data[i]) for i in range(n)]
            outputs = model.split(model.forward(model.collate(prepared)), n)
            right = sum(model.decode(o)["label"] == label for o, label in zip(outputs, data.target, strict=False))
            assert right / n > 0.8


def png(side: int = 8, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side), 255 if mode == "L" else (255, 255, 255)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "input",
    [
        {"pixels": [16] * 64},
        {"pixels": [[16.0] * 8] * 8},
        [16] * 64,
        np.full((8, 8), 16, dtype=np.uint8),
        torch.full((64,), 16.0),
        png(),
        png(mode="RGB"),
    ],
)
def test_every_kind_of_input_is_the_same_picture(input: Any) -> None:
    model = Digits()
    batch = model.collate([model.preprocess(input)])
    assert batch.dtype is torch.float32
    assert torch.equal(batch, torch.ones(1, 1, 8, 8))


def test_pictures_of_all_kinds_share_a_batch() -> None:
    model = Digits()
    inputs: list[Any] = [
        [0] * 63 + [8],
        [0.0] * 63 + [8.0],
        {"pixels": [[0] * 8] * 7 + [[0] * 7 + [8]]},
        [0] * 63 + [8],
    ]
    wanted = torch.zeros(1, 8, 8)
    wanted[0, 7, 7] = 0.5
    assert torch.equal(model.collate([model.preprocess(one) for one in inputs]), wanted.expand(4, 1, 8, 8))
    plain = model.collate([model.preprocess(one) for one in (inputs[0], inputs[3])])
    assert torch.equal(plain, wanted.expand(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("input", "says"),
    [
        ({"picture": 1}, '"pixels"'),
        ([1, 2], "shape"),
        ([17] * 64, "from 0 to 16"),
        ([-1] * 64, "from 0 to 16"),
        ([float("nan")] * 64, "from 0 to 16"),
        (["a"] * 64, "64 numbers"),
        (None, "64 numbers"),
        ([[1, 2], [3]], "64 numbers"),
        (b"no picture", "PNG or JPEG"),
        (png(9), "8x8 pixels"),
        (png()[:30], "PNG or JPEG"),
    ],
)
def test_what_is_no_digit_is_refused(input: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        Digits().preprocess(input)
