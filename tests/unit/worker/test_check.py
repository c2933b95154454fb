"""The dry run: what it finds in an author's model, and how it says so."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchrelay_storage.database import Database
from torchrelay_storage.registry import Registry
from torchrelay_worker import InvalidInput, Model, check
from torchrelay_worker.models.weights import Weights
from worker_fakes import Plus


class Embeds(Model):
    """A length and a tensor as its output."""

    max_batch_size = 16
    max_batch_cost = 8

    def preprocess(self, input: Any) -> torch.Tensor:
        return torch.tensor(input, dtype=torch.float32)

    def length(self, prepared: torch.Tensor) -> int:
        return len(prepared)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([batch.sum(1), batch.amax(1)], dim=1)


class Depends(Plus):
    """Its output depends on its mates, as that of a module in train mode does."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * len(batch)


class Loses(Plus):
    """One output too few."""

    def split(self, outputs: Any, n: int) -> list[Any]:
        return super().split(outputs, n)[1:]


class Unstorable(Plus):
    """Its output cannot be stored."""

    def decode(self, output: Any) -> Any:
        return {1, 2}


class Unloadable(Plus):
    """It does not load."""

    def load(self, weights: Weights, device: torch.device) -> None:
        weights.state_dict()


def tried(handler: type[Model], given: Any) -> check.Report:
    return check.try_model(handler, Weights(), given, torch.device("cpu"), "m@1")


def test_a_good_model_shows_each_step() -> None:
    report = tried(Embeds, [1, 2, 3])
    assert (report.length, report.batch) == (3, 2)  # two of them fit into the cost
    assert report.output.tolist() == [6.0, 3.0]
    assert {"load", "preprocess", "length", "collate", "forward of 2", "encode output"} <= set(report.milliseconds)
    assert report.as_json()["output"] == "torch.float32 of shape [2]"


@pytest.mark.parametrize(
    ("handler", "given", "step", "says"),
    [
        (Plus, "no number", "preprocess", "ValueError"),
        (Plus, {1, 2}, "encode input", "InvalidInput"),
        (Depends, 1, "forward", "eval"),
        (Loses, 1, "split", "0 outputs for a batch of 1"),
        (Unstorable, 1, "encode output", "InvalidInput"),
        (Unloadable, 1, "load", "without weights"),
        (Model, 1, "forward", "has no forward"),
    ],
)
def test_what_is_wrong_is_said_with_the_step(handler: type[Model], given: Any, step: str, says: str) -> None:
    with pytest.raises(check.CheckFailed, match=says) as caught:
        tried(handler, given)
    assert caught.value.step == step


def test_outputs_are_compared_but_for_rounding() -> None:
    tensor = torch.ones(2)
    assert check.alike({"a": [1.0, "x", tensor]}, {"a": [1.0001, "x", tensor + 1e-5]})
    assert check.alike(np.arange(2), np.arange(2))
    for a, b in (
        (1.0, 1.1),
        ({"a": 1}, {"b": 1}),
        ([1], [1, 2]),
        (tensor, torch.ones(3)),
        ("a", "b"),
        (tensor, 2 * tensor),
    ):
        assert not check.alike(a, b)


def test_long_outputs_are_shortened_for_a_person() -> None:
    assert check.shown({"a": list(range(20)), "b": b"xx", "c": "y" * 900, "d": None}) == {
        "a": [*range(10), "…"], "b": "2 bytes", "c": "y" * 400 + "…", "d": None,
    }  # fmt: skip


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Registers a model whose handler this module has."""
    monkeypatch.setenv("TORCHRELAY_CONFIG", "")
    monkeypatch.setenv("TORCHRELAY_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHRELAY_HANDLERS", json.dumps({"plus": "worker_fakes:Plus"}))
    database = Database(f"sqlite:///{tmp_path / 'torchrelay.db'}")
    database.upgrade()

    def register(handler: str) -> None:
        Registry(database).register("m", handler)
        database.dispose()

    return register


def test_the_command(
    tmp_path: Path,
    registered: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered("plus")
    (tmp_path / "in.json").write_text("41")
    assert check.main(["m", "--input", str(tmp_path / "in.json"), "--device", "cpu"]) == 0
    assert "all hooks work" in capsys.readouterr().out
    assert check.main(["m", "--input", str(tmp_path / "in.json"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == 42.0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'"x"')))
    assert check.main(["m", "--input", "-", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["step"], found["type"]) == (False, "preprocess", "ValueError")
    assert check.main(["nope", "--input", str(tmp_path / "in.json")]) == 2
    assert "no model is registered" in capsys.readouterr().err
    assert check.main(["m", "--input", str(tmp_path / "none.json")]) == 2
    (tmp_path / "in.json").write_text("{")
    assert check.main(["m", "--input", str(tmp_path / "in.json")]) == 2


def test_an_input_that_is_no_text_is_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG\xff")
    assert check.read_input(str(tmp_path / "x.png")) == b"\x89PNG\xff"
    with pytest.raises(InvalidInput):
        check.read_input(str(tmp_path / "none"))
