"""Jobs as users see them: by id, in pages with filters, and those that ended in given chunks. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappush, heapreplace
from typing import Any

import orjson
from sqlalchemy import Connection, Row, bindparam, text

from torchrelay_storage.attempts import Attempt, read_attempts
from torchrelay_storage.chunk_jobs import OfChunks
from torchrelay_storage.database import Database
from torchrelay_storage.ids import LARGEST
from torchrelay_storage.job_error import JobError, decode_error
from torchrelay_storage.settle import MAX_CHUNK, slices
from torchrelay_storage.states import ChunkState, End, JobState

CHUNK_PAGE = 64  # chunks looked at in one statement while a page is gathered


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job with everything that is known of it. `input` and `output` are encoded as in `values`."""

    id: int
    chunk: int
    batch: int | None
    model: str
    version: int  # of the model: the number, as in digits@3
    state: JobState
    priority: int
    failures: int
    max_attempts: int
    timeout: float | None
    tenant: str
    key: str | None
    metadata: dict[str, Any]
    error: JobError | None
    worker: str | None  # who runs it, or recorded its end
    created_at: float
    not_before: float | None
    expires_at: float | None
    finished_at: float | None
    input: bytes | None = None  # None where it was not asked for
    output: bytes | None = None
    trains: str | None = None  # of a training run: the name of the model that it trains
    trained: int | None = None  # and the number of the version that it registered
    handler_revision: str | None = None  # of the code that computed its result


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs a page shows; what is empty or None does not filter."""

    states: tuple[JobState, ...] = ()
    model: str | None = None
    batch: int | None = None
    tenant: str | None = None


def derive_state(end: int, chunk_state: int, due: bool, retrying: bool) -> JobState:
    """Return the state that users see: the job's own end, else where its chunk is. As the view `job_status` does."""
    if end != End.OPEN:
        return End(end).shown
    if chunk_state == ChunkState.CLAIMED:
        return JobState.RUNNING
    if retrying:
        return JobState.RETRYING
    return JobState.QUEUED if due else JobState.SCHEDULED


# For each state: which ends its jobs have, and which chunks can hold such a job, so that an index finds them.
_WHERE: dict[JobState, tuple[End, str]] = {
    JobState.SCHEDULED: (End.OPEN, "c.state < 2 AND NOT c.due AND NOT c.retrying"),
    JobState.QUEUED: (End.OPEN, "c.state < 2 AND c.due AND NOT c.retrying"),
    JobState.RUNNING: (End.OPEN, "c.state = 2"),
    JobState.RETRYING: (End.OPEN, "c.state < 2 AND c.retrying"),
    JobState.SUCCEEDED: (End.SUCCEEDED, "c.succeeded > 0"),
    JobState.FAILED: (End.FAILED, "c.failed > 0"),
    JobState.CANCELLED: (End.CANCELLED, "c.cancelled > 0"),
    JobState.EXPIRED: (End.EXPIRED, "c.expired > 0"),
}


def condition(states: Sequence[JobState]) -> str:
    """Return the SQL by which a job `j` of a chunk `c` is in one of these states."""
    return " OR ".join(f"(j.state = {int(end)} AND {where})" for end, where in (_WHERE[s] for s in states))


_COLUMNS = """j.id, j.chunk, j.batch, m.name AS model, v.version, j.state AS end_state, c.state AS chunk_state, c.due,
    c.retrying, c.priority, j.failures, c.max_attempts, c.timeout, c.tenant, k.key, j.metadata, j.error,
    w.name AS worker, c.created_at, c.not_before, c.expires_at, j.finished_at,
    CASE WHEN m.training THEN (SELECT r.model FROM runs r WHERE r.job = j.id) END AS trains,
    CASE WHEN m.training THEN (SELECT r.version FROM runs r WHERE r.job = j.id) END AS trained,
    (SELECT s.revision FROM served s WHERE s.worker = j.worker AND s.version = c.version) AS handler_revision"""

_JOINS = """JOIN model_versions v ON v.id = c.version JOIN models m ON m.id = c.model
    LEFT JOIN keys k ON k.job = j.id LEFT JOIN workers w ON w.id = COALESCE(j.worker, c.worker)"""


class JobReader:
    """The questions that can be asked about jobs."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def get(self, jobs: Sequence[int], *, with_input: bool = False, with_output: bool = True) -> dict[int, JobRow]:
        """Return the rows of these jobs by id; one that does not exist is left out."""
        statement = text(
            f"SELECT {_COLUMNS}{_values(with_input, with_output)} FROM jobs j JOIN chunks c ON c.id = j.chunk {_JOINS} "
            "WHERE j.id IN :jobs"
        ).bindparams(bindparam("jobs", expanding=True))

        def work(connection: Connection) -> dict[int, JobRow]:
            found: dict[int, JobRow] = {}
            for run in slices(list(jobs)):
                found.update((r.id, _row(r)) for r in connection.execute(statement, {"jobs": list(run)}))
            return found

        return self._db.query(work)

    def of_key(self, model: int, tenant: str, key: str) -> tuple[int, bytes] | None:
        """Return the id of the job that a tenant submitted to this model under a key, and its input's digest."""
        statement = text("SELECT job, digest FROM keys WHERE tenant = :tenant AND model = :model AND key = :key")
        scope = {"tenant": tenant, "model": model, "key": key}
        row = self._db.query(lambda connection: connection.execute(statement, scope).one_or_none())
        return (row.job, bytes(row.digest)) if row is not None else None

    def queued(self, model: int | None = None) -> int:
        """Return how many jobs of a model wait for a worker, delayed ones and retries too; None: of all models."""
        scope = (
            "c.model = :model" if model is not None else "c.model NOT IN (SELECT m.id FROM models m WHERE m.training)"
        )
        # One state at a time, so that an index finds them: those that are done may be a thousand times as many.
        of_state = f"""SELECT COALESCE(sum(c.size - c.succeeded - c.failed - c.cancelled - c.expired), 0)
            FROM chunks c WHERE {scope} AND c.state ="""
        statement = text(f"SELECT ({of_state} {ChunkState.WAITING:d}) + ({of_state} {ChunkState.ANNOUNCED:d})")
        return int(self._db.query(lambda connection: connection.execute(statement, {"model": model}).scalar_one()))

    def attempts(self, job: int) -> list[Attempt]:
        """Return the tries of a job, the oldest first. Raises JobNotFound."""
        return self._db.query(lambda connection: read_attempts(connection, job))

    def page(
        self, wanted: JobFilter, *, limit: int = 50, before: int | None = None, with_output: bool = False
    ) -> list[JobRow]:
        """Return the newest jobs that pass the filter, at most `limit`.

        Args:
            before: the last id of the page before; the next page goes on below it.
        """

        def work(connection: Connection) -> list[int]:
            return newest(connection, wanted, limit, before)

        ids = self._db.query(work)
        rows = self.get(ids, with_output=with_output)
        return [rows[i] for i in ids if i in rows]

    def ended_in(self, chunks: Sequence[int], *, with_output: bool = True, with_input: bool = False) -> list[JobRow]:
        """Return the ended jobs of these chunks in the order of their ids, which is the order of their inputs."""
        columns = _COLUMNS + _values(with_input, with_output)
        statement = OfChunks(f"SELECT {columns} FROM {{chunk_jobs}} {_JOINS} WHERE c.id IN :chunks AND j.state <> 0")

        def work(connection: Connection) -> list[JobRow]:
            found = [_row(r) for run in slices(list(chunks)) for r in statement.on(connection, {"chunks": list(run)})]
            return sorted(found, key=lambda row: row.id)

        return self._db.query(work)


def _values(with_input: bool, with_output: bool) -> str:
    return (", j.input" if with_input else "") + (", j.output" if with_output else "")


def _row(r: Row[Any]) -> JobRow:
    fields = r._mapping
    return JobRow(
        id=r.id, chunk=r.chunk, batch=r.batch, model=r.model, version=r.version,
        state=derive_state(r.end_state, r.chunk_state, r.due, r.retrying),
        priority=r.priority, failures=r.failures, max_attempts=r.max_attempts, timeout=r.timeout, tenant=r.tenant,
        key=r.key, metadata=orjson.loads(r.metadata) if r.metadata else {},
        error=decode_error(r.error),
        worker=r.worker, created_at=r.created_at, not_before=r.not_before, expires_at=r.expires_at,
        finished_at=r.finished_at, input=fields.get("input"), output=fields.get("output"), trains=r.trains,
        trained=r.trained, handler_revision=r.handler_revision,
    )  # fmt: skip


def newest(connection: Connection, wanted: JobFilter, limit: int, before: int | None) -> list[int]:
    """Gather the newest matching ids by walking the chunks from the newest down.

    Chunks hold runs of ids, so a page needs few of them, whatever the size of the table: once `limit` ids are found,
    a chunk whose last id is below all of them has nothing to add. Retries overlap the run they came from, which is why
    the walk is by `last_id` and keeps the best so far.
    """
    best: list[int] = []  # a heap: the smallest of the ids kept comes first
    below = before if before is not None else LARGEST
    scope = {"model": wanted.model, "batch": wanted.batch, "tenant": wanted.tenant, "below": below}
    for query, ends in _walks(wanted):
        # A chunk spans at most MAX_CHUNK ids, so none further up reaches below the page's edge.
        last, last_chunk = min(LARGEST, below + MAX_CHUNK), LARGEST
        while True:
            cursor = {"last": last, "last_chunk": last_chunk, "limit": CHUNK_PAGE}
            chunks = connection.execute(query, scope | cursor).all()
            for chunk in chunks:
                if len(best) == limit and chunk.last_id < best[0]:
                    break
                for job in _jobs_of(connection, chunk, ends, limit, below):
                    if len(best) < limit:
                        heappush(best, job)
                    elif job > best[0]:
                        heapreplace(best, job)
            if len(chunks) < CHUNK_PAGE or (len(best) == limit and chunks[-1].last_id < best[0]):
                break
            last, last_chunk = chunks[-1].last_id, chunks[-1].id
    return sorted(best, reverse=True)


def _walks(wanted: JobFilter) -> list[tuple[Any, tuple[End, ...]]]:
    """One walk for each set of chunks that an index can find; states whose chunks overlap must not be walked twice."""
    scope = ""
    if wanted.model is not None:
        scope += " AND c.model = (SELECT id FROM models WHERE name = :model)"
    if wanted.batch is not None:
        scope += " AND c.batch = :batch"
    if wanted.tenant is not None:
        scope += " AND c.tenant = :tenant"

    def walk(where: str) -> Any:
        return text(
            f"SELECT c.id, c.first_id, c.last_id FROM chunks c WHERE {where}{scope} AND c.first_id < :below "
            "AND (c.last_id, c.id) < (:last, :last_chunk) ORDER BY c.last_id DESC, c.id DESC LIMIT :limit"
        )

    if not wanted.states:
        return [(walk("c.size > 0"), tuple(End))]
    by_end: dict[tuple[End, str], None] = {_WHERE[state]: None for state in wanted.states}
    return [(walk(where), (end,)) for end, where in by_end]


def _jobs_of(connection: Connection, chunk: Row[Any], ends: tuple[End, ...], limit: int, below: int) -> Sequence[int]:
    return connection.execute(
        text(
            "SELECT id FROM jobs WHERE id BETWEEN :first AND :last AND chunk = :chunk "
            f"AND state IN ({', '.join(str(int(e)) for e in ends)}) ORDER BY id DESC LIMIT :limit"
        ),
        {"first": chunk.first_id, "last": min(chunk.last_id, below - 1), "chunk": chunk.id, "limit": limit},
    ).scalars().all()  # fmt: skip
