"""The tries of a job: when, by which worker, how each ended. A try that succeeded stands in the job's own row.

So a job that succeeds at once costs no row here. A hand-back is no try: it costs a job nothing and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, bindparam, text

from torchrelay_storage.errors import JobNotFound
from torchrelay_storage.ids import Kind, draw, show
from torchrelay_storage.job_error import JobError, decode_error
from torchrelay_storage.settle import slices
from torchrelay_storage.states import ChunkState, End

Ended = Literal["failed", "lost", "succeeded", "running"]
Recorded = Literal["failed", "lost", "lost_alone"]  # the last is shown as lost


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a job.

    Attributes:
        number: from 1.
        outcome: `failed` (it spent one of `max_attempts`), `lost` (its worker was, and nobody could say for which job's
            fault: it spent nothing), `succeeded`, or `running`.
        worker: the name of the worker that ran it.
        started_at: when its chunk was claimed, in seconds since 1970; None: not known.
        worker_ended: how that worker's process ended, where the try ended with it.
    """

    number: int
    outcome: Ended
    worker: str | None
    started_at: float | None
    ended_at: float | None
    error: JobError | None = None
    worker_ended: str | None = None


@dataclass(frozen=True, slots=True)
class Try:
    """A try to be recorded, that did not succeed. `error` is encoded."""

    job: int
    chunk: int
    error: bytes | None


# Its chunk tells when it began. Of a job that has ended or moved on there is nothing to say, or it is said already.
_RECORD = text("""
    INSERT INTO attempts (job, id, worker, started_at, ended_at, outcome, error)
    SELECT :job, :id, :worker, (SELECT c.claimed_at FROM chunks c WHERE c.id = :chunk), :now, :outcome, :error
    FROM jobs j WHERE j.id = :job AND j.chunk = :chunk AND j.state = 0
""")

_LOST_ALONE = text("SELECT count(DISTINCT job) FROM attempts WHERE job IN :jobs AND outcome = 'lost_alone'").bindparams(
    bindparam("jobs", expanding=True)
)

# By the database's clock first: an id tells the time of the machine that drew it.
_READ = text("""
    SELECT a.outcome, a.started_at, a.ended_at, a.error, w.name, w.ended
    FROM attempts a LEFT JOIN workers w ON w.id = a.worker WHERE a.job = :job ORDER BY a.ended_at, a.id
""")

_JOB = text("""
    SELECT j.state, j.finished_at, c.state AS chunk_state, c.claimed_at, w.name
    FROM jobs j JOIN chunks c ON c.id = j.chunk LEFT JOIN workers w ON w.id = COALESCE(j.worker, c.worker)
    WHERE j.id = :job
""")


def record_attempts(connection: Connection, tries: Sequence[Try], outcome: Recorded, worker: int, now: float) -> None:
    """Record tries that did not succeed, before their jobs are ended or moved and their chunks freed."""
    if tries:
        first = draw(len(tries))
        connection.execute(
            _RECORD,
            [
                {"job": t.job, "id": first + i, "chunk": t.chunk, "error": t.error,
                 "worker": worker, "now": now, "outcome": outcome}
                for i, t in enumerate(tries)
            ],
        )  # fmt: skip


def were_lost_alone(connection: Connection, jobs: Sequence[int]) -> bool:
    """Return whether each of some jobs has been lost before while nothing ran beside its chunk."""
    return all(
        int(connection.execute(_LOST_ALONE, {"jobs": list(run)}).scalar_one()) == len(run) for run in slices(jobs)
    )


def read_attempts(connection: Connection, job: int) -> list[Attempt]:
    """Return the tries of a job, the oldest first. Raises JobNotFound."""
    now = connection.execute(_JOB, {"job": job}).one_or_none()
    if now is None:
        raise JobNotFound(f"no job has the id {show(Kind.JOB, job)}; it never existed, or retention has purged it")
    found = []
    for i, row in enumerate(connection.execute(_READ, {"job": job}), start=1):
        error = decode_error(row.error)
        outcome: Ended = "failed" if row.outcome == "failed" else "lost"
        with_worker = outcome == "lost" or (error is not None and error.type == "WorkerLost")
        ended = row.ended if with_worker else None
        found.append(Attempt(i, outcome, row.name, row.started_at, row.ended_at, error, ended))
    if now.state == End.SUCCEEDED:
        # Its chunk may have been handed back since for the sake of other jobs, and claimed again.
        known = now.claimed_at is not None and now.claimed_at <= now.finished_at
        started_at = now.claimed_at if known else None
        found.append(Attempt(len(found) + 1, "succeeded", now.name, started_at, now.finished_at))
    elif now.state == End.OPEN and now.chunk_state == ChunkState.CLAIMED and not _ended(found, now.claimed_at):
        found.append(Attempt(len(found) + 1, "running", now.name, now.claimed_at, None))
    return found


def _ended(found: Sequence[Attempt], started_at: float) -> bool:
    """Whether the try that began then ended between the statement that saw it run and the one that read the tries."""
    return bool(found) and found[-1].started_at == started_at
