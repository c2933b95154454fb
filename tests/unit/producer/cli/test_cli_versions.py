"""Commands about versions, aliases and recipes, over SQLite."""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchrelay import Relay
from torchrelay.cli.arguments import complete_recipe, complete_version
from torchrelay.recipes import READY
from torchrelay.settings import Settings
from torchrelay_storage.registry import Registry

Cli = Callable[..., Any]


def columns(line: str) -> list[str]:
    """The cells of a table's line: two blanks part them."""
    return re.split(r" {2,}", line.strip())


@pytest.fixture
def two(trainer: Any) -> list[str]:
    """The runs that trained digits@1, the champion, and digits@2."""
    return [trainer.train(promote="champion", accuracy=0.97), trainer.train(accuracy=0.99)]


@pytest.mark.usefixtures("two")
def test_models_lists_aliases_and_metrics_of_the_newest(cli: Cli, relay: Relay) -> None:
    head, *lines = cli("models").out.splitlines()
    assert columns(head) == ["model", "handler", "accuracy", "validation_loss", "waiting", "running", "workers",
                             "versions"]  # fmt: skip
    assert [columns(line)[0] for line in lines] == ["digits@2", "double@1"]
    assert columns(lines[0])[2:4] == ["0.99", "0.04"]
    relay.promote("digits@2", alias="newest")
    assert "newest" in cli("models").out
    shown = cli("models", "--json").json[0]
    assert (shown["aliases"], shown["metrics"]["accuracy"], shown["versions"]) == (["newest"], 0.99, 2)


def test_models_without_any_metrics_has_no_columns_for_them(cli: Cli, relay: Relay) -> None:
    head = cli("models").out.splitlines()[0]
    assert columns(head) == ["model", "handler", "waiting", "running", "workers", "versions"]


def test_show(cli: Cli, two: list[str]) -> None:
    shown = cli("models", "show", "digits@champion", "--json").json
    assert (shown["ref"], shown["aliases"], shown["run"]) == ("digits@1", ["champion"], two[0])
    assert shown["lineage"]["hyperparameters"] == {"epochs": 4, "width": 97}
    assert [version["ref"] for version in shown["versions"]] == ["digits@2", "digits@1"]
    assert cli("models", "show", "digits", "--json").json["ref"] == "digits@2"
    words = cli("models", "show", "digits@1").out
    for word in ("champion", "accuracy", "0.97", two[0], two[1], "cd" * 32, '{"epochs":4,"width":97}'):
        assert word in words
    error = cli("models", "show", "digits@best", "--json", code=2).error
    assert error["type"] == "ModelNotFound"
    assert "champion" in error["message"]


@pytest.mark.usefixtures("two")
def test_compare(cli: Cli, trainer: Any) -> None:
    lines = cli("models", "compare", "digits@champion", "digits").out.splitlines()
    assert columns(lines[0]) == ["digits@1", "digits@2"]
    cells = {columns(line)[0]: columns(line)[1:] for line in lines[1:]}
    assert cells["accuracy"] == ["0.97", "0.99"]
    assert cells["hyperparameters.width"] == ["97", "99"]
    assert "hyperparameters.epochs" not in cells, "only what differs"
    documents = cli("models", "compare", "digits@1", "digits@2", "--json").json
    assert [document["ref"] for document in documents] == ["digits@1", "digits@2"]
    assert cli("models", "compare", "digits").out.splitlines()[0].split() == ["digits@2", "digits@1"]
    trainer.train("flowers")
    assert "has one version" in cli("models", "compare", "flowers", code=2).err


@pytest.mark.usefixtures("two")
def test_promote_roll_back_and_the_history(cli: Cli, trainer: Any, two: list[str]) -> None:
    promoted = cli("models", "promote", "digits@2", "--json").json
    assert promoted == {"model": "digits", "alias": "champion", "version": 2, "ref": "digits@2"}
    assert cli("models", "rollback", "digits", "--by", "ops").out == "digits@champion is digits@1 again\n"
    assert cli("models", "promote", "digits@champion", "--alias", "canary").out == "digits@canary is digits@1\n"
    moves = cli("models", "history", "digits", "--json").json
    assert [(m["alias"], m["version"], m["by"], m["rollback"]) for m in moves] == [
        ("canary", 1, getpass.getuser(), False),
        ("champion", 1, "ops", True),
        ("champion", 2, getpass.getuser(), False),
        ("champion", 1, two[0], False),
    ]
    assert moves[0]["at"] >= moves[-1]["at"]
    assert len(cli("models", "history", "digits", "--alias", "canary", "--json").json) == 1
    words = cli("models", "history", "digits").out
    assert "rollback" in words
    assert two[0] in words
    trainer.train("flowers")
    assert "has had no alias" in cli("models", "history", "flowers").err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["promote", "digits"], "say which version"),
        (["promote", "digits@9"], "digits@9"),
        (["promote", "digits@1", "--alias", "7"], "alias"),
        (["promote", "digit@1"], "did you mean digits"),
        (["rollback", "digits"], "champion"),
        (["rollback", "digits", "--alias", "nope"], "nope"),
        (["history", "nope"], "nope"),
    ],
)
@pytest.mark.usefixtures("two")
def test_what_is_refused(cli: Cli, arguments: list[str], words: str) -> None:
    assert words in cli("models", *arguments, "--json", code=2).error["message"]


def test_recipes(cli: Cli, bare: Cli, trainer: Any, tmp_path: Path) -> None:
    assert [recipe["name"] for recipe in bare("models", "recipes", "--json").json] == sorted(READY)
    assert not (tmp_path / ".torchrelay").exists()
    schema = {"description": "Ours.", "properties": {"depth": {"type": "integer", "default": 3}}, "required": []}
    Registry(trainer.database).lane("ours", schema)
    lines = cli("models", "recipes").out.splitlines()
    assert any(line.split()[0] == "ours" and line.endswith("Ours.") for line in lines)
    words = cli("models", "recipes", "ours").out
    assert "--depth" in words
    assert "3" in words
    table = cli("models", "recipes", "tabular-classification").out
    assert "--learning-rate" in table
    assert "needed" in table
    shown = cli("models", "recipes", "regression", "--json").json
    assert shown["hyperparameters"]["properties"]["hidden"]["default"] == [64, 64]
    assert cli("models", "recipes", "nope", "--json", code=2).error["type"] == "RecipeNotFound"


@pytest.mark.usefixtures("two")
def test_versions_and_recipes_are_completed(
    sqlite_settings: Settings, trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # the embedded default of the repository's folder may hold models: `make demo`
    Registry(trainer.database).lane("tapestry", {})
    monkeypatch.setenv("TORCHRELAY_DATABASE", sqlite_settings.database_url)
    assert complete_version("dig") == ["digits"]
    assert complete_version("digits@") == ["digits@champion", "digits@2", "digits@1"]
    assert complete_version("digits@c") == ["digits@champion"]
    assert complete_recipe("ta") == ["tabular-classification", "tapestry"]
    monkeypatch.setenv("TORCHRELAY_DATABASE", "")
    assert complete_version("digits@") == []
    assert complete_recipe("ta") == ["tabular-classification"]
