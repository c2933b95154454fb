"""The demo's data: which pictures are held out, and what is trained on."""

from __future__ import annotations

from collections import Counter

from torchrelay.demo import dataset, draw, pictures


def test_the_same_fifth_of_each_digit_is_held_out() -> None:
    images, labels = pictures()
    held_out = draw(labels)
    assert held_out == draw(labels)
    assert len(set(held_out)) == len(held_out)
    there, drawn = Counter(labels), Counter(labels[i] for i in held_out)
    assert {label: round(n / 5) for label, n in there.items()} == drawn
    assert (images.shape, images.dtype) == ((1797, 8, 8), "uint8")
    assert (images.min(), images.max()) == (0, 16)


def test_a_column_says_which_pictures_are_held_out() -> None:
    images, labels = pictures()
    held_out = draw(labels)
    columns = dataset(images, labels, held_out)
    assert {name: len(column) for name, column in columns.items()} == {"image": 1797, "label": 1797, "split": 1797}
    assert [i for i, part in enumerate(columns["split"].tolist()) if part == "validation"] == list(held_out)
    assert set(columns["split"].tolist()) == {"train", "validation"}
    assert columns["label"].tolist() == labels
