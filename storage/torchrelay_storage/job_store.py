"""The moves of jobs: submitted, finished, cancelled. A row is written at its submit and at its end.

What it inherits lets jobs run again (`retries`) and asks about them (`job_reader`). Not here: the moves of chunks
(`chunk_store`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, insert, text
from sqlalchemy.exc import IntegrityError

from torchrelay_storage import faults, schema
from torchrelay_storage.attempts import Try, record_attempts
from torchrelay_storage.chunk_jobs import IN_CHUNK, OfChunks
from torchrelay_storage.database import Database
from torchrelay_storage.dialect import FinishRow, JobTuple
from torchrelay_storage.errors import KeyConflict
from torchrelay_storage.ids import Kind, draw, show
from torchrelay_storage.retries import JobRetries
from torchrelay_storage.settle import Moved, lock, part, settle, slices
from torchrelay_storage.states import End
from torchrelay_storage.submission import Submission, Submitted, chunk_row, resolved, runs
from torchrelay_storage.turns import last_turn

REDRAWS = 5  # two collisions in a row come once in 10^13 submits
CANCEL_SLICE = 200  # chunks cancelled in one transaction


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job of a device batch ended. OPEN: it failed and is to be tried again in `retry_in` seconds."""

    job: int
    chunk: int
    token: int
    end: End
    output: bytes | None = None
    error: bytes | None = None  # JSON: type, message, traceback
    retry_in: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of a device batch's outcomes.

    Attributes:
        recorded: how many jobs were written.
        dropped: chunks whose token was refused: another holds them now; nothing of them was written.
        chunks, batches: whom to tell.
    """

    recorded: int
    dropped: frozenset[int]
    chunks: tuple[int, ...]
    batches: tuple[int, ...]


_COUNT_UP = text("""
    UPDATE chunks SET succeeded = succeeded + :succeeded, failed = failed + :failed,
        ended_at = CASE WHEN size = succeeded + failed + cancelled + expired + :n THEN :now ELSE ended_at END,
        state = CASE WHEN size = succeeded + failed + cancelled + expired + :n THEN 3 ELSE state END
    WHERE id = :chunk
""")

_RETRY = text("""
    UPDATE jobs SET chunk = :new, failures = failures + 1, error = :error
    WHERE id = :job AND chunk = :chunk AND state = 0
""")

# What tells that a finish or a cancel was committed: something that it wrote, by its time.
_WROTE = text("""
    SELECT 1 FROM jobs WHERE id IN :jobs AND finished_at = :now
    UNION ALL SELECT 1 FROM attempts WHERE job IN :jobs AND ended_at = :now AND worker = :worker LIMIT 1
""").bindparams(bindparam("jobs", expanding=True))

_CANCELLED = OfChunks("""
    SELECT 1 FROM {chunk_jobs} WHERE c.id IN :chunks AND j.state = 3 AND j.finished_at = :now LIMIT 1
""")


class JobStore(JobRetries):
    """The moves of jobs, and the questions about them."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        locked = f"""SELECT id, token, batch FROM chunks
            WHERE id IN :chunks AND state = 2 AND worker = :worker ORDER BY id {database.dialect.lock}"""
        self._held = text(locked).bindparams(bindparam("chunks", expanding=True))

    # --- submit -------------------------------------------------------------------------------------------

    def submit(
        self, submissions: Sequence[Submission], connection: Connection | None = None
    ) -> list[list[Submitted | KeyConflict]]:
        """Store jobs in one transaction; they exist when it commits.

        Args:
            connection: the caller's own; the jobs then exist if and only if the caller commits.

        Returns:
            For each submission and each of its jobs where it is, or the KeyConflict that kept this one job out.
        """
        for attempt in range(REDRAWS):
            firsts = [s.ids if s.ids is not None else draw(len(s.jobs)) for s in submissions]
            try:
                if connection is None:
                    return self._submit_whole(submissions, firsts)
                with connection.begin_nested():  # ids that were drawn twice must not spoil the caller's transaction
                    return self._submit(connection, submissions, firsts, bulk=False)
            except IntegrityError:
                if attempt == REDRAWS - 1 or any(s.ids is not None for s in submissions):
                    raise
        raise AssertionError("unreachable")

    def _submit_whole(
        self, submissions: Sequence[Submission], firsts: Sequence[int]
    ) -> list[list[Submitted | KeyConflict]]:
        return self._db.transact(
            lambda connection: self._submit(connection, submissions, firsts, bulk=True),
            lambda connection, _: self._is_stored(connection, firsts),
        )

    def _is_stored(self, connection: Connection, firsts: Sequence[int]) -> bool:
        statement = text("SELECT count(*) FROM jobs WHERE id IN :ids").bindparams(bindparam("ids", expanding=True))
        return bool(connection.execute(statement, {"ids": list(firsts)}).scalar())

    def _submit(
        self,
        connection: Connection,
        submissions: Sequence[Submission],
        firsts: Sequence[int],
        *,
        bulk: bool,
    ) -> list[list[Submitted | KeyConflict]]:
        now = self._db.clock(connection)
        placed: list[list[Submitted | KeyConflict]] = []
        chunks: list[dict[str, object]] = []
        rows: list[JobTuple] = []
        turns: dict[tuple[int, int, int], int] = {}
        for submission, first in zip(submissions, firsts, strict=True):
            where = self._take_keys(connection, submission, first)
            lane = (
                submission.version.model,
                submission.options.priority,
                submission.flow,
            )
            for run in runs(submission, where):
                if lane not in turns:
                    turns[lane] = last_turn(connection, *lane)
                turns[lane] += 1
                chunk = first + run[0]  # a chunk is named after its first job
                chunks.append(chunk_row(submission, (chunk, first + run[-1], len(run)), turns[lane], now))
                for i in run:
                    job = submission.jobs[i]
                    rows.append((first + i, chunk, submission.batch, job.input, job.metadata))
                    where[i] = Submitted(first + i, chunk)
            placed.append([resolved(where[i], first, where) for i in range(len(submission.jobs))])
        if chunks:
            connection.execute(insert(schema.chunks), chunks)
            if bulk:
                self._db.dialect.insert_jobs(connection, rows)
            else:
                names = ("id", "chunk", "batch", "input", "metadata")
                connection.execute(insert(schema.jobs), [dict(zip(names, row, strict=True)) for row in rows])
        return placed

    def _take_keys(
        self, connection: Connection, submission: Submission, first: int
    ) -> dict[int, Submitted | KeyConflict]:
        """Take the keys of a submission's jobs; return, by index, those that are another's."""
        keyed = {i: job for i, job in enumerate(submission.jobs) if job.key is not None}
        if not keyed:
            return {}
        scope = {"tenant": submission.options.tenant, "model": submission.version.model}
        take = text("INSERT INTO keys (tenant, model, key, digest, job) VALUES (:tenant, :model, :key, :digest, :job) "
                    "ON CONFLICT DO NOTHING")  # fmt: skip
        owner = text(
            "SELECT k.job, k.digest, j.chunk FROM keys k LEFT JOIN jobs j ON j.id = k.job "
            "WHERE k.tenant = :tenant AND k.model = :model AND k.key = :key"
        )
        taken: dict[int, Submitted | KeyConflict] = {}
        for i, job in keyed.items():
            mine = first + i
            # Where another transaction is about to commit the same key, this waits for it.
            connection.execute(take, scope | {"key": job.key, "digest": job.digest, "job": mine})
            found = connection.execute(owner, scope | {"key": job.key}).one()
            if found.job == mine:
                continue
            same = bytes(found.digest) == job.digest
            assert job.key is not None
            taken[i] = (
                Submitted(found.job, found.chunk or 0, existed=True)
                if same
                else KeyConflict(job.key, show(Kind.JOB, found.job))
            )
        return taken

    # --- finish -------------------------------------------------------------------------------------------

    def finish(self, outcomes: Sequence[Outcome], worker: int) -> Finished:
        """Record how the jobs of a device batch ended, in one transaction fenced by each chunk's token.

        A job that was cancelled meanwhile stays so; one that is to be retried moves to a waiting chunk.
        """
        by_chunk: dict[int, list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            by_chunk[outcome.chunk].append(outcome)

        def work(connection: Connection) -> tuple[Finished, float]:
            now = self._db.clock(connection)
            held = {}
            batches: dict[int, None] = {}
            for run in slices(sorted(by_chunk)):
                for row in connection.execute(self._held, {"chunks": list(run), "worker": worker}):
                    held[row.id] = row.token
                    if row.batch is not None:
                        batches[row.batch] = None
            fenced = [o for o in outcomes if held.get(o.chunk) == o.token]
            refused = frozenset(o.chunk for o in outcomes if held.get(o.chunk) != o.token)
            ends: list[FinishRow] = [
                (o.job, o.chunk, int(o.end), o.output, o.error, int(o.end is End.FAILED))
                for o in fenced
                if o.end is not End.OPEN
            ]
            tries = [Try(o.job, o.chunk, o.error) for o in fenced if o.end is not End.SUCCEEDED]
            record_attempts(connection, tries, "failed", worker, now)
            written = self._db.dialect.finish_jobs(connection, ends, worker, now) if ends else 0
            retried = self._retry_later(connection, [o for o in fenced if o.end is End.OPEN], now)
            chunks = sorted({o.chunk for o in fenced})
            if written == len(ends) == len(fenced):
                if chunks:
                    connection.execute(_COUNT_UP, _counts(fenced, now))
            else:  # some were cancelled meanwhile, or moved away
                settle(connection, chunks, now)
            faults.reach("recording")
            return Finished(written + retried, refused, tuple(chunks), tuple(batches)), now

        def is_done(connection: Connection, result: tuple[Finished, float]) -> bool:
            scope = {"jobs": [o.job for o in outcomes], "worker": worker, "now": result[1]}
            return result[0].recorded > 0 and connection.execute(_WROTE, scope).first() is not None

        return self._db.transact(work, is_done)[0]

    def _retry_later(self, connection: Connection, outcomes: Sequence[Outcome], now: float) -> int:
        moved = 0
        groups: dict[tuple[int, float], list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            groups[outcome.chunk, outcome.retry_in].append(outcome)
        for (source, retry_in), group in groups.items():
            due = now + retry_in if retry_in > 0 else None
            new = part(connection, source, [o.job for o in group], not_before=due, retrying=True)
            written = connection.execute(
                _RETRY, [{"new": new, "job": o.job, "chunk": o.chunk, "error": o.error} for o in group]
            ).rowcount
            if written != len(group):
                settle(connection, [new], now)
            moved += written
        return moved

    # --- cancel and retry ---------------------------------------------------------------------------------

    def cancel(self, jobs: Sequence[int]) -> Moved:
        """Cancel those of these jobs that are open. A running one's result will be dropped."""
        statement = text(
            "UPDATE jobs SET state = 3, finished_at = :now WHERE id IN :jobs AND state = 0 RETURNING chunk"
        ).bindparams(bindparam("jobs", expanding=True))
        moved = Moved()
        for run in slices(list(jobs)):

            def work(connection: Connection, run: Sequence[int] = run) -> tuple[Moved, float]:
                now = self._db.clock(connection)
                batches = self._lock_homes(connection, run)
                hit = list(connection.execute(statement, {"jobs": list(run), "now": now}).scalars())
                settle(connection, hit, now)
                return Moved(len(hit), tuple(sorted(set(hit))), batches if hit else ()), now

            def is_done(connection: Connection, result: tuple[Moved, float]) -> bool:
                scope = {"chunks": list(result[0].chunks), "now": result[1]}
                return _CANCELLED.on(connection, scope).first() is not None

            moved += self._db.transact(work, is_done)[0]
        return moved

    def cancel_batch(self, batch: int) -> Moved:
        """Cancel every open job of a batch."""
        statement = text(f"UPDATE jobs SET state = 3, finished_at = :now WHERE {IN_CHUNK} AND state = 0")
        unfinished = text("SELECT id FROM chunks WHERE batch = :batch AND state < 3 ORDER BY id LIMIT :limit")

        def work(connection: Connection) -> tuple[int, list[int], float]:
            now = self._db.clock(connection)
            chunks = list(connection.execute(unfinished, {"batch": batch, "limit": CANCEL_SLICE}).scalars())
            if not chunks:
                return 0, [], now
            lock(self._db, connection, chunks)
            count = connection.execute(statement, [{"chunk": chunk, "now": now} for chunk in chunks]).rowcount
            settle(connection, chunks, now)
            return count, chunks, now

        def is_done(connection: Connection, result: tuple[int, list[int], float]) -> bool:
            return _CANCELLED.on(connection, {"chunks": result[1], "now": result[2]}).first() is not None

        moved = Moved()
        while True:
            count, chunks, _ = self._db.transact(work, is_done)
            if not chunks:
                return moved
            moved += Moved(count, tuple(chunks), (batch,))


def _counts(outcomes: Sequence[Outcome], now: float) -> list[dict[str, object]]:
    succeeded: dict[int, int] = defaultdict(int)
    failed: dict[int, int] = defaultdict(int)
    for outcome in outcomes:
        (succeeded if outcome.end is End.SUCCEEDED else failed)[outcome.chunk] += 1
    return [
        {"chunk": c, "succeeded": succeeded[c], "failed": failed[c], "n": succeeded[c] + failed[c], "now": now}
        for c in sorted({o.chunk for o in outcomes})
    ]
