"""`torchrelay db`: the schema of the database, upgraded, shown, checked."""

from __future__ import annotations

import typer

from torchrelay.cli.session import Json, Session

group = typer.Typer(no_args_is_help=True, help="The database's schema: upgrade, current, check.")


def add(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(group, name="db", rich_help_panel="Run and operate")


@group.command()
def upgrade(ctx: typer.Context, _json: Json = False) -> None:
    """Bring the schema to what this release needs. Workers of the release before go on with it."""
    session = Session.of(ctx)
    with session.database(create=True) as database:
        before, _ = database.revision()
        database.upgrade()
        after, _ = database.revision()
        document = {"database": database.safe_url, "before": before, "after": after}
        words = f"was at {after} already" if before == after else f"went from {before or 'nothing'} to {after}"
        session.screen.show(document, f"{database.safe_url} {words}")


@group.command()
def current(ctx: typer.Context, _json: Json = False) -> None:
    """Show the schema that the database has, and the one that this release was made for."""
    session = Session.of(ctx)
    with session.database() as database:
        has, code = database.revision()
        document = {"database": database.safe_url, "current": has, "code": code}
        session.screen.show(document, f"{database.safe_url} is at {has or 'nothing'}, this release was made for {code}")


@group.command()
def check(ctx: typer.Context, _json: Json = False) -> None:
    """Exit with 0 if this release can run on the schema, else with 3; the message says which side to upgrade."""
    session = Session.of(ctx)
    with session.database() as database:
        database.check()
        has, _ = database.revision()
        session.screen.show({"database": database.safe_url, "current": has, "ok": True}, "ok")
