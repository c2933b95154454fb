"""`torchrelay result`: a job's result, or a batch's in the order of its inputs, on standard output or in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchrelay.cli.arguments import Id, Wait, WaitLimit, kind_of
from torchrelay.cli.output import ExitCode, Screen, to_json
from torchrelay.cli.session import Json, Session, core_of
from torchrelay_storage import ids
from torchrelay_storage.errors import InvalidInput, JobFailed, RelayError, WaitTimeout
from torchrelay_storage.ids import Kind, show

if TYPE_CHECKING:
    from torchrelay.core import Core
    from torchrelay_storage.job_reader import JobRow


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Jobs")(result)


def result(
    ctx: typer.Context,
    id_: Id,
    *,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file.")] = None,
    wait: Wait = False,
    wait_limit: WaitLimit = None,
    _json: Json = False,
) -> None:
    """Print a job's result, or a batch's as JSON lines in the order of its inputs. Exits with 1 if one has none."""
    session = Session.of(ctx)
    screen = session.screen
    waits = wait or wait_limit is not None
    with session.relay() as relay:
        core = core_of(relay)
        if kind_of(id_) is Kind.JOB:
            if waits:
                relay.job(id_).wait(wait_limit)
            with _writing(out):
                show_result(screen, core, core.job(ids.read(Kind.JOB, id_)), out)
            return
        batch = relay.batch(id_)
        if waits:
            batch.wait(wait_limit, progress=not session.as_json and sys.stderr.isatty())
        with _writing(out):
            _show_results(screen, core, ids.read(Kind.BATCH, id_), out)


@contextmanager
def _writing(out: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if out is None:
            raise
        raise InvalidInput(f"{out} cannot be written: {error.strerror or error}") from error


def show_result(screen: Screen, core: Core, row: JobRow, out: Path | None) -> None:
    value = core.outcome(row)
    if out is not None:
        write_value(value, out)
    if screen.as_json:
        document = {"id": show(Kind.JOB, row.id), "state": row.state.value}
        screen.document(document | ({"file": str(out)} if out is not None else {"result": value}))
    elif out is not None:
        screen.note(f"written to {out}")
    elif isinstance(value, bytes):
        if sys.stdout.isatty():
            raise InvalidInput(f"the result is {len(value):,} bytes, which are not for a terminal; use --out FILE")
        sys.stdout.buffer.write(value)
        sys.stdout.flush()
    else:
        screen.line(to_json(value))


def _show_results(screen: Screen, core: Core, batch: int, out: Path | None) -> None:
    counts = core.batches.counts(batch)
    without = 0
    lines = _result_lines(core, batch)
    if out is None:
        for line in lines:
            without += "result" not in line
            screen.document(line)
    else:
        with screen.progress("results", counts.total) as bar, out.open("w", encoding="utf-8") as file:
            for line in lines:
                without += "result" not in line
                file.write(to_json(line) + "\n")
                bar.advance()
        screen.note(f"written to {out}")
    if not counts.done:
        raise WaitTimeout(
            f"batch {show(Kind.BATCH, batch)} has not ended: {counts.ended:,} of {counts.total:,} jobs have; "
            "what comes before the first that has not is here, --wait waits for all"
        )
    if without:
        screen.note(f"{without:,} jobs have no result; each line says why")
        raise typer.Exit(ExitCode.FAILED)


def _result_lines(core: Core, batch: int) -> Iterator[dict[str, Any]]:
    from torchrelay.batches import InOrder

    walk = InOrder(core, batch)
    while True:
        rows, _ = walk.step()
        if not rows:
            return
        for row in rows:
            line: dict[str, Any] = {"id": show(Kind.JOB, row.id), "state": row.state.value}
            try:
                line["result"] = core.outcome(row)
            except JobFailed as error:
                line["error"] = {"type": error.kind, "message": error.message}
            except RelayError as error:
                line["error"] = {"type": type(error).__name__, "message": str(error)}
            yield line


def write_value(value: Any, path: Path) -> None:
    """Write a result to a file: bytes as they are, an array as .npy where the name says so, the rest as JSON."""
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif path.suffix == ".npy" and hasattr(value, "dtype"):
        import numpy

        with path.open("wb") as file:
            numpy.save(file, numpy.asarray(value), allow_pickle=False)
    else:
        path.write_text(to_json(value) + "\n", encoding="utf-8")
