"""From chunks to their jobs: by the range of ids that a chunk covers, since jobs have no index but their primary key.

As a plain join, PostgreSQL cannot tell how few rows a range between two columns holds: once a table has statistics it
would read all jobs and hash them by chunk, at each claim. So the range is looked up chunk by chunk.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, TextClause, bindparam, text

_RANGE = "j.id BETWEEN c.first_id AND c.last_id AND j.chunk = c.id"

_JOIN = {
    "sqlite": f"chunks c JOIN jobs j ON {_RANGE}",
    # OFFSET 0 keeps the planner from making a join of it again.
    "postgresql": f"chunks c CROSS JOIN LATERAL (SELECT * FROM jobs j WHERE {_RANGE} OFFSET 0) j",
}

# The rows of `jobs` that are in the chunk `:chunk`.
IN_CHUNK = """chunk = :chunk AND id BETWEEN (SELECT first_id FROM chunks WHERE id = :chunk)
    AND (SELECT last_id FROM chunks WHERE id = :chunk)"""


class OfChunks:
    """A question about chunks `c` and their jobs `j`, in SQL.

    Args:
        statement: with `{chunk_jobs}` in its FROM, and `:chunks` (or what `lists` names) as lists.
    """

    def __init__(self, statement: str, lists: tuple[str, ...] = ("chunks",)) -> None:
        self._texts: dict[str, TextClause] = {
            name: text(statement.format(chunk_jobs=join)).bindparams(*(bindparam(one, expanding=True) for one in lists))
            for name, join in _JOIN.items()
        }

    def fetch(self, connection: Connection, scope: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Ask it, with these parameters; return the driver's own rows, for those that are many."""
        with self.on(connection, scope) as result:
            return list(result.cursor.fetchall())

    def on(self, connection: Connection, scope: dict[str, Any]) -> Any:
        """Ask it, with these parameters; return the cursor's result."""
        return connection.execute(self._texts[connection.dialect.name], scope)
