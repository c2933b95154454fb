"""Workers of this release go on under load on a schema that a later release has expanded, and new ones start on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from servers import wait_until
from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.errors import SchemaMismatch
from torchrelay_storage.schema import REVISION, metadata

LATER = "0999"


def expand(connection: Connection) -> None:
    """What a later release's migration may do: add columns and tables, and put more into the view."""
    for table in metadata.tables:
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN later_text text"))
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN later_number integer NOT NULL DEFAULT 7"))
    connection.execute(text("CREATE TABLE later_things (id integer PRIMARY KEY, what text NOT NULL)"))
    connection.execute(text("CREATE INDEX ix_later ON chunks (later_number) WHERE state < 0"))
    if connection.dialect.name == "postgresql":
        view = connection.execute(text("SELECT pg_get_viewdef('job_status')")).scalar_one().rstrip("; \n")
        connection.exec_driver_sql(f"CREATE OR REPLACE VIEW job_status AS SELECT o.*, 7 AS later FROM ({view}) o")
    else:
        view = connection.execute(text("SELECT sql FROM sqlite_master WHERE name = 'job_status'")).scalar_one()
        connection.execute(text("DROP VIEW job_status"))
        old = view.partition(" AS ")[2]
        connection.exec_driver_sql(f"CREATE VIEW job_status AS SELECT o.*, 7 AS later FROM ({old}) o")
    connection.execute(text("UPDATE alembic_version SET version_num = :later"), {"later": LATER})
    connection.execute(text("UPDATE compatibility SET oldest = :oldest"), {"oldest": REVISION})


class Clients:
    """Applications that submit without a pause: singly, in batches, and in transactions of their own."""

    def __init__(self, settings: Settings) -> None:
        self.jobs: list[tuple[int, str]] = []  # input, id
        self.batches: list[str] = []
        self.errors: list[BaseException] = []
        self._settings = settings
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work,)) for work in (self._single, self._batch, self._session)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, work: Callable[[Relay, int], None]) -> None:
        try:
            with Relay(settings=self._settings) as relay:
                i = 0
                while not self._stop.wait(0.02):
                    work(relay, i)
                    i += 1
        except BaseException as error:
            self.errors.append(error)

    def _single(self, relay: Relay, i: int) -> None:
        self.jobs.append((i, relay.submit("double", i).id))

    def _batch(self, relay: Relay, i: int) -> None:
        self.batches.append(relay.submit_batch("double", range(100)).id)
        self._stop.wait(0.3)

    def _session(self, relay: Relay, i: int) -> None:
        engine = create_engine(relay._core.db.engine.url)
        for tries_left in (2, 1, 0):
            try:
                with Session(engine) as session:
                    session.execute(text("SELECT 1"))
                    job = relay.submit("double", 10_000 + i, session=session)
                    if i % 2:
                        session.commit()
                        self.jobs.append((10_000 + i, job.id))
                break
            except OperationalError:  # a deadlock with the migration; an application's transaction is its own to repeat
                if not tries_left:
                    raise
        engine.dispose()
        self._stop.wait(0.1)


def test_workers_go_on_while_a_later_release_expands_the_schema(
    settings: Settings, relay: Relay, database: Database, start: Callable[..., Any], runs: Any
) -> None:
    relay.register_model("double", handler="double")
    first, second = start(wait=False), start()
    assert relay.submit("double", 1).result(timeout=60) == 2
    with Clients(settings) as clients:
        wait_until(lambda: len(clients.jobs) > 50 or clients.errors, 60, "some jobs")
        database.transact(expand)
        with pytest.raises(SchemaMismatch, match="newer release"):
            database.upgrade()
        database.check()
        before = len(clients.jobs)
        third = start()
        assert first.stop() == 0
        wait_until(lambda: len(clients.jobs) > before + 50 or clients.errors, 60, "more jobs")
        second.kill()  # and the maintenance, on the new schema
        time.sleep(2.0)
    assert clients.errors == []
    for given, job in clients.jobs:
        assert relay.job(job).result(timeout=60) == 2 * given
    for batch in clients.batches:
        assert relay.batch(batch).wait(timeout=60).succeeded == 100
    expected = 1 + len(clients.jobs) + 100 * len(clients.batches)
    with database.read() as connection:
        rows = connection.execute(
            text("SELECT state, version, handler_revision, later, count(*) FROM job_status GROUP BY 1, 2, 3, 4")
        ).all()
        fresh = connection.execute(text("SELECT count(*) FROM jobs WHERE later_number = 7")).scalar()
    [(state, version, revision, later, n)] = [tuple(row) for row in rows]
    assert (state, version, later, n, fresh) == ("succeeded", 1, 7, expected, expected)
    assert revision, "each job tells which handler served it"
    assert relay.job(clients.jobs[-1][1]).model == "double@1"
    assert third.process.poll() is None
