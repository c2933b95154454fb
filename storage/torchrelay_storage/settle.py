"""What every move of jobs shares: locking their chunks, parting jobs from a chunk, and counting a chunk anew.

A chunk's counts are derived: whoever changes jobs outside the fast path of the finish calls `settle` in the same
transaction, and a chunk none of whose jobs is open is done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Connection, bindparam, text

from torchrelay_storage.chunk_jobs import OfChunks
from torchrelay_storage.database import Database
from torchrelay_storage.ids import draw
from torchrelay_storage.states import End

T = TypeVar("T")

# A chunk's jobs lie within this many ids; chunk sizes are capped by it.
MAX_CHUNK = 10_000

SLICE = 500  # ids in one statement: well below SQLite's limit of parameters


@dataclass(frozen=True, slots=True)
class Moved:
    """How many jobs a move changed, and whom to tell: the chunks they were in, and their batches."""

    count: int = 0
    chunks: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.count + other.count,
            tuple(dict.fromkeys(self.chunks + other.chunks)),
            tuple(dict.fromkeys(self.batches + other.batches)),
        )


def slices(items: Sequence[T], size: int = SLICE) -> Iterator[Sequence[T]]:
    """Yield the items in runs that fit a statement."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


_COUNT = OfChunks("""
    SELECT c.id AS chunk, j.state AS state, count(*) AS n FROM {chunk_jobs}
    WHERE c.id IN :chunks GROUP BY c.id, j.state
""")

_SET_COUNTS = text("""
    UPDATE chunks SET size = :size, succeeded = :succeeded, failed = :failed, cancelled = :cancelled,
        expired = :expired, ended_at = CASE WHEN :open = 0 AND state <> 3 THEN :now ELSE ended_at END,
        state = CASE WHEN :open = 0 THEN 3 ELSE state END
    WHERE id = :chunk
""")

_LOCK = "SELECT id, batch FROM chunks WHERE id IN :chunks ORDER BY id {lock}"

_PART = text("""
    INSERT INTO chunks (id, model, version, batch, tenant, flow, priority, turn, first_id, last_id, size, state, due,
                        suspect, retrying, token, timeout, max_attempts, backoff, not_before, expires_at, created_at)
    SELECT :chunk, model, version, batch, tenant, flow, priority, COALESCE(CAST(:turn AS BIGINT), turn),
           :first, :last, :size, 0, CAST(:due AS BOOLEAN), CAST(:suspect AS BOOLEAN), CAST(:retrying AS BOOLEAN), 0,
           timeout, max_attempts, backoff,
           CAST(:not_before AS FLOAT), CASE WHEN CAST(:expires AS BOOLEAN) THEN expires_at END, created_at
    FROM chunks WHERE id = :source
""")


def lock(database: Database, connection: Connection, chunks: Iterable[int]) -> tuple[int, ...]:
    """Lock chunks in the order of their ids, as every move does, so that no two wait for each other.

    Returns:
        The batches that they belong to.
    """
    statement = text(_LOCK.format(lock=database.dialect.lock)).bindparams(bindparam("chunks", expanding=True))
    batches: dict[int, None] = {}
    for run in slices(sorted(set(chunks))):
        for row in connection.execute(statement, {"chunks": list(run)}):
            if row.batch is not None:
                batches[row.batch] = None
    return tuple(batches)


def settle(connection: Connection, chunks: Iterable[int], now: float) -> None:
    """Count chunks anew from their jobs; those without open jobs are done. The caller holds their locks."""
    wanted = sorted(set(chunks))
    counts: dict[int, dict[int, int]] = defaultdict(dict)
    for run in slices(wanted):
        for row in _COUNT.on(connection, {"chunks": list(run)}):
            counts[row.chunk][row.state] = row.n
    if wanted:
        connection.execute(
            _SET_COUNTS,
            [
                {
                    "chunk": chunk,
                    "now": now,
                    "size": sum(counts[chunk].values()),
                    "open": counts[chunk].get(End.OPEN, 0),
                    "succeeded": counts[chunk].get(End.SUCCEEDED, 0),
                    "failed": counts[chunk].get(End.FAILED, 0),
                    "cancelled": counts[chunk].get(End.CANCELLED, 0),
                    "expired": counts[chunk].get(End.EXPIRED, 0),
                }
                for chunk in wanted
            ],
        )


def part(
    connection: Connection,
    source: int,
    jobs: Sequence[int],
    *,
    not_before: float | None = None,
    suspect: bool = False,
    retrying: bool = False,
    turn: int | None = None,
    expires: bool = False,
) -> int:
    """Make a waiting chunk for some jobs of another, and return its id. The caller moves the jobs' rows.

    Args:
        not_before: when it may start, on the database's clock; None: at once.
        suspect: it comes from a process that died, and is to run alone.
        turn: its turn; None: its source's, so that it does not lose its place.
        expires: they have not started, and must by the deadline that they have. Who has started keeps no deadline.
    """
    chunk = draw()
    connection.execute(
        _PART,
        {
            "chunk": chunk,
            "source": source,
            "first": min(jobs),
            "last": max(jobs),
            "size": len(jobs),
            "turn": turn,
            "due": not_before is None,
            "suspect": suspect,
            "retrying": retrying,
            "not_before": not_before,
            "expires": expires,
        },
    )
    return chunk
