"""Turns: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) in one integer.

A flow's next chunk gets `max(present, the flow's last turn) + 1`, where present is the turn announced last of that
model and priority. A flow that comes late starts at the present, so a million-job batch and a single job alternate.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, text

_LAST = text("""
    SELECT COALESCE((SELECT present FROM turns WHERE model = :model AND priority = :priority), 0) AS present,
           COALESCE((SELECT max(turn) FROM chunks
                     WHERE state = 0 AND model = :model AND priority = :priority AND flow = :flow), 0) AS last
""")

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


def presents(connection: Connection, model: int, least: int) -> list[dict[str, int]]:
    """Return `priority` and `present` of a model's priorities from `least` up, the most urgent first."""
    rows = connection.execute(_PRESENTS, {"model": model, "least": least})
    return [{"priority": row.priority, "present": row.present} for row in rows]


def advance(connection: Connection, model: int, turns: Mapping[int, int]) -> None:
    """Move the present of a model forward: `turns` is the latest turn announced by priority."""
    rows = [{"model": model, "priority": p, "turn": t} for p, t in sorted(turns.items())]
    if rows:
        connection.execute(_ADVANCE, rows)
