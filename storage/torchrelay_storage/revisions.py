"""The schema's revisions: upgrading, and whether this code runs on what a database has. Alembic does the work."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, select, text

from torchrelay_storage.errors import SchemaMismatch
from torchrelay_storage.schema import REVISION, compatibility

MIGRATIONS = Path(__file__).parent / "migrations"

_TOO_NEW = (
    "the database {0} is at schema {1}, which this code does not know: it was upgraded by a newer release; "
    "upgrade torchrelay on this machine"
)


def upgrade(connection: Connection, where: str) -> None:
    """Run the migrations in the caller's transaction. `where` is the database's name for messages.

    Raises:
        SchemaMismatch: a newer release has upgraded the database.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(7470117)"))
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        current = MigrationContext.configure(connection).get_current_revision()
        raise SchemaMismatch(_TOO_NEW.format(where, current)) from error


def check(connection: Connection, where: str, current: str | None) -> None:
    """Raise SchemaMismatch if this code cannot run on schema `current`; the message says which side to upgrade."""
    if current is None:
        raise SchemaMismatch(f"the database {where} has no torchrelay tables yet; run `torchrelay db upgrade`")
    known = {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}
    if current in known:
        raise SchemaMismatch(
            f"the database {where} is at schema {current}, older than this code, which needs {REVISION}; "
            "upgrade the database with `torchrelay db upgrade`"
        )
    if connection.execute(select(compatibility.c.oldest)).scalar() not in known:
        raise SchemaMismatch(_TOO_NEW.format(where, current))
