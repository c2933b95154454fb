"""A model whose jobs workers lose and fail: what the tests of recovery begin with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import text

from torchrelay_storage.attempts import Attempt
from torchrelay_storage.chunk_store import ChunkStore, Claimed
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_error import JobError, encode_error
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.lost import Evidence
from torchrelay_storage.options import Options
from torchrelay_storage.outcomes import Finished, Outcome
from torchrelay_storage.registry import Registry
from torchrelay_storage.schema import metadata
from torchrelay_storage.settle import Moved
from torchrelay_storage.states import End
from torchrelay_storage.submission import NewJob, Submission, Submitted

ERROR = encode_error(JobError("ValueError", "no"))


class Scene:
    """The stores, a model whose chunks take four jobs, and a worker that beats."""

    def __init__(self, database: Database, chunk_size: int = 4) -> None:
        self.database = database
        self.chunks, self.jobs = ChunkStore(database), JobStore(database)
        self.fleet, self.registry = Fleet(database), Registry(database)
        self.version = self.registry.register("m", "h", chunk_size=chunk_size)
        self.worker = self.hire()

    def hire(self, name: str = "w") -> int:
        """Return a worker that beats."""
        return self.fleet.register(name, host="h", pid=1, device="cpu").id

    def submit(self, n: int = 1, batch: int | None = None, **options: Any) -> list[int]:
        """Submit jobs and return their ids."""
        jobs = [NewJob(b"%d" % i) for i in range(n)]
        [placed] = self.jobs.submit([Submission(self.version, Options(**options), jobs, batch=batch)])
        return [one.job for one in placed if isinstance(one, Submitted)]

    def claim(self, job: int, worker: int | None = None) -> Claimed:
        """Claim the chunk that a job is in, once it is due."""
        self.ripen()
        [claimed] = self.chunks.claim([self.row(job).chunk], worker or self.worker)
        return claimed

    def claim_alone(self, job: int, worker: int | None = None) -> Claimed:
        """Claim a suspect and say that nothing runs beside it."""
        claimed = self.claim(job, worker)
        assert claimed.suspect
        assert self.chunks.run_alone(claimed.chunk, claimed.token, worker or self.worker)
        return claimed

    def finish(
        self, claimed: Claimed, end: End = End.SUCCEEDED, jobs: Iterable[int] | None = None, worker: int | None = None
    ) -> Finished:
        """Record the end of a claimed chunk's jobs, or of some."""
        error = None if end is End.SUCCEEDED else ERROR
        wanted = [one.id for one in claimed.jobs] if jobs is None else jobs
        outcomes = [Outcome(job, claimed.chunk, claimed.token, end, b"1", error) for job in wanted]
        return self.jobs.finish(outcomes, worker or self.worker)

    def die(self, evidence: Evidence | None, worker: int | None = None, ended: str = "killed by SIGSEGV") -> Moved:
        """Let the worker's process die, and have another in its place."""
        moved = self.chunks.give_up(worker or self.worker, ended, evidence)
        if worker is None:
            self.worker = self.hire()
        return moved

    def row(self, job: int) -> JobRow:
        return self.jobs.get([job])[job]

    def chunk(self, job: int) -> Any:
        """The row of the chunk that a job is in."""
        with self.database.read() as connection:
            return connection.execute(
                text("SELECT c.* FROM chunks c JOIN jobs j ON j.chunk = c.id WHERE j.id = :job"), {"job": job}
            ).one()

    def outcomes(self, job: int) -> list[str]:
        """How the tries of a job ended."""
        return [attempt.outcome for attempt in self.jobs.attempts(job)]

    def last_attempt(self, job: int) -> Attempt:
        return self.jobs.attempts(job)[-1]

    def ripen(self) -> None:
        """Let whatever waits for its time have come to it."""
        with self.database.write() as connection:
            connection.execute(text("UPDATE chunks SET due = true WHERE state = 0"))

    def grow_old(self, seconds: float = 100.0) -> None:
        """Let the last beats of all workers be longer ago."""
        with self.database.write() as connection:
            connection.execute(text("UPDATE workers SET beat_at = beat_at - :seconds"), {"seconds": seconds})

    def everything(self) -> dict[str, list[Any]]:
        """All rows of all tables, to see that nothing was written."""
        with self.database.read() as connection:
            return {
                table.name: sorted(map(tuple, connection.execute(table.select())), key=repr)
                for table in metadata.sorted_tables
            }

    def check(self) -> None:
        """What is always true: a chunk's counts are those of its jobs, and it is done exactly when none is open."""
        with self.database.read() as connection:
            chunks = connection.execute(text("SELECT * FROM chunks")).all()
            jobs = connection.execute(text("SELECT id, chunk, state, failures, finished_at FROM jobs")).all()
            homeless = connection.execute(text("SELECT count(*) FROM attempts WHERE job NOT IN (SELECT id FROM jobs)"))
            assert homeless.scalar() == 0, "attempts go with their job"
        for chunk in chunks:
            mine = [job.state for job in jobs if job.chunk == chunk.id]
            counted = (chunk.size, chunk.succeeded, chunk.failed, chunk.cancelled, chunk.expired)
            assert counted == (len(mine), *(mine.count(end) for end in (1, 2, 3, 4)))
            assert (chunk.state == 3) == (0 not in mine)
            assert all(chunk.first_id <= job.id <= chunk.last_id for job in jobs if job.chunk == chunk.id)
        for job in jobs:
            assert (job.finished_at is None) == (job.state == 0)
