"""Real faults of real databases: each is retried or named by a typed error; never a silent drop, nor a wrong count."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, create_engine, text

from pgbouncer import PgBouncerServer
from servers import PostgresServer, wait_until
from torchrelay_storage import database as database_module
from torchrelay_storage import sqlite as sqlite_module
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import Unreachable
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_storage.states import End
from torchrelay_storage.submission import NewJob, Submission, Submitted

ON_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def version(database: Database) -> ModelVersion:
    return Registry(database).register("model", handler="h", chunk_size=64)


@pytest.fixture
def stranger(database_url: str) -> Iterator[psycopg.Connection]:
    """Somebody else's session in the same database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def submit(database: Database, version: ModelVersion, n: int, key: str | None = None) -> list[int]:
    jobs = [NewJob(b"1", key=f"{key}-{i}" if key else None, digest=b"d" if key else None) for i in range(n)]
    [placed] = JobStore(database).submit([Submission(version, Options(), jobs)])
    return [p.job for p in placed if isinstance(p, Submitted)]


def count(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(text("SELECT count(*) FROM jobs")).scalar_one())


def waits_for_a_lock(connection: psycopg.Connection) -> bool:
    row = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    ).fetchone()
    return row is not None and row[0] > 0


def set_for_new_sessions(database: Database, setting: str) -> None:
    """Set something for the database's next sessions, and end those that there are."""
    with psycopg.connect(database.url.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {database.url.database} SET {setting}")
    database.dispose()


# --- conflicts ------------------------------------------------------------------------------------------------------


@ON_POSTGRESQL
def test_a_deadlock_is_tried_again(database: Database, version: ModelVersion, database_url: str) -> None:
    first, second = submit(database, version, 1)[0], submit(database, version, 1)[0]
    worker = Fleet(database).register("w", host="h", pid=1, device="cpu").id
    claimed = ChunkStore(database).claim([first, second], worker)
    outcomes = [Outcome(c.jobs[0].id, c.chunk, c.token, End.SUCCEEDED, b"1") for c in claimed]
    with psycopg.connect(database_url) as stranger, psycopg.connect(database_url, autocommit=True) as observer:
        stranger.execute("SET deadlock_timeout = '20s'")  # so that it is not the one that gives way
        stranger.execute("SELECT 1 FROM chunks WHERE id = %s FOR UPDATE", (second,))
        with ThreadPoolExecutor(1) as pool:
            finishing = pool.submit(
                JobStore(database).finish, outcomes, worker
            )  # holds the first, waits for the second
            wait_until(lambda: waits_for_a_lock(observer), 10, "the finish waiting")
            stranger.execute("SELECT 1 FROM chunks WHERE id = %s FOR UPDATE", (first,))
            stranger.commit()
            assert finishing.result(20).recorded == 2
    with database.read() as connection:
        assert connection.execute(text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
                                  ).scalar() == 1  # fmt: skip
        assert connection.execute(text("SELECT sum(succeeded) FROM chunks")).scalar() == 2


@ON_POSTGRESQL
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_serialization_failures_are_tried_again(database: Database, version: ModelVersion, level: str) -> None:
    set_for_new_sessions(database, f"default_transaction_isolation = '{level}'")
    tries = []

    def work(connection: Connection) -> int:
        tries.append(1)
        before = connection.execute(text("SELECT chunk_size FROM model_versions")).scalar_one()
        if len(tries) == 1:
            other = Database(database.url.render_as_string(hide_password=False))
            Registry(other).set_chunk_size(version.id, before + 1)
            other.dispose()
        row = {"n": before + 1}
        return int(
            connection.execute(text("UPDATE model_versions SET chunk_size = :n RETURNING chunk_size"), row).scalar_one()
        )

    assert database.transact(work) == 66
    assert len(tries) == 2
    with ThreadPoolExecutor(8) as pool:  # the same keys at the same time
        found = list(pool.map(lambda _: submit(database, version, 5, key="k"), range(8)))
    assert all(jobs == found[0] for jobs in found)
    assert count(database) == 5


@ON_POSTGRESQL
def test_a_lock_that_is_never_free_is_a_typed_error(
    database: Database, version: ModelVersion, stranger: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "RETRY_SECONDS", 0.5)
    [job] = submit(database, version, 1)
    set_for_new_sessions(database, "lock_timeout = '100ms'")
    with stranger.transaction():
        stranger.execute("SELECT 1 FROM chunks FOR UPDATE")
        with pytest.raises(Unreachable, match=r"is too busy: .*lock timeout"):
            JobStore(database).cancel([job])
    assert JobStore(database).cancel([job]).count == 1


@ON_SQLITE
def test_a_busy_file_is_waited_for_and_then_a_typed_error(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_module, "BUSY_TIMEOUT", 0.1)
    monkeypatch.setattr(database_module, "RETRY_SECONDS", 1.0)
    database = Database(database_url)
    version = Registry(database).register("model", handler="h")
    stranger = sqlite3.connect(tmp_path / "torchrelay.db", isolation_level=None, check_same_thread=False)
    stranger.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unreachable, match="is too busy: database is locked"):
        submit(database, version, 3)
    timer = threading.Timer(0.5, lambda: stranger.execute("COMMIT"))
    timer.start()
    assert len(submit(database, version, 3)) == 3
    timer.join()
    stranger.close()
    assert count(database) == 3
    database.dispose()


# --- a server that refuses ------------------------------------------------------------------------------------------


@ON_POSTGRESQL
def test_a_read_only_server_is_left_for_the_next(database: Database, version: ModelVersion) -> None:
    """After a failover the old server is a replica, and the name leads to the new one: by a new connection only."""
    set_for_new_sessions(database, "default_transaction_read_only = on")
    with database.read() as connection:  # a session that stays read only
        assert connection.execute(text("SHOW transaction_read_only")).scalar() == "on"
    with psycopg.connect(database.url.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f"ALTER DATABASE {database.url.database} RESET default_transaction_read_only")
    assert len(submit(database, version, 100)) == 100
    assert count(database) == 100


@ON_POSTGRESQL
def test_a_cancelled_statement_and_a_terminated_session_are_tried_again(
    database: Database, version: ModelVersion, database_url: str
) -> None:
    jobs = submit(database, version, 2)
    for job, end in zip(jobs, ("pg_cancel_backend", "pg_terminate_backend"), strict=True):
        with psycopg.connect(database_url) as stranger, psycopg.connect(database_url, autocommit=True) as observer:
            stranger.execute("SELECT 1 FROM chunks FOR UPDATE")
            with ThreadPoolExecutor(1) as pool:
                cancelling = pool.submit(JobStore(database).cancel, [job])
                wait_until(lambda observer=observer: waits_for_a_lock(observer), 10, "the cancel waiting")
                observer.execute(f"SELECT {end}(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
                stranger.rollback()
                assert cancelling.result(20).count == 1


@ON_POSTGRESQL
def test_a_plan_that_a_migration_has_overtaken_is_made_anew(database: Database, version: ModelVersion) -> None:
    registry = Registry(database)
    for _ in range(20):  # psycopg prepares what comes again
        registry.resolve("model")
    with database.write() as connection:
        connection.execute(text("ALTER TABLE model_versions ALTER chunk_size TYPE bigint"))
    for _ in range(20):
        assert registry.resolve("model").id == version.id


@ON_POSTGRESQL
def test_too_many_connections_are_waited_for(database_url: str, postgres_server: PostgresServer) -> None:
    with PostgresServer(max_connections="8", superuser_reserved_connections="0") as server, ExitStack() as stack:
        database = Database(server.create("small"))
        taken = [stack.enter_context(psycopg.connect(server.url("small"))) for _ in range(8)]
        timer = threading.Timer(1.0, taken[0].close)
        timer.start()
        assert database.now() > 0
        timer.join()
        database.dispose()


# --- a client that stands still ---------------------------------------------------------------------------------------

# Locks a chunk, says so, is stopped from outside, and then goes on: with the same work, and its own locks.
STOPPED_CLIENT = """
import sys
from sqlalchemy import text
from torchrelay_storage import postgresql
postgresql.IDLE_IN_TRANSACTION = 1.0
from torchrelay_storage.database import Database
database, chunk = Database(sys.argv[1]), int(sys.argv[2])
def work(connection):
    connection.execute(text("SELECT 1 FROM chunks WHERE id = :chunk FOR UPDATE"), {"chunk": chunk})
    print("locked", flush=True)
    sys.stdin.readline()
    return connection.execute(text("UPDATE chunks SET priority = 9 WHERE id = :chunk"), {"chunk": chunk}).rowcount
print("changed", database.transact(work), flush=True)
"""


@ON_POSTGRESQL
@pytest.mark.parametrize("through", ["direct", "pgbouncer"])
def test_a_stopped_client_frees_its_locks_and_goes_on(
    through: str, database: Database, version: ModelVersion, request: pytest.FixtureRequest
) -> None:
    [job] = submit(database, version, 1)
    url = database.url.render_as_string(hide_password=False)
    if through == "pgbouncer":
        bouncer: PgBouncerServer = request.getfixturevalue("pgbouncer_server")
        url = bouncer.ensure().url(str(database.url.database))
    command = [sys.executable, "-c", STOPPED_CLIENT, url, str(job)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == "locked\n"
        os.kill(client.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert JobStore(database).cancel([job]).count == 1
            assert time.monotonic() - began < 5, "the limit is 1 s here"
        finally:
            os.kill(client.pid, signal.SIGCONT)
        client.stdin.write("go\n\n")
        client.stdin.flush()
        assert client.stdout.readline() == "locked\n", "tried again"
        assert client.stdout.readline() == "changed 1\n"
        assert client.wait(20) == 0


@ON_POSTGRESQL
def test_the_limit_is_for_our_own_sessions(
    database: Database, database_url: str, pgbouncer_server: PgBouncerServer
) -> None:
    show = "SHOW idle_in_transaction_session_timeout"
    with database.read() as connection:
        assert connection.exec_driver_sql(show).scalar() == "10s"
    bounced = Database(pgbouncer_server.ensure().url(str(database.url.database)))
    with bounced.write() as connection:
        assert connection.exec_driver_sql(show).scalar() == "10s"
    bounced.dispose()
    for url in (database_url, pgbouncer_server.url(str(database.url.database))):
        engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))  # a caller's, for `session=`
        with engine.connect() as connection:
            assert connection.exec_driver_sql(show).scalar() == "0", "nothing of ours is left in a session"
        engine.dispose()


# --- a server that goes away ------------------------------------------------------------------------------------------


@ON_POSTGRESQL
def test_a_killed_server_is_waited_for(
    database: Database, version: ModelVersion, postgres_server: PostgresServer
) -> None:
    stop, jobs, refused = threading.Event(), list[int](), list[Exception]()

    def go_on(submitting: Callable[[], list[int]]) -> None:
        while not stop.is_set():
            try:
                jobs.extend(submitting())
            except Unreachable as error:
                refused.append(error)

    threads = [threading.Thread(target=go_on, args=(lambda n=n: submit(database, version, n),)) for n in (1, 3, 100)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(jobs) > 500, 30, "some jobs")
        postgres_server.kill()
        postgres_server.restart()
        after = len(jobs)
        wait_until(lambda: len(jobs) > after + 500, 30, "more jobs")
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        postgres_server.ensure()
    assert refused == [], "it was back in time"
    assert len(set(jobs)) == len(jobs) == count(database)
