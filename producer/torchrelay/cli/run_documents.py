"""Training runs as JSON documents and as tables. Reads rows; asks nothing itself. Not here: their curves (`curves`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from torchrelay.cli.documents import job_document, model_of
from torchrelay.cli.output import facts, moment, short, span, table
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.states import TERMINAL, JobState

if TYPE_CHECKING:
    from torchrelay_storage.run_writer import CheckpointRow, Point
    from torchrelay_storage.runs import RunRow


def run_document(run: RunRow, job: JobRow, metrics: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return a run as JSON shows it: a job, and how far it is. `metrics`: the newest of each name, where asked for."""
    document = {
        **job_document(job),
        "paused": run.paused,
        "progress": {
            "phase": run.phase, "step": run.step, "steps": run.steps, "epoch": run.epoch, "epochs": run.epochs,
            "examples_per_s": run.examples_per_s, "eta": run.eta if job.state is JobState.RUNNING else None,
        },
        "best": {"step": run.best_step, "value": run.best} if run.best is not None else None,
        "deaths": run.deaths,
        "split": dict(run.split),
        "dataset_sha256": run.dataset_sha256,
        "started_at": moment(run.started_at),
        "updated_at": moment(run.updated_at),
    }  # fmt: skip
    return document | ({"metrics": dict(metrics)} if metrics is not None else {})


def run_word(run: RunRow, job: JobRow) -> str:
    """Return one word for how a run is: a job's states, and pausing (it writes its checkpoint) and paused."""
    if not run.paused or job.state in TERMINAL:
        return job.state.value
    return "pausing" if job.state is JobState.RUNNING else "paused"


def run_facts(run: RunRow, job: JobRow, metrics: Mapping[str, float], checkpoints: Sequence[CheckpointRow]) -> Table:
    """Return everything about one run."""
    word = run_word(run, job)
    took = job.finished_at - run.started_at if job.finished_at is not None and run.started_at is not None else None
    return facts([
        ("run", show(Kind.JOB, job.id)),
        ("state", f"{word}, {run.phase}" if word == "running" and run.phase else word),
        ("model", model_of(job)),
        ("recipe", run.recipe),
        ("progress", progress_words(run, job)),
        ("metrics", metric_words(metrics)),
        ("best", f"{number(run.best)} at step {run.best_step:,}" if run.best is not None and run.best_step else None),
        ("split", ", ".join(f"{name} {value}" for name, value in run.split.items())),
        ("dataset", f"sha256 {run.dataset_sha256}" if run.dataset_sha256 else None),
        ("checkpoints", ", ".join(f"step {row.step:,} at {moment(row.created_at)}" for row in checkpoints)),
        ("deaths", f"{run.deaths} of its process since the last checkpoint" if run.deaths else None),
        ("priority", job.priority),
        ("failures", f"{job.failures} of {job.max_attempts} attempts" if job.failures else None),
        ("timeout", span(job.timeout) if job.timeout is not None else None),
        ("tenant", job.tenant),
        ("key", job.key),
        ("metadata", job.metadata),
        ("created", moment(job.created_at)),
        ("not before", moment(job.not_before)),
        ("expires", moment(job.expires_at)),
        ("started", moment(run.started_at)),
        ("finished", f"{moment(job.finished_at)}{f', {span(took)} after its start' if took is not None else ''}"
         if job.finished_at is not None else None),
        ("worker", job.worker),
        ("error", f"{job.error.type}: {job.error.message}" if job.error else None),
        ("traceback", job.error.traceback if job.error else None),
    ])  # fmt: skip


def runs_table(found: Sequence[tuple[RunRow, JobRow]], now: float) -> Table:
    """Return runs as a table. `now` is seconds since 1970 on the database's clock."""
    columns = ["id", "state", "model", "recipe", "progress", "best", "age", "took", "error"]
    cells = [
        [show(Kind.JOB, job.id), run_word(run, job), model_of(job), run.recipe, _short_progress(run),
         number(run.best) if run.best is not None else None, span(now - job.created_at), _took(run, job),
         short(f"{job.error.type}: {job.error.message}", 48) if job.error else None]
        for run, job in found
    ]  # fmt: skip
    used = [i for i, name in enumerate(columns) if name not in ("best", "error") or any(c[i] for c in cells)]
    return table(
        [columns[i] for i in used], ([c[i] for i in used] for c in cells), numbers=("progress", "best", "age", "took")
    )


def progress_words(run: RunRow, job: JobRow) -> str | None:
    """Return how far a run is: epoch, step, speed and how long it has to go."""
    if not run.steps:
        return None
    return ", ".join(word for word in (*stand(run, job), time_left(run, job)) if word)


def stand(run: RunRow, job: JobRow) -> list[str]:
    """Return where a run that has begun stands, and how fast it goes, in words."""
    words = [f"epoch {run.epoch:,} of {run.epochs:,}", f"step {run.step:,} of {run.steps:,}"]
    if run.examples_per_s and job.state is JobState.RUNNING:
        words.append(f"{run.examples_per_s:,.0f} examples/s")
    return words


def time_left(run: RunRow, job: JobRow) -> str:
    """Return how long a run has to go, where that is known."""
    if not run.eta or run.paused or job.state is not JobState.RUNNING:
        return ""
    return f"{span(run.eta)} to go"


def metric_words(metrics: Mapping[str, float]) -> str:
    """Return the newest metrics in a line."""
    return ", ".join(f"{name} {number(value)}" for name, value in metrics.items())


def metrics_table(rows: Sequence[tuple[int, int, Mapping[str, float]]]) -> Table:
    """Return metrics as a table: a row for each step, a column for each name."""
    names = list(dict.fromkeys(name for *_, values in rows for name in values))
    cells = [
        [f"{step:,}", f"{epoch:,}", *(number(values[name]) if name in values else None for name in names)]
        for step, epoch, values in rows
    ]
    columns = ["step", "epoch", *names]
    return table(columns, cells, numbers=columns)


def point_document(point: Point) -> dict[str, Any]:
    """Return a point of a metric as JSON shows it."""
    return {"name": point.name, "step": point.step, "epoch": point.epoch, "value": point.value}


def checkpoint_document(row: CheckpointRow) -> dict[str, Any]:
    """Return a checkpoint as JSON shows it."""
    return {"step": row.step, "value": row.value, "created_at": moment(row.created_at), "files": dict(row.files)}


def number(value: float | None) -> str:
    """Return a metric for people: four digits that count."""
    return "-" if value is None else f"{value:.4g}"


def _short_progress(run: RunRow) -> str | None:
    return f"{100 * run.step // run.steps} %" if run.steps else None


def _took(run: RunRow, job: JobRow) -> str | None:
    if run.started_at is None or job.finished_at is None:
        return None
    return span(job.finished_at - run.started_at)
