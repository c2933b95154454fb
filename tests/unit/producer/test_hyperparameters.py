"""Hyperparameters: what a recipe's schema lets through, and in which words the rest is refused."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field

from torchrelay import InvalidHyperparameter
from torchrelay.hyperparameters import check, describe
from torchrelay.recipes import READY

TABLE = READY["tabular-classification"].model_json_schema()


class Kind(enum.StrEnum):
    A = "a"
    B = "b"


class Authors(BaseModel):
    """A recipe's own class, with what the ready ones do not have."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind = Kind.A
    sizes: dict[str, int] = Field({}, description="Sizes by name.")
    name: str = Field("x", min_length=1, pattern="^[a-z]+$")
    either: int | str | None = None
    free: Any = None
    momentum: float = Field(0.9, lt=1)


SCHEMA = Authors.model_json_schema()


def test_defaults_are_filled_in_and_values_are_plain() -> None:
    chosen = check("t", TABLE, {"target": "y", "hidden": (8, np.int64(4)), "learning_rate": np.float32(0.5)})
    ready = READY["tabular-classification"](target="y", hidden=[8, 4], learning_rate=0.5)  # type: ignore[call-arg]
    assert chosen == ready.model_dump(mode="json")
    assert list(chosen)[:2] == ["epochs", "batch_size"]
    assert type(chosen["hidden"][1]) is int
    assert check("a", SCHEMA, {"kind": Kind.B})["kind"] == "b"
    assert type(check("a", SCHEMA, {"kind": Kind.B})["kind"]) is str
    assert check("any", {"type": "object"}, {"what": [1]}) == {"what": [1]}


@pytest.mark.parametrize(
    ("given", "key", "says"),
    [
        ({}, "target", "needs target: Column to predict"),
        ({"target": "y", "epohs": 3}, "epohs", "no hyperparameter 'epohs'; did you mean 'epochs'"),
        ({"target": "y", "priorty": 3}, "priorty", "did you mean 'priority'"),
        ({"target": "y", "zzz": 3}, "zzz", "it takes epochs, batch_size"),
        ({"target": "y", "epochs": 0}, "epochs", r"epochs must be a whole number from 1 to 1,000,000, not 0 \(Times"),
        ({"target": "y", "epochs": "5"}, "epochs", "not '5'"),
        ({"target": "y", "epochs": True}, "epochs", "not True"),
        ({"target": "y", "epochs": 1.5}, "epochs", r"not 1\.5"),
        ({"target": "y", "learning_rate": 11}, "learning_rate", "a number above 0 and at most 10, not 11"),
        ({"target": "y", "learning_rate": float("nan")}, "learning_rate", "must be a finite number, not nan"),
        ({"target": "y", "clip_norm": float("inf")}, "clip_norm", "must be a finite number, not inf"),
        ({"target": "y", "dropout": 1.0}, "dropout", "a number at least 0 and below 1"),
        ({"target": "y", "schedule": "cos"}, "schedule", "'cosine', 'linear' or 'constant', not 'cos'"),
        ({"target": "y", "patience": 0}, "patience", "a whole number at least 1 or none, not 0"),
        ({"target": "y", "hidden": [8, 0]}, "hidden", r"a list of whole numbers from 1 to 65,536.*at hidden\[1\]"),
        ({"target": "y", "hidden": 8}, "hidden", "a list of whole numbers"),
        ({"target": 3}, "target", "target must be a text, not 3"),
        ({"target": "y", "features": {"a"}}, "features", "features cannot be a set"),
        ({"target": "y", "features": [np.zeros(2)]}, "features", "features cannot be a ndarray"),
        ({"target": "y", "hidden": {1: 2}}, "hidden", "must be a dict with string keys"),
    ],
)
def test_what_is_refused_is_named_with_what_is_allowed(given: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(InvalidHyperparameter, match=says) as caught:
        check("tabular-classification", TABLE, given, ["priority"])
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("given", "key", "says"),
    [
        ({"kind": "c"}, "kind", "kind must be 'a' or 'b', not 'c'"),
        ({"sizes": {"x": "y"}}, "sizes", r"sizes must be a dict.*at sizes\['x'\] \(Sizes by name\)"),
        ({"name": ""}, "name", "name cannot be ''"),
        ({"name": "A"}, "name", "name cannot be 'A': .*does not match"),
        ({"either": 1.5}, "either", "either must be a whole number, a text or none, not 1.5"),
        ({"momentum": 1}, "momentum", "momentum must be a number below 1, not 1"),
    ],
)
def test_an_authors_schema(given: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(InvalidHyperparameter, match=says) as caught:
        check("mine", SCHEMA, given)
    assert caught.value.key == key


def test_what_a_schema_can_say_is_told_in_words() -> None:
    assert describe({"type": ["integer", "null"]}) == "a whole number or none"
    assert describe({"const": 3}) == "3"
    assert describe({}) == "anything"
    assert describe({"type": "array"}) == "a list"
    assert describe({"type": "array", "items": {"type": "array", "items": {"type": "string"}}}) == (
        "a list of lists of texts"
    )
    assert describe({"$ref": "#/$defs/Kind"}) == "as the recipe's schema says"


def test_a_schema_never_fetches_anything() -> None:
    schema = {"properties": {"x": {"$ref": "http://127.0.0.1:9/schema.json"}}}
    with pytest.raises(InvalidHyperparameter, match="refers to what it does not hold"):
        check("far", schema, {"x": 1})


def test_a_rule_for_the_whole() -> None:
    schema = {"type": "object", "minProperties": 2}
    with pytest.raises(InvalidHyperparameter, match="recipe 'two' does not take these") as caught:
        check("two", schema, {"x": 1})
    assert caught.value.key == ""
