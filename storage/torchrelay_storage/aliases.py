"""Aliases: names such as `champion` that stand for a version of a model, moved without restarting a worker.

Each move is written down: which version was live when. Not here: what an alias stands for in a submit
(`Registry.resolve`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, ModelNotFound
from torchrelay_storage.registry import NAME


@dataclass(frozen=True, slots=True)
class AliasMove:
    """What an alias stood for from a time on.

    Attributes:
        version: the number of the version; None: the alias was removed.
        at: on the database's clock.
        by: who moved it, as they called themselves; the shown id of a run that promoted what it trained.
        rollback: it went back to what was live before.
    """

    alias: str
    version: int | None
    at: float
    by: str
    rollback: bool = False


_SET = text("""
    INSERT INTO aliases (model, alias, version) VALUES (:model, :alias, :version)
    ON CONFLICT (model, alias) DO UPDATE SET version = excluded.version
""")
_REMOVE = text("DELETE FROM aliases WHERE model = :model AND alias = :alias")
_PRESENT = text("SELECT version FROM aliases WHERE model = :model AND alias = :alias")
_NOTE = text("""
    INSERT INTO alias_moves (model, alias, version, rollback, at, by)
    VALUES (:model, :alias, CAST(:version AS INTEGER), CAST(:rollback AS BOOLEAN), :at, :by)
""")
_MOVED = text("""
    SELECT 1 FROM alias_moves a JOIN models m ON m.id = a.model
    WHERE m.name = :model AND a.alias = :alias AND a.at = :at AND a.rollback
""")
_MOVES = "SELECT alias, version, at, by, rollback FROM alias_moves WHERE model = :model"


def check_alias(alias: str) -> None:
    """Raise InvalidInput for what cannot be an alias."""
    if not NAME.fullmatch(alias) or alias.isdecimal():
        raise InvalidInput(
            f"an alias has 1 to 63 characters of a-z, 0-9, '.', '_', '-', and is no number, not {alias!r}"
        )


class AliasStore:
    """The aliases of models. Two moves of one model's aliases wait for each other."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def set(self, model: str, alias: str, version: int, by: str = "") -> None:
        """Let an alias stand for a version, given by its number, from now on.

        Raises:
            InvalidInput: it cannot be an alias.
            ModelNotFound: there is no such model, or no such version of it.
        """
        check_alias(alias)

        def work(connection: Connection) -> None:
            number = self._lock(connection, model)
            there = text("SELECT 1 FROM model_versions WHERE model = :model AND version = :version")
            if connection.execute(there, {"model": number, "version": version}).scalar() is None:
                raise ModelNotFound(f"model {model!r} has no version {version}: {alias} was not moved")
            self.move(connection, number, alias, version, by)

        self._db.transact(work)

    def move(self, connection: Connection, model: int, alias: str, version: int, by: str) -> None:
        """The same inside a transaction that holds the model's lock; `model` is its id. The version exists."""
        if self._present(connection, model, alias) != version:
            connection.execute(_SET, {"model": model, "alias": alias, "version": version})
            self._note(connection, model, alias, version, by)

    def remove(self, model: str, alias: str, by: str = "") -> None:
        """Let an alias stand for nothing. Raises ModelNotFound: there is no such model, or no such alias of it."""

        def work(connection: Connection) -> None:
            number = self._lock(connection, model)
            if connection.execute(_REMOVE, {"model": number, "alias": alias}).rowcount == 0:
                raise ModelNotFound(f"model {model!r} has no alias {alias!r}")
            self._note(connection, number, alias, None, by)

        def is_done(connection: Connection, _: None) -> bool:
            return self._present(connection, self._find(connection, model), alias) is None

        self._db.transact(work, is_done)

    def of(self, model: str) -> dict[str, int]:
        """Return what the aliases of a model stand for: alias -> number of the version. Raises ModelNotFound."""
        statement = text("SELECT alias, version FROM aliases WHERE model = :model ORDER BY alias")

        def work(connection: Connection) -> dict[str, int]:
            number = self._find(connection, model)
            return {row.alias: row.version for row in connection.execute(statement, {"model": number})}

        return self._db.query(work)

    def history(self, model: str, alias: str | None = None) -> list[AliasMove]:
        """Return the moves of a model's aliases, or of one, newest first. Raises ModelNotFound."""
        statement = text(f"{_MOVES}{' AND alias = :alias' if alias is not None else ''} ORDER BY id DESC")

        def work(connection: Connection) -> list[AliasMove]:
            row = {"model": self._find(connection, model), "alias": alias}
            return [
                AliasMove(r.alias, r.version, r.at, r.by, bool(r.rollback)) for r in connection.execute(statement, row)
            ]

        return self._db.query(work)

    def rollback(self, model: str, alias: str, by: str = "") -> int:
        """Let an alias stand for the version that was live before, and return its number.

        A rollback undoes a move, so that the next one goes one further back: after 1, 2, 3 the first leads to 2 and
        the second to 1. A version that was rolled back is not come back to: after 1, 2, a rollback and 3, to 1.

        Raises:
            InvalidInput: no other version was live before.
            ModelNotFound: there is no such model.
        """
        statement = text(f"{_MOVES} AND alias = :alias ORDER BY id")

        def work(connection: Connection) -> tuple[int, float]:
            number = self._lock(connection, model)
            present = self._present(connection, number, alias)
            before = _before(list(connection.execute(statement, {"model": number, "alias": alias})), present)
            if before is None:
                now = f"{model}@{present} is the first" if present is not None else "it never stood for any"
                raise InvalidInput(f"alias {alias!r} of model {model!r} has no version to go back to: {now}")
            connection.execute(_SET, {"model": number, "alias": alias, "version": before})
            return before, self._note(connection, number, alias, before, by, rollback=True)

        def is_done(connection: Connection, result: tuple[int, float]) -> bool:
            row = {"model": model, "alias": alias, "at": result[1]}
            return connection.execute(_MOVED, row).first() is not None

        return self._db.transact(work, is_done)[0]

    def _lock(self, connection: Connection, model: str) -> int:
        return self._find(connection, model, self._db.dialect.lock)

    def _find(self, connection: Connection, model: str, lock: str = "") -> int:
        statement = text(f"SELECT id FROM models WHERE name = :name AND NOT training {lock}")
        number = connection.execute(statement, {"name": model}).scalar()
        if number is None:
            raise ModelNotFound(f"no model is registered as {model!r}; `torchrelay models` lists them")
        return int(number)

    def _present(self, connection: Connection, model: int, alias: str) -> int | None:
        found: int | None = connection.execute(_PRESENT, {"model": model, "alias": alias}).scalar()
        return found

    def _note(
        self, connection: Connection, model: int, alias: str, version: int | None, by: str, *, rollback: bool = False
    ) -> float:
        now = self._db.clock(connection)
        row = {"model": model, "alias": alias, "version": version, "rollback": rollback, "by": by, "at": now}
        connection.execute(_NOTE, row)
        return now


def _before(moves: Sequence[Row[Any]], present: int | None) -> int | None:
    """Return the version that was live before the present one, if `moves`, oldest first, have one.

    What is not undone is a stack: a move puts its version on top, a rollback takes off what lies above its version.
    """
    live: list[int | None] = []
    for move in moves:
        if move.rollback:
            while live and live[-1] != move.version:
                live.pop()
        else:
            live.append(move.version)
    while live and live[-1] in (present, None):
        live.pop()
    return live[-1] if live else None
