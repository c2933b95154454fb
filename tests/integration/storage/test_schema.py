"""The schema: migrations and tables agree, and a schema that the code cannot run on says which side to upgrade."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from torchrelay_storage.database import Database
from torchrelay_storage.errors import SchemaMismatch, Unreachable
from torchrelay_storage.registry import Registry
from torchrelay_storage.revisions import MIGRATIONS
from torchrelay_storage.schema import REVISION, metadata


def test_migrations_make_the_tables_of_the_schema(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert database.revision() == (ScriptDirectory(str(MIGRATIONS)).get_current_head(), REVISION)
    assert database.revision()[0] == REVISION
    database.check()


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
