"""What `Database` and the stores ask of a dialect: where SQLite and PostgreSQL differ, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL

JobTuple: TypeAlias = tuple[int, int, int | None, bytes, bytes | None]  # id, chunk, batch, input, metadata
FinishRow: TypeAlias = tuple[int, int, int, bytes | None, bytes | None, int]  # id, chunk, end, output, error, failed


class Dialect(Protocol):
    """What differs between the databases. `now`, `lock` and the like are SQL.

    `joined` is the pattern of an aggregate: texts in one, with commas between.
    """

    name: str
    now: str
    lock: str
    skip_locked: str
    joined: str
    json_text: str

    def engine(self, url: URL, pool_size: int) -> Engine: ...
    def is_transient(self, error: BaseException) -> bool: ...
    def is_unreachable(self, error: BaseException) -> bool: ...
    def insert_jobs(self, connection: Connection, rows: Sequence[JobTuple]) -> None: ...
    def finish_jobs(self, connection: Connection, rows: Sequence[FinishRow], worker: int, now: float) -> int: ...
