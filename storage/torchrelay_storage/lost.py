"""What was held by workers that are lost: who is suspected, who is blamed, and what waits again.

Nobody can say which of several jobs took a process down, so suspects come back in smaller and smaller chunks, each of
which runs alone; a job is blamed once it was by itself and ran alone. A supervisor that saw its process die knows more
than the maintenance does of a machine that fell silent: which jobs were being run (`give_up`). A machine that fell
silent, or a process that was killed from outside, may have been lost for any reason: only the second such loss of a job
that ran alone is held against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, bindparam, text

from torchrelay_storage import faults
from torchrelay_storage.attempts import Try, record_attempts, were_lost_alone
from torchrelay_storage.blame import Lost, blame, count_death, worker_name
from torchrelay_storage.chunk_jobs import IN_CHUNK
from torchrelay_storage.database import Database
from torchrelay_storage.job_error import JobError, encode_error
from torchrelay_storage.options import Backoff
from torchrelay_storage.settle import Moved, part, settle, slices

RESCUE_SLICE = 200
_ALONE = "it ran this job, and nothing beside it"
SINGLES = 64  # suspects that come back one by one; more of them come back in halves


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the last moment of a process.

    Attributes:
        jobs: that it was running: in a device batch, or in an author's own code.
        versions: of models that it was loading.
        timed_out: it was ended because what it ran had overrun its limit.
        from_outside: it was killed by somebody else, such as the kernel for want of memory, or an operator.
    """

    jobs: frozenset[int] = field(default_factory=frozenset)
    versions: frozenset[int] = field(default_factory=frozenset)
    timed_out: bool = False
    from_outside: bool = False


@dataclass(frozen=True, slots=True)
class _Loss:
    """What is said of a lost worker's jobs.

    `one_by_one`: its suspects were really running, so that they are few. `sure`: there is one, and it is the cause.
    `by_chance`: it may have nothing to do with what it ran.
    """

    error: JobError
    now: float
    timed_out: bool = False
    one_by_one: bool = False
    sure: bool = False
    by_chance: bool = False


_COLUMNS = """c.id, c.batch, c.version, c.max_attempts, c.worker, c.alone, c.retrying, c.backoff,
    (SELECT m.training FROM models m WHERE m.id = c.model) AS training"""

_STOP = text("UPDATE workers SET stopped_at = :now, ended = :ended WHERE id = :worker AND stopped_at IS NULL")

_OPEN = text(f"SELECT id FROM jobs WHERE {IN_CHUNK} AND state = 0 ORDER BY id")

_FREE = text("""
    UPDATE chunks SET state = 0, token = token + 1, worker = NULL, claimed_at = NULL, announced_at = NULL,
        alone = false, suspect = suspect OR CAST(:suspect AS BOOLEAN),
        expires_at = CASE WHEN CAST(:started AS BOOLEAN) THEN NULL ELSE expires_at END
    WHERE id = :chunk AND state = 2
""")

_MOVE = text("UPDATE jobs SET chunk = :new WHERE id IN :jobs AND chunk = :chunk AND state = 0").bindparams(
    bindparam("jobs", expanding=True)
)


class LostChunks:
    """The moves of chunks whose worker is lost."""

    def __init__(self, database: Database) -> None:
        self._db = database
        d = database.dialect
        # A worker that was stopped in the middle of a beat holds its row's lock: it must not hold up the rescue.
        self._stop_stale = text(f"""
            UPDATE workers SET stopped_at = :now, ended = 'fell silent' WHERE stopped_at IS NULL AND id IN (
                SELECT c.id FROM workers c WHERE c.stopped_at IS NULL AND c.beat_at <= :before {d.skip_locked})
        """)
        self._orphans = text(f"""
            SELECT {_COLUMNS} FROM chunks c
            WHERE c.state = 2 AND NOT EXISTS (
                SELECT 1 FROM workers w WHERE w.id = c.worker AND w.stopped_at IS NULL AND w.beat_at > :before)
            ORDER BY c.id LIMIT :limit {d.skip_locked}
        """)
        self._of_worker = text(
            f"SELECT {_COLUMNS} FROM chunks c WHERE c.state = 2 AND c.worker = :worker ORDER BY c.id {d.lock}"
        )

    def rescue(self, stale_after: float | None, limit: int = RESCUE_SLICE) -> Moved:
        """Let the chunks of workers that are stopped, gone or silent for `stale_after` seconds wait again.

        Who is silent counts as stopped from now on: should it come back, its beat tells it (`Fleet.beat`), and its
        writes are refused by the tokens. What it held is suspect, comes back in halves and runs alone; a job that was
        by itself and ran alone is blamed the second time: one more failure, of type WorkerLost. A training run is never
        a suspect: one more death of it is counted.

        Args:
            stale_after: None: only of workers that are stopped or gone, because the living had no chance to beat.
        """

        def work(connection: Connection) -> Moved:
            now = self._db.clock(connection)
            before = now - stale_after if stale_after is not None else -1.0
            if stale_after is not None:
                connection.execute(self._stop_stale, {"now": now, "before": before})
            rows = connection.execute(self._orphans, {"before": before, "limit": limit}).all()
            if not rows:
                return Moved()
            names = {worker: worker_name(connection, worker) for worker in {row.worker for row in rows}}
            count = 0
            for row in rows:
                jobs = list(connection.execute(_OPEN, {"chunk": row.id}).scalars())
                count += len(jobs)
                loss = _Loss(JobError("WorkerLost", f"{names[row.worker]} was lost"), now, by_chance=True)
                self._let_go(connection, row, jobs, jobs, loss)
            faults.reach("rescuing")
            return self._settled(connection, rows, count, now)

        return self._db.transact(work)

    def give_up(self, worker: int, ended: str, evidence: Evidence | None) -> Moved:
        """Say that a worker's process has died, and let what it held wait again, by what is known of its last moment.

        Jobs that it was not running wait again as if they had been handed back. Of those that it was running, each
        comes back by itself (in halves where they are many) and runs alone. One that was by itself and alone is to
        blame: it fails once, of type WorkerLost, or for good with Timeout where it was ended for overrunning its limit;
        the latter also where nothing else was running.
        Where nothing ran and a model was being loaded, all that waited for the model fail once.
        Where the process was killed from outside, neither happens before the second time that they were lost alone.

        Args:
            ended: how the process ended, such as `killed by SIGSEGV`.
            evidence: None: nothing is known, and everything that it held is suspected.
        """

        def work(connection: Connection) -> Moved:
            now = self._db.clock(connection)
            connection.execute(_STOP, {"worker": worker, "now": now, "ended": ended})
            rows = connection.execute(self._of_worker, {"worker": worker}).all()
            if not rows:
                return Moved()
            error = JobError("WorkerLost", f"{worker_name(connection, worker)}: {ended}")
            loss = _Loss(error, now)
            if evidence is not None:
                # What ran by itself is what overran its limit. What crashes a process may lie elsewhere.
                sure = evidence.timed_out and len(evidence.jobs) == 1 and not evidence.versions
                loss = _Loss(
                    error, now, evidence.timed_out, one_by_one=True, sure=sure, by_chance=evidence.from_outside
                )
            count = 0
            for row in rows:
                jobs = list(connection.execute(_OPEN, {"chunk": row.id}).scalars())
                count += len(jobs)
                if evidence is None:
                    self._let_go(connection, row, jobs, jobs, loss)
                    continue
                suspects = [job for job in jobs if job in evidence.jobs]
                if row.version in evidence.versions and not suspects:
                    self._not_loaded(connection, row, jobs, evidence, loss)
                else:
                    guilty = row.alone and len(jobs) == 1
                    self._let_go(connection, row, jobs, jobs if guilty else suspects, loss)
            faults.reach("rescuing")
            return self._settled(connection, rows, count, now)

        return self._db.transact(work)

    def _settled(self, connection: Connection, rows: Sequence[Row[Any]], count: int, now: float) -> Moved:
        chunks = [row.id for row in rows]
        settle(connection, chunks, now)
        return Moved(count, tuple(chunks), tuple({row.batch for row in rows if row.batch is not None}))

    def _let_go(
        self, connection: Connection, row: Row[Any], jobs: Sequence[int], suspects: Sequence[int], loss: _Loss
    ) -> None:
        """Free a chunk whose open jobs are `jobs`, and deal with the suspects among them."""
        lost = [Lost(row.id, job, row.worker, row.max_attempts) for job in (jobs if row.training else suspects)]
        alone = len(jobs) == 1 and row.alone
        if row.training:
            error = JobError(loss.error.type, f"{loss.error.message} while it trained this run")
            for run in lost:
                count_death(connection, run, loss.now, error)
            connection.execute(_FREE, {"chunk": row.id, "suspect": False, "started": True})
        elif not suspects:
            connection.execute(_FREE, {"chunk": row.id, "suspect": False, "started": False})
        elif loss.sure or (alone and (not loss.by_chance or were_lost_alone(connection, suspects))):
            known = loss.error.message
            if loss.timed_out:
                error = JobError("Timeout", f"a device batch of this job alone did not end within its limit ({known})")
            else:
                error = JobError(loss.error.type, f"{known} while {_ALONE}")
            backoff = Backoff.decode(row.backoff) if row.backoff else None
            blame(connection, lost, loss.now, error, backoff=backoff, final=loss.timed_out)
            connection.execute(_FREE, {"chunk": row.id, "suspect": len(jobs) == 1, "started": len(jobs) == 1})
        else:
            doing = _ALONE if alone else "it held this job and others"
            error = JobError(loss.error.type, f"{loss.error.message} while {doing}")
            tries = [Try(job, row.id, encode_error(error)) for job in suspects]
            record_attempts(connection, tries, "lost_alone" if alone else "lost", row.worker, loss.now)
            self._part(connection, row, jobs, suspects, one_by_one=loss.one_by_one)

    def _part(
        self, connection: Connection, row: Row[Any], jobs: Sequence[int], suspects: Sequence[int], *, one_by_one: bool
    ) -> None:
        """Let the suspects wait in smaller chunks, each of which runs alone; the rest stays where it is."""
        if one_by_one and len(suspects) <= SINGLES:
            groups = [[job] for job in suspects]
        else:
            half = (len(suspects) + 1) // 2
            groups = [list(suspects[:half]), list(suspects[half:])]
        whole = len(suspects) == len(jobs)  # then the first group stays
        for group in groups[1:] if whole else groups:
            if group:
                new = part(connection, row.id, group, suspect=True, retrying=bool(row.retrying))
                for run in slices(group):
                    connection.execute(_MOVE, {"new": new, "jobs": list(run), "chunk": row.id})
        connection.execute(_FREE, {"chunk": row.id, "suspect": whole, "started": whole})

    def _not_loaded(
        self, connection: Connection, row: Row[Any], jobs: Sequence[int], evidence: Evidence, loss: _Loss
    ) -> None:
        """The process died while it loaded this chunk's model and ran none of its jobs."""
        error = JobError(loss.error.type, f"{loss.error.message} while it loaded the model")
        guilty = not evidence.jobs and (not loss.by_chance or (row.alone and were_lost_alone(connection, jobs)))
        if guilty and jobs:
            lost = [Lost(row.id, job, row.worker, row.max_attempts) for job in jobs]
            backoff = Backoff.decode(row.backoff) if row.backoff else None
            blame(connection, lost, loss.now, error, backoff=backoff)
        elif row.alone and not evidence.jobs:
            tries = [Try(job, row.id, encode_error(error)) for job in jobs]
            record_attempts(connection, tries, "lost_alone", row.worker, loss.now)
        connection.execute(_FREE, {"chunk": row.id, "suspect": not guilty, "started": guilty})
