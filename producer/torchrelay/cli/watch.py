"""`torchrelay watch`: what is seen of a job, a batch, everything. Not here: runs (`watch_runs`), screens (`live`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from torchrelay.cli.arguments import kind_of
from torchrelay.cli.live import View, follow
from torchrelay.cli.output import ExitCode, table
from torchrelay.cli.session import Json, Session
from torchrelay_storage import ids
from torchrelay_storage.ids import Kind
from torchrelay_storage.job_reader import JobFilter
from torchrelay_storage.states import TERMINAL, JobState

if TYPE_CHECKING:
    from torchrelay.core import Core

JOBS = 12  # the newest, in the view of everything
OPEN = tuple(state for state in JobState if state not in TERMINAL)


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Jobs")(watch)


def watch(
    ctx: typer.Context,
    id_: Annotated[
        str | None, typer.Argument(help="A job, a run or a batch; without it, everything.", metavar="[ID]")
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 1.0,
    _json: Json = False,
) -> None:
    """Watch a job, a training run or a batch until it ends, or everything until Ctrl-C."""
    session = Session.of(ctx)
    with session.core() as core:
        look: Callable[[], View]
        if id_ is None:
            look = Everything(core)
        elif kind_of(id_) is Kind.JOB:
            look = look_at(core, ids.read(Kind.JOB, id_))
        else:
            look = OneBatch(core, ids.read(Kind.BATCH, id_))
        code = follow(session.screen, look, every).code
    raise typer.Exit(code)


def look_at(core: Core, job: int) -> Callable[[], View]:
    """Return what looks at a job, or at a training run. Raises JobNotFound."""
    if core.job(job, with_output=False).trains is None:
        return OneJob(core, job)
    from torchrelay.cli.watch_runs import OneRun

    return OneRun(core, job)


class OneJob:
    """Looks at a job of inference."""

    def __init__(self, core: Core, job: int) -> None:
        self._core = core
        self._job = job

    def __call__(self) -> View:
        """Look."""
        from torchrelay.cli.documents import job_document, job_facts

        row = self._core.job(self._job, with_output=False)
        document = job_document(row)
        ended = row.state in TERMINAL
        code = ExitCode.FAILED if ended and row.state is not JobState.SUCCEEDED else ExitCode.DONE
        return View(document, f"{document['id']} {row.state}", job_facts(row), ended, code)


class OneBatch:
    """Looks at a batch; knows how fast it goes from what it saw before."""

    def __init__(self, core: Core, batch: int) -> None:
        self._core = core
        self._batch = batch
        self._seen: list[tuple[float, int]] = []  # monotonic seconds, jobs ended

    def __call__(self) -> View:
        """Look."""
        from torchrelay.cli.documents import batch_document, batch_facts, counts_document

        row, counts = self._core.batches.get(self._batch), self._core.batches.counts(self._batch)
        document = batch_document(row, counts)
        words = ", ".join(f"{n:,} {state}" for state, n in counts_document(counts).items() if n)
        failed = counts.failed + counts.cancelled + counts.expired
        code = ExitCode.FAILED if counts.done and failed else ExitCode.DONE
        speed = self._speed(counts.ended)
        shown = batch_facts(row, counts)
        if speed is not None and not counts.done:
            left = f", {counts.open / speed:,.0f} s to go" if speed and counts.closed else ""
            shown.add_row("speed", f"{speed:,.0f} jobs/s{left}")
        return View(document, f"{document['id']} {counts.ended:,}/{counts.total:,} {words}", shown, counts.done, code)

    def _speed(self, ended: int) -> float | None:
        self._seen = [*self._seen[-9:], (time.monotonic(), ended)]
        (first, before), (last, now) = self._seen[0], self._seen[-1]
        return (now - before) / (last - first) if last > first else None


class Everything:
    """Looks at the models, the workers, the runs under way and the newest jobs."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def __call__(self) -> View:
        """Look."""
        from torchrelay.cli.documents import job_document, jobs_table, model_document, serving
        from torchrelay.cli.run_documents import run_document, runs_table

        core = self._core
        models, alive = core.models(), [w for w in core.workers() if w.alive]
        rows, now = core.jobs.page(JobFilter(), limit=JOBS), core.db.now()
        names = serving(models, alive)
        waiting, running = sum(m.waiting for m in models), sum(m.running for m in models)
        runs = core.runs.page(states=OPEN, limit=JOBS)
        line = f"{waiting:,} waiting, {running:,} running, {len(alive)} workers"
        if runs:
            line += f", {len(runs)} training runs under way"
        document = {
            "waiting": waiting, "running": running, "workers": [w.name for w in alive],
            "models": [model_document(m, names[m.newest.name]) for m in models],
            "runs": [run_document(run, job) for run, job in runs],
            "jobs": [job_document(row) for row in rows],
        }  # fmt: skip
        columns = ("model", "waiting", "running", "workers")
        parts: list[Any] = [
            Text(line, style="bold"),
            table(columns, ((m.newest.ref, f"{m.waiting:,}", f"{m.running:,}", len(names[m.newest.name]))
                            for m in models), numbers=columns[1:]),
        ]  # fmt: skip
        if runs:
            parts += [Text(""), runs_table(runs, now)]
        if rows:
            parts += [Text(""), jobs_table(rows, now)]
        return View(document, line, Group(*parts, Text("Ctrl-C ends", style="dim")))
