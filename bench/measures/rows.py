"""Many ended jobs, made in SQL at the databases' own speed: what a table looks like after months, in seconds.

Batches of a thousand jobs, a chunk each, all succeeded an hour ago, with ids that are a day old and a worker's row that
has stopped. Through the schema that the migrations made, and none of the stores.
"""

from __future__ import annotations

import time

from sqlalchemy import Connection, text

from torchrelay_storage import ids
from torchrelay_storage.database import Database

CHUNK = 1_000  # jobs of a chunk and of a batch
DAY = 86_400


def fill(database: Database, version: int, model: int, rows: int) -> None:
    """Insert so many ended jobs of a model version."""
    first = (int((time.time() - DAY) * 1000) - ids.EPOCH_MS) << ids.RANDOM_BITS
    scope = {
        "first": first, "rows": rows, "size": CHUNK, "batches": -(-rows // CHUNK), "version": version, "model": model,
        "worker": first, "now": time.time() - 3600,
    }  # fmt: skip
    with database.write() as connection:
        for statement in (_WORKER, _BATCHES, _CHUNKS, _JOBS):
            connection.execute(text(_series(statement, database.is_sqlite)), scope)
    _tidy(database)


def batches(database: Database) -> list[int]:
    """Return the ids of the batches that `fill` made: each is also the id of its chunk and of its first job."""
    statement = text("SELECT b.id FROM batches b JOIN chunks c ON c.id = b.id")
    return list(database.query(lambda connection: connection.execute(statement).scalars().all()))


def _series(statement: str, is_sqlite: bool) -> str:
    """Write `{series:N}` as each database counts from 0 to N - 1."""
    for name in ("batches", "rows"):
        if is_sqlite:
            series = (f"(WITH RECURSIVE s (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM s WHERE i + 1 < :{name}) "
                      "SELECT i FROM s)")  # fmt: skip
        else:
            series = f"(SELECT i FROM generate_series(0, CAST(:{name} AS bigint) - 1) AS s (i))"
        statement = statement.replace(f"{{{name}}}", series)
    stored = "CAST({} AS BLOB)" if is_sqlite else "convert_to({}, 'UTF8')"
    statement = statement.replace("{input}", stored.format("""'{"x": ' || s.i || '}'"""))
    return statement.replace("{output}", stored.format("""'{"y": 1}'"""))


def _tidy(database: Database) -> None:
    def tidy(connection: Connection) -> None:
        connection.exec_driver_sql("ANALYZE" if database.is_sqlite else "VACUUM (ANALYZE)")

    if database.is_sqlite:
        with database.write() as connection:
            tidy(connection)
    else:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            tidy(connection)


_WORKER = """
    INSERT INTO workers (id, name, host, pid, device, started_at, beat_at, stopped_at)
    VALUES (:worker, 'before', 'here', 1, 'cpu', :now, :now, :now)
"""
_BATCHES = """
    INSERT INTO batches (id, model, version, priority, closed, created_at)
    SELECT :first + s.i * :size, :model, :version, 5, true, :now FROM {batches} s
"""
_CHUNKS = """
    INSERT INTO chunks (id, model, version, batch, flow, priority, turn, first_id, last_id, size, succeeded, state,
        token, worker, max_attempts, created_at, announced_at, claimed_at, ended_at)
    SELECT :first + s.i * :size, :model, :version, :first + s.i * :size, :first + s.i * :size, 5, s.i + 1,
        :first + s.i * :size, :first + s.i * :size + :size - 1, :size, :size, 3, 1, :worker, 3, :now, :now, :now, :now
    FROM {batches} s
"""
_JOBS = """
    INSERT INTO jobs (id, chunk, batch, state, input, output, worker, finished_at)
    SELECT :first + s.i, :first + s.i / :size * :size, :first + s.i / :size * :size, 1, {input}, {output}, :worker, :now
    FROM {rows} s
"""
