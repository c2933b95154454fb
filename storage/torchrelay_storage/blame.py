"""What the loss of a worker or of a run's process costs: a failure for a job, a death for a training run.

A job is blamed once it was by itself and ran alone. A run is by itself always; it may die of its machine rather than by
its own fault, and what it has done is in its checkpoints: only deaths without a checkpoint in between add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, text

from torchrelay_storage.attempts import Try, record_attempts
from torchrelay_storage.job_error import JobError, encode_error
from torchrelay_storage.options import DEFAULT_BACKOFF, Backoff
from torchrelay_storage.settle import slices


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
        worker = CASE WHEN failures + 1 >= :most THEN :worker END,
        finished_at = CASE WHEN failures + 1 >= :most THEN :now END
    WHERE id IN :jobs AND chunk = :chunk AND state = 0 RETURNING failures
""").bindparams(bindparam("jobs", expanding=True))

_WAIT = text("UPDATE chunks SET retrying = true, due = false, not_before = :at WHERE id = :chunk")

_RETRYING = text("UPDATE chunks SET retrying = true WHERE id = :chunk")

_DIE = text("UPDATE runs SET deaths = deaths + 1, eta = NULL, updated_at = :now WHERE job = :job RETURNING deaths")

_END_RUN = text("""
    UPDATE jobs SET state = 2, failures = failures + 1, error = :error, worker = :worker, finished_at = :now
    WHERE id = :job AND chunk = :chunk AND state = 0
""")

_REST = text("UPDATE runs SET eta = NULL, updated_at = :now WHERE job = :job")

_KEEP_ERROR = text("UPDATE jobs SET error = :error WHERE id = :job AND chunk = :chunk AND state = 0")


def blame(
    connection: Connection,
    lost: Sequence[Lost],
    now: float,
    error: JobError,
    *,
    backoff: Backoff | None = None,
    final: bool = False,
) -> None:
    """Count one more failure for each of some jobs of one chunk; a job fails with its last, or waits for its next try.

    The caller frees the chunk and settles it afterwards.

    Args:
        final: they fail for good, whatever their attempts: they would do the same again.
    """
    chunk, worker = lost[0].chunk, lost[0].worker
    stored = encode_error(error)
    record_attempts(connection, [Try(one.job, chunk, stored) for one in lost], "failed", worker, now)
    row = {"error": stored, "most": 0 if final else lost[0].max_attempts, "now": now, "worker": worker, "chunk": chunk}
    failures = [
        n for run in slices([one.job for one in lost])
        for n in connection.execute(_FAIL_ONCE, row | {"jobs": list(run)}).scalars()
    ]  # fmt: skip
    if not final:  # else what is left of the chunk has nothing to wait for
        wait = (backoff or DEFAULT_BACKOFF).wait(min(failures, default=1) - 1)
        connection.execute(_WAIT, {"chunk": chunk, "at": now + wait})


def count_death(connection: Connection, lost: Lost, now: float, error: JobError) -> bool:
    """Count one more death of a run, which fails with its last. The caller settles its chunk, or lets it wait.

    Args:
        error: what is known of it.

    Returns:
        Whether the run goes on.
    """
    deaths = int(connection.execute(_DIE, {"job": lost.job, "now": now}).scalar_one())
    last = deaths >= lost.max_attempts
    if last and deaths > 1:
        message = f"{error.message} (death {deaths} without a checkpoint in between)"
        error = JobError(error.type, message, error.traceback)
    if last:
        end_run(connection, lost, now, error)
    else:
        stored = encode_error(error)
        record_attempts(connection, [Try(lost.job, lost.chunk, stored)], "lost", lost.worker, now)
        connection.execute(_KEEP_ERROR, {"job": lost.job, "chunk": lost.chunk, "error": stored})
        connection.execute(_RETRYING, {"chunk": lost.chunk})
    return not last


def end_run(connection: Connection, lost: Lost, now: float, error: JobError) -> None:
    """Let a run fail for good. The caller settles its chunk."""
    stored = encode_error(error)
    record_attempts(connection, [Try(lost.job, lost.chunk, stored)], "failed", lost.worker, now)
    row = {"job": lost.job, "chunk": lost.chunk, "worker": lost.worker, "error": stored, "now": now}
    connection.execute(_END_RUN, row)
    connection.execute(_REST, {"job": lost.job, "now": now})


def worker_name(connection: Connection, worker: int) -> str:
    """Return `worker gpu-1`, for messages."""
    name = connection.execute(text("SELECT name FROM workers WHERE id = :id"), {"id": worker}).scalar()
    return f"worker {name or worker}"
