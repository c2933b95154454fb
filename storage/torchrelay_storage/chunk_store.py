"""The hot table: chunks claimed, handed back, expired.

Every move is one fenced statement over many rows (`states.CHUNK_MOVES`). Not here: what moves jobs (`job_store`), what
waits and is announced (`waiting`), and what becomes of a lost worker's chunks (`lost`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, bindparam, text

from torchrelay_storage.chunk_jobs import IN_CHUNK, OfChunks
from torchrelay_storage.database import Database
from torchrelay_storage.lost import LostChunks
from torchrelay_storage.options import Backoff
from torchrelay_storage.settle import Moved, settle, slices
from torchrelay_storage.states import ChunkState
from torchrelay_storage.waiting import WaitingChunks, not_paused

EXPIRE_SLICE = 200


class ClaimedJob(NamedTuple):  # which is made at a quarter of a dataclass' cost, a million times
    """An open job of a claimed chunk. `input` is encoded as in `values`."""

    id: int
    input: bytes
    failures: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """A chunk that a worker holds, with the token that its writes must show.

    A `suspect` was held by a process that died: its worker runs it alone, so that nobody else is blamed for it.
    """

    chunk: int
    token: int
    model: int
    version: int
    batch: int | None
    priority: int
    timeout: float | None  # seconds
    max_attempts: int
    jobs: tuple[ClaimedJob, ...]
    suspect: bool = False
    backoff: Backoff | None = None  # between its jobs' tries; None: the model's


@dataclass(frozen=True, slots=True)
class Held:
    """What the database says a worker holds. `cancelled` grows when jobs of the chunk were cancelled."""

    chunk: int
    token: int
    cancelled: int


def _chunks(statement: str) -> Any:
    return text(statement).bindparams(bindparam("chunks", expanding=True))


# What a worker that counts as stopped took would only have to be rescued.
_ALIVE = "AND EXISTS (SELECT 1 FROM workers w WHERE w.id = :worker AND w.stopped_at IS NULL)"

_LET_WAIT = _chunks("UPDATE chunks SET state = 0, announced_at = NULL WHERE id IN :chunks AND state = 1")

_READ_JOBS = OfChunks("""
    SELECT j.id, j.input, j.failures, j.chunk FROM {chunk_jobs}
    WHERE c.id IN :chunks AND j.state = 0 ORDER BY j.id
""")

_OPEN_JOBS = OfChunks("""
    SELECT j.id FROM {chunk_jobs}
    WHERE c.id IN :chunks AND j.state = 0 ORDER BY j.id
""")

_EXPIRE_JOBS = text(f"UPDATE jobs SET state = 4, finished_at = :now WHERE {IN_CHUNK} AND state = 0")


class ChunkStore(WaitingChunks, LostChunks):
    """The moves of chunks."""

    def __init__(self, database: Database) -> None:
        WaitingChunks.__init__(self, database)
        LostChunks.__init__(self, database)
        d = database.dialect
        returning = "id, token, model, version, batch, priority, timeout, max_attempts, suspect, backoff"
        here = not_paused(":model")
        self._claimable = _chunks(f"""
            SELECT c.id, c.suspect, {d.now} AS now FROM chunks c WHERE c.id IN :chunks AND c.state IN (0, 1) AND c.due
              AND (c.expires_at IS NULL OR c.expires_at > {d.now}) {not_paused("c.model")} {_ALIVE}
            ORDER BY c.id {d.skip_locked}
        """)
        # One state and model at a time, so that an index gives the order: there may be a million that wait.
        self._claimable_next = [
            text(f"""
                SELECT c.id, c.suspect FROM chunks c
                WHERE c.state = {state:d} AND c.due AND c.model = :model
                  AND (c.expires_at IS NULL OR c.expires_at > :now) {here} {_ALIVE}
                ORDER BY c.priority DESC, c.turn, c.id LIMIT :limit {d.skip_locked}
            """)
            for state in (ChunkState.ANNOUNCED, ChunkState.WAITING)
        ]
        self._claim = _chunks(f"""
            UPDATE chunks SET state = 2, token = token + 1, worker = :worker, claimed_at = :now, alone = false
            WHERE id IN :chunks AND state IN (0, 1) RETURNING {returning}
        """)
        self._too_late = text(f"""
            SELECT c.id, c.batch, {d.now} AS now FROM chunks c
            WHERE c.state < 2 AND c.expires_at IS NOT NULL AND c.expires_at <= (SELECT {d.now})
            ORDER BY c.id LIMIT :limit {d.skip_locked}
        """)

    # --- claim --------------------------------------------------------------------------------------------

    def claim(self, chunks: Sequence[int], worker: int) -> list[Claimed]:
        """Claim chunks and read their open jobs, in one transaction.

        What is cancelled, expired, paused, not due, or claimed by another is not returned.
        """

        def work(connection: Connection) -> list[Claimed]:
            free = connection.execute(self._claimable, {"chunks": list(chunks), "worker": worker}).all()
            return self._take(connection, free, worker, free[0].now if free else 0.0)

        return self._db.transact(work)

    def claim_next(self, models: Sequence[int], worker: int, limit: int) -> list[Claimed]:
        """Claim the next chunks of these models straight from SQL: how work goes on while Redis is away."""
        if not models:
            return []

        def work(connection: Connection) -> list[Claimed]:
            now = self._db.clock(connection)
            connection.execute(self._ripen)
            found: list[Row[Any]] = []
            for statement in self._claimable_next:
                for model in models:
                    if len(found) < limit:
                        row = {"model": model, "limit": limit - len(found), "now": now, "worker": worker}
                        found.extend(connection.execute(statement, row))
            return self._take(connection, found, worker, now)

        return self._db.transact(work)

    def _take(self, connection: Connection, free: Sequence[Row[Any]], worker: int, now: float) -> list[Claimed]:
        # A suspect runs alone: whoever held two would hold one of them up, and both would be lost with the first.
        suspects = [row.id for row in free if row.suspect]
        if suspects[1:]:
            connection.execute(_LET_WAIT, {"chunks": suspects[1:]})
        chunks = [row.id for row in free if row.id not in suspects[1:]]
        if not chunks:
            return []
        rows = connection.execute(self._claim, {"chunks": chunks, "worker": worker, "now": now}).all()
        jobs: dict[int, list[ClaimedJob]] = {row.id: [] for row in rows}
        for job, data, failures, chunk in _READ_JOBS.fetch(connection, {"chunks": list(jobs)}):
            jobs[chunk].append(ClaimedJob(job, data, failures))
        taken = [
            Claimed(
                chunk=row.id, token=row.token, model=row.model, version=row.version, batch=row.batch,
                priority=row.priority, timeout=row.timeout, max_attempts=row.max_attempts, jobs=tuple(jobs[row.id]),
                suspect=bool(row.suspect), backoff=Backoff.decode(row.backoff) if row.backoff else None,
            )
            for row in rows
        ]  # fmt: skip
        return sorted(taken, key=lambda c: (-c.priority, c.chunk))

    def hand_back(self, holds: Sequence[tuple[int, int]], worker: int, *, suspect: bool = False) -> int:
        """Let claimed chunks wait again, where the worker still holds them with this token. Spends nobody's attempts.

        Args:
            holds: (chunk, token) pairs.
            suspect: the process that held them died, perhaps of one of them; each runs alone from now on.

        Returns:
            How many chunks went back.
        """
        statement = text("""
            UPDATE chunks SET state = 0, token = token + 1, worker = NULL, claimed_at = NULL, announced_at = NULL,
                alone = false, suspect = suspect OR CAST(:suspect AS BOOLEAN)
            WHERE id = :chunk AND token = :token AND worker = :worker AND state = 2
        """)
        if not holds:
            return 0
        rows = [{"chunk": c, "token": t, "worker": worker, "suspect": suspect} for c, t in sorted(holds)]

        def work(connection: Connection) -> int:
            return sum(connection.execute(statement, row).rowcount for row in rows)

        return self._db.transact(work)

    def run_alone(self, chunk: int, token: int, worker: int) -> bool:
        """Note that a suspect runs now and nothing beside it, so that it can be blamed should its worker be lost.

        Returns:
            False: the worker does not hold it any more.
        """
        statement = text(
            "UPDATE chunks SET alone = true WHERE id = :chunk AND token = :token AND worker = :worker AND state = 2"
        )
        row = {"chunk": chunk, "token": token, "worker": worker}
        return self._db.transact(lambda connection: connection.execute(statement, row).rowcount == 1)

    def held(self, worker: int) -> list[Held]:
        """Return the chunks that the database says this worker holds."""
        statement = text("SELECT id, token, cancelled FROM chunks WHERE state = 2 AND worker = :worker ORDER BY id")

        def work(connection: Connection) -> list[Held]:
            return [Held(*row) for row in connection.execute(statement, {"worker": worker})]

        return self._db.query(work)

    def open_jobs(self, chunks: Sequence[int]) -> set[int]:
        """Return which jobs of these chunks are still open."""

        def work(connection: Connection) -> set[int]:
            return {job for run in slices(chunks) for job in _OPEN_JOBS.on(connection, {"chunks": list(run)}).scalars()}

        return self._db.query(work)

    # --- maintenance --------------------------------------------------------------------------------------

    def expire(self, limit: int = EXPIRE_SLICE) -> Moved:
        """End the jobs that were not started in time."""

        def work(connection: Connection) -> Moved:
            rows = connection.execute(self._too_late, {"limit": limit}).all()
            if not rows:
                return Moved()
            chunks, now = [row.id for row in rows], rows[0].now
            count = connection.execute(_EXPIRE_JOBS, [{"chunk": chunk, "now": now} for chunk in chunks]).rowcount
            settle(connection, chunks, now)
            return Moved(count, tuple(chunks), tuple({row.batch for row in rows if row.batch is not None}))

        return self._db.transact(work)

    def recall(self, *, model: int | None = None, batch: int | None = None) -> int:
        """Let what was announced wait again: after a pause, whose messages workers have thrown away."""
        which = "model = :id" if model is not None else "batch = :id"
        statement = text(f"UPDATE chunks SET state = 0, announced_at = NULL WHERE state = 1 AND {which}")
        scope = {"id": model if model is not None else batch}
        return self._db.transact(lambda connection: connection.execute(statement, scope).rowcount)
