"""Fixtures for all tests: real servers, a fresh migrated database a test on both kinds, and worker processes.

A test that takes `database_url`, `database`, `settings` or `worker` runs twice, on SQLite and on PostgreSQL;
`@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)` runs it on one of them.
TORCHRELAY_TEST_DATABASES=pgbouncer (or `sqlite,pgbouncer` and the like) reaches PostgreSQL through a PgBouncer.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from pgbouncer import PgBouncerServer
from servers import PostgresServer, RedisServer, wait_until
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from workers import WorkerProcess

TEMPLATE = "torchrelay_template"

# Kept under a name that no process of ours reads; the processes of pytest-xdist find it there.
_DATABASES = "TESTS_OF_TORCHRELAY_DATABASES"
os.environ[_DATABASES] = (
    os.environ.get("TORCHRELAY_TEST_DATABASES") or os.environ.get(_DATABASES) or "sqlite,postgresql"
)
DATABASES = os.environ[_DATABASES].split(",")

# No test may depend on who runs it; and nothing may be fetched from a hub.
for _name in [name for name in os.environ if name.startswith("TORCHRELAY_")]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"

_numbers = itertools.count()


# --- servers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One Redis for all tests; a test may pause, kill or restart it."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests; a test may pause, kill or restart it."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def pgbouncer_server(postgres_server: PostgresServer) -> Iterator[PgBouncerServer]:
    """One PgBouncer, in transaction mode, before the PostgreSQL of all tests."""
    with PgBouncerServer(postgres_server.ensure()) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of an empty Redis."""
    redis_server.ensure().flush()
    return redis_server.url


# --- databases ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "torchrelay.db"
    _upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def _postgres_template(postgres_server: PostgresServer) -> str:
    _upgrade(postgres_server.ensure().create(TEMPLATE))
    return TEMPLATE


def _upgrade(url: str) -> None:
    database = Database(url)
    try:
        database.upgrade()
    finally:
        database.dispose()


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh database of our schema's newest revision: a SQLite file, then a PostgreSQL database.

    Tests for PostgreSQL alone go through PgBouncer too where only that is asked for.
    """
    if request.param == "sqlite":
        path = tmp_path / "torchrelay.db"
        shutil.copy(request.getfixturevalue("_sqlite_template"), path)
        yield f"sqlite:///{path}"
    else:
        yield from _postgres_database(request, request.getfixturevalue("_postgres_template"))


@pytest.fixture(params=DATABASES)
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh database without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        yield from _postgres_database(request, "template0")


def _postgres_database(request: pytest.FixtureRequest, template: str) -> Iterator[str]:
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = f"test_{next(_numbers)}"
    url = server.ensure().create(name, template)
    if request.param == "pgbouncer" or "postgresql" not in DATABASES:
        url = request.getfixturevalue("pgbouncer_server").ensure().url(name)
    yield url
    server.ensure().drop(name)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh database, open."""
    database = Database(database_url)
    yield database
    database.dispose()


# --- the whole system -----------------------------------------------------------------------------------------------


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """The settings of a system of its own: fresh database, empty Redis, artifacts in the test's folder."""
    return Settings.load(
        home=tmp_path / "home", database=database_url, broker=redis_url, artifacts=f"file://{tmp_path / 'artifacts'}"
    )


@pytest.fixture
def worker(settings: Settings, tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Return a function that starts a worker and waits until it is alive.

    `start(*arguments, name=None, handlers={}, environment={}, wait=True)`: arguments go to `torchrelay_worker`;
    handlers are name -> "module:Class" and may lie below tests/, as "integration.handlers:Echo". All are stopped at
    the end of the test, which fails if one leaves a process behind.
    """
    started: list[WorkerProcess] = []
    database = Database(settings.database_url)

    def start(
        *arguments: str,
        name: str | None = None,
        handlers: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> WorkerProcess:
        name = name or f"worker-{next(_numbers)}"
        chosen: dict[str, Any] = settings.model_dump(exclude_none=True)
        chosen["handlers"] = {**settings.handlers, **(handlers or {})}
        process = WorkerProcess(name, arguments, Settings.load(**chosen), environment or {}, tmp_path / f"{name}.log")
        started.append(process)
        if wait:
            wait_until(lambda: process.is_alive(database, settings.stale_after), 60, f"the first beat of {name}")
        return process

    yield start

    families = [process.children for process in started]
    for process in started:
        if process.process.poll() is None:
            process.process.terminate()  # all of them first, so that they end side by side
    try:
        for process in started:
            process.stop()
        _, left = psutil.wait_procs([child for family in families for child in family], timeout=5)
        assert not left, f"a worker left processes behind: {left}"
    finally:
        for process in started:
            process.kill()
        database.dispose()
