"""What SQLite does its own way: how transactions begin, and the bulk paths of submit and finish."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import count, repeat
from typing import Any

import orjson
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL

from torchrelay_storage.dialect import FailedRow, Fault, JobTuple, homes
from torchrelay_storage.outcomes import Span, Successes
from torchrelay_storage.states import End

BUSY_TIMEOUT = 10.0  # seconds a writer waits for another; one writes at a time, and none takes long

LENGTH_BITS = 24  # of a number that says where an output begins, and then how long it is
LONGEST = (1 << LENGTH_BITS) - 1  # bytes of an output
MOST_WHOLE = 1 << 28  # bytes of all outputs in one statement; SQLite would take a gigabyte

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
        written = 0
        few: list[Successes] = []
        for group in done:
            packed = _packed(group.span()) if group.is_span else None
            if packed is None:
                few.append(group)
            else:
                scope = (packed[0], worker, now, *packed[1:], group.chunk)
                written += connection.exec_driver_sql(_SUCCEED_SPAN, scope).rowcount
        rows = [row for g in few for row in zip(g.outputs, repeat(worker), repeat(now), g.jobs, repeat(g.chunk))]
        return written + (connection.exec_driver_sql(_SUCCEED, rows).rowcount if rows else 0)

    def fail_jobs(self, connection: Connection, rows: Sequence[FailedRow], worker: int, now: float) -> int:
        """Write the last failures of open jobs; return how many rows were still open and of the chunk named."""
        statement = (
            f"UPDATE jobs SET state = {End.FAILED:d}, error = ?, failures = failures + 1, worker = {worker:d}, "
            f"finished_at = {now!r} WHERE id = ? AND chunk = ? AND state = 0"
        )
        return connection.exec_driver_sql(statement, [(error, job, chunk) for job, chunk, error in rows]).rowcount


def _packed(span: Span) -> tuple[bytes, str, int] | None:
    """Return all outputs, where each begins and how long it is, as JSON, and the first id; None: they are too large."""
    if len(span.whole) > MOST_WHOLE or max(span.lengths) > LONGEST:
        return None
    packed = [start << LENGTH_BITS | n if n >= 0 else -1 for start, n in zip(span.starts, span.lengths, strict=False)]
    return span.whole, orjson.dumps(packed).decode(), span.first


def _many(rows: Sequence[tuple[Any, ...]]) -> Any:
    return rows if isinstance(rows, list) else list(rows)


_SUCCEED = """
    UPDATE jobs SET state = 1, output = ?, error = NULL, worker = ?, finished_at = ?
    WHERE id = ? AND chunk = ? AND state = 0
"""
# Many of one chunk: executemany would give up the interpreter's lock, and want it back, for each of them.
_SUCCEED_SPAN = f"""
    UPDATE jobs SET state = 1, error = NULL,
        output = substr(?, (u.value >> {LENGTH_BITS}) + 1, u.value & {LONGEST}), worker = ?, finished_at = ?
    FROM json_each(?) AS u WHERE jobs.id = ? + u.key AND +jobs.chunk = ? AND jobs.state = 0 AND u.value >= 0
"""
