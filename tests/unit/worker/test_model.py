"""The author's class: collating, splitting, moving, and which hooks a subclass brought."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchrelay_worker
from torchrelay_worker import InvalidInput, Model
from torchrelay_worker.models.model import collate, move, nan_rows, revision_of, split


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, torchrelay_worker; assert 'torch' not in sys.modules; torchrelay_worker.Model"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(torchrelay_worker.__all__) == {
        "Backoff", "Exported", "InvalidDataset", "InvalidInput", "Model", "Recipe", "Table", "Weights",
    }  # fmt: skip
    assert all(hasattr(torchrelay_worker, name) for name in torchrelay_worker.__all__)
    with pytest.raises(AttributeError):
        torchrelay_worker.Missing  # noqa: B018


def test_length_counts_only_if_a_subclass_brought_it() -> None:
    class Plain(Model):
        pass

    class Long(Model):
        def length(self, prepared: Any) -> int:
            return len(prepared)

    assert (Plain.has_length, Long.has_length) == (False, True)
    with pytest.raises(NotImplementedError):
        Plain().forward(None)


@given(st.integers(1, 9), st.lists(st.integers(0, 4), max_size=3))
def test_equal_shapes_are_stacked_and_split_back(n: int, shape: list[int]) -> None:
    tensors = [torch.randn(shape) for _ in range(n)]
    batch = collate(tensors)
    assert batch.shape == (n, *shape)
    assert all(torch.equal(a, b) for a, b in zip(tensors, split(batch, n), strict=True))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_sequences_are_padded_to_the_longest(lengths: list[int]) -> None:
    tensors = [torch.full((n, 2), n) for n in lengths]
    batch = collate(tensors, pad_value=-1)
    assert batch.shape == (len(lengths), max(lengths), 2)
    assert batch.dtype == torch.int64
    for row, n in zip(batch, lengths, strict=True):
        assert (row[:n] == n).all()
        assert (row[n:] == -1).all()


def test_dicts_and_tuples_are_collated_part_by_part() -> None:
    prepared = [{"ids": torch.arange(n), "at": (np.float32(n), n)} for n in (2, 3)]
    batch = collate(prepared, pad_value={"ids": 9})
    assert batch["ids"].tolist() == [[0, 1, 9], [0, 1, 2]]
    assert [part.tolist() for part in batch["at"]] == [[2.0, 3.0], [2, 3]]
    back = split({"ids": batch["ids"], "at": batch["at"], "none": None}, 2)
    assert back[0]["ids"].tolist() == [0, 1, 9]
    assert [float(x) for x in back[1]["at"]] == [3.0, 3.0]


@pytest.mark.parametrize(
    "prepared",
    [
        [torch.zeros(2, 3), torch.zeros(2, 4)],
        [torch.zeros(2), torch.zeros(2, 2)],
        [{"a": torch.zeros(1)}, {"b": torch.zeros(1)}],
        [(torch.zeros(1),), (torch.zeros(1), torch.zeros(1))],
    ],
)
def test_what_cannot_be_collated_says_so(prepared: list[Any]) -> None:
    with pytest.raises(ValueError, match="batch"):
        collate(prepared)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="str"):
        collate(["a", "b"])
    with pytest.raises(TypeError, match="object"):
        split(object(), 1)


@pytest.mark.parametrize("outputs", [torch.zeros(3, 2), torch.tensor(1.0), [1, 2, 3], {"a": torch.zeros(3)}])
def test_another_number_of_outputs_is_refused(outputs: Any) -> None:
    with pytest.raises(ValueError, match="batch of 2"):
        split(outputs, 2)


def test_lists_and_arrays_are_split() -> None:
    assert split(["a", "b"], 2) == ["a", "b"]
    assert [part.tolist() for part in split(np.arange(4).reshape(2, 2), 2)] == [[0, 1], [2, 3]]


def test_move_keeps_the_structure() -> None:
    tree = {"a": torch.zeros(1), "b": (torch.zeros(1), [torch.zeros(1), "text"])}
    moved = move(tree, torch.device("meta"))
    assert moved["a"].device.type == moved["b"][0].device.type == moved["b"][1][0].device.type == "meta"
    assert moved["b"][1][1] == "text"
    assert move(tree["a"], torch.device("cpu")) is tree["a"]


def test_nan_rows_are_found_wherever_they_are() -> None:
    nan = float("nan")
    tensor = torch.tensor([[1.0, nan], [1.0, 1.0], [nan, nan]])
    assert nan_rows(tensor, 3) == {0, 2}
    assert nan_rows({"a": torch.ones(3), "b": tensor}, 3) == {0, 2}
    assert nan_rows((torch.arange(3), tensor), 3) == {0, 2}
    assert nan_rows([1.0, {"x": nan}, [torch.tensor(nan)]], 3) == {1, 2}
    assert nan_rows("text", 3) == set()


def test_default_preprocess_and_decode() -> None:
    model = Model()
    assert model.preprocess([1, 2.5]).tolist() == [1.0, 2.5]
    tensor = torch.ones(2)
    assert model.preprocess(tensor) is tensor
    with pytest.raises(InvalidInput):
        model.preprocess({"a": 1})
    assert model.decode(torch.tensor(3)) == 3
    assert model.decode(tensor) is tensor


class Named(Model):
    revision = "2026-10"


class Unnamed(Model):
    pass


def test_the_revision_is_what_the_author_says_else_a_hash_of_the_file() -> None:
    assert revision_of(Named) == "2026-10"
    assert revision_of(Unnamed) == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    assert revision_of(type("Shell", (Model,), {"__module__": "builtins"})) == "unknown", "no file, as in a shell"
