"""Chunks that wait and are announced: who is next, and what was announced and is to be sent once more."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, bindparam, text

from torchrelay_storage.database import Database
from torchrelay_storage.turns import advance, presents

DEAR = 0.005  # seconds that a look at a whole queue may take without being spared
LOOKING = 0.05  # the share of the time that dear looks may take


def not_paused(model: str) -> str:
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


def _chunks(statement: str) -> Any:
    return text(statement).bindparams(bindparam("chunks", expanding=True))


class WaitingChunks:
    """The moves of chunks that nobody holds."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._costs: dict[int, tuple[float, float]] = {}  # by model: when its whole queue was looked at, how long
        d = database.dialect
        here = not_paused(":model")
        now = f"(SELECT {d.now})"  # taken once in a statement, so that an index can look for it
        self._ripen = text(f"UPDATE chunks SET due = true WHERE state = 0 AND NOT due AND not_before <= {now}")
        self._next = text(f"""
            SELECT c.id, c.priority, c.turn FROM chunks c
            WHERE c.state = 0 AND c.due AND c.model = :model AND c.priority >= :least
              AND (c.expires_at IS NULL OR c.expires_at > {now}) {here}
            ORDER BY c.priority DESC, c.turn, c.id LIMIT :limit {d.skip_locked}
        """)
        self._next_of = text(f"""
            SELECT c.id, c.priority, c.turn FROM chunks c
            WHERE c.state = 0 AND c.due AND c.model = :model AND c.priority = :priority AND c.turn >= :present
              AND (c.expires_at IS NULL OR c.expires_at > {now}) {here}
            ORDER BY c.turn, c.id LIMIT :limit {d.skip_locked}
        """)
        self._announce = _chunks(
            f"UPDATE chunks SET state = 1, announced_at = {now} WHERE id IN :chunks AND state = 0 RETURNING id"
        )
        self._overdue = text(f"""
            SELECT c.id, c.priority FROM chunks c
            WHERE c.state = 1 AND c.model = :model AND c.announced_at <= {now} - :older_than {here}
            ORDER BY c.announced_at LIMIT :limit {d.skip_locked}
        """)
        self._again = _chunks(f"UPDATE chunks SET announced_at = {now} WHERE id IN :chunks AND state = 1 RETURNING id")

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
            connection.execute(self._ripen)
            rows = self._look(connection, {"model": model, "least": least, "limit": limit})
            chosen: list[Row[Any]] = []
            for row in rows:  # most urgent first, so what is chosen so far is what is as urgent or more
                if len(chosen) < room.get(row.priority, 0):
                    chosen.append(row)
            if not chosen:
                return []
            moved = set(connection.execute(self._announce, {"chunks": [r.id for r in chosen]}).scalars())
            announced = [row for row in chosen if row.id in moved]
            latest: dict[int, int] = {}
            for row in announced:
                latest[row.priority] = max(row.turn, latest.get(row.priority, 0))
            advance(connection, model, latest)
            return [Announced(row.id, row.priority) for row in announced]

        return self._db.transact(work)

    def _look(self, connection: Connection, scope: dict[str, Any]) -> Sequence[Row[Any]]:
        """Return the next chunks of a model.

        While somebody holds an old snapshot, nothing can be vacuumed, and what was announced before lies dead at the
        head of the index. Where that makes a look expensive, most looks begin at the present turn of each priority,
        behind it all. What comes back with an earlier turn, or is the first of its priority, is found by the others.
        """
        model, limit = scope["model"], scope["limit"]
        at, cost = self._costs.get(model, (-math.inf, 0.0))
        if cost > DEAR and time.monotonic() - at < cost / LOOKING:
            rows: list[Row[Any]] = []
            for flow in presents(connection, model, scope["least"]):
                if len(rows) < limit:
                    rows += connection.execute(self._next_of, scope | flow | {"limit": limit - len(rows)})
            if len(rows) == limit:
                return rows
        began = time.monotonic()
        found = connection.execute(self._next, scope).all()
        self._costs[model] = (time.monotonic(), time.monotonic() - began)
        return found

    def announce_again(
        self, model: int, older_than: float, limit: int, waiting: Collection[int] = ()
    ) -> list[Announced]:
        """Return chunks announced more than `older_than` seconds ago and not claimed, to be sent once more.

        Args:
            waiting: chunks that are known to be still there.
        """

        def work(connection: Connection) -> list[Announced]:
            scope = {"model": model, "older_than": older_than, "limit": limit + len(waiting)}
            rows = [row for row in connection.execute(self._overdue, scope) if row.id not in waiting][:limit]
            if not rows:
                return []
            moved = set(connection.execute(self._again, {"chunks": [r.id for r in rows]}).scalars())
            return [Announced(row.id, row.priority) for row in rows if row.id in moved]

        return self._db.transact(work)

    def due_models(self) -> list[ModelDue]:
        """Return the models that have something to announce or to announce again."""
        statement = text(f"""
            SELECT m.id, m.name,
                   EXISTS (SELECT 1 FROM chunks c WHERE c.state = 0 AND c.due AND c.model = m.id)
                   OR EXISTS (SELECT 1 FROM chunks c WHERE c.state = 0 AND NOT c.due
                              AND c.not_before <= (SELECT {self._db.dialect.now})
                              AND c.model = m.id) AS waiting,
                   EXISTS (SELECT 1 FROM chunks c WHERE c.state = 1 AND c.model = m.id) AS announced
            FROM models m WHERE NOT m.paused
        """)

        def work(connection: Connection) -> list[ModelDue]:
            rows = connection.execute(statement)
            return [
                ModelDue(r.id, r.name, bool(r.waiting), bool(r.announced)) for r in rows if r.waiting or r.announced
            ]

        return self._db.query(work)
