"""The log of a training run: lines in SQL, of which the newest are kept. Not here: who reads them (`runs`)."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

from torchrelay_storage.database import Database
from torchrelay_storage.ids import draw

MAX_LINES = 10_000  # of a run that are kept
LINES_DROPPED = 1_000  # of the oldest once there are more: seldom, and many at a time
MAX_LINE = 2_000  # characters

_ADD = text("INSERT INTO run_logs (job, id, at, line) VALUES (:job, :id, :at, :line)")
_ADDED = text("SELECT 1 FROM run_logs WHERE job = :job AND id = :id AND at = :at AND line = :line")
_THERE = text("SELECT count(*) AS n, COALESCE(max(id), 0) AS last FROM run_logs WHERE job = :job")
_DROP = text("""
    DELETE FROM run_logs WHERE job = :job AND id <= (
        SELECT id FROM run_logs WHERE job = :job ORDER BY id LIMIT 1 OFFSET :before_last)
""")


def append_lines(database: Database, job: int, lines: Sequence[tuple[float, str]]) -> None:
    """Add (time, line) pairs to a run's log; once there are more than MAX_LINES, the oldest are dropped."""
    fresh = [(at, _clean(line)) for at, line in lines[-MAX_LINES:]]
    if not fresh:
        return
    # Whoever adds to this log waits here for the others, so that a reader who goes on after an id misses no line.
    turn = text(f"SELECT job FROM runs WHERE job = :job {database.dialect.lock}")

    def work(connection: Connection) -> int | None:
        if connection.execute(turn, {"job": job}).scalar() is None:
            return None  # it was purged
        there = connection.execute(_THERE, {"job": job}).one()
        first = max(draw(len(fresh)), there.last + 1)
        rows = [{"job": job, "id": first + i, "at": at, "line": line} for i, (at, line) in enumerate(fresh)]
        connection.execute(_ADD, rows)
        beyond = there.n + len(fresh) - MAX_LINES
        if beyond > 0:
            drop = max(beyond, min(LINES_DROPPED, there.n))
            connection.execute(_DROP, {"job": job, "before_last": drop - 1})
        return int(first) + len(fresh) - 1

    def is_done(connection: Connection, last: int | None) -> bool:
        row = {"job": job, "id": last, "at": fresh[-1][0], "line": fresh[-1][1]}
        return last is not None and connection.execute(_ADDED, row).first() is not None

    database.transact(work, is_done)


def _clean(line: str) -> str:
    """Return a line that both databases take: PostgreSQL has no zero byte in a text, and neither a lone surrogate."""
    return line[:MAX_LINE].replace("\0", "").encode(errors="replace").decode()
