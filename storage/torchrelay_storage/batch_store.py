"""Batches: a row for the group, and counts that are sums over its chunks, so that no counter row is fought over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Connection, Row, text

from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import BatchNotFound
from torchrelay_storage.ids import Kind, draw, show
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.states import ChunkState


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch. `closed`: its end is written; until then more jobs may come."""

    id: int
    model: str
    version: int
    version_id: int
    tenant: str
    key: str | None
    priority: int
    paused: bool
    closed: bool
    metadata: Mapping[str, Any]
    created_at: float


@dataclass(frozen=True, slots=True)
class Counts:
    """How many jobs of a batch are in each state."""

    scheduled: int = 0
    queued: int = 0
    running: int = 0
    retrying: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    closed: bool = False

    @property
    def open(self) -> int:
        """Jobs that have not ended."""
        return self.scheduled + self.queued + self.running + self.retrying

    @property
    def ended(self) -> int:
        """Jobs in a terminal state."""
        return self.succeeded + self.failed + self.cancelled + self.expired

    @property
    def total(self) -> int:
        """All jobs stored so far."""
        return self.open + self.ended

    @property
    def done(self) -> bool:
        """Whether the batch's end is written and all its jobs have ended."""
        return self.closed and self.open == 0


@dataclass(frozen=True, slots=True)
class BatchChunk:
    """A chunk of a batch and how many of its jobs have ended."""

    id: int
    first: int
    last: int
    size: int
    ended: int
    state: ChunkState


_SELECT = """SELECT b.id, m.name AS model, v.version, b.version AS version_id, b.tenant, b.key, b.priority, b.paused,
    b.closed, b.metadata, b.created_at
    FROM batches b JOIN models m ON m.id = b.model JOIN model_versions v ON v.id = b.version"""


class BatchStore:
    """Batches and their counts."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(
        self,
        version: ModelVersion,
        options: Options,
        *,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        connection: Connection | None = None,
    ) -> BatchRow:
        """Open a batch, or return the one that has this key already, in whatever state it is."""
        statement = text("""
            INSERT INTO batches (id, model, version, tenant, key, priority, metadata, created_at)
            VALUES (:id, :model, :version, :tenant, :key, :priority, :metadata, :now) ON CONFLICT DO NOTHING
        """)
        batch = draw()

        def work(connection: Connection) -> BatchRow:
            row = {"id": batch, "model": version.model, "version": version.id, "tenant": options.tenant, "key": key,
                   "priority": options.priority, "metadata": orjson.dumps(dict(metadata or {})).decode(),
                   "now": self._db.clock(connection)}  # fmt: skip
            connection.execute(statement, row)
            if key is None:
                return _batch(connection.execute(text(f"{_SELECT} WHERE b.id = :id"), {"id": batch}).one())
            by_key = text(f"{_SELECT} WHERE b.tenant = :tenant AND b.model = :model AND b.key = :key")
            return _batch(connection.execute(by_key, row).one())

        return work(connection) if connection is not None else self._db.transact(work)

    def of_key(self, model: int, tenant: str, key: str) -> BatchRow | None:
        """Return the batch that a tenant submitted to this model under a key."""
        statement = text(f"{_SELECT} WHERE b.tenant = :tenant AND b.model = :model AND b.key = :key")
        scope = {"tenant": tenant, "model": model, "key": key}
        row = self._db.query(lambda connection: connection.execute(statement, scope).one_or_none())
        return _batch(row) if row is not None else None

    def get(self, batch: int) -> BatchRow:
        """Return a batch. Raises BatchNotFound."""
        statement = text(f"{_SELECT} WHERE b.id = :id")
        row = self._db.query(lambda connection: connection.execute(statement, {"id": batch}).one_or_none())
        if row is None:
            raise BatchNotFound(f"no batch has the id {show(Kind.BATCH, batch)}; it never existed, or was purged")
        return _batch(row)

    def page(self, *, limit: int = 50, before: int | None = None, model: str | None = None) -> list[BatchRow]:
        """Return the newest batches, at most `limit`; the next page goes on below the last id."""
        scope = " AND m.name = :model" if model is not None else ""
        statement = text(f"{_SELECT} WHERE b.id < :before{scope} ORDER BY b.id DESC LIMIT :limit")
        row = {"before": before if before is not None else 2**63 - 1, "limit": limit, "model": model}
        return [_batch(r) for r in self._db.query(lambda connection: connection.execute(statement, row).all())]

    def close(self, batch: int, connection: Connection | None = None) -> None:
        """Write the end of a batch: no more jobs will come."""
        statement = text("UPDATE batches SET closed = true WHERE id = :id")

        def work(connection: Connection) -> None:
            connection.execute(statement, {"id": batch})

        work(connection) if connection is not None else self._db.transact(work)

    def stored(self, batch: int) -> int:
        """Return how many inputs of a batch are stored: where a client that died goes on."""
        return self.counts(batch).total

    def counts(self, batch: int) -> Counts:
        """Return how many jobs are in each state. Raises BatchNotFound."""
        statement = text("""
            SELECT state, due, retrying, sum(size) AS size, sum(succeeded) AS succeeded, sum(failed) AS failed,
                   sum(cancelled) AS cancelled, sum(expired) AS expired
            FROM chunks WHERE batch = :batch GROUP BY state, due, retrying
        """)
        closed = text("SELECT closed FROM batches WHERE id = :batch")

        def work(connection: Connection) -> Counts | None:
            # The end first: a batch must not look done because its last jobs came between the two reads.
            end = connection.execute(closed, {"batch": batch}).scalar()
            if end is None:
                return None
            sums = dict.fromkeys(("scheduled", "queued", "running", "retrying", *_ENDS), 0)
            for row in connection.execute(statement, {"batch": batch}):
                for name in _ENDS:
                    sums[name] += int(getattr(row, name))
                sums[_open_state(row)] += int(row.size) - sum(int(getattr(row, name)) for name in _ENDS)
            return Counts(**sums, closed=bool(end))

        counts = self._db.query(work)
        if counts is None:
            raise BatchNotFound(f"no batch has the id {show(Kind.BATCH, batch)}; it never existed, or was purged")
        return counts

    def chunks(self, batch: int) -> list[BatchChunk]:
        """Return a batch's chunks in the order of their first job."""
        statement = text("""
            SELECT id, first_id, last_id, size, succeeded + failed + cancelled + expired AS ended, state
            FROM chunks WHERE batch = :batch ORDER BY first_id, id
        """)

        def work(connection: Connection) -> list[BatchChunk]:
            rows = connection.execute(statement, {"batch": batch})
            return [BatchChunk(i, f, la, n, int(e), ChunkState(s)) for i, f, la, n, e, s in rows]

        return self._db.query(work)

    def pause(self, batch: int) -> None:
        """Let nothing of this batch be claimed until `resume`. Raises BatchNotFound."""
        self._set_paused(batch, paused=True)

    def resume(self, batch: int) -> None:
        """End a pause. Raises BatchNotFound."""
        self._set_paused(batch, paused=False)
        ChunkStore(self._db).recall(batch=batch)

    def _set_paused(self, batch: int, *, paused: bool) -> None:
        self.get(batch)
        statement = text("UPDATE batches SET paused = :paused WHERE id = :id")
        self._db.transact(lambda connection: connection.execute(statement, {"id": batch, "paused": paused}))


_ENDS = ("succeeded", "failed", "cancelled", "expired")


def _open_state(row: Row[Any]) -> str:
    if row.state == ChunkState.CLAIMED:
        return "running"
    if row.retrying:
        return "retrying"
    return "queued" if row.due else "scheduled"


def _batch(row: Row[Any]) -> BatchRow:
    fields = dict(row._mapping)
    return BatchRow(**{**fields, "metadata": orjson.loads(row.metadata), "paused": bool(row.paused),
                       "closed": bool(row.closed)})  # fmt: skip
