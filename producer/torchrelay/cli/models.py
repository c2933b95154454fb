"""Commands about models: list, register, check, pause, resume.

Not here: their versions and aliases (`versions`), and what a handler does (the worker's side).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrelay.cli import versions
from torchrelay.cli.arguments import Model, complete_model
from torchrelay.cli.output import ExitCode
from torchrelay.cli.session import Json, Session, core_of
from torchrelay.cli.stack import need_torch
from torchrelay_storage.errors import InvalidInput

if TYPE_CHECKING:
    from torchrelay.client import Relay

group = typer.Typer(
    invoke_without_command=True,
    help="The registered models; register and check add and try one, promote moves an alias.",
)


def add(app: typer.Typer) -> None:
    """Add the commands."""
    versions.add(group)
    app.add_typer(group, name="models", rich_help_panel="Models")
    app.command(rich_help_panel="Models")(pause)
    app.command(rich_help_panel="Models")(resume)


@group.callback()
def models(ctx: typer.Context, _json: Json = False) -> None:
    """List the registered models with what waits, what runs, and who serves them."""
    if ctx.invoked_subcommand is not None:
        return
    from torchrelay.cli.documents import model_document, models_table, serving
    from torchrelay_storage.fleet import Fleet
    from torchrelay_storage.registry import Registry

    session = Session.of(ctx)
    with session.database() as database:
        found = Registry(database).models()
        alive = [w for w in Fleet(database).workers(session.settings.stale_after) if w.alive]
    served = serving(found, alive)
    if found or session.as_json:
        session.screen.show([model_document(m, served[m.newest.name]) for m in found], models_table(found, served))
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


@group.command()
def limit(
    ctx: typer.Context,
    name: Model,
    jobs: Annotated[
        str, typer.Argument(help="How many may wait before submits are refused, or none.", metavar="N|none")
    ],
    _json: Json = False,
) -> None:
    """Limit how many jobs of a model may wait: a submit of more is refused, and told when to try again."""
    session = Session.of(ctx)
    if jobs != "none" and not jobs.isdecimal():
        raise InvalidInput(f"a limit is a whole number of jobs, or none, not {jobs!r}")
    most = None if jobs == "none" else int(jobs)
    with session.relay() as relay:
        relay.limit_model(name, most)
    said = "any number of jobs of" if most is None else f"at most {most:,} jobs of"
    session.screen.show({"model": name, "max_queued": most}, f"{said} {name} may wait")


def pause(
    ctx: typer.Context,
    what: Annotated[
        str, typer.Argument(help="Name of a model, or id of a training run or a batch.", autocompletion=complete_model)
    ],
    _json: Json = False,
) -> None:
    """Let nothing of a model or batch be started until it is resumed. Submits go on; what runs, ends.

    A training run that is under way writes a checkpoint and gives its device free; resume lets it go on from there.
    """
    _set_paused(ctx, what, paused=True)


def resume(
    ctx: typer.Context,
    what: Annotated[
        str, typer.Argument(help="Name of a model, or id of a training run or a batch.", autocompletion=complete_model)
    ],
    _json: Json = False,
) -> None:
    """End a pause."""
    _set_paused(ctx, what, paused=False)


def _set_paused(ctx: typer.Context, what: str, *, paused: bool) -> None:
    session = Session.of(ctx)
    with session.relay() as relay:
        kind = _pause(relay, what, paused=paused)
    word = "paused" if paused else "resumed"
    session.screen.show({kind: what, "paused": paused}, f"{kind} {what} is {word}")


def _pause(relay: Relay, what: str, *, paused: bool) -> str:
    from torchrelay.cli.runs import find_run
    from torchrelay_storage import ids

    core, head = core_of(relay), what[:2].lower()  # no name of a model looks like the id of something that exists
    if head == "j_":
        find_run(core, what)
        run = relay.run(what)
        if not (run.pause() if paused else run.resume()):
            raise InvalidInput(f"run {what} has ended; there is nothing to {'pause' if paused else 'resume'}")
        return "run"
    if head != "b_":
        core.pause(what) if paused else core.resume(what)
        return "model"
    number = ids.read(ids.Kind.BATCH, what)
    if paused:
        core.pause_batch(number)
    else:
        core.resume_batch(number, core.batches.get(number).model)
    return "batch"
