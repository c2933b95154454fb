"""What PostgreSQL does its own way: row locks, and the bulk paths of submit (COPY) and finish (unnest)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, cast

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from torchrelay_storage.dialect import FailedRow, Fault, JobTuple, homes
from torchrelay_storage.outcomes import Successes

ROWS = 256  # that are joined with arrays in one statement
COPY_FROM = 32  # rows from which COPY beats an INSERT with arrays

# A client that was stopped in the middle of a transaction keeps its locks for so long. None of ours thinks longer.
IDLE_IN_TRANSACTION = 10.0  # seconds

_FAULTS = {
    "25006": Fault.AWAY,  # read only: after a failover this is the replica now, and the name leads to another
    "25P03": Fault.AWAY,  # idle in a transaction for too long: this process was stopped
    "25P04": Fault.AWAY,  # a transaction that was too long
    "40001": Fault.BUSY,  # serialization failure
    "40003": Fault.AWAY,  # nobody knows whether it was done
    "40P01": Fault.BUSY,  # deadlock
    "53100": Fault.FULL,
    "53200": Fault.BUSY,  # out of memory
    "53300": Fault.AWAY,  # too many connections
    "55P03": Fault.BUSY,  # a lock that was not to be had in time
    "57014": Fault.BUSY,  # cancelled, by its administrator or for taking too long
    "57P01": Fault.AWAY,  # it shuts down,
    "57P02": Fault.AWAY,  # has crashed,
    "57P03": Fault.AWAY,  # or starts
    "57P05": Fault.AWAY,  # idle for too long
    "58030": Fault.AWAY,  # an I/O error
}
_QUOTA = ("No space left on device", "Disk quota exceeded", "File too large")  # for which there is no state of its own


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
        engine = create_engine(
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
        event.listen(engine, "connect", _greet)
        event.listen(engine, "begin", _limit_idleness)
        event.listen(engine, "handle_error", _drop_connection)
        return engine

    def fault(self, error: BaseException) -> Fault | None:
        """Return what a driver's error says of the database; None: the statement is to blame."""
        return _fault(error)

    def insert_jobs(self, connection: Connection, rows: Sequence[JobTuple]) -> None:
        """Insert (id, chunk, batch, input, metadata) rows."""
        if len(rows) < COPY_FROM:
            columns = [list(column) for column in zip(*rows, strict=True)]
            connection.exec_driver_sql(_INSERT, tuple(columns))
            return
        with _copying(connection, _COPY) as copy:
            copy.set_types(["int8", "int8", "int8", "bytea", "bytea"])
            for row in rows:
                copy.write_row(row)

    def insert_inputs(
        self, connection: Connection, first: int, sizes: Sequence[int], batch: int, inputs: Sequence[bytes]
    ) -> None:
        """Insert jobs with consecutive ids, in chunks of these sizes, each named after its first job.

        Rows in the binary format of COPY (https://www.postgresql.org/docs/current/sql-copy.html), made here: psycopg's
        `write_row` takes twice as long as the server does.
        """
        head = _ROW.pack
        rows = (
            head(4, 8, job, 8, chunk, 8, batch, len(data)) + data
            for job, chunk, data in zip(count(first), homes(first, sizes), inputs, strict=False)
        )
        with _copying(connection, _COPY_INPUTS) as copy:
            copy.write(b"".join((_COPY_HEADER, *rows, _COPY_TRAILER)))

    def succeed_jobs(self, connection: Connection, done: Sequence[Successes], worker: int, now: float) -> int:
        """Write the ends of open jobs; return how many rows were still open and of the chunk named."""
        written = 0
        for group in done:
            if group.is_span:
                written += connection.exec_driver_sql(_SUCCEED_SPAN, (worker, now, *_span(group))).rowcount
        few = (g for g in done if not g.is_span)
        rows = [(job, g.chunk, output) for g in few for job, output in zip(g.jobs, g.outputs, strict=True)]
        return written + _write(connection, _SUCCEED, rows, worker, now)

    def fail_jobs(self, connection: Connection, rows: Sequence[FailedRow], worker: int, now: float) -> int:
        """Write the last failures of open jobs; return how many rows were still open and of the chunk named."""
        return _write(connection, _FAIL, rows, worker, now)


@contextmanager
def _copying(connection: Connection, statement: str) -> Iterator[psycopg.Copy]:
    driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            yield copy
    except psycopg.Error as error:  # as SQLAlchemy would name it, past which this went
        if driver.closed:
            connection.invalidate()
        raise DBAPIError.instance(statement, None, error, psycopg.Error, hide_parameters=True) from error


def _write(connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]], worker: int, now: float) -> int:
    written = 0
    for start in range(0, len(rows), ROWS):
        columns = [list(column) for column in zip(*rows[start : start + ROWS], strict=True)]
        written += connection.exec_driver_sql(statement, (worker, now, *columns, columns[0])).rowcount
    return written


def _span(group: Successes) -> tuple[object, ...]:
    """Return the parameters of `_SUCCEED_SPAN` after the first two."""
    first, last, whole, lengths = span = group.span()
    starts, sizes = [*(start + 1 for start in span.starts), _INT4], [*lengths, _INT4]
    return whole, starts, first, sizes, first, first, last, group.chunk, sizes, first


def _fault(error: BaseException) -> Fault | None:
    if not isinstance(error, psycopg.Error):
        return None
    state = error.sqlstate
    if state is None:  # a lost connection, or none at all
        return Fault.AWAY if isinstance(error, psycopg.OperationalError) else None
    if state in ("58030", "XX000") and any(words in str(error) for words in _QUOTA):
        return Fault.FULL
    if state == "0A000" and "cached plan" in str(error):  # a migration changed a table; the next try plans anew
        return Fault.BUSY
    return Fault.AWAY if state.startswith("08") else _FAULTS.get(state)


def _greet(connection: psycopg.Connection[Any], record: ConnectionPoolEntry) -> None:
    """Learn whether a pooler such as PgBouncer stands in between, whose sessions are shared; set the session up if not.

    A pooler that gives a client another session each transaction makes up the process id that it tells the client.
    What is set in its sessions, or prepared, would meet others.
    """
    connection.autocommit = True
    pid = connection.info.backend_pid
    row = connection.execute(_GREET, {"pid": pid, "idle": f"{IDLE_IN_TRANSACTION * 1000:.0f}"}).fetchone()
    connection.autocommit = False
    record.info[_POOLED] = row is not None and row[0] != pid
    if record.info[_POOLED]:
        connection.prepare_threshold = None


def _limit_idleness(connection: Connection) -> None:
    """Behind a pooler the limit is set for each transaction that may lock something."""
    if connection.info.get(_POOLED) and not connection.get_execution_options().get("torchrelay_read"):
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION * 1000:.0f}")


def _drop_connection(context: ExceptionContext) -> None:
    """Do not use a connection again that leads to the wrong server, or to none, nor any that is older."""
    if _fault(context.original_exception) is Fault.AWAY:
        context.is_disconnect = True


_POOLED = "torchrelay_pooled"
_GREET = """
    SELECT pg_backend_pid(), CASE WHEN pg_backend_pid() = %(pid)s
        THEN set_config('idle_in_transaction_session_timeout', %(idle)s, false) END
"""
_COPY = "COPY jobs (id, chunk, batch, input, metadata) FROM STDIN (FORMAT BINARY)"

_COPY_INPUTS = "COPY jobs (id, chunk, batch, input) FROM STDIN (FORMAT BINARY)"
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_TRAILER = b"\xff\xff"
_ROW = struct.Struct(">hiqiqiqi")  # number of fields; then of each its length, and itself

# Arrays in binary (%b): as text they cost more than the update itself. The ids come a second time: where its statistics
# say that all jobs have ended, PostgreSQL would go through the table for the rest, and compare each with each.
_SUCCEED = """
    UPDATE jobs SET state = 1, output = u.output, error = NULL, worker = %s, finished_at = %s
    FROM unnest(%b::bigint[], %b::bigint[], %b::bytea[]) AS u(id, chunk, output)
    WHERE jobs.id = u.id AND jobs.chunk = u.chunk AND jobs.state = 0 AND jobs.id = ANY(%b::bigint[])
"""
# psycopg sends ints in the smallest type that holds them all; were that not int4, the server would cast the whole array
# for each row.
_INT4 = 1 << 30

# Many of one chunk: its range of ids, each with its slice of all outputs in one. A join with arrays is at the mercy of
# the planner, which knows nothing of rows that came after its statistics, and then compares each with each.
_SUCCEED_SPAN = """
    UPDATE jobs SET state = 1, error = NULL, worker = %s, finished_at = %s,
        output = substr(%b::bytea, (%b::int[])[id - %s + 1], (%b::int[])[id - %s + 1])
    WHERE id BETWEEN %s AND %s AND chunk = %s AND state = 0 AND (%b::int[])[id - %s + 1] >= 0
"""
_FAIL = """
    UPDATE jobs SET state = 2, error = u.error, failures = failures + 1, worker = %s, finished_at = %s
    FROM unnest(%b::bigint[], %b::bigint[], %b::bytea[]) AS u(id, chunk, error)
    WHERE jobs.id = u.id AND jobs.chunk = u.chunk AND jobs.state = 0 AND jobs.id = ANY(%b::bigint[])
"""
_INSERT = """
    INSERT INTO jobs (id, chunk, batch, input, metadata)
    SELECT * FROM unnest(%b::bigint[], %b::bigint[], %b::bigint[], %b::bytea[], %b::bytea[])
"""
