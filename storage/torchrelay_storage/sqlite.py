"""What SQLite does its own way: how transactions begin, and the bulk paths of submit and finish."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import chain, count, repeat
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL

from torchrelay_storage.dialect import FailedRow, Fault, JobTuple, homes
from torchrelay_storage.outcomes import Successes
from torchrelay_storage.states import End

BUSY_TIMEOUT = 10.0  # seconds a writer waits for another; one writes at a time, and none takes long

_FAULTS = {
    sqlite3.SQLITE_BUSY: Fault.BUSY,
    sqlite3.SQLITE_LOCKED: Fault.BUSY,
    sqlite3.SQLITE_PROTOCOL: Fault.BUSY,
    sqlite3.SQLITE_NOMEM: Fault.BUSY,
    sqlite3.SQLITE_IOERR: Fault.AWAY,
    sqlite3.SQLITE_CANTOPEN: Fault.CLOSED,
    sqlite3.SQLITE_READONLY: Fault.CLOSED,
    sqlite3.SQLITE_FULL: Fault.FULL,
}


class Sqlite:
    """The dialect of the embedded default. `storage` calls it wherever the two databases differ."""

    name = "sqlite"
    # Milliseconds: `unixepoch('subsec')` needs SQLite 3.42, and Debian 12 has 3.40.
    now = "((julianday('now') - 2440587.5) * 86400.0)"
    lock = ""  # a transaction that writes holds the whole file
    skip_locked = ""
    joined = "group_concat({0})"
    json_text = "CASE WHEN {0} >= x'20' THEN CAST({0} AS TEXT) END"

    def engine(self, url: URL, pool_size: int) -> Engine:
        """Return an engine whose connections are in WAL mode and begin their transactions IMMEDIATE."""
        memory = url.database in (None, "", ":memory:")
        engine = create_engine(
            url,
            execution_options={"preserve_rowcount": True},
            connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False},
            **({} if memory else {"pool_size": pool_size, "max_overflow": 20}),
        )

        @event.listens_for(engine, "connect")
        def on_connect(connection: sqlite3.Connection, _record: object) -> None:
            connection.isolation_level = None  # SQLAlchemy says BEGIN below, not the driver behind its back
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "cache_size=-65536",
                           "temp_store=MEMORY", "journal_size_limit=67108864"):  # fmt: skip
                connection.execute(f"PRAGMA {pragma}").close()

        @event.listens_for(engine, "begin")
        def on_begin(connection: Connection) -> None:
            # A transaction that reads first and then writes would fail with SQLITE_BUSY where another wrote between.
            mode = "DEFERRED" if connection.get_execution_options().get("torchrelay_read") else "IMMEDIATE"
            connection.exec_driver_sql(f"BEGIN {mode}")

        return engine

    def fault(self, error: BaseException) -> Fault | None:
        """Return what a driver's error says of the database; None: the statement is to blame."""
        code = getattr(error, "sqlite_errorcode", None)  # its low byte is the kind, the rest tells more
        return _FAULTS.get(code & 0xFF) if code is not None else None

    def insert_jobs(self, connection: Connection, rows: Sequence[JobTuple]) -> None:
        """Insert (id, chunk, batch, input, metadata) rows."""
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, chunk, batch, input, metadata) VALUES (?, ?, ?, ?, ?)", _many(rows)
        )

    def insert_inputs(
        self, connection: Connection, first: int, sizes: Sequence[int], batch: int, inputs: Sequence[bytes]
    ) -> None:
        """Insert jobs with consecutive ids, in chunks of these sizes, each named after its first job."""
        rows = zip(count(first), homes(first, sizes), repeat(batch), inputs, strict=False)
        connection.exec_driver_sql("INSERT INTO jobs (id, chunk, batch, input) VALUES (?, ?, ?, ?)", list(rows))

    def succeed_jobs(self, connection: Connection, done: Sequence[Successes], worker: int, now: float) -> int:
        """Write the ends of open jobs; return how many rows were still open and of the chunk named."""
        statement = (
            f"UPDATE jobs SET state = {End.SUCCEEDED:d}, output = ?, error = NULL, worker = {worker:d}, "
            f"finished_at = {now!r} WHERE id = ? AND chunk = ? AND state = 0"
        )
        rows = chain.from_iterable(zip(g.outputs, g.jobs, repeat(g.chunk), strict=False) for g in done)
        return connection.exec_driver_sql(statement, list(rows)).rowcount

    def fail_jobs(self, connection: Connection, rows: Sequence[FailedRow], worker: int, now: float) -> int:
        """Write the last failures of open jobs; return how many rows were still open and of the chunk named."""
        statement = (
            f"UPDATE jobs SET state = {End.FAILED:d}, error = ?, failures = failures + 1, worker = {worker:d}, "
            f"finished_at = {now!r} WHERE id = ? AND chunk = ? AND state = 0"
        )
        return connection.exec_driver_sql(statement, [(error, job, chunk) for job, chunk, error in rows]).rowcount


def _many(rows: Sequence[tuple[Any, ...]]) -> Any:
    return rows if isinstance(rows, list) else list(rows)
