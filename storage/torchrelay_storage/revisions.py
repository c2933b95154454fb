"""The schema's revisions: upgrading, and whether this code runs on what a database has. Alembic does the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import select, text

from torchrelay_storage.errors import SchemaMismatch
from torchrelay_storage.schema import REVISION, compatibility

if TYPE_CHECKING:
    from torchrelay_storage.database import Database

MIGRATIONS = Path(__file__).parent / "migrations"

_TOO_NEW = (
    "the database {0} is at schema {1}, which this code does not know: it was upgraded by a newer release; "
    "upgrade torchrelay on this machine"
)


def upgrade(database: Database) -> None:
    """Run the migrations in one transaction. Raises SchemaMismatch for a database that a newer release upgraded."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with database.write() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(7470117)"))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            current = MigrationContext.configure(connection).get_current_revision()
            raise SchemaMismatch(_TOO_NEW.format(database.safe_url, current)) from error


def check(database: Database, current: str | None) -> None:
    """Raise SchemaMismatch if this code cannot run on schema `current`; the message says which side to upgrade."""
    if current is None:
        raise SchemaMismatch(
            f"the database {database.safe_url} has no torchrelay tables yet; run `torchrelay db upgrade`"
        )
    known = {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}
    if current in known:
        raise SchemaMismatch(
            f"the database {database.safe_url} is at schema {current}, older than this code, which needs {REVISION}; "
            "upgrade the database with `torchrelay db upgrade`"
        )
    with database.read() as connection:
        oldest = connection.execute(select(compatibility.c.oldest)).scalar()
    if oldest not in known:
        raise SchemaMismatch(_TOO_NEW.format(database.safe_url, current))
