"""`torchrelay models show, compare, promote, rollback, history, recipes`: a model's versions and aliases.

Not here: the list of models, and adding one (`models`); training a version (`train`).
"""

from __future__ import annotations

import getpass
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.table import Table

from torchrelay.cli.arguments import complete_model, complete_recipe, complete_version
from torchrelay.cli.output import facts, moment, short, table
from torchrelay.cli.session import Json, Session
from torchrelay_storage.errors import InvalidInput, RecipeNotFound
from torchrelay_storage.ids import Kind, show

if TYPE_CHECKING:
    from torchrelay_storage.registry import ModelVersion

CHAMPION = "champion"

Name = Annotated[str, typer.Argument(help="Name of a model.", metavar="NAME", autocompletion=complete_model)]
Ref = Annotated[
    str, typer.Argument(help="NAME (the newest), NAME@3 or NAME@alias.", metavar="NAME[@VERSION]",
                        autocompletion=complete_version)
]  # fmt: skip
Alias = Annotated[str, typer.Option(help="The alias that is moved.")]
By = Annotated[str | None, typer.Option(help="Who moves it, for the history; default: this user.", metavar="WHO")]


def add(group: typer.Typer) -> None:
    """Add the commands."""
    group.command("show")(show_)
    group.command()(compare)
    group.command()(promote)
    group.command()(rollback)
    group.command()(history)
    group.command()(recipes)


# --- looking -----------------------------------------------------------------------------------------------


def show_(ctx: typer.Context, name: Ref, _json: Json = False) -> None:
    """Show a version: what it measured, what it came from, and the versions beside it."""
    from torchrelay.cli.documents import version_document
    from torchrelay_storage.registry import Registry

    session = Session.of(ctx)
    with session.database() as database:
        version = Registry(database).resolve(name)
        others = Registry(database).versions(version.name)
    document = version_document(version) | {"versions": [version_document(other) for other in others]}
    session.screen.show(document, version_facts(version), "", versions_table(others))


def compare(
    ctx: typer.Context,
    names: Annotated[
        list[str], typer.Argument(help="Two or more: NAME, NAME@3, NAME@alias.", metavar="NAME[@VERSION]…",
                                  autocompletion=complete_version)
    ],
    _json: Json = False,
) -> None:  # fmt: skip
    """Show versions side by side: their metrics, and in what their making differs."""
    from torchrelay.cli.documents import version_document
    from torchrelay_storage.registry import Registry

    session = Session.of(ctx)
    with session.database() as database:
        registry = Registry(database)
        versions = [registry.resolve(name) for name in names]
        if len(versions) == 1:
            versions = registry.versions(versions[0].name)[:2]
            if len(versions) < 2:
                raise InvalidInput(f"{names[0]} has one version; name two: torchrelay models compare A B")
    session.screen.show([version_document(version) for version in versions], comparison(versions))


def version_facts(version: ModelVersion) -> Table:
    """Return everything about one version."""
    lineage = {name: value for name, value in version.lineage.items() if name != "run" and value is not None}
    return facts([
        ("version", version.ref),
        ("aliases", ", ".join(version.aliases)),
        ("state", "paused" if version.paused else None),
        ("handler", version.handler),
        *((f"  {name}", f"{value:.6g}") for name, value in sorted(version.metrics.items())),
        ("run", show(Kind.JOB, version.run) if version.run is not None else None),
        *((f"  {name}", _words(value)) for name, value in lineage.items()),
        ("weights", version.weights),
        ("sha256", version.sha256),
        ("config", short(_words(dict(version.config)), 400) if version.config else None),
        ("created", moment(version.created_at)),
    ])  # fmt: skip


def versions_table(versions: Sequence[ModelVersion]) -> Table:
    """Return a model's versions as a table, the newest first."""
    from torchrelay.cli.documents import main_metrics

    names = main_metrics(versions)
    rows = [
        (v.ref, ", ".join(v.aliases), *(f"{v.metrics[name]:.4g}" if name in v.metrics else "" for name in names),
         show(Kind.JOB, v.run) if v.run is not None else "", moment(v.created_at))
        for v in versions
    ]  # fmt: skip
    return table(("version", "aliases", *names, "run", "created"), rows, numbers=names)


def comparison(versions: Sequence[ModelVersion]) -> Table:
    """Return a table with a column for each version. Metrics are all there, of the rest what differs."""
    rows: list[tuple[str, list[Any]]] = [
        ("aliases", [", ".join(v.aliases) for v in versions]),
        ("handler", [v.handler for v in versions]),
    ]
    for name in sorted({name for v in versions for name in v.metrics}):
        rows.append((name, [f"{v.metrics[name]:.6g}" if name in v.metrics else "" for v in versions]))
    made = [_flat(v.lineage) for v in versions]
    for name in dict.fromkeys(name for lineage in made for name in lineage):
        values = [_words(lineage[name]) if name in lineage else "" for lineage in made]
        if len(set(values)) > 1:
            rows.append((name, values))
    rows.append(("created", [moment(v.created_at) for v in versions]))
    shown = [row for row in rows if any(row[1])]
    return table(("", *(v.ref for v in versions)), ([name, *cells] for name, cells in shown))


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested objects as one, with names such as hyperparameters.epochs."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _words(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


# --- aliases -----------------------------------------------------------------------------------------------


def promote(
    ctx: typer.Context,
    version: Annotated[
        str, typer.Argument(help="The version that goes live, such as digits@3.", metavar="NAME@VERSION",
                            autocompletion=complete_version)
    ],
    alias: Alias = CHAMPION,
    by: By = None,
    _json: Json = False,
) -> None:  # fmt: skip
    """Let an alias stand for a version. Jobs that are submitted as NAME@champion are served by it from now on."""
    session = Session.of(ctx)
    if "@" not in version:
        raise InvalidInput(f"say which version: torchrelay models promote {version}@1 --alias {alias}")
    with session.relay() as relay:
        promoted = relay.promote(version, alias=alias, by=by if by is not None else _user())
    document = {"model": promoted.name, "alias": alias, "version": promoted.version, "ref": promoted.ref}
    session.screen.show(document, f"{promoted.name}@{alias} is {promoted.ref}")


def rollback(ctx: typer.Context, name: Name, alias: Alias = CHAMPION, by: By = None, _json: Json = False) -> None:
    """Let an alias stand again for the version that it stood for before."""
    session = Session.of(ctx)
    with session.relay() as relay:
        back = relay.rollback(name, alias=alias, by=by if by is not None else _user())
    document = {"model": back.name, "alias": alias, "version": back.version, "ref": back.ref}
    session.screen.show(document, f"{back.name}@{alias} is {back.ref} again")


def history(
    ctx: typer.Context,
    name: Name,
    alias: Annotated[str | None, typer.Option(help="Only of this alias.")] = None,
    _json: Json = False,
) -> None:
    """Show which version was live when, the newest first."""
    session = Session.of(ctx)
    with session.relay() as relay:
        moves = relay.alias_history(name, alias)
    documents = [
        {"alias": move.alias, "version": move.version, "at": moment(move.at), "by": move.by, "rollback": move.rollback}
        for move in moves
    ]
    rows = [
        (moment(move.at), move.alias, f"{name}@{move.version}" if move.version is not None else "removed",
         "rollback" if move.rollback else "", move.by)
        for move in moves
    ]  # fmt: skip
    if moves or session.as_json:
        session.screen.show(documents, table(("since", "alias", "version", "", "by"), rows))
    else:
        session.screen.note(f"{name} has had no alias; `torchrelay models promote {name}@1` gives it one")


def _user() -> str:
    with suppress(OSError, KeyError, ImportError):  # what getpass raises where a user has no name
        return getpass.getuser()
    return ""


# --- recipes -----------------------------------------------------------------------------------------------


def recipes(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="A recipe.", autocompletion=complete_recipe)] = None,
    _json: Json = False,
) -> None:
    """List the recipes that a model can be trained by; with a NAME, its hyperparameters."""
    session = Session.of(ctx)
    found = known_recipes(session)
    if name is None:
        rows = [(recipe, short(schema.get("description", ""), 90)) for recipe, schema in found.items()]
        documents = [
            {"name": recipe, "description": schema.get("description", ""), "hyperparameters": schema}
            for recipe, schema in found.items()
        ]
        session.screen.show(documents, table(("recipe", "what it does"), rows))
        return
    if name not in found:
        raise RecipeNotFound(f"no recipe is called {name!r}; there are: {', '.join(found)}")
    schema = found[name]
    document = {"name": name, "description": schema.get("description", ""), "hyperparameters": schema}
    session.screen.show(document, schema.get("description", ""), "", hyperparameters_table(schema))


def known_recipes(session: Session) -> dict[str, Mapping[str, Any]]:
    """Return the JSON Schema of each recipe: the ready ones, and where there is a database those that workers have."""
    from torchrelay.recipes import READY
    from torchrelay_storage.registry import Registry

    found: dict[str, Mapping[str, Any]] = {}
    settings = session.settings
    if settings.database is not None or (settings.home / "torchrelay.db").exists():
        with session.database() as database:
            found = {lane.handler: lane.config for lane in Registry(database).lanes()}
    # An operator may have put another one in a ready one's place.
    ready = {name: kind.model_json_schema() for name, kind in READY.items() if name not in settings.recipes}
    return dict(sorted((found | ready).items()))


def hyperparameters_table(schema: Mapping[str, Any]) -> Table:
    """Return a recipe's hyperparameters as a table: how they are written, and what they are."""
    from torchrelay.hyperparameters import describe

    required = set(schema.get("required", ()))
    rows = [
        (f"--{name.replace('_', '-')}", describe(field, schema), "needed" if name in required else _default(field),
         field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    ]  # fmt: skip
    return table(("option", "takes", "default", ""), rows)


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    return "none" if value is None else _words(value)
