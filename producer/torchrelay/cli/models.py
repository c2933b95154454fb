"""Commands about models: list, register, check, pause, resume. Not here: what a handler does (the worker's side)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrelay.cli.arguments import Model, complete_model
from torchrelay.cli.output import ExitCode, table
from torchrelay.cli.session import Json, Session
from torchrelay.cli.stack import need_torch
from torchrelay_storage.errors import InvalidInput

if TYPE_CHECKING:
    from torchrelay.core import Core

group = typer.Typer(invoke_without_command=True, help="The registered models; register and check add and try one.")


def add(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(group, name="models", rich_help_panel="Models")
    app.command(rich_help_panel="Models")(pause)
    app.command(rich_help_panel="Models")(resume)


@group.callback()
def models(ctx: typer.Context, _json: Json = False) -> None:
    """List the registered models with what waits, what runs, and who serves them."""
    if ctx.invoked_subcommand is not None:
        return
    from torchrelay.cli.documents import model_document, serving
    from torchrelay_storage.fleet import Fleet
    from torchrelay_storage.registry import Registry

    session = Session.of(ctx)
    with session.database() as database:
        found = Registry(database).models()
        alive = [w for w in Fleet(database).workers(session.settings.stale_after) if w.alive]
    served = serving(found, alive)
    rows = [
        (m.newest.ref, m.newest.handler, "paused" if m.newest.paused else "", m.waiting, m.running,
         len(served[m.newest.name]), m.versions)
        for m in found
    ]  # fmt: skip
    columns = ("model", "handler", "", "waiting", "running", "workers", "versions")
    if found or session.as_json:
        session.screen.show(
            [model_document(m, served[m.newest.name]) for m in found], table(columns, rows, numbers=columns[3:])
        )
    else:
        session.screen.note("no model is registered; `torchrelay models register` adds one, `torchrelay demo` too")


@group.command()
def register(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, '.', '_', '-'.")],
    *,
    handler: Annotated[str, typer.Option(help="Name under which workers find the Python class.")],
    weights: Annotated[Path | None, typer.Option(help="File to upload; its sha256 is checked at each load.")] = None,
    config: Annotated[
        str | None, typer.Option(help="The handler's own settings: a JSON object, or @file.json.")
    ] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Jobs that travel together; workers find it out.")] = None,
    _json: Json = False,
) -> None:
    """Add a model, or the next version of one. Running workers pick it up."""
    from torchrelay.cli.documents import version_document
    from torchrelay.cli.inputs import read_object

    session = Session.of(ctx)
    settings = read_object(config, "--config")
    with session.relay(create=True) as relay:
        version = relay.register_model(name, handler=handler, weights=weights, config=settings, chunk_size=chunk_size)
    session.screen.show(version_document(version), f"registered {version.ref}")


@group.command()
def check(
    ctx: typer.Context,
    name: Model,
    input_: Annotated[str, typer.Option("--input", "-i", help="JSON, @file, or - for standard input.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    _json: Json = False,
) -> None:
    """Try a model on one input, in a process of its own, before it serves: load, preprocess, forward, decode."""
    session = Session.of(ctx)
    need_torch()
    with session.database() as database:
        from torchrelay_storage.registry import Registry

        Registry(database).resolve(name)
    given = input_[1:] if input_.startswith("@") else "-"
    if given != "-" and not Path(given).is_file():
        raise InvalidInput(f"the input file {given} cannot be read")
    command = [sys.executable, "-m", "torchrelay_worker.check", name, "--input", given, "--device", device]
    if session.as_json:
        command.append("--json")
    sys.stdout.flush()
    done = subprocess.run(
        command,
        input=None if given != "-" or input_ == "-" else input_.encode(),
        env=os.environ | session.settings.as_environment(),
        check=False,
    )
    if done.returncode:
        raise typer.Exit(done.returncode if done.returncode in (1, 2, 3) else ExitCode.FAILED)


def pause(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(help="Name of a model, or id of a batch.", autocompletion=complete_model)],
    _json: Json = False,
) -> None:
    """Let nothing of a model or batch be started until it is resumed. Submits go on; what runs, ends."""
    _set_paused(ctx, what, paused=True)


def resume(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(help="Name of a model, or id of a batch.", autocompletion=complete_model)],
    _json: Json = False,
) -> None:
    """End a pause."""
    _set_paused(ctx, what, paused=False)


def _set_paused(ctx: typer.Context, what: str, *, paused: bool) -> None:
    session = Session.of(ctx)
    with session.core() as core:
        kind = _pause(core, what, paused=paused)
    word = "paused" if paused else "resumed"
    session.screen.show({kind: what, "paused": paused}, f"{kind} {what} is {word}")


def _pause(core: Core, what: str, *, paused: bool) -> str:
    from torchrelay_storage import ids

    if what[:2].lower() != "b_":  # no name of a model looks like the id of a batch that exists
        core.pause(what) if paused else core.resume(what)
        return "model"
    number = ids.read(ids.Kind.BATCH, what)
    if paused:
        core.pause_batch(number)
    else:
        core.resume_batch(number, core.batches.get(number).model)
    return "batch"
