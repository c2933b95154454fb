"""Jobs, batches and models as JSON documents and as tables. Reads rows; asks nothing itself.

Not here: training runs (`run_documents`), and versions side by side (`versions`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from torchrelay.cli.output import facts, moment, short, span, table
from torchrelay_storage.attempts import Attempt
from torchrelay_storage.batch_store import BatchRow, Counts
from torchrelay_storage.fleet import WorkerRow
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.registry import ModelRow, ModelVersion
from torchrelay_storage.states import JobState

STATES = tuple(state.value for state in JobState)


def job_document(row: JobRow) -> dict[str, Any]:
    """Return a job as JSON shows it. Times are ISO 8601 in UTC; its result is a command of its own."""
    return {
        "id": show(Kind.JOB, row.id),
        "kind": kind_word(row),
        "state": row.state.value,
        "model": model_of(row),
        **({"recipe": recipe_of(row)} if row.trains is not None else {}),
        "version": row.version if row.trains is None else row.trained,
        "handler_revision": row.handler_revision,
        "batch": _batch_id(row.batch),
        "priority": row.priority,
        "failures": row.failures,
        "max_attempts": row.max_attempts,
        "timeout": row.timeout,
        "tenant": row.tenant,
        "key": row.key,
        "metadata": row.metadata,
        "worker": row.worker,
        "error": {"type": row.error.type, "message": row.error.message, "traceback": row.error.traceback}
        if row.error
        else None,
        "created_at": moment(row.created_at),
        "not_before": moment(row.not_before),
        "expires_at": moment(row.expires_at),
        "finished_at": moment(row.finished_at),
    }


def model_of(row: JobRow) -> str:
    """Return the version that runs a job; of a training run the model's name, with the version that it registered."""
    if row.trains is None:
        return f"{row.model}@{row.version}"
    return row.trains if row.trained is None else f"{row.trains}@{row.trained}"


def kind_word(row: JobRow) -> str:
    """Return `inference` or `training`."""
    return "inference" if row.trains is None else "training"


def recipe_of(row: JobRow) -> str:
    """Return the recipe of a training run: the name of the lane that it is in has it."""
    return row.model.partition(":")[2]


def job_facts(row: JobRow) -> Table:
    """Return everything about one job."""
    took = row.finished_at - row.created_at if row.finished_at is not None else None
    return facts([
        ("job", show(Kind.JOB, row.id)),
        ("state", row.state.value),
        ("model", model_of(row)),
        ("batch", _batch_id(row.batch)),
        ("priority", row.priority),
        ("failures", f"{row.failures} of {row.max_attempts} attempts" if row.failures else None),
        ("timeout", span(row.timeout) if row.timeout is not None else None),
        ("tenant", row.tenant),
        ("key", row.key),
        ("metadata", row.metadata),
        ("created", moment(row.created_at)),
        ("not before", moment(row.not_before)),
        ("expires", moment(row.expires_at)),
        ("finished", f"{moment(row.finished_at)}, {span(took)} after the submit" if took is not None else None),
        ("worker", row.worker),
        ("handler", f"revision {row.handler_revision}" if row.handler_revision is not None else None),
        ("error", f"{row.error.type}: {row.error.message}" if row.error else None),
        ("traceback", row.error.traceback if row.error else None),
    ])  # fmt: skip


def attempt_document(attempt: Attempt) -> dict[str, Any]:
    """Return a try of a job as JSON shows it."""
    error = attempt.error
    return {
        "number": attempt.number, "outcome": attempt.outcome, "worker": attempt.worker,
        "started_at": moment(attempt.started_at), "ended_at": moment(attempt.ended_at),
        "error": {"type": error.type, "message": error.message, "traceback": error.traceback} if error else None,
        "worker_ended": attempt.worker_ended,
    }  # fmt: skip


def attempts_shown(attempts: Sequence[Attempt]) -> list[object]:
    """Return the tries of a job as a table, with an empty line before it; nothing where there is none."""
    if not attempts:
        return []
    columns = ["attempt", "started", "took", "worker", "outcome", "error"]
    cells = [
        [a.number, moment(a.started_at),
         span(a.ended_at - a.started_at) if a.ended_at is not None and a.started_at is not None else None,
         a.worker, f"{a.outcome}, {a.worker_ended}" if a.outcome == "lost" and a.worker_ended else a.outcome,
         short(f"{a.error.type}: {a.error.message}", 96) if a.error else None]
        for a in attempts
    ]  # fmt: skip
    if not any(a.error for a in attempts):
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    return ["", table(columns, cells, numbers=("attempt", "started", "took"))]


def jobs_table(rows: Sequence[JobRow], now: float) -> Table:
    """Return jobs as a table. `now` is seconds since 1970 on the database's clock.

    Where all of them failed, this is the dead letters: more of the error is shown.
    """
    columns = ["id", "state", "model", "kind", "priority", "age", "took", "attempts", "batch", "error"]
    width = 96 if all(row.state is JobState.FAILED for row in rows) else 48
    cells = [
        [show(Kind.JOB, row.id), row.state.value, model_of(row), kind_word(row), row.priority,
         span(now - row.created_at),
         span(row.finished_at - row.created_at) if row.finished_at is not None else None,
         f"{row.failures} of {row.max_attempts}" if row.failures else None,
         _batch_id(row.batch), short(f"{row.error.type}: {row.error.message}", width) if row.error else None]
        for row in rows
    ]  # fmt: skip
    optional = ("attempts", "batch", "error")
    used = [i for i, name in enumerate(columns) if name not in optional or any(c[i] for c in cells)]
    if all(row.trains is None for row in rows):
        used.remove(columns.index("kind"))
    return table(
        [columns[i] for i in used],
        ([c[i] for i in used] for c in cells),
        numbers=("priority", "age", "took", "attempts"),
    )


def batch_document(row: BatchRow, counts: Counts) -> dict[str, Any]:
    """Return a batch as JSON shows it."""
    return {
        "id": show(Kind.BATCH, row.id),
        "state": batch_word(row, counts),
        "model": f"{row.model}@{row.version}",
        "priority": row.priority,
        "tenant": row.tenant,
        "key": row.key,
        "metadata": dict(row.metadata),
        "closed": counts.closed,
        "paused": row.paused,
        "done": counts.done,
        "total": counts.total,
        "counts": counts_document(counts),
        "created_at": moment(row.created_at),
    }


def counts_document(counts: Counts) -> dict[str, int]:
    """Return the number of jobs by state, in the order in which jobs live."""
    return {state: getattr(counts, state) for state in STATES}


def batch_word(row: BatchRow, counts: Counts) -> str:
    """Return one word for how a batch is: open (its end is not written), paused, running, done."""
    if counts.done:
        return "done"
    if row.paused:
        return "paused"
    return "running" if counts.closed else "open"


def batch_facts(row: BatchRow, counts: Counts) -> Table:
    """Return everything about one batch."""
    word = batch_word(row, counts)
    if not counts.closed:
        word += ": its end is not written; whoever submits it goes on, or has died (the same --key goes on with it)"
    return facts([
        ("batch", show(Kind.BATCH, row.id)),
        ("state", word),
        ("model", f"{row.model}@{row.version}"),
        ("jobs", f"{counts.ended:,} of {counts.total:,} ended"),
        *((f"  {state}", f"{n:,}") for state, n in counts_document(counts).items() if n),
        ("priority", row.priority),
        ("tenant", row.tenant),
        ("key", row.key),
        ("metadata", dict(row.metadata)),
        ("created", moment(row.created_at)),
    ])  # fmt: skip


def batches_table(found: Sequence[tuple[BatchRow, Counts]], now: float) -> Table:
    """Return batches as a table. `now` as in `jobs_table`."""
    columns = ["id", "state", "model", "jobs", "ended", "failed", "age", "key"]
    cells = [
        [show(Kind.BATCH, row.id), batch_word(row, counts), f"{row.model}@{row.version}", f"{counts.total:,}",
         f"{counts.ended:,}", f"{counts.failed:,}" if counts.failed else "", span(now - row.created_at), row.key]
        for row, counts in found
    ]  # fmt: skip
    used = [i for i, name in enumerate(columns) if name not in ("failed", "key") or any(c[i] for c in cells)]
    numbers = ("jobs", "ended", "failed", "age")
    return table([columns[i] for i in used], ([c[i] or "" for i in used] for c in cells), numbers=numbers)


def model_document(row: ModelRow, workers: Iterable[str]) -> dict[str, Any]:
    """Return a model as JSON shows it; `workers` are the names of those that serve it."""
    return {
        **version_document(row.newest), "versions": row.versions, "waiting": row.waiting, "running": row.running,
        "max_queued": row.newest.max_queued, "workers": list(workers),
    }  # fmt: skip


def serving(models: Sequence[ModelRow], alive: Sequence[WorkerRow]) -> dict[str, list[str]]:
    """Return by a model's name which of the living workers serve it."""
    return {m.newest.name: [w.name for w in alive if w.models is None or m.newest.name in w.models] for m in models}


def models_table(models: Sequence[ModelRow], served: Mapping[str, Sequence[str]]) -> Table:
    """Return models as a table; aliases, limits and what was measured have a column where a model has them."""
    names = main_metrics([m.newest for m in models])
    rows = [
        [m.newest.ref, m.newest.handler, ", ".join(m.newest.aliases), "paused" if m.newest.paused else "",
         *(f"{m.newest.metrics[name]:.4g}" if name in m.newest.metrics else "" for name in names),
         m.waiting, m.newest.max_queued, m.running, len(served[m.newest.name]), m.versions]
        for m in models
    ]  # fmt: skip
    columns = ["model", "handler", "aliases", "", *names, "waiting", "at most", "running", "workers", "versions"]
    empty: tuple[object, ...] = ("", None)
    used = [
        i
        for i, column in enumerate(columns)
        if column not in ("aliases", "at most") or any(row[i] not in empty for row in rows)
    ]
    numbers = (*names, "waiting", "at most", "running", "workers", "versions")
    return table([columns[i] for i in used], ([row[i] for i in used] for row in rows), numbers=numbers)


def main_metrics(versions: Iterable[ModelVersion], most: int = 3) -> list[str]:
    """Return the metrics that say how good these versions are: scores first, then the validation loss."""
    there = {name for version in versions for name in version.metrics} - {"train_loss", "learning_rate"}
    return sorted(there, key=lambda name: (name.endswith("loss"), name))[:most]


def version_document(version: ModelVersion) -> dict[str, Any]:
    """Return a version of a model as JSON shows it."""
    return {
        "name": version.name, "version": version.version, "ref": version.ref, "handler": version.handler,
        "aliases": list(version.aliases), "weights": version.weights, "sha256": version.sha256,
        "config": dict(version.config), "metrics": dict(version.metrics), "lineage": dict(version.lineage),
        "run": show(Kind.JOB, version.run) if version.run is not None else None,
        "paused": version.paused, "created_at": moment(version.created_at),
    }  # fmt: skip


def _batch_id(batch: int | None) -> str | None:
    return show(Kind.BATCH, batch) if batch is not None else None
