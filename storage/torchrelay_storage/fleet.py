"""Who works: one row an incarnation of a worker, beating on the database's clock; and leases, held by one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Connection, text

from torchrelay_storage.database import Database
from torchrelay_storage.ids import draw


@dataclass(frozen=True, slots=True)
class Worker:
    """An incarnation: a process that starts anew under the same name is another one."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """What is known of a worker.

    Attributes:
        models: the names it serves; None: all.
        alive: it has beaten lately and is not stopped.
        stats: what it reports of itself, such as `{"rates": {"digits": 12.5}}` (chunks per second).
    """

    id: int
    name: str
    host: str
    pid: int
    device: str
    models: tuple[str, ...] | None
    stats: Mapping[str, Any]
    started_at: float
    beat_at: float
    stopped_at: float | None
    alive: bool
    beat_age: float  # seconds since the last beat
    ended: str | None = None  # how it ended, where that is known


class Fleet:
    """Workers' rows and leases."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._now = database.dialect.now

    def register(self, name: str, *, host: str, pid: int, device: str, models: Sequence[str] | None = None) -> Worker:
        """Add an incarnation, alive from now."""
        statement = text(f"""
            INSERT INTO workers (id, name, host, pid, device, models, started_at, beat_at)
            VALUES (:id, :name, :host, :pid, :device, :models, {self._now}, {self._now}) ON CONFLICT (id) DO NOTHING
        """)
        worker = Worker(draw(), name)
        row = {"id": worker.id, "name": name, "host": host, "pid": pid, "device": device,
               "models": orjson.dumps(list(models)).decode() if models is not None else None}  # fmt: skip
        self._db.transact(lambda connection: connection.execute(statement, row))
        return worker

    def beat(self, worker: int, stats: Mapping[str, Any] | None = None) -> bool:
        """Say that a worker lives.

        Returns:
            False: its row is gone or stopped; it holds nothing any more and must register anew.
        """
        keep = ", stats = :stats" if stats is not None else ""
        statement = text(f"UPDATE workers SET beat_at = {self._now}{keep} WHERE id = :id AND stopped_at IS NULL")
        row: dict[str, Any] = {"id": worker}
        if stats is not None:
            row["stats"] = orjson.dumps(dict(stats)).decode()
        return self._db.transact(lambda connection: connection.execute(statement, row).rowcount == 1)

    def stop(self, worker: int, ended: str | None = None) -> None:
        """Say that a worker has ended, and how: what it may still hold is rescued at once."""
        statement = text(f"""
            UPDATE workers SET stopped_at = {self._now}, ended = :ended WHERE id = :id AND stopped_at IS NULL
        """)
        self._db.transact(lambda connection: connection.execute(statement, {"id": worker, "ended": ended}))

    def serves(self, worker: int, version: int, revision: str) -> None:
        """Record which revision of its handler a worker runs a model version with: it tells what computed a result."""
        statement = text(f"""
            INSERT INTO served (worker, version, revision, at) VALUES (:worker, :version, :revision, {self._now})
            ON CONFLICT (worker, version) DO UPDATE SET revision = excluded.revision, at = excluded.at
        """)
        row = {"worker": worker, "version": version, "revision": revision}
        self._db.transact(lambda connection: connection.execute(statement, row))

    def workers(self, stale_after: float, *, ended: bool = True) -> list[WorkerRow]:
        """Return all incarnations on record, the newest first; without those that have `ended`, if wanted."""
        statement = text(f"""
            SELECT id, name, host, pid, device, models, stats, started_at, beat_at, stopped_at, ended,
                   {self._now} AS now FROM workers
            {"" if ended else "WHERE stopped_at IS NULL"} ORDER BY id DESC
        """)

        def work(connection: Connection) -> list[WorkerRow]:
            return [
                WorkerRow(
                    id=r.id, name=r.name, host=r.host, pid=r.pid, device=r.device,
                    models=tuple(orjson.loads(r.models)) if r.models is not None else None,
                    stats=orjson.loads(r.stats), started_at=r.started_at, beat_at=r.beat_at, stopped_at=r.stopped_at,
                    alive=r.stopped_at is None and r.now - r.beat_at < stale_after,
                    beat_age=max(0.0, r.now - r.beat_at), ended=r.ended,
                )
                for r in connection.execute(statement)
            ]  # fmt: skip

        return self._db.query(work)

    def forget(self, older_than: float) -> int:
        """Delete the rows of workers that ended or fell silent more than `older_than` seconds ago and hold nothing."""
        statement = text(f"""
            DELETE FROM workers WHERE COALESCE(stopped_at, beat_at) < {self._now} - :older_than
              AND NOT EXISTS (SELECT 1 FROM chunks c WHERE c.state = 2 AND c.worker = workers.id)
        """)
        unserve = text("DELETE FROM served WHERE NOT EXISTS (SELECT 1 FROM workers w WHERE w.id = served.worker)")

        def work(connection: Connection) -> int:
            gone = connection.execute(statement, {"older_than": older_than}).rowcount
            if gone:
                connection.execute(unserve)
            return gone

        return self._db.transact(work)

    # --- leases -------------------------------------------------------------------------------------------

    def acquire(self, lease: str, holder: int, seconds: float) -> bool:
        """Take or renew a lease for `seconds`; False: somebody else holds it."""
        # `excluded` knows when the statement began: who then waited for another's must not find it run out meanwhile.
        statement = text(f"""
            INSERT INTO leases (name, holder, expires_at) VALUES (:name, :holder, {self._now} + :seconds)
            ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
            WHERE leases.holder = excluded.holder OR leases.expires_at < excluded.expires_at - :seconds
        """)
        row = {"name": lease, "holder": holder, "seconds": seconds}
        return self._db.transact(lambda connection: connection.execute(statement, row).rowcount == 1)

    def release(self, lease: str, holder: int) -> None:
        """Give a lease back, if it is held."""
        statement = text("DELETE FROM leases WHERE name = :name AND holder = :holder")
        self._db.transact(lambda connection: connection.execute(statement, {"name": lease, "holder": holder}))
