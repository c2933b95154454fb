"""Retention: what ended long ago is deleted in slices, with its artifacts; what someone may still need is spared.

Of a training run its metrics, log and checkpoints go too; the version that it registered stays, with its weights, which
are files of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, text

from torchrelay_storage.chunk_jobs import IN_CHUNK, OfChunks
from torchrelay_storage.database import Database
from torchrelay_storage.settle import slices

PURGE_SLICE = 50  # chunks in one transaction


@dataclass(frozen=True, slots=True)
class Purged:
    """What a slice deleted.

    Attributes:
        artifacts: stored values that refer to the object store, to be deleted there.
        runs: training runs, whose files (`artifacts.run_path`) are to be deleted there too.
    """

    jobs: int
    chunks: int
    artifacts: tuple[bytes, ...]
    runs: tuple[int, ...] = ()


class Retention:
    """Deletes finished jobs. A batch is spared whole until its end is written and all its jobs have ended."""

    def __init__(self, database: Database) -> None:
        self._db = database
        # `values.py` marks what lies in the object store by its first byte.
        self._old = text(f"""
            SELECT c.id FROM chunks c
            WHERE c.state = 3 AND c.ended_at < :before AND (c.batch IS NULL OR (
                EXISTS (SELECT 1 FROM batches b WHERE b.id = c.batch AND b.closed)
                AND NOT EXISTS (SELECT 1 FROM chunks o WHERE o.batch = c.batch
                                AND (o.state < 3 OR o.ended_at >= :before))))
            ORDER BY c.ended_at LIMIT :limit {database.dialect.skip_locked}
        """)

    def purge(self, older_than: float, *, reference: bytes, limit: int = PURGE_SLICE) -> Purged:
        """Delete one slice of jobs that ended more than `older_than` seconds ago.

        Args:
            reference: the first byte of a stored value that is a reference to the object store.

        Returns:
            What was deleted; call again until it is nothing. The artifacts' references are returned once the rows are
            gone: who dies before deleting them leaves files, never a row without its file.
        """

        def work(connection: Connection) -> tuple[Purged, list[int]]:
            before = self._db.clock(connection) - older_than
            chunks = list(connection.execute(self._old, {"before": before, "limit": limit}).scalars())
            if not chunks:
                return Purged(0, 0, ()), []
            scope = {"chunks": chunks}
            artifacts = [
                bytes(value)
                for row in _REFERENCES.on(connection, scope | {"tag": reference})
                for value in row
                if value is not None and bytes(value[:1]) == reference
            ]
            runs = tuple(_RUNS.on(connection, scope).scalars())
            for run in slices(runs):
                for statement in _DELETE_RUNS:
                    connection.execute(statement, {"runs": list(run)})
            each = [{"chunk": chunk} for chunk in chunks]
            connection.execute(_DELETE_ATTEMPTS, each)
            connection.execute(_DELETE_KEYS, each)
            jobs = connection.execute(_DELETE_JOBS, each).rowcount
            connection.execute(_DELETE_CHUNKS, scope)
            connection.execute(_DELETE_BATCHES, {"before": before})
            return Purged(jobs, len(chunks), tuple(artifacts), runs), chunks

        def is_done(connection: Connection, result: tuple[Purged, list[int]]) -> bool:
            return bool(result[1]) and connection.execute(_LEFT, {"chunks": result[1]}).first() is None

        return self._db.transact(work, is_done)[0]


def _of(statement: str, name: str = "chunks") -> Any:
    return text(statement).bindparams(bindparam(name, expanding=True))


_REFERENCES = OfChunks("""
    SELECT j.input, j.output FROM {chunk_jobs}
    WHERE c.id IN :chunks AND (substr(j.input, 1, 1) = :tag OR substr(j.output, 1, 1) = :tag)
""")
_RUNS = OfChunks("SELECT r.job FROM {chunk_jobs} JOIN runs r ON r.job = j.id WHERE c.id IN :chunks")
_DELETE_RUNS = [
    _of(f"DELETE FROM {table} WHERE job IN :runs", "runs") for table in ("metrics", "run_logs", "checkpoints", "runs")
]
_DELETE_ATTEMPTS = text(f"DELETE FROM attempts WHERE job IN (SELECT id FROM jobs WHERE {IN_CHUNK})")
_DELETE_KEYS = text(f"DELETE FROM keys WHERE job IN (SELECT id FROM jobs WHERE {IN_CHUNK})")
_DELETE_JOBS = text(f"DELETE FROM jobs WHERE {IN_CHUNK}")
_DELETE_CHUNKS = _of("DELETE FROM chunks WHERE id IN :chunks")
_LEFT = _of("SELECT 1 FROM chunks WHERE id IN :chunks LIMIT 1")
_DELETE_BATCHES = text("""
    DELETE FROM batches WHERE closed AND created_at < :before
      AND NOT EXISTS (SELECT 1 FROM chunks c WHERE c.batch = batches.id)
""")
