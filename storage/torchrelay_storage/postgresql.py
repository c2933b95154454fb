"""What PostgreSQL does its own way: row locks, and the bulk paths of submit (COPY) and finish (unnest)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import psycopg
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.engine import URL

from torchrelay_storage.dialect import FinishRow, JobTuple
from torchrelay_storage.states import End

COPY_FROM = 32  # rows from which COPY beats an INSERT with arrays

_TRANSIENT = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.TooManyConnections,
    psycopg.errors.CannotConnectNow,
    psycopg.errors.AdminShutdown,
    psycopg.errors.CrashShutdown,
)


class Postgresql:
    """The dialect of a shared database, through psycopg 3."""

    name = "postgresql"
    now = "extract(epoch from clock_timestamp())::float8"
    lock = "FOR UPDATE"
    skip_locked = "FOR UPDATE OF c SKIP LOCKED"
    joined = "string_agg({0}, ',')"
    # The first byte tells JSON from the rest; what is not JSON is NULL here.
    json_text = "CASE WHEN length({0}) > 0 AND get_byte({0}, 0) >= 32 THEN convert_from({0}, 'UTF8') END"

    def engine(self, url: URL, pool_size: int) -> Engine:
        """Return an engine on psycopg 3 that notices a silent server within seconds."""
        return create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=20,
            execution_options={"preserve_rowcount": True},  # also of executemany, once the cursor is closed
            connect_args={
                "connect_timeout": 3,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 20_000,  # milliseconds
                "application_name": "torchrelay",
            },
        )

    def is_transient(self, error: BaseException) -> bool:
        """Whether the same transaction may succeed at another try."""
        if isinstance(error, _TRANSIENT):
            return True
        # A lost connection has no SQLSTATE of its own, or one of class 08.
        state = getattr(error, "sqlstate", None)
        return isinstance(error, psycopg.OperationalError) and (state is None or state.startswith("08"))

    def is_unreachable(self, error: BaseException) -> bool:
        """Whether the database itself could not be had."""
        return self.is_transient(error) and not isinstance(error, _TRANSIENT[:3])

    def insert_jobs(self, connection: Connection, rows: Sequence[JobTuple]) -> None:
        """Insert (id, chunk, batch, input, metadata) rows."""
        if len(rows) < COPY_FROM:
            columns = [list(column) for column in zip(*rows, strict=True)]
            connection.exec_driver_sql(_INSERT, tuple(columns))
            return
        driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
        with (
            driver.cursor() as cursor,
            cursor.copy("COPY jobs (id, chunk, batch, input, metadata) FROM STDIN (FORMAT BINARY)") as copy,
        ):
            copy.set_types(["int8", "int8", "int8", "bytea", "bytea"])
            for row in rows:
                copy.write_row(row)

    def finish_jobs(self, connection: Connection, rows: Sequence[FinishRow], worker: int, now: float) -> int:
        """Write the ends of open jobs; return how many rows were still open and of the chunk named."""
        succeeded = [(job, chunk, output) for job, chunk, end, output, *_ in rows if end == End.SUCCEEDED]
        others = [row for row in rows if row[2] != End.SUCCEEDED]
        written = 0
        for statement, some in ((_SUCCEED, succeeded), (_FINISH, others)):
            if some:
                columns = [list(column) for column in zip(*some, strict=True)]
                written += connection.exec_driver_sql(statement, (worker, now, *columns)).rowcount
        return written


# Arrays in binary (%b): as text they cost more than the update itself. Successes, the usual case, need fewer of them.
_SUCCEED = """
    UPDATE jobs SET state = 1, output = u.output, error = NULL, worker = %s, finished_at = %s
    FROM unnest(%b::bigint[], %b::bigint[], %b::bytea[]) AS u(id, chunk, output)
    WHERE jobs.id = u.id AND jobs.chunk = u.chunk AND jobs.state = 0
"""
_FINISH = """
    UPDATE jobs SET state = u.state, output = u.output, error = u.error, failures = failures + u.failed, worker = %s,
        finished_at = %s
    FROM unnest(%b::bigint[], %b::bigint[], %b::smallint[], %b::bytea[], %b::bytea[], %b::smallint[])
        AS u(id, chunk, state, output, error, failed)
    WHERE jobs.id = u.id AND jobs.chunk = u.chunk AND jobs.state = 0
"""
_INSERT = """
    INSERT INTO jobs (id, chunk, batch, input, metadata)
    SELECT * FROM unnest(%b::bigint[], %b::bigint[], %b::bigint[], %b::bytea[], %b::bytea[])
"""
