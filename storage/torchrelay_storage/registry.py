"""Models: a name, its versions (a handler and pinned weights), and whether it is paused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Connection, Row, text

from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, ModelNotFound
from torchrelay_storage.settle import MAX_CHUNK

DEFAULT_CHUNK_SIZE = 256  # until a worker has loaded the model and knows better
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a model.

    Attributes:
        id: of this version; `model` is the id of the name.
        handler: the name under which workers find the Python class.
        weights: URI in the artifact store, with the sha256 that is checked at each load.
        config: the handler's own settings.
        chunk_size: how many jobs travel together.
    """

    id: int
    model: int
    name: str
    version: int
    handler: str
    weights: str | None
    sha256: str | None
    config: Mapping[str, Any]
    chunk_size: int
    paused: bool
    created_at: float

    @property
    def ref(self) -> str:
        """The version as users write it: `digits@3`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model with its newest version, and how much of it waits or runs now."""

    newest: ModelVersion
    versions: int
    waiting: int  # open jobs that no worker holds
    running: int


_COLUMNS = """v.id, v.model, m.name, v.version, v.handler, v.weights, v.sha256, v.config, v.chunk_size, m.paused,
    v.created_at"""
_FROM = "FROM model_versions v JOIN models m ON m.id = v.model"


class Registry:
    """Models and their versions."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def register(
        self,
        name: str,
        handler: str,
        *,
        weights: str | None = None,
        sha256: str | None = None,
        config: Mapping[str, Any] | None = None,
        chunk_size: int | None = None,
    ) -> ModelVersion:
        """Add the next version of a model; the first makes the name.

        Raises:
            InvalidInput: a name that is no name, a chunk size out of range, a config that is not JSON.
        """
        if not NAME.fullmatch(name):
            raise InvalidInput(f"a model's name has 1 to 63 characters of a-z, 0-9, '.', '_', '-', not {name!r}")
        if chunk_size is not None and not 1 <= chunk_size <= MAX_CHUNK:
            raise InvalidInput(f"chunk_size must be from 1 to {MAX_CHUNK}, not {chunk_size}")
        try:
            config_json = orjson.dumps(dict(config or {})).decode()
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"the config of model {name!r} is not JSON: {error}") from error

        def work(connection: Connection) -> int:
            now = self._db.clock(connection)
            connection.execute(
                text("INSERT INTO models (name, created_at) VALUES (:name, :now) ON CONFLICT DO NOTHING"),
                {"name": name, "now": now},
            )
            model = connection.execute(
                text(f"SELECT id FROM models WHERE name = :name {self._db.dialect.lock}"), {"name": name}
            ).scalar_one()
            statement = text("""
                INSERT INTO model_versions (model, version, handler, weights, sha256, config, chunk_size, created_at)
                SELECT :model, COALESCE(max(version), 0) + 1, :handler, :weights, :sha256, :config, :chunk_size, :now
                FROM model_versions WHERE model = :model RETURNING id
            """)
            row = {"model": model, "handler": handler, "weights": weights, "sha256": sha256, "config": config_json,
                   "chunk_size": chunk_size or DEFAULT_CHUNK_SIZE, "now": now}  # fmt: skip
            return int(connection.execute(statement, row).scalar_one())

        return self.version(self._db.transact(work))

    def resolve(self, ref: str) -> ModelVersion:
        """Return the version that `digits` (the newest) or `digits@3` stands for.

        Raises:
            ModelNotFound: it names the registered models that come near.
        """
        name, at, number = ref.partition("@")
        if at and not number.isdecimal():
            raise ModelNotFound(f"{ref!r}: a version is a number, as in {name}@1")
        newest = "" if at else "ORDER BY v.version DESC LIMIT 1"
        wanted = "AND v.version = :version" if at else ""
        statement = text(f"SELECT {_COLUMNS} {_FROM} WHERE m.name = :name {wanted} {newest}")

        def work(connection: Connection) -> ModelVersion:
            parameters = {"name": name, **({"version": int(number)} if at else {})}
            row = connection.execute(statement, parameters).one_or_none()
            if row is None:
                raise ModelNotFound(_not_found(connection, ref, name))
            return _version(row)

        return self._db.query(work)

    def version(self, number: int) -> ModelVersion:
        """Return a version by its id. Raises ModelNotFound."""
        statement = text(f"SELECT {_COLUMNS} {_FROM} WHERE v.id = :id")
        row = self._db.query(lambda connection: connection.execute(statement, {"id": number}).one_or_none())
        if row is None:
            raise ModelNotFound(f"no model version has the id {number}")
        return _version(row)

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """Return the versions of a model, or of all, the newest of each name first."""
        statement = text(
            f"SELECT {_COLUMNS} {_FROM} {'WHERE m.name = :name' if name else ''} ORDER BY m.name, v.version DESC"
        )
        rows: Sequence[Row[Any]] = self._db.query(
            lambda connection: connection.execute(statement, {"name": name} if name else {}).all()
        )
        return [_version(row) for row in rows]

    def models(self) -> list[ModelRow]:
        """Return each model with its newest version and its load."""
        statement = text("""
            SELECT c.model, sum(CASE WHEN c.state < 2 THEN c.size - ended ELSE 0 END) AS waiting,
                   sum(CASE WHEN c.state = 2 THEN c.size - ended ELSE 0 END) AS running
            FROM (SELECT model, state, size, succeeded + failed + cancelled + expired AS ended
                  FROM chunks WHERE state < 3) c GROUP BY c.model
        """)
        load = {r.model: r for r in self._db.query(lambda connection: connection.execute(statement).all())}
        found: dict[int, list[ModelVersion]] = {}
        for version in self.versions():
            found.setdefault(version.model, []).append(version)
        return [
            ModelRow(
                newest=versions[0],
                versions=len(versions),
                waiting=int(load[model].waiting) if model in load else 0,
                running=int(load[model].running) if model in load else 0,
            )
            for model, versions in found.items()
        ]

    def set_chunk_size(self, version: int, chunk_size: int) -> None:
        """Record how many jobs of this version should travel together, as a worker has measured it."""
        statement = text("UPDATE model_versions SET chunk_size = :n WHERE id = :id AND chunk_size <> :n")
        row = {"id": version, "n": max(1, min(chunk_size, MAX_CHUNK))}
        self._db.transact(lambda connection: connection.execute(statement, row))

    def pause(self, name: str) -> None:
        """Let nothing of this model be claimed until `resume`. Raises ModelNotFound."""
        self._set_paused(name, paused=True)

    def resume(self, name: str) -> None:
        """End a pause. Raises ModelNotFound."""
        ChunkStore(self._db).recall(model=self._set_paused(name, paused=False))

    def _set_paused(self, name: str, *, paused: bool) -> int:
        model = self.resolve(name).model
        statement = text("UPDATE models SET paused = :paused WHERE id = :id")
        self._db.transact(lambda connection: connection.execute(statement, {"id": model, "paused": paused}))
        return model


def _version(row: Row[Any]) -> ModelVersion:
    fields = dict(row._mapping)
    return ModelVersion(**{**fields, "config": orjson.loads(row.config), "paused": bool(row.paused)})


def _not_found(connection: Connection, ref: str, name: str) -> str:
    names = list(connection.execute(text("SELECT name FROM models ORDER BY name")).scalars())
    if name in names:
        newest = connection.execute(
            text("SELECT max(v.version) FROM model_versions v JOIN models m ON m.id = v.model WHERE m.name = :name"),
            {"name": name},
        ).scalar()
        return f"model {name!r} has no such version: {ref}; its newest is {name}@{newest}"
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"registered are: {', '.join(names) or 'none yet'}"
    return f"no model is registered as {name!r}; {hint} (`torchrelay models register` adds one)"
