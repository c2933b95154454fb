"""A database as an earlier release has left it."""

from __future__ import annotations

from alembic import command
from alembic.config import Config

from torchrelay_storage.database import Database
from torchrelay_storage.revisions import MIGRATIONS


def upgrade_to(database: Database, revision: str) -> None:
    """Bring an older or empty database to this revision and no further."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
