"""The hot table: chunks announced, claimed, handed back, expired.

Every move is one fenced statement over many rows (`states.CHUNK_MOVES`). Not here: what moves jobs (`job_store`), and
what becomes of a lost worker's chunks (`lost`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, bindparam, text

from torchrelay_storage.chunk_jobs import IN_CHUNK, OfChunks
from torchrelay_storage.database import Database
from torchrelay_storage.lost import LostChunks
from torchrelay_storage.options import Backoff
from torchrelay_storage.settle import Moved, settle, slices
from torchrelay_storage.states import ChunkState
from torchrelay_storage.turns import advance

EXPIRE_SLICE = 200


def _not_paused(model: str) -> str:
    """Return the SQL by which neither the model of a chunk `c` nor its batch nor its run is paused.

    As a NOT EXISTS, PostgreSQL would make a join of the model and expect it to leave no row, and sort a whole queue for
    its first chunks. With `model` a parameter it is looked up once a statement; a run is looked up only for the chunks
    of training lanes, whose `first_id` is its job.
    """
    return f"""
        AND NOT (SELECT m.paused FROM models m WHERE m.id = {model})
        AND (NOT (SELECT m.training FROM models m WHERE m.id = {model})
             OR NOT EXISTS (SELECT 1 FROM runs r WHERE r.job = c.first_id AND r.paused))
        AND (c.batch IS NULL OR NOT EXISTS (SELECT 1 FROM batches b WHERE b.id = c.batch AND b.paused))
    """


@dataclass(frozen=True, slots=True)
class Announced:
    """A chunk whose id is to be sent through Redis."""

    chunk: int
    priority: int


@dataclass(frozen=True, slots=True)
class ModelDue:
    """A model and whether it has chunks that wait to be announced, or that were announced and not claimed."""

    model: int
    name: str
    waiting: bool
    announced: bool


@dataclass(frozen=True, slots=True)
class ClaimedJob:
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
    SELECT j.id, j.chunk, j.input, j.failures FROM {chunk_jobs}
    WHERE c.id IN :chunks AND j.state = 0 ORDER BY j.id
""")

_OPEN_JOBS = OfChunks("""
    SELECT j.id FROM {chunk_jobs}
    WHERE c.id IN :chunks AND j.state = 0 ORDER BY j.id
""")

_EXPIRE_JOBS = text(f"UPDATE jobs SET state = 4, finished_at = :now WHERE {IN_CHUNK} AND state = 0")


class ChunkStore(LostChunks):
    """The moves of chunks."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        d = database.dialect
        returning = "id, token, model, version, batch, priority, timeout, max_attempts, suspect, backoff"
        here = _not_paused(":model")
        self._ripen = text("UPDATE chunks SET due = true WHERE state = 0 AND NOT due AND not_before <= :now")
        self._next = text(f"""
            SELECT c.id, c.priority, c.turn FROM chunks c
            WHERE c.state = 0 AND c.due AND c.model = :model AND c.priority >= :least
              AND (c.expires_at IS NULL OR c.expires_at > :now) {here}
            ORDER BY c.priority DESC, c.turn, c.id LIMIT :limit {d.skip_locked}
        """)
        self._announce = _chunks(
            "UPDATE chunks SET state = 1, announced_at = :now WHERE id IN :chunks AND state = 0 RETURNING id"
        )
        self._overdue = text(f"""
            SELECT c.id, c.priority FROM chunks c
            WHERE c.state = 1 AND c.model = :model AND c.announced_at <= :before {here}
            ORDER BY c.announced_at LIMIT :limit {d.skip_locked}
        """)
        self._again = _chunks("UPDATE chunks SET announced_at = :now WHERE id IN :chunks AND state = 1 RETURNING id")
        self._claimable = _chunks(f"""
            SELECT c.id, c.suspect FROM chunks c WHERE c.id IN :chunks AND c.state IN (0, 1) AND c.due
              AND (c.expires_at IS NULL OR c.expires_at > :now) {_not_paused("c.model")} {_ALIVE}
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
            SELECT c.id, c.batch FROM chunks c
            WHERE c.state < 2 AND c.expires_at IS NOT NULL AND c.expires_at <= :now
            ORDER BY c.id LIMIT :limit {d.skip_locked}
        """)

    # --- announce -----------------------------------------------------------------------------------------

    def announce(self, model: int, room: Mapping[int, int]) -> list[Announced]:
        """Move waiting chunks whose time has come to `announced`, in the order of priority, then turn.

        Args:
            room: by priority 0 to 9, how many more chunks of that priority or a higher one may be announced.

        Returns:
            What was announced. It is committed: whoever dies before sending it leaves it to `announce_again`.
        """
        limit = max(room.values(), default=0)
        if limit <= 0:
            return []
        least = min(p for p, n in room.items() if n > 0)

        def work(connection: Connection) -> list[Announced]:
            now = self._db.clock(connection)
            connection.execute(self._ripen, {"now": now})
            rows = connection.execute(self._next, {"model": model, "least": least, "limit": limit, "now": now}).all()
            chosen: list[Row[Any]] = []
            for row in rows:  # most urgent first, so what is chosen so far is what is as urgent or more
                if len(chosen) < room.get(row.priority, 0):
                    chosen.append(row)
            if not chosen:
                return []
            moved = set(connection.execute(self._announce, {"chunks": [r.id for r in chosen], "now": now}).scalars())
            announced = [row for row in chosen if row.id in moved]
            latest: dict[int, int] = {}
            for row in announced:
                latest[row.priority] = max(row.turn, latest.get(row.priority, 0))
            advance(connection, model, latest)
            return [Announced(row.id, row.priority) for row in announced]

        return self._db.transact(work)

    def announce_again(
        self, model: int, older_than: float, limit: int, waiting: Collection[int] = ()
    ) -> list[Announced]:
        """Return chunks announced more than `older_than` seconds ago and not claimed, to be sent once more.

        Args:
            waiting: chunks that are known to be still there.
        """

        def work(connection: Connection) -> list[Announced]:
            now = self._db.clock(connection)
            scope = {"model": model, "before": now - older_than, "limit": limit + len(waiting)}
            rows = [row for row in connection.execute(self._overdue, scope) if row.id not in waiting][:limit]
            if not rows:
                return []
            moved = set(connection.execute(self._again, {"chunks": [r.id for r in rows], "now": now}).scalars())
            return [Announced(row.id, row.priority) for row in rows if row.id in moved]

        return self._db.transact(work)

    def due_models(self) -> list[ModelDue]:
        """Return the models that have something to announce or to announce again."""
        statement = text("""
            SELECT m.id, m.name,
                   EXISTS (SELECT 1 FROM chunks c WHERE c.state = 0 AND c.due AND c.model = m.id)
                   OR EXISTS (SELECT 1 FROM chunks c WHERE c.state = 0 AND NOT c.due AND c.not_before <= :now
                              AND c.model = m.id) AS waiting,
                   EXISTS (SELECT 1 FROM chunks c WHERE c.state = 1 AND c.model = m.id) AS announced
            FROM models m WHERE NOT m.paused
        """)

        def work(connection: Connection) -> list[ModelDue]:
            rows = connection.execute(statement, {"now": self._db.clock(connection)})
            return [
                ModelDue(r.id, r.name, bool(r.waiting), bool(r.announced)) for r in rows if r.waiting or r.announced
            ]

        return self._db.query(work)

    # --- claim --------------------------------------------------------------------------------------------

    def claim(self, chunks: Sequence[int], worker: int) -> list[Claimed]:
        """Claim chunks and read their open jobs, in one transaction.

        What is cancelled, expired, paused, not due, or claimed by another is not returned.
        """

        def work(connection: Connection) -> list[Claimed]:
            now = self._db.clock(connection)
            row = {"chunks": list(chunks), "now": now, "worker": worker}
            return self._take(connection, connection.execute(self._claimable, row).all(), worker, now)

        return self._db.transact(work)

    def claim_next(self, models: Sequence[int], worker: int, limit: int) -> list[Claimed]:
        """Claim the next chunks of these models straight from SQL: how work goes on while Redis is away."""
        if not models:
            return []

        def work(connection: Connection) -> list[Claimed]:
            now = self._db.clock(connection)
            connection.execute(self._ripen, {"now": now})
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
        for job, chunk, data, failures in _READ_JOBS.on(connection, {"chunks": list(jobs)}):
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
            now = self._db.clock(connection)
            rows = connection.execute(self._too_late, {"now": now, "limit": limit}).all()
            if not rows:
                return Moved()
            chunks = [row.id for row in rows]
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
