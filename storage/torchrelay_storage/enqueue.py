"""How jobs come to be: rows and chunks in one transaction, alone or in the caller's own.

Not here: how a submission is cut into chunks (`submission`).
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, insert, text
from sqlalchemy.exc import IntegrityError

from torchrelay_storage import schema
from torchrelay_storage.database import Database
from torchrelay_storage.dialect import JobTuple
from torchrelay_storage.errors import KeyConflict
from torchrelay_storage.ids import Kind, draw, show
from torchrelay_storage.retries import JobRetries
from torchrelay_storage.states import ChunkState
from torchrelay_storage.submission import Submission, Submitted, chunk_row, resolved, runs, spans
from torchrelay_storage.turns import Stand, last_turn, stand, standing

REDRAWS = 5  # two collisions in a row come once in 10^13 submits


class JobEnqueue(JobRetries):
    """The moves that store jobs."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._standing = standing(database.dialect.now)

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
        now = 0.0
        placed: list[list[Submitted | KeyConflict]] = []
        chunks: list[dict[str, object]] = []
        rows: list[JobTuple] = []
        turns: dict[tuple[int, int, int], int] = {}
        room: dict[int, int] = {}  # by model: how many of these chunks may be announced at once
        for submission, first in zip(submissions, firsts, strict=True):
            where = self._take_keys(connection, submission, first)
            model = submission.version.model
            lane = (model, submission.options.priority, submission.flow)
            for run in runs(submission, where):
                if lane not in turns:
                    found = self._stand(connection, lane, submission.window if bulk else 0)
                    turns[lane], now = found.last, max(now, found.now)
                    room.setdefault(model, found.room)
                turns[lane] += 1
                chunk = first + run[0]  # a chunk is named after its first job
                row = chunk_row(submission, (chunk, first + run[-1], len(run)), turns[lane], now)
                announced = bool(room[model] > 0 and row["due"])
                if announced:
                    room[model] -= 1
                    row |= {"state": ChunkState.ANNOUNCED, "announced_at": now}
                chunks.append(row)
                for i in run:
                    job = submission.jobs[i]
                    rows.append((first + i, chunk, submission.batch, job.input, job.metadata))
                    where[i] = Submitted(first + i, chunk, announced=announced)
            placed.append([resolved(where[i], first, where) for i in range(len(submission.jobs))])
        if chunks:
            connection.execute(insert(schema.chunks), chunks)
            if bulk:
                self._db.dialect.insert_jobs(connection, rows)
            else:
                names = ("id", "chunk", "batch", "input", "metadata")
                connection.execute(insert(schema.jobs), [dict(zip(names, row, strict=True)) for row in rows])
        return placed

    def _stand(self, connection: Connection, lane: tuple[int, int, int], window: int) -> Stand:
        if window:
            return stand(connection, self._standing, lane, window)
        return Stand(self._db.clock(connection), last_turn(connection, *lane), 0)

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

    def extend(self, submission: Submission, inputs: Sequence[bytes]) -> None:
        """Store jobs of a batch that have nothing but an input, in one transaction: the bulk path.

        Args:
            submission: what they share; it has no jobs of its own.
            inputs: encoded as in `values`, in their order.
        """
        for attempt in range(REDRAWS):
            first = draw(len(inputs))
            try:
                self._db.transact(
                    lambda connection, first=first: self._extend(connection, submission, inputs, first),  # type: ignore[misc]
                    lambda connection, _, first=first: self._is_stored(connection, [first]),  # type: ignore[misc]
                )
            except IntegrityError:
                if attempt == REDRAWS - 1:
                    raise
            else:
                return

    def _extend(self, connection: Connection, submission: Submission, inputs: Sequence[bytes], first: int) -> None:
        assert submission.batch is not None
        now = self._db.clock(connection)
        last = last_turn(connection, submission.version.model, submission.options.priority, submission.flow)
        chunks, sizes = [], []
        for turn, (start, n) in enumerate(spans(submission.version, inputs), start=last + 1):
            chunks.append(chunk_row(submission, (first + start, first + start + n - 1, n), turn, now))
            sizes.append(n)
        connection.execute(insert(schema.chunks), chunks)
        self._db.dialect.insert_inputs(connection, first, sizes, submission.batch, inputs)
