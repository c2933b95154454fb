"""What there is to do for the maintenance: one look at all that may have become due, cheap enough for an idle system.

Not here: doing it (`waiting`, `lost`, `chunk_store`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

from torchrelay_storage.database import Database


@dataclass(frozen=True, slots=True)
class Needed:
    """What the maintenance has to do.

    Attributes:
        announce: a model that is not paused has chunks that wait or were announced, or a delayed chunk's time has come.
        rescue: a worker that is stopped, gone or silent holds chunks; or one is silent and does not count as stopped.
        expire: a chunk was not started in time.
        held: a worker holds chunks: there may be something to do in a moment.
        next_due: seconds until the time of the next delayed chunk, or the end of the next one's, comes; None: there is
            none, or none behind those whose time has come.
    """

    announce: bool
    rescue: bool
    expire: bool
    held: bool
    next_due: float | None


class Upkeep:
    """The maintenance's eyes."""

    def __init__(self, database: Database) -> None:
        self._db = database
        # Each asks for the first in the order of an index, and not just whether there is one: where PostgreSQL expects
        # one everywhere, it would go through the table until it finds it, also long after the last of them.
        self._look = text(f"""
            SELECT t.now,
                (SELECT min(c.not_before) FROM chunks c WHERE c.state = 0 AND NOT c.due) AS not_before,
                (SELECT min(c.expires_at) FROM chunks c WHERE c.state < 2 AND c.expires_at IS NOT NULL) AS expires_at,
                EXISTS (SELECT 1 FROM models m WHERE NOT m.paused AND (
                    (SELECT max(c.priority) FROM chunks c WHERE c.state = 0 AND c.due AND c.model = m.id) IS NOT NULL
                    OR (SELECT min(c.announced_at) FROM chunks c WHERE c.state = 1 AND c.model = m.id) IS NOT NULL
                )) AS announce,
                (SELECT max(c.worker) FROM chunks c WHERE c.state = 2) IS NOT NULL AS held,
                (SELECT c.worker FROM chunks c WHERE c.state = 2 AND NOT EXISTS (
                    SELECT 1 FROM workers w WHERE w.id = c.worker AND w.stopped_at IS NULL AND w.beat_at > t.before
                ) ORDER BY c.worker LIMIT 1) IS NOT NULL
                OR EXISTS (SELECT 1 FROM workers w WHERE w.stopped_at IS NULL AND w.beat_at <= t.before) AS rescue
            FROM (
                SELECT n.now, COALESCE(n.now - CAST(:stale_after AS FLOAT), -1.0) AS before
                FROM (SELECT {database.dialect.now} AS now) n
            ) t
        """)

    def look(self, stale_after: float | None) -> Needed:
        """Say what there is to do, in one statement.

        Args:
            stale_after: as for `rescue`: None: who is silent may live.
        """

        def work(connection: Connection) -> Needed:
            row = connection.execute(self._look, {"stale_after": stale_after}).one()
            until = [at - row.now for at in (row.not_before, row.expires_at) if at is not None]
            return Needed(
                announce=bool(row.announce) or (row.not_before is not None and row.not_before <= row.now),
                rescue=bool(row.rescue),
                expire=row.expires_at is not None and row.expires_at <= row.now,
                held=bool(row.held),
                next_due=min((seconds for seconds in until if seconds > 0), default=None),
            )

        return self._db.query(work)
