"""Aliases: set, resolved, rolled back, with their history, on both databases."""

from __future__ import annotations

import threading

import pytest

from torchrelay_storage.aliases import AliasStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, ModelNotFound
from torchrelay_storage.registry import Registry


@pytest.fixture
def aliases(database: Database) -> AliasStore:
    for _ in range(4):
        Registry(database).register("digits", "h")
    Registry(database).register("other", "h")
    return AliasStore(database)


def test_an_alias_stands_for_a_version(database: Database, aliases: AliasStore) -> None:
    registry = Registry(database)
    aliases.set("digits", "champion", 2, by="ann")
    aliases.set("digits", "canary", 2)
    aliases.set("other", "champion", 1)
    found = registry.resolve("digits@champion")
    assert found == registry.resolve("digits@2")
    assert found.aliases == ("canary", "champion")
    assert registry.resolve("digits").aliases == ()
    aliases.set("digits", "champion", 3)
    assert registry.resolve("digits@champion").version == 3
    assert aliases.of("digits") == {"canary": 2, "champion": 3}
    assert [v.aliases for v in registry.versions("digits")] == [(), ("champion",), ("canary",), ()]


def test_the_history_says_what_was_live_when(aliases: AliasStore) -> None:
    aliases.set("digits", "champion", 1, by="ann")
    aliases.set("digits", "champion", 1, by="bob")  # nothing moved
    aliases.set("digits", "canary", 3)
    aliases.set("digits", "champion", 2, by="ann")
    aliases.rollback("digits", "champion", by="eve")
    aliases.remove("digits", "champion", by="ann")
    moves = aliases.history("digits", "champion")
    assert [(m.version, m.by, m.rollback) for m in moves] == [
        (None, "ann", False),
        (1, "eve", True),
        (2, "ann", False),
        (1, "ann", False),
    ]
    assert [m.at for m in moves] == sorted((m.at for m in moves), reverse=True)
    assert [m.alias for m in aliases.history("digits")] == ["champion", "champion", "champion", "canary", "champion"]
    assert aliases.history("other") == []
    assert aliases.of("digits") == {"canary": 3}


def test_a_second_rollback_goes_one_further_back(database: Database, aliases: AliasStore) -> None:
    for version in (1, 2, 3):
        aliases.set("digits", "champion", version)
    aliases.set("digits", "canary", 4)  # another alias's moves are its own
    assert aliases.rollback("digits", "champion") == 2
    assert Registry(database).resolve("digits@champion").version == 2
    assert aliases.rollback("digits", "champion") == 1
    with pytest.raises(InvalidInput, match="digits@1 is the first"):
        aliases.rollback("digits", "champion")
    assert aliases.of("digits") == {"canary": 4, "champion": 1}


def test_what_was_rolled_back_is_not_come_back_to(aliases: AliasStore) -> None:
    for version in (1, 2):
        aliases.set("digits", "champion", version)
    aliases.rollback("digits", "champion")
    aliases.set("digits", "champion", 3)
    assert aliases.rollback("digits", "champion") == 1


def test_a_version_that_came_back_is_left_for_what_was_between(aliases: AliasStore) -> None:
    for version in (1, 2, 1):
        aliases.set("digits", "champion", version)
    assert [aliases.rollback("digits", "champion") for _ in range(2)] == [2, 1]
    with pytest.raises(InvalidInput):
        aliases.rollback("digits", "champion")


def test_a_removed_alias_comes_back_by_a_rollback(aliases: AliasStore) -> None:
    for version in (1, 2):
        aliases.set("digits", "champion", version)
    aliases.remove("digits", "champion")
    assert aliases.of("digits") == {}
    assert [aliases.rollback("digits", "champion") for _ in range(2)] == [2, 1]
    with pytest.raises(InvalidInput, match="never stood for any"):
        aliases.rollback("digits", "canary")


@pytest.mark.parametrize("bad", ["", "3", "007", "Champion", "a b", "-x", "x" * 64, "a@b"])
def test_what_cannot_be_an_alias(aliases: AliasStore, bad: str) -> None:
    with pytest.raises(InvalidInput, match="alias"):
        aliases.set("digits", bad, 1)


def test_what_is_not_there_is_named(database: Database, aliases: AliasStore) -> None:
    Registry(database).lane("images", {})
    with pytest.raises(ModelNotFound, match="no version 9"):
        aliases.set("digits", "champion", 9)
    with pytest.raises(ModelNotFound, match="no alias 'champion'"):
        aliases.remove("digits", "champion")
    with pytest.raises(ModelNotFound, match="it has no aliases yet"):
        Registry(database).resolve("digits@champion")
    aliases.set("digits", "canary", 2)
    aliases.set("digits", "beta", 2)
    with pytest.raises(ModelNotFound, match="its aliases are: beta, canary"):
        Registry(database).resolve("digits@champion")
    for model in ("nobody", "train:images"):
        for call in (aliases.of, aliases.history):
            with pytest.raises(ModelNotFound, match=model):
                call(model)
        with pytest.raises(ModelNotFound, match=model):
            aliases.set(model, "champion", 1)
        with pytest.raises(ModelNotFound, match=model):
            aliases.rollback(model, "champion")
    assert {m.alias for m in aliases.history("digits")} == {"canary", "beta"}


def test_moves_at_once_are_all_in_the_history_in_their_order(aliases: AliasStore) -> None:
    barrier = threading.Barrier(4)

    def move(version: int) -> None:
        barrier.wait()
        aliases.set("digits", "champion", version)

    threads = [threading.Thread(target=move, args=(version,)) for version in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = aliases.history("digits")
    assert sorted(m.version or 0 for m in moves) == [1, 2, 3, 4]
    assert aliases.of("digits") == {"champion": moves[0].version}, "the last move is what is live"
