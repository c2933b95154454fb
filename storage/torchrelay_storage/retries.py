"""Jobs that ended without success run again: by id, of a batch, or by a filter.

Not here: a worker's own retries (`JobStore.finish`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from sqlalchemy import Connection, bindparam, text

from torchrelay_storage.chunk_jobs import OfChunks
from torchrelay_storage.job_reader import JobFilter, JobReader, newest
from torchrelay_storage.settle import MAX_CHUNK, SLICE, Moved, lock, part, settle, slices
from torchrelay_storage.states import JOB_MOVES, End, JobState
from torchrelay_storage.turns import last_turn

RETRIABLE = (JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED)

Again: TypeAlias = tuple[Moved, list[int]]  # what moved, and the chunks that were made for it

# What a run has done is kept: it goes on from its last checkpoint. A cancelled one may have been paused.
_START_RUNS_OVER = text("UPDATE runs SET paused = false, deaths = 0, phase = '' WHERE job IN :jobs").bindparams(
    bindparam("jobs", expanding=True)
)

_THERE = text("SELECT 1 FROM chunks WHERE id IN :chunks LIMIT 1").bindparams(bindparam("chunks", expanding=True))


class JobRetries(JobReader):
    """The moves of ended jobs back to waiting ones."""

    def retry(self, jobs: Sequence[int]) -> Moved:
        """Let those of these jobs that ended without success run again, with all their attempts and no deadline."""
        return self._again(jobs, tuple(JOB_MOVES["retry"][0]))

    def retry_batch(self, batch: int, ends: Sequence[End] = (End.FAILED,)) -> Moved:
        """Let the jobs of a batch that ended in these ways run again. What fails anew meanwhile is not met twice."""
        statement = OfChunks(
            "SELECT j.id FROM {chunk_jobs} WHERE c.batch = :batch AND c.last_id > :after AND j.id > :after "
            "AND j.state IN :ends ORDER BY j.id LIMIT :limit",
            lists=("ends",),
        )
        wanted = tuple(end for end in ends if end in JOB_MOVES["retry"][0])
        scope = {"batch": batch, "ends": [int(end) for end in wanted], "limit": MAX_CHUNK}
        moved, found = Moved(), [0]
        while wanted and found:  # from the oldest up
            row = scope | {"after": found[-1]}
            found = self._db.query(lambda connection, row=row: list(statement.on(connection, row).scalars()))  # type: ignore[misc]
            moved += self._again(found, wanted)
        return moved

    def retry_where(self, wanted: JobFilter) -> Moved:
        """Let all jobs of a filter run again that ended without success. What fails anew meanwhile is not met twice."""
        states = tuple(s for s in wanted.states or RETRIABLE if s in RETRIABLE)
        if not states:
            return Moved()
        ends = tuple(end for end in JOB_MOVES["retry"][0] if end.shown in states)
        moved, below = Moved(), None
        while True:  # from the newest down
            found = self._db.query(
                lambda connection, below=below: newest(connection, replace(wanted, states=states), SLICE, below)  # type: ignore[misc]
            )
            if not found:
                return moved
            moved += self._again(found, ends)
            below = min(found)

    def _again(self, jobs: Sequence[int], ends: Sequence[End]) -> Moved:
        moved = Moved()
        for run in slices(list(jobs)):
            moved += self._db.transact(
                lambda connection, run=run: self._start_over(connection, run, ends),  # type: ignore[misc]
                _is_done,
            )[0]
        return moved

    def _start_over(self, connection: Connection, jobs: Sequence[int], ends: Sequence[End]) -> Again:
        now = self._db.clock(connection)
        batches = self._lock_homes(connection, jobs)
        statement = text(
            "SELECT j.id, j.chunk, c.model, c.priority, c.flow FROM jobs j JOIN chunks c ON c.id = j.chunk "
            "WHERE j.id IN :jobs AND j.state IN :ends ORDER BY j.id"
        ).bindparams(bindparam("jobs", expanding=True), bindparam("ends", expanding=True))
        scope = {"jobs": list(jobs), "ends": [int(end) for end in ends]}
        groups: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
        for row in connection.execute(statement, scope):
            groups[row.chunk, row.model, row.priority, row.flow].append(row.id)
        turns: dict[tuple[int, int, int], int] = {}
        new_chunks: list[int] = []
        count = 0
        for (source, *lane), group in groups.items():
            where = (lane[0], lane[1], lane[2])
            turns[where] = turns.get(where) or last_turn(connection, *where)
            turns[where] += 1
            new = part(connection, source, group, turn=turns[where])
            reopen = text(
                "UPDATE jobs SET chunk = :new, state = 0, failures = 0, output = NULL, error = NULL, worker = NULL, "
                "finished_at = NULL WHERE id IN :jobs AND chunk = :chunk AND state IN (2, 3, 4)"
            ).bindparams(bindparam("jobs", expanding=True))
            count += connection.execute(reopen, {"new": new, "jobs": group, "chunk": source}).rowcount
            connection.execute(_START_RUNS_OVER, {"jobs": group})
            new_chunks.append(new)
        sources = [source for source, *_ in groups]
        settle(connection, sources + new_chunks, now)
        return Moved(count, tuple(sources), batches if count else ()), new_chunks

    def _lock_homes(self, connection: Connection, jobs: Sequence[int]) -> tuple[int, ...]:
        """Lock the chunks that jobs are in, and return their batches.

        While this waited for a lock a job may have been moved to another chunk, which somebody may claim and count:
        that one is locked too. Once its chunk is locked, a job stays where it is.
        """
        batches: dict[int, None] = {}
        locked: set[int] = set()
        while homes := set(self._chunks_of(connection, jobs)) - locked:
            batches |= dict.fromkeys(lock(self._db, connection, homes))
            locked |= homes
        return tuple(batches)

    def _chunks_of(self, connection: Connection, jobs: Sequence[int]) -> list[int]:
        statement = text("SELECT DISTINCT chunk FROM jobs WHERE id IN :jobs").bindparams(
            bindparam("jobs", expanding=True)
        )
        return list(connection.execute(statement, {"jobs": list(jobs)}).scalars())


def _is_done(connection: Connection, result: Again) -> bool:
    return connection.execute(_THERE, {"chunks": result[1]}).first() is not None
