"""Commands that look at training runs: metrics and logs; `list --runs`, `status` and pauses ask here too.

Not here: submitting one (`train`), and watching one (`watch_runs`).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrelay.cli.arguments import kind_of
from torchrelay.cli.output import moment
from torchrelay.cli.session import Json, Session
from torchrelay_storage import ids
from torchrelay_storage.errors import InvalidInput, JobNotFound
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.states import TERMINAL, JobState

if TYPE_CHECKING:
    from torchrelay.core import Core
    from torchrelay_storage.job_reader import JobRow
    from torchrelay_storage.runs import LogLine, RunRow

PANEL = "Training"
LOG_PAGE = 1_000  # lines
FOLLOW_SECONDS = 1.0  # between two looks for new lines

RunId = Annotated[str, typer.Argument(help="Id of a training run (j_…).", metavar="ID")]


def add(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(rich_help_panel=PANEL)(metrics)
    app.command(rich_help_panel=PANEL)(logs)


# --- metrics -----------------------------------------------------------------------------------------------


def metrics(
    ctx: typer.Context,
    id_: RunId,
    *,
    name: Annotated[list[str] | None, typer.Option("--name", help="Only this metric; may be repeated.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this PNG.", metavar="FILE.png")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows of the table, the last ones.")] = 20,
    _json: Json = False,
) -> None:
    """Show a run's metrics: a curve and a table; with --plot, a picture; with --json, every point."""
    from torchrelay.cli import curves
    from torchrelay.cli.run_documents import metrics_table, point_document

    session = Session.of(ctx)
    screen = session.screen
    with session.core() as core:
        run, _ = find_run(core, id_)
        if name:
            _check_names(core, run, name)
        points = core.runs.metrics(run.job, name)
    found = curves.curves_of(points)
    if plot is not None:
        curves.save(found, plot, f"{run.version_ref or run.model} · {run.recipe} · {id_}")
    if screen.as_json:
        document = {"id": id_, "model": run.version_ref or run.model, "points": [point_document(p) for p in points]}
        screen.document(document | ({"file": str(plot)} if plot is not None else {}))
    elif plot is not None:
        screen.note(f"written to {plot}")
    elif not found:
        screen.note("the run has no metrics yet")
    else:
        rows = curves.rows(found)
        if sys.stdout.isatty():
            from torchrelay.cli.watch_runs import draw

            if (chart := draw(found if name else curves.losses(found))) is not None:
                screen.show(None, chart, "")
        screen.show(None, metrics_table(rows[-limit:]))
        if len(rows) > limit:
            screen.note(f"{len(rows) - limit:,} rows before these; --limit shows more")


def _check_names(core: Core, run: RunRow, names: list[str]) -> None:
    there = dict.fromkeys(point.name for point in core.runs.metrics(run.job))
    if bad := [name for name in names if name not in there]:
        raise InvalidInput(f"the run has no metric {bad[0]!r}; it has: {', '.join(there) or 'none yet'}")


# --- logs --------------------------------------------------------------------------------------------------


def logs(
    ctx: typer.Context,
    id_: RunId,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    tail: Annotated[int | None, typer.Option(min=1, max=10_000, help="Only the last lines.", metavar="N")] = None,
    _json: Json = False,
) -> None:
    """Print what a run's process said."""
    session = Session.of(ctx)
    screen = session.screen
    with session.core() as core:
        run, job = find_run(core, id_)
        after: int | None = None
        while True:
            # Asked before the lines: what an ended run said is all there.
            ended = job.state in TERMINAL
            lines = _after(core, run.job, after)
            if after is None and tail is not None:
                lines = iter(deque(lines, maxlen=tail))
            for line in lines:
                after = line.id
                if screen.as_json:
                    screen.document({"at": moment(line.at), "line": line.line})
                else:
                    screen.line(line.line)
            if not follow or ended:
                break
            time.sleep(FOLLOW_SECONDS)
            job = core.job(run.job, with_output=False)
    if after is None:
        screen.note("it said nothing" if ended else "it has said nothing yet")


def _after(core: Core, run: int, after: int | None) -> Iterator[LogLine]:
    """The lines of a run's log after one that is known."""
    while lines := core.runs.logs(run, after=after, limit=LOG_PAGE):
        yield from lines
        after = lines[-1].id


# --- what other commands ask -------------------------------------------------------------------------------


def find_run(core: Core, text: str) -> tuple[RunRow, JobRow]:
    """Return a run by its shown id. Raises JobNotFound, where it is the id of something else too."""
    if kind_of(text) is not Kind.JOB:
        raise JobNotFound(f"{text} is the id of a batch; pass that of a training run (`torchrelay list --runs`)")
    job = core.job(ids.read(Kind.JOB, text), with_output=False)
    if job.trains is None:
        raise JobNotFound(f"{text} is a job of inference; pass the id of a training run (`torchrelay list --runs`)")
    return core.runs.get(job.id), job


def show_run(session: Session, core: Core, text: str) -> None:
    """Print everything about one run."""
    from torchrelay.cli import curves
    from torchrelay.cli.documents import attempt_document, attempts_shown
    from torchrelay.cli.run_documents import checkpoint_document, run_document, run_facts

    run, job = find_run(core, text)
    latest, checkpoints = curves.newest(curves.curves_of(core.runs.metrics(run.job))), core.runs.checkpoints(run.job)
    tries = core.jobs.attempts(run.job)
    document = run_document(run, job, latest) | {
        "checkpoints": [checkpoint_document(row) for row in checkpoints],
        "attempts": [attempt_document(a) for a in tries],
    }
    session.screen.show(document, run_facts(run, job, latest, checkpoints), *attempts_shown(tries))


def list_runs(session: Session, model: str | None, states: list[JobState], limit: int, before: str | None) -> None:
    """Print runs, the newest first."""
    from torchrelay.cli.run_documents import run_document, runs_table

    screen = session.screen
    last = ids.read(Kind.JOB, before) if before is not None else None
    with session.core() as core:
        # By the bare name: a model whose first run is under way has no version yet.
        found = core.runs.page(
            model=model.partition("@")[0] if model is not None else None, states=tuple(states), limit=limit, before=last
        )
        if screen.as_json:
            screen.document([run_document(run, job) for run, job in found])
        elif found:
            screen.show(None, runs_table(found, core.db.now()))
            if len(found) == limit:
                screen.note(f"there may be more: --before {show(Kind.JOB, found[-1][1].id)}")
        else:
            screen.note("there is no such run; `torchrelay train` submits one")
