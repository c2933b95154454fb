"""The demo's handler and its training: inputs of every kind, what is refused, and the accuracy that is promised."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchrelay_worker import InvalidInput, check, demo
from torchrelay_worker.models import weights
from torchrelay_worker.models.digits import Digits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's training, run once."""
    out = tmp_path_factory.mktemp("digits")
    assert demo.main(["--out", str(out), "--json"]) == 0
    return {**json.loads((out / "digits.json").read_text()), "path": out / "digits.pt2"}


def test_the_training_reaches_the_accuracy_on_pictures_it_never_saw(trained: dict[str, Any]) -> None:
    assert trained["accuracy"] >= 0.97
    held_out = trained["held_out"]
    assert len(set(held_out)) == len(held_out)
    assert 0.15 < len(held_out) / trained["pictures"] < 0.25


def test_the_split_is_stratified_and_seeded() -> None:
    labels = torch.arange(10).repeat(20)
    first, second = (demo.split(labels, 0.2, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not set(first[0].tolist()) & set(first[1].tolist())
    assert labels[first[1]].bincount().tolist() == [4] * 10


def test_the_program_takes_batches_of_any_size_and_passes_the_dry_run(trained: dict[str, Any]) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    loaded = weights.local(Path(trained["path"]))
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
            assert right / n > 0.95


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
    assert torch.equal(Digits().preprocess(input), torch.ones(1, 8, 8))


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
