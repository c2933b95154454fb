"""What `Database` and the stores ask of a dialect: where SQLite and PostgreSQL differ, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol, TypeAlias

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL

JobTuple: TypeAlias = tuple[int, int, int | None, bytes, bytes | None]  # id, chunk, batch, input, metadata
FinishRow: TypeAlias = tuple[int, int, int, bytes | None, bytes | None, int]  # id, chunk, end, output, error, failed


class Fault(Enum):
    """What is wrong with a database, where no statement is to blame. `retried`: it may pass by itself."""

    def __init__(self, words: str, retried: bool) -> None:
        self.words = words
        self.retried = retried

    BUSY = ("is too busy", True)  # a deadlock, a conflict, a lock: over in a moment
    AWAY = ("does not answer", True)  # another connection may find it
    CLOSED = ("cannot be opened or written", False)
    FULL = ("has no room left", False)


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
    def fault(self, error: BaseException) -> Fault | None: ...
    def insert_jobs(self, connection: Connection, rows: Sequence[JobTuple]) -> None: ...
    def finish_jobs(self, connection: Connection, rows: Sequence[FinishRow], worker: int, now: float) -> int: ...
