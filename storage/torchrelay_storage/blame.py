"""What the loss of a worker or of a run's process costs: a failure for a job, a death for a training run.

A job is blamed once it was by itself and ran alone. A run is by itself always; it may die of its machine rather than by
its own fault, and what it has done is in its checkpoints: only deaths without a checkpoint in between add up.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

from torchrelay_storage.job_reader import JobError, encode_error


@dataclass(frozen=True, slots=True)
class Lost:
    """Whose holder was lost. The caller holds the chunk's lock; `worker` is who held it."""

    chunk: int
    job: int
    worker: int
    max_attempts: int


_FAIL_ONCE = text("""
    UPDATE jobs SET failures = failures + 1, error = :error,
        state = CASE WHEN failures + 1 >= :most THEN 2 ELSE 0 END,
        finished_at = CASE WHEN failures + 1 >= :most THEN :now ELSE NULL END
    WHERE id = :job AND state = 0
""")

_RETRYING = text("UPDATE chunks SET retrying = true WHERE id = :chunk")

_DIE = text("UPDATE runs SET deaths = deaths + 1, eta = NULL, updated_at = :now WHERE job = :job RETURNING deaths")

_END_RUN = text("""
    UPDATE jobs SET state = 2, failures = failures + 1, error = :error, worker = :worker, finished_at = :now
    WHERE id = :job AND chunk = :chunk AND state = 0
""")

_REST = text("UPDATE runs SET eta = NULL, updated_at = :now WHERE job = :job")

_KEEP_ERROR = text("UPDATE jobs SET error = :error WHERE id = :job AND chunk = :chunk AND state = 0")


def blame_job(connection: Connection, lost: Lost, now: float) -> None:
    """Count one more failure, of type WorkerLost; the job fails with its last. The caller settles its chunk."""
    message = f"{_worker(connection, lost)} was lost while it ran this job, and nothing else was to blame"
    error = encode_error(JobError("WorkerLost", message))
    connection.execute(_FAIL_ONCE, {"error": error, "most": lost.max_attempts, "now": now, "job": lost.job})
    connection.execute(_RETRYING, {"chunk": lost.chunk})


def count_death(connection: Connection, lost: Lost, now: float, error: JobError | None = None) -> bool:
    """Count one more death of a run, which fails with its last. The caller settles its chunk, or lets it wait.

    Args:
        error: what is known of it; None: that its worker was lost.

    Returns:
        Whether the run goes on.
    """
    deaths = int(connection.execute(_DIE, {"job": lost.job, "now": now}).scalar_one())
    error = error or JobError("WorkerLost", f"{_worker(connection, lost)} was lost while it trained this run")
    last = deaths >= lost.max_attempts
    if last and deaths > 1:
        message = f"{error.message} (death {deaths} without a checkpoint in between)"
        error = JobError(error.type, message, error.traceback)
    if last:
        end_run(connection, lost, now, error)
    else:
        connection.execute(_KEEP_ERROR, {"job": lost.job, "chunk": lost.chunk, "error": encode_error(error)})
        connection.execute(_RETRYING, {"chunk": lost.chunk})
    return not last


def end_run(connection: Connection, lost: Lost, now: float, error: JobError) -> None:
    """Let a run fail for good. The caller settles its chunk."""
    row = {"job": lost.job, "chunk": lost.chunk, "worker": lost.worker, "error": encode_error(error), "now": now}
    connection.execute(_END_RUN, row)
    connection.execute(_REST, {"job": lost.job, "now": now})


def _worker(connection: Connection, lost: Lost) -> str:
    name = connection.execute(text("SELECT name FROM workers WHERE id = :id"), {"id": lost.worker}).scalar()
    return f"worker {name or lost.worker}"
