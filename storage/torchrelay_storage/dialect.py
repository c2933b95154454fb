"""What `Database` and the stores ask of a dialect: where SQLite and PostgreSQL differ, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import accumulate, chain, repeat
from typing import Protocol, TypeAlias

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL

from torchrelay_storage.outcomes import Successes

JobTuple: TypeAlias = tuple[int, int, int | None, bytes, bytes | None]  # id, chunk, batch, input, metadata
FailedRow: TypeAlias = tuple[int, int, bytes | None]  # id, chunk, error


class Fault(Enum):
    """What is wrong with a database, where no statement is to blame. `retried`: it may pass by itself."""

    def __init__(self, words: str, retried: bool) -> None:
        self.words = words
        self.retried = retried

    BUSY = ("is too busy", True)  # a deadlock, a conflict, a lock: over in a moment
    AWAY = ("does not answer", True)  # another connection may find it
    CLOSED = ("cannot be opened or written", False)
    FULL = ("has no room left", False)


def homes(first: int, sizes: Sequence[int]) -> Iterator[int]:
    """Return the chunk of each of many jobs with consecutive ids; a chunk is named after its first job."""
    starts = accumulate(sizes, initial=first)
    return chain.from_iterable(map(repeat, starts, sizes))


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
    def insert_inputs(
        self, connection: Connection, first: int, sizes: Sequence[int], batch: int, inputs: Sequence[bytes]
    ) -> None: ...
    def succeed_jobs(self, connection: Connection, done: Sequence[Successes], worker: int, now: float) -> int: ...
    def fail_jobs(self, connection: Connection, rows: Sequence[FailedRow], worker: int, now: float) -> int: ...
