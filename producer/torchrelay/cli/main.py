"""The command line: its commands, its global options, and how it ends. Not here: what a command does, and how it looks.

Modules that a command needs are imported when it runs, so that `--help` and shell completion answer at once.
"""

from __future__ import annotations

import logging
import signal
import sys
from importlib.metadata import version
from typing import Annotated, Any

import structlog
import typer
from typer.core import TyperGroup

from torchrelay.cli import batches, db, jobs, models, results, runs, stack, train, watch
from torchrelay.cli.output import ExitCode, exit_code, to_json
from torchrelay.cli.session import Json, Session
from torchrelay_storage.errors import RelayError

INTERRUPTED = 128 + signal.SIGINT


class Commands(TyperGroup):
    """The group of all commands: turns typed errors into a message and an exit code, in one place."""

    def main(self, args: Any = None, *rest: Any, **more: Any) -> Any:
        """Run the command line. Whether JSON is wanted is seen here, since errors of usage come before any command."""
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        more["obj"] = Session(as_json="--json" in options)
        if "--json" not in options or not more.get("standalone_mode", True):
            return super().main(words, *rest, **more)
        try:
            code = super().main(words, *rest, **(more | {"standalone_mode": False}))
        except Exception as error:
            # A UsageError of click, or of the copy of it that typer carries: told by what it can do.
            if not hasattr(error, "format_message"):
                raise
            report = {"type": "Usage", "message": error.format_message(), "next": "--help shows what there is"}
            sys.stderr.write(to_json({"error": report}) + "\n")
            sys.exit(ExitCode.USAGE)
        sys.exit(code if isinstance(code, int) else ExitCode.DONE)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a RelayError becomes one message without a traceback."""
        session: Session = ctx.obj
        try:
            return super().invoke(ctx)
        except RelayError as error:
            session.screen.error(error)
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="torchrelay",
    cls=Commands,
    help="A durable queue for PyTorch inference and training. Start with `torchrelay demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchrelay {version('torchrelay')}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    *,
    home: Annotated[str | None, typer.Option(help="Folder of the embedded database, Redis and artifacts.")] = None,
    database: Annotated[str | None, typer.Option(help="sqlite:///path or postgresql://…", metavar="URL")] = None,
    broker: Annotated[str | None, typer.Option(help="redis://… of another Redis.", metavar="URL")] = None,
    artifacts: Annotated[str | None, typer.Option(help="file:///… or s3://…", metavar="URL")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, on standard error.")] = False,
    _json: Json = False,
    _version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """A durable queue for PyTorch inference and training. Start with `torchrelay demo`."""
    session = Session.of(ctx)
    session.arguments |= {"home": home, "database": database, "broker": broker, "artifacts": artifacts}
    # What a user should know, the commands say in words of their own.
    _log_to_stderr(logging.DEBUG if verbose else logging.ERROR, as_json=session.as_json)


def _log_to_stderr(level: int, *, as_json: bool) -> None:
    """Standard output belongs to results."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


stack.add_first(app)
jobs.add(app)
results.add(app)
batches.add(app)
watch.add(app)
train.add(app)
runs.add(app)
models.add(app)
stack.add_last(app)
db.add(app)


def main() -> None:
    """The entry point `torchrelay`."""
    try:
        app()
    except BrokenPipeError:  # `torchrelay list | head`
        sys.stderr.close()
        sys.exit(128 + signal.SIGPIPE)
