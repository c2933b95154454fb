"""The moves of jobs to their ends: finished, cancelled. A row is written at its submit and at its end.

What it inherits stores jobs (`enqueue`), lets them run again (`retries`) and asks about them (`job_reader`). Not here:
the moves of chunks (`chunk_store`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, text

from torchrelay_storage import faults
from torchrelay_storage.attempts import Try, record_attempts
from torchrelay_storage.chunk_jobs import IN_CHUNK, OfChunks
from torchrelay_storage.database import Database
from torchrelay_storage.enqueue import JobEnqueue
from torchrelay_storage.outcomes import Finished, Outcome, Successes
from torchrelay_storage.settle import Moved, lock, part, settle, slices
from torchrelay_storage.states import End

CANCEL_SLICE = 200  # chunks cancelled in one transaction


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


class JobStore(JobEnqueue):
    """The moves of jobs, and the questions about them."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        locked = f"""SELECT id, token, batch, {database.dialect.now} AS now FROM chunks
            WHERE id IN :chunks AND state = 2 AND worker = :worker ORDER BY id {database.dialect.lock}"""
        self._held = text(locked).bindparams(bindparam("chunks", expanding=True))

    # --- finish -------------------------------------------------------------------------------------------

    def finish(self, outcomes: Sequence[Outcome], worker: int, successes: Sequence[Successes] = ()) -> Finished:
        """Record how the jobs of a device batch ended, in one transaction fenced by each chunk's token.

        A job that was cancelled meanwhile stays so; one that is to be retried moves to a waiting chunk.

        Args:
            outcomes: one by one.
            successes: by chunk, which is how many of them should come.
        """
        good = [*successes, *_columns([o for o in outcomes if o.end is End.SUCCEEDED])]
        others = [o for o in outcomes if o.end is not End.SUCCEEDED]
        touched = sorted({g.chunk for g in good}.union(o.chunk for o in others))

        def work(connection: Connection) -> tuple[Finished, float]:
            now = 0.0  # of who holds nothing any more, and so writes nothing
            held = {}
            batches: dict[int, None] = {}
            for run in slices(touched):
                for row in connection.execute(self._held, {"chunks": list(run), "worker": worker}):
                    held[row.id], now = row.token, max(now, row.now)
                    if row.batch is not None:
                        batches[row.batch] = None
            done = [g for g in good if held.get(g.chunk) == g.token]
            fenced = [o for o in others if held.get(o.chunk) == o.token]
            chunks = sorted({g.chunk for g in done}.union(o.chunk for o in fenced))
            record_attempts(connection, [Try(o.job, o.chunk, o.error) for o in fenced], "failed", worker, now)
            written = self._db.dialect.succeed_jobs(connection, done, worker, now) if done else 0
            if failed := [(o.job, o.chunk, o.error) for o in fenced if o.end is End.FAILED]:
                written += self._db.dialect.fail_jobs(connection, failed, worker, now)
            retried = self._retry_later(connection, [o for o in fenced if o.end is End.OPEN], now)
            if written == sum(len(g.jobs) for g in done) + len(fenced):
                if chunks:
                    connection.execute(_COUNT_UP, _counts(done, fenced, now))
            else:  # some were cancelled meanwhile, or moved away
                settle(connection, chunks, now)
            faults.reach("recording")
            return Finished(
                written + retried, frozenset(touched).difference(chunks), tuple(chunks), tuple(batches)
            ), now

        def is_done(connection: Connection, result: tuple[Finished, float]) -> bool:
            jobs = [*(o.job for o in others), *(job for g in good for job in g.jobs)]
            scope = {"jobs": jobs, "worker": worker, "now": result[1]}
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


def _columns(outcomes: Sequence[Outcome]) -> list[Successes]:
    groups: dict[tuple[int, int], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.chunk, outcome.token].append(outcome)
    return [Successes(*key, [o.job for o in some], [o.output for o in some]) for key, some in groups.items()]


def _counts(done: Sequence[Successes], failed: Sequence[Outcome], now: float) -> list[dict[str, object]]:
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for group in done:
        counts[group.chunk][0] += len(group.jobs)
    for outcome in failed:
        counts[outcome.chunk][1] += 1
    return [{"chunk": c, "succeeded": s, "failed": f, "n": s + f, "now": now} for c, (s, f) in sorted(counts.items())]
