"""What `torchrelay watch` and `train --wait` see of a training run: a bar, its metrics and the curve of its losses.

Not here: how a view is kept up to date (`live`), and how a curve is drawn (`curves`).
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from torchrelay.cli import curves
from torchrelay.cli.documents import model_of
from torchrelay.cli.live import View
from torchrelay.cli.output import STATE_STYLES, ExitCode
from torchrelay.cli.run_documents import (
    metric_words,
    number,
    progress_words,
    run_document,
    run_word,
    stand,
    time_left,
)
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.states import TERMINAL, JobState

if TYPE_CHECKING:
    from torchrelay.core import Core
    from torchrelay_storage.runs import RunRow

BAR_WIDTH = 40  # columns
CHART_WIDTH = 100  # columns at most
CHART_HEIGHT = 16  # rows at most, the axis among them
OTHER_ROWS = 10  # of the view and of the prompt; the chart gets what is left of the terminal
LEAST_HEIGHT = 8  # rows; a lower chart says nothing


class OneRun:
    """Looks at a run."""

    def __init__(self, core: Core, job: int) -> None:
        self._core = core
        self._job = job
        self._read_at: float | None = None  # of the row whose metrics were read last
        self._curves: curves.Curves = {}

    def __call__(self) -> View:
        """Look. Raises JobNotFound."""
        job = self._core.job(self._job, with_output=False)
        run = self._core.runs.get(self._job)  # after the job: a run that has ended has all its metrics
        if run.updated_at is None or run.updated_at != self._read_at:
            self._curves, self._read_at = curves.curves_of(self._core.runs.metrics(self._job)), run.updated_at
        latest = curves.newest(self._curves)
        ended = job.state in TERMINAL
        code = ExitCode.FAILED if ended and job.state is not JobState.SUCCEEDED else ExitCode.DONE
        return View(
            run_document(run, job, latest), run_line(run, job, latest), run_view(run, job, self._curves), ended, code
        )


def run_line(run: RunRow, job: JobRow, metrics: dict[str, float]) -> str:
    """Return a run in one line."""
    words = [f"{show(Kind.JOB, job.id)} {run_word(run, job)}"]
    if job.state is JobState.RUNNING and run.phase:
        words.append(run.phase)
    if (progress := progress_words(run, job)) is not None:
        words.append(progress)
    if metrics:
        words.append(metric_words(metrics))
    if job.state is JobState.SUCCEEDED and run.version_ref:
        words.append(run.version_ref)
    if job.error is not None and job.state is not JobState.SUCCEEDED:
        words.append(f"{job.error.type}: {job.error.message}")
    return " · ".join(words)


def run_view(run: RunRow, job: JobRow, found: curves.Curves) -> Group:
    """Return a run as a terminal shows it."""
    word = run_word(run, job)
    heading = Text.assemble(
        (show(Kind.JOB, job.id), "bold"), f"  {model_of(job)}  {run.recipe}  ", (word, STATE_STYLES.get(word, "")),
        f" · {run.phase}" if word == "running" and run.phase else "",
    )  # fmt: skip
    parts: list[Any] = [heading]
    if run.steps:
        done = job.state is JobState.SUCCEEDED
        share = 1.0 if done else min(run.step / run.steps, 1.0)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=1.0, completed=share, width=BAR_WIDTH), f"{share:.0%}", time_left(run, job))
        parts += [bar, Text(", ".join(stand(run, job)))]
    if found:
        latest = [Text.assemble(name, " ", (number(value), "bold")) for name, value in curves.newest(found).items()]
        parts.append(Text("   ").join(latest))
    if run.best is not None and run.best_step is not None:
        parts.append(Text(f"best {number(run.best)}, at step {run.best_step:,}", style="dim"))
    if job.error is not None and job.state is not JobState.SUCCEEDED:
        parts.append(Text(f"{job.error.type}: {job.error.message}", style="red"))
        parts.append(Text(f"torchrelay logs {show(Kind.JOB, job.id)} shows what it said", style="dim"))
    if (drawn := draw(curves.losses(found))) is not None:
        parts += [Text(""), drawn]
    return Group(*parts)


def draw(found: curves.Curves) -> Text | None:
    """Return the curves in the size that the terminal has room for; None where there is none, or nothing to draw."""
    terminal = shutil.get_terminal_size()
    height = min(CHART_HEIGHT, terminal.lines - OTHER_ROWS)
    if height < LEAST_HEIGHT:
        return None
    chart = curves.chart(found, min(CHART_WIDTH, terminal.columns - 1), height)
    return Text.from_ansi(chart) if chart is not None else None
