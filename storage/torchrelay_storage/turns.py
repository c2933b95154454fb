"""Turns: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) in one integer.

A flow's next chunk gets `max(present, the flow's last turn) + 1`, where present is the turn announced last of that
model and priority. A flow that comes late starts at the present, so a million-job batch and a single job alternate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, TextClause, text

_TURNS = """
    SELECT COALESCE((SELECT present FROM turns WHERE model = :model AND priority = :priority), 0) AS present,
           COALESCE((SELECT max(turn) FROM chunks
                     WHERE state = 0 AND model = :model AND priority = :priority AND flow = :flow), 0) AS last
"""

_LAST = text(_TURNS)

# Whose model is paused, or has chunks that wait, waits behind them. In the order of an index each, as in `upkeep`: with
# old statistics PostgreSQL would look for any one in the whole table.
_ROOM = """
    CASE WHEN (SELECT m.paused FROM models m WHERE m.id = :model)
              OR (SELECT max(c.priority) FROM chunks c WHERE c.state = 0 AND c.due AND c.model = :model) IS NOT NULL
         THEN 0
         ELSE :most - (SELECT count(*) FROM (SELECT c.announced_at FROM chunks c
                                             WHERE c.state = 1 AND c.model = :model ORDER BY c.announced_at LIMIT :most
                                            ) AS announced)
    END AS room
"""

_PRESENTS = text(
    "SELECT priority, present FROM turns WHERE model = :model AND priority >= :least ORDER BY priority DESC"
)

_ADVANCE = text("""
    INSERT INTO turns (model, priority, present) VALUES (:model, :priority, :turn)
    ON CONFLICT (model, priority) DO UPDATE SET present = excluded.present WHERE turns.present < excluded.present
""")


def last_turn(connection: Connection, model: int, priority: int, flow: int) -> int:
    """Return the turn after which a flow's next chunk comes."""
    row = connection.execute(_LAST, {"model": model, "priority": priority, "flow": flow}).one()
    return max(int(row.present), int(row.last))


@dataclass(frozen=True, slots=True)
class Stand:
    """How a flow stands.

    Attributes:
        now: by the database's clock.
        last: the turn after which the flow's next chunk comes.
        room: how many chunks of the model may be announced at once, ahead of nobody.
    """

    now: float
    last: int
    room: int


def standing(clock: str) -> TextClause:
    """Return the statement of `stand`; `clock` is the database's time in SQL."""
    return text(f"SELECT {clock} AS now, s.*, {_ROOM} FROM ({_TURNS}) AS s")


def stand(connection: Connection, statement: TextClause, lane: tuple[int, int, int], most: int) -> Stand:
    """Return how a flow stands, by one statement.

    Args:
        lane: its model, priority and flow.
        most: how many chunks of the model may be announced and not claimed.
    """
    model, priority, flow = lane
    row = connection.execute(statement, {"model": model, "priority": priority, "flow": flow, "most": most}).one()
    return Stand(row.now, max(int(row.present), int(row.last)), max(int(row.room), 0))


def presents(connection: Connection, model: int, least: int) -> list[dict[str, int]]:
    """Return `priority` and `present` of a model's priorities from `least` up, the most urgent first."""
    rows = connection.execute(_PRESENTS, {"model": model, "least": least})
    return [{"priority": row.priority, "present": row.present} for row in rows]


def advance(connection: Connection, model: int, turns: Mapping[int, int]) -> None:
    """Move the present of a model forward: `turns` is the latest turn announced by priority."""
    rows = [{"model": model, "priority": p, "turn": t} for p, t in sorted(turns.items())]
    if rows:
        connection.execute(_ADVANCE, rows)
