"""The split: its parts, its seed, and what is said where there are too few examples."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrelay_storage.errors import InvalidDataset
from torchrelay_storage.run_spec import Split
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.split import Drawn, apart, draw, take


def parts(drawn: Drawn) -> tuple[list[int], list[int]]:
    return drawn.train.tolist(), drawn.validation.tolist()


@settings(deadline=None)
@given(st.integers(2, 500), st.floats(0.001, 0.999), st.integers(0, 2**32 - 1))
def test_both_parts_have_examples_and_each_example_is_in_one(n: int, fraction: float, seed: int) -> None:
    drawn = draw(n, Split(fraction=fraction), seed)
    train, validation = parts(drawn)
    assert sorted(train + validation) == list(range(n))
    assert train == sorted(train)
    assert validation == sorted(validation)
    assert min(len(train), len(validation)) >= 1
    assert abs(len(validation) - n * fraction) <= 1
    assert parts(draw(n, Split(fraction=fraction), seed)) == (train, validation)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.integers(0, 100))
def test_a_stratified_split_has_each_class_in_both_parts(classes: list[int], seed: int) -> None:
    labels = sorted(classes * 2)
    drawn = draw(len(labels), Split(fraction=0.25), seed, labels)
    train, validation = (Counter(labels[i] for i in part) for part in parts(drawn))
    for label, n in Counter(labels).items():
        assert train[label] >= 1
        assert validation[label] >= 1
        assert abs(validation[label] - n * 0.25) <= 1
    assert sum(train.values()) + sum(validation.values()) == len(labels)


def test_other_seeds_draw_other_parts() -> None:
    first, second = (draw(100, Split(), seed).validation.tolist() for seed in (1, 2))
    assert first != second
    assert len(first) == len(second) == 20


def test_the_record_tells_how_it_was_made() -> None:
    record = draw(10, Split(fraction=0.3), 7, [0, 1] * 5).record
    assert record == {
        "by": "fraction", "fraction": 0.3, "seed": 7, "stratified": True, "train": 6, "validation": 4,
        "sha256": draw(10, Split(fraction=0.3), 7, [0, 1] * 5).record["sha256"],
    }  # fmt: skip
    assert record["sha256"] != draw(10, Split(fraction=0.3), 8, [0, 1] * 5).record["sha256"]
    assert draw(10, Split(stratify=False), 7, [0, 1] * 5).record["stratified"] is False
    assert draw(10, Split(), 7).record["stratified"] is False


def test_a_column_says_it_all() -> None:
    table, column = take(Table({"x": [1, 2, 3], "part": [" Train", "validation", "VAL"]}), Split(column="part"))
    assert table.columns == ("x",)
    drawn = draw(3, Split(column="part"), 0, None, column)
    assert parts(drawn) == ([0], [1, 2])
    assert drawn.record["by"] == "column"
    assert drawn.record["column"] == "part"


def test_a_format_s_own_column_is_taken_and_any_other_is_left() -> None:
    table = Table({"x": [1, 2], "split": ["train", "validation"]})
    assert take(table, Split()) == (table, None)
    table = Table({"x": [1, 2], "split": ["train", "validation"]}, split_column="split")
    rest, column = take(table, Split())
    assert (rest.columns, column) == (("x",), ["train", "validation"])


def test_a_validation_set_of_its_own_has_its_own_indices() -> None:
    drawn = apart(3, 2)
    assert parts(drawn) == ([0, 1, 2], [0, 1])
    assert drawn.record["by"] == "dataset"
    with pytest.raises(InvalidDataset, match="validation set is empty"):
        apart(3, 0)


@pytest.mark.parametrize(
    ("n", "labels", "given_", "row", "says"),
    [
        (0, None, None, None, "the dataset is empty"),
        (1, None, None, None, "too few examples for the split: there is 1"),
        (3, [0, 0, 1], None, 2, "class of row 2 has only this one"),
        (2, None, ["train", "test"], 1, "'test' in row 1"),
        (2, None, ["train", None], 1, "None in row 1"),
        (2, None, ["train", "train"], None, "says validation in no row"),
    ],
)
def test_too_few_examples_are_refused(
    n: int, labels: list[int] | None, given_: list[str | None] | None, row: int | None, says: str
) -> None:
    with pytest.raises(InvalidDataset, match=says) as caught:
        draw(n, Split(), 0, labels, given_)
    assert caught.value.row == row


def test_a_class_with_one_example_is_no_matter_without_stratify() -> None:
    assert len(draw(3, Split(stratify=False), 0, [0, 0, 1]).validation) == 1


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidDataset, match="'part'") as caught:
        take(Table({"parts": ["train"]}), Split(column="part"))
    assert caught.value.column == "part"


def test_indices_are_int64() -> None:
    assert draw(5, Split(), 0).train.dtype == torch.int64
    assert draw(4, Split(), 0, None, ["train", "train", "val", "val"]).validation.dtype == torch.int64
