"""Models: a name, its versions (a handler and pinned weights), and whether it is paused.

A recipe's lane, whose jobs are training runs, is a model too, hidden from who asks for models. Not here: who moves an
alias (`aliases`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from sqlalchemy import Connection, Row, text

from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, ModelNotFound
from torchrelay_storage.ids import LARGEST
from torchrelay_storage.settle import MAX_CHUNK

DEFAULT_CHUNK_SIZE = 256  # until a worker has loaded the model and knows better
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MOST_QUEUED = 2**31 - 1
LANE = "train:"  # a recipe's lane is a model of this name, which no user can register


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a model.

    Attributes:
        id: of this version; `model` is the id of the name.
        handler: the name under which workers find the Python class.
        weights: URI in the artifact store, with the sha256 that is checked at each load.
        config: the handler's own settings.
        chunk_size: how many jobs travel together.
        metrics: what the run that trained it measured.
        lineage: what it came from: dataset, code, hyperparameters.
        run: the id of the job that trained it.
        aliases: that stand for it now.
        max_queued: how many jobs of the model may wait; None: any number.
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
    metrics: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    run: int | None = None
    aliases: tuple[str, ...] = ()
    max_queued: int | None = None

    @property
    def ref(self) -> str:
        """The version as users write it: `digits@3`."""
        return f"{self.name}@{self.version}"

    @property
    def recipe(self) -> str | None:
        """The recipe whose lane this is: its jobs are training runs, its config their hyperparameters' JSON Schema."""
        return self.handler if self.name.startswith(LANE) else None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model with its newest version, and how much of it waits or runs now."""

    newest: ModelVersion
    versions: int
    waiting: int  # open jobs that no worker holds
    running: int


_THERE = text("SELECT 1 FROM model_versions WHERE id = :id")
_FROM = "FROM model_versions v JOIN models m ON m.id = v.model"


def check_name(name: str, noun: str = "model") -> None:
    """Raise InvalidInput for what cannot be a name."""
    if not NAME.fullmatch(name):
        raise InvalidInput(f"a {noun}'s name has 1 to 63 characters of a-z, 0-9, '.', '_', '-', not {name!r}")


def json_text(document: Mapping[str, Any], what: str) -> str:
    """Return a document as JSON; `what` names it. Raises InvalidInput."""
    try:
        return orjson.dumps(dict(document), option=orjson.OPT_SERIALIZE_NUMPY).decode()
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{what} is not JSON: {error}") from error


def add_version(
    database: Database,
    connection: Connection,
    name: str,
    handler: str,
    *,
    config: str,
    weights: str | None = None,
    sha256: str | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    metrics: str = "{}",
    lineage: str = "{}",
    run: int | None = None,
    lane: bool = False,
) -> tuple[int, int, int]:
    """Add the next version of a model in the caller's transaction; the first makes the name. The texts are JSON.

    Two at once get two numbers: the second waits for the first to commit.

    Returns:
        The ids of the version and of the model, and the version's number.
    """
    now = database.clock(connection)
    model = lock_model(database, connection, name, now, lane=lane)
    statement = text("""
        INSERT INTO model_versions (model, version, handler, weights, sha256, config, chunk_size, metrics, lineage, run,
                                    created_at)
        SELECT :model, COALESCE(max(version), 0) + 1, :handler, :weights, :sha256, :config, :chunk_size, :metrics,
               :lineage, CAST(:run AS BIGINT), :now
        FROM model_versions WHERE model = :model RETURNING id, version
    """)
    row = {"model": model, "handler": handler, "weights": weights, "sha256": sha256, "config": config,
           "chunk_size": chunk_size, "metrics": metrics, "lineage": lineage, "run": run, "now": now}  # fmt: skip
    added = connection.execute(statement, row).one()
    return int(added.id), model, int(added.version)


def lock_model(database: Database, connection: Connection, name: str, now: float, *, lane: bool = False) -> int:
    """Lock a model's row, which is made where there is none, and return its id."""
    connection.execute(
        text("INSERT INTO models (name, training, created_at) VALUES (:name, CAST(:lane AS BOOLEAN), :now) "
             "ON CONFLICT DO NOTHING"),
        {"name": name, "lane": lane, "now": now},
    )  # fmt: skip
    locked = text(f"SELECT id FROM models WHERE name = :name {database.dialect.lock}")
    return int(connection.execute(locked, {"name": name}).scalar_one())


class Registry:
    """Models and their versions."""

    def __init__(self, database: Database) -> None:
        self._db = database
        aliases = database.dialect.joined.format("a.alias")
        self._select = f"""SELECT v.id, v.model, m.name, v.version, v.handler, v.weights, v.sha256, v.config,
            v.chunk_size, m.paused, v.created_at, v.metrics, v.lineage, v.run, m.max_queued,
            (SELECT {aliases} FROM aliases a WHERE a.model = v.model AND a.version = v.version) AS aliases {_FROM}"""

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
        check_name(name)
        if chunk_size is not None and not 1 <= chunk_size <= MAX_CHUNK:
            raise InvalidInput(f"chunk_size must be from 1 to {MAX_CHUNK}, not {chunk_size}")
        config_json = json_text(config or {}, f"the config of model {name!r}")

        def work(connection: Connection) -> int:
            number, _, _ = add_version(
                self._db, connection, name, handler, config=config_json, weights=weights, sha256=sha256,
                chunk_size=chunk_size or DEFAULT_CHUNK_SIZE,
            )  # fmt: skip
            return number

        def is_done(connection: Connection, number: int) -> bool:
            return connection.execute(_THERE, {"id": number}).first() is not None

        return self.version(self._db.transact(work, is_done))

    def resolve(self, ref: str) -> ModelVersion:
        """Return the version that `digits` (the newest), `digits@3` or `digits@champion` (an alias) stands for.

        Raises:
            ModelNotFound: it names the registered models that come near, or the aliases that there are.
        """
        name, at, which = ref.partition("@")
        if not at:
            wanted = "ORDER BY v.version DESC LIMIT 1"
        elif which.isdecimal():
            wanted = "AND v.version = :version"
        else:
            wanted = "AND v.version = (SELECT version FROM aliases WHERE model = m.id AND alias = :alias)"
        statement = text(f"{self._select} WHERE m.name = :name AND NOT m.training {wanted}")
        parameters = {"name": name, "alias": which, "version": min(int(which), LARGEST) if which.isdecimal() else 0}

        def work(connection: Connection) -> ModelVersion:
            row = connection.execute(statement, parameters).one_or_none()
            if row is None:
                raise ModelNotFound(_not_found(connection, ref))
            return _version(row)

        return self._db.query(work)

    def version(self, number: int) -> ModelVersion:
        """Return a version, or a lane's, by its id. Raises ModelNotFound."""
        return self._db.query(lambda connection: self.read(connection, number))

    def read(self, connection: Connection, number: int) -> ModelVersion:
        """The same inside a transaction."""
        row = connection.execute(text(f"{self._select} WHERE v.id = :id"), {"id": number}).one_or_none()
        if row is None:
            raise ModelNotFound(f"no model version has the id {number}")
        return _version(row)

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """Return the versions of a model, or of all, the newest of each name first."""
        scope = "AND m.name = :name" if name else ""
        statement = text(f"{self._select} WHERE NOT m.training {scope} ORDER BY m.name, v.version DESC")
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

    def lane(self, recipe: str, schema: Mapping[str, Any], connection: Connection | None = None) -> ModelVersion:
        """Return a recipe's lane, which is made where there is none.

        Args:
            schema: the JSON Schema of its hyperparameters, which clients check them by; a changed one is recorded.
            connection: the caller's own; a lane that is made then exists if and only if the caller commits.

        Raises:
            InvalidInput: a name that is none for a recipe, or a schema that is not JSON.
        """
        check_name(recipe, "recipe")
        config = json_text(schema, f"the schema of recipe {recipe!r}")
        found = self.find_lane(recipe)
        if found is not None and found.config == orjson.loads(config):
            return found
        name = LANE + recipe

        def work(connection: Connection) -> int:
            model = lock_model(self._db, connection, name, self._db.clock(connection), lane=True)
            renew = text("UPDATE model_versions SET config = :config WHERE model = :model RETURNING id")
            number = connection.execute(renew, {"config": config, "model": model}).scalar()
            if number is None:
                number, _, _ = add_version(self._db, connection, name, recipe, config=config, chunk_size=1, lane=True)
            return int(number)

        if connection is not None:
            return self.read(connection, work(connection))
        return self.version(self._db.transact(work))

    def find_lane(self, recipe: str) -> ModelVersion | None:
        """Return the lane of a recipe, or None where no worker has ever served it."""
        return next((lane for lane in self.lanes() if lane.recipe == recipe), None)

    def lanes(self) -> list[ModelVersion]:
        """Return the lanes of all recipes that a worker has ever served, by name."""
        statement = text(f"{self._select} WHERE m.training ORDER BY m.name")
        return [_version(row) for row in self._db.query(lambda connection: connection.execute(statement).all())]

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

    def limit(self, name: str, max_queued: int | None) -> None:
        """Set how many jobs of a model may wait before submits are refused; None: any number.

        Raises:
            InvalidInput: it is no whole number from 0 up.
            ModelNotFound: there is no such model.
        """
        whole = isinstance(max_queued, int) and not isinstance(max_queued, bool)
        if max_queued is not None and not (whole and 0 <= max_queued <= MOST_QUEUED):
            raise InvalidInput(
                f"a limit is a whole number of jobs from 0 to {MOST_QUEUED}, or none, not {max_queued!r}"
            )
        row = {"id": self.resolve(name).model, "n": max_queued}
        statement = text("UPDATE models SET max_queued = :n WHERE id = :id")
        self._db.transact(lambda connection: connection.execute(statement, row))

    def _set_paused(self, name: str, *, paused: bool) -> int:
        model = self.resolve(name).model
        statement = text("UPDATE models SET paused = :paused WHERE id = :id")
        self._db.transact(lambda connection: connection.execute(statement, {"id": model, "paused": paused}))
        return model


def _version(row: Row[Any]) -> ModelVersion:
    read = {name: orjson.loads(getattr(row, name)) for name in ("config", "metrics", "lineage")}
    aliases = tuple(sorted(row.aliases.split(","))) if row.aliases else ()
    return ModelVersion(**{**row._mapping, **read, "paused": bool(row.paused), "aliases": aliases})


def _not_found(connection: Connection, ref: str) -> str:
    name, _, which = ref.partition("@")
    names = list(connection.execute(text("SELECT name FROM models WHERE NOT training ORDER BY name")).scalars())
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"registered are: {', '.join(names) or 'none yet'}"
        return f"no model is registered as {name!r}; {hint} (`torchrelay models register` adds one)"
    if which.isdecimal():
        newest = text(
            "SELECT max(v.version) FROM model_versions v JOIN models m ON m.id = v.model WHERE m.name = :name"
        )
        number = connection.execute(newest, {"name": name}).scalar()
        return f"model {name!r} has no such version: {ref}; its newest is {name}@{number}"
    statement = text("SELECT a.alias FROM aliases a JOIN models m ON m.id = a.model WHERE m.name = :name ORDER BY 1")
    aliases = list(connection.execute(statement, {"name": name}).scalars())
    there = f"its aliases are: {', '.join(aliases)}" if aliases else "it has no aliases yet"
    return f"model {name!r} has no alias {which!r}: {ref}; {there}; a version is a number, as in {name}@1"
