"""What every command starts from: the settings, the screen, and the way to the data. Not here: any command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import typer

from torchrelay.cli.output import Screen
from torchrelay.settings import Settings
from torchrelay_storage.errors import Unreachable

if TYPE_CHECKING:
    from torchrelay.client import Relay
    from torchrelay.core import Core
    from torchrelay_storage.database import Database

# The group sees it before any command is parsed (`main.Commands.main`); commands name it for their help.
Json = Annotated[bool, typer.Option("--json", help="Print JSON; JSON lines for streams.")]


@dataclass
class Session:
    """One run of the command line."""

    as_json: bool = False
    arguments: dict[str, str | None] = field(default_factory=dict)  # of Settings, from the global options

    @classmethod
    def of(cls, context: typer.Context) -> Session:
        """Return the session that this command belongs to."""
        found = context.find_object(cls)
        assert found is not None, "main.options makes it"
        return found

    @property
    def screen(self) -> Screen:
        """Where to print."""
        return Screen(self.as_json)

    @cached_property
    def settings(self) -> Settings:
        """The settings, the global options the strongest. Raises InvalidInput."""
        return Settings.load(**self.arguments)

    @contextmanager
    def relay(self, *, create: bool = False) -> Iterator[Relay]:
        """Yield a Relay.

        Args:
            create: make the embedded database where there is none yet.

        Raises:
            Unreachable: there is no embedded database, and it is not to be made.
        """
        from torchrelay.client import Relay

        self._prepare(create)
        with Relay(settings=self.settings) as relay:
            yield relay

    @contextmanager
    def core(self, *, create: bool = False) -> Iterator[Core]:
        """Yield what a Relay is made of, for commands that show rows; arguments and errors as `relay`."""
        with self.relay(create=create) as relay:
            yield core_of(relay)

    @contextmanager
    def database(self, *, create: bool = False) -> Iterator[Database]:
        """Yield the database; arguments and errors as `relay`."""
        from torchrelay_storage.database import Database

        self._prepare(create)
        database = Database(self.settings.database_url)
        try:
            yield database
        finally:
            database.dispose()

    def _prepare(self, create: bool) -> None:
        settings = self.settings
        if settings.database is None and not create and not (settings.home / "torchrelay.db").exists():
            # Looking must not leave a folder behind wherever somebody happens to be.
            raise Unreachable(
                f"there is no torchrelay data in {settings.home}; `torchrelay up` or `torchrelay demo` makes it, "
                "--home names another folder, --database (or TORCHRELAY_DATABASE) a database elsewhere"
            )


def core_of(relay: Relay) -> Core:
    """Return what this Relay is made of. Rows have more to show than handles; applications have no need of it."""
    return relay._core.ready()
