"""The schema: migrations and tables agree, and a schema that the code cannot run on says which side to upgrade."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from integration.storage.old_schema import upgrade_to
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import SchemaMismatch, Unreachable
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.registry import Registry
from torchrelay_storage.revisions import MIGRATIONS
from torchrelay_storage.schema import REVISION, metadata


def test_migrations_make_the_tables_of_the_schema(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert database.revision() == (ScriptDirectory(str(MIGRATIONS)).get_current_head(), REVISION)
    assert database.revision()[0] == REVISION
    database.check()


# A model, a chunk of two jobs that a worker holds, one of them ended; and a view that an operator has built on ours.
FIRST_ROWS = """
    INSERT INTO models (name, created_at) VALUES ('digits', 1);
    INSERT INTO model_versions (model, version, handler, config, chunk_size, created_at)
        VALUES (1, 1, 'h', '{"a":1}', 4, 1);
    INSERT INTO workers (id, name, host, pid, device, started_at, beat_at) VALUES (7, 'w', 'h', 1, 'cpu', 1, 1);
    INSERT INTO chunks (id, model, version, flow, priority, turn, first_id, last_id, size, succeeded, state, token,
                        worker, max_attempts, created_at)
        VALUES (11, 1, 1, 0, 5, 1, 11, 12, 2, 1, 2, 3, 7, 2, 1);
    INSERT INTO jobs (id, chunk, state, input) VALUES (11, 11, 1, '1'), (12, 11, 0, '2')
"""


def test_an_upgrade_keeps_the_rows_of_the_first_schema(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    upgrade_to(database, "0001")
    with database.write() as connection:
        for statement in FIRST_ROWS.split(";"):
            connection.exec_driver_sql(statement)
        if not database.is_sqlite:
            connection.execute(text("CREATE VIEW mine AS SELECT job, state FROM job_status"))
    with pytest.raises(SchemaMismatch, match="upgrade the database"):
        database.check()
    database.upgrade()
    database.check()
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        shown = connection.execute(text("SELECT id, model, version, state, kind FROM job_status ORDER BY id")).all()
        if not database.is_sqlite:
            assert connection.execute(text("SELECT count(*) FROM mine")).scalar() == 2
    assert [tuple(row) for row in shown] == [
        (11, "digits", 1, "succeeded", "inference"),
        (12, "digits", 1, "running", "inference"),
    ]
    version = Registry(database).resolve("digits")
    assert (version.config, version.metrics, version.lineage, version.run, version.aliases) == (
        {"a": 1},
        {},
        {},
        None,
        (),
    )
    Fleet(database).stop(7)
    assert ChunkStore(database).rescue(60).count == 1
    living = Fleet(database).register("b", host="h", pid=1, device="cpu").id
    assert len(ChunkStore(database).claim([11], living)) == 1
    assert JobStore(database).cancel([12]).count == 1
    assert Registry(database).lane("images", {}).version == 1
    database.dispose()


def test_upgrading_twice_changes_nothing(database: Database) -> None:
    database.upgrade()
    database.check()


def test_a_newer_schema_serves_older_code_until_it_contracts(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.check()  # the later release only expanded
    with database.write() as connection:
        connection.execute(text("UPDATE compatibility SET oldest = '9998'"))
    with pytest.raises(SchemaMismatch, match="upgrade torchrelay on this machine"):
        database.check()
    with pytest.raises(SchemaMismatch, match="upgrade torchrelay on this machine"):
        database.upgrade()


def test_no_tables_says_what_to_run(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/new.db")
    with pytest.raises(SchemaMismatch, match="torchrelay db upgrade"):
        database.check()
    with pytest.raises(SchemaMismatch, match="torchrelay db upgrade"):
        Registry(database).versions()
    database.dispose()


def test_several_upgrade_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"
    failures: list[BaseException] = []

    def upgrade() -> None:
        database = Database(url)
        try:
            database.upgrade()
        except BaseException as error:
            failures.append(error)
        finally:
            database.dispose()

    threads = [threading.Thread(target=upgrade) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


def test_a_database_that_is_not_there_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrelay_storage.database.RETRY_SECONDS", 0.2)
    database = Database("postgresql://nobody@127.0.0.1:9/none")
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        database.now()
    database.dispose()


def test_passwords_are_not_shown() -> None:
    database = Database("postgresql://u:secret@127.0.0.1:9/none")
    assert "secret" not in database.safe_url
    database.dispose()
