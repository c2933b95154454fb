"""One database: its engine, its clock, its transactions with passing faults retried, its schema's revision.

Not here: any statement about jobs (the stores), and what the two databases do differently (`sqlite`, `postgresql`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import tenacity
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, ProgrammingError

from torchrelay_storage.dialect import Dialect, Fault
from torchrelay_storage.errors import InvalidInput, SchemaMismatch, StorageFull, Unreachable
from torchrelay_storage.postgresql import Postgresql
from torchrelay_storage.schema import REVISION
from torchrelay_storage.sqlite import Sqlite

T = TypeVar("T")

# A deadlock or a locked file is over in a moment; a database that restarts is back in a few seconds.
RETRY_SECONDS = 8.0

# Threads of one process that write to SQLite take turns by a lock of our own: SQLite would let them sleep and look
# again, up to a tenth of a second at a time. After so long one tries its luck with SQLite.
TURN_SECONDS = 5.0


class Database:
    """A SQLite file or a PostgreSQL database, by URL (`sqlite:///path`, `postgresql://user:password@host/name`).

    Thread-safe; a forked child gets connections of its own. Raises InvalidInput for a URL that is neither.
    """

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise InvalidInput("the database's URL cannot be read; one looks like sqlite:///torchrelay.db or "
                               "postgresql://user:password@host/name") from error  # fmt: skip
        kind = parsed.get_backend_name()
        if kind not in ("sqlite", "postgresql"):
            raise InvalidInput(f"torchrelay keeps its jobs in SQLite or PostgreSQL, not in {kind!r}")
        if kind == "sqlite" and parsed.database not in (None, "", ":memory:"):
            try:
                Path(str(parsed.database)).expanduser().parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Unreachable(f"the folder of the database {parsed.database} cannot be made: {error}") from error
        self.url = parsed
        self.is_sqlite = kind == "sqlite"
        self.dialect: Dialect = Sqlite() if self.is_sqlite else Postgresql()
        self.engine = self.dialect.engine(parsed, pool_size)
        # What only reads needs no transaction where one gives no snapshot anyway: it would cost two round trips more.
        unbound = {} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        self._reading = self.engine.execution_options(torchrelay_read=True, **unbound)
        self._writing = threading.RLock()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        # A forked child must not speak on its parent's connections, nor wait for a lock of its parent's threads.
        self.engine.dispose(close=False)
        self._writing = threading.RLock()

    # --- transactions -------------------------------------------------------------------------------------

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that commits at the end of the block. Nothing is retried."""
        with self._named_errors(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction for reading. Nothing is retried."""
        with self._named_errors(), self.engine.connect().execution_options(torchrelay_read=True) as connection:
            yield connection

    def transact(self, work: Callable[[Connection], T], is_done: Callable[[Connection, T], bool] | None = None) -> T:
        """Run `work` in a transaction, anew where a passing fault ended it, and return what it returned.

        Args:
            is_done: Whether a try was committed after all that had returned this: its connection was lost in the middle
                of the commit. Asked on another connection once the next try has done its work, whose locks have waited
                for the end of such a commit; if so, that try is undone. Without it, `work` must mean the same when it
                is done twice.

        Raises:
            StorageFull: the database has no room left.
            Unreachable: the database could not be had for RETRY_SECONDS.
        """
        doubtful: list[T] = []
        return self._retried(lambda: self._begin(work, is_done, doubtful))

    def query(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which only reads; retried and raising as `transact`."""
        return self._retried(lambda: self._look(work))

    def _begin(
        self, work: Callable[[Connection], T], is_done: Callable[[Connection, T], bool] | None, doubtful: list[T]
    ) -> T:
        def done() -> list[T]:
            if not doubtful or is_done is None:
                return []
            return self._look(lambda connection: [earlier for earlier in doubtful if is_done(connection, earlier)])

        try:
            with self._turn(), self.engine.begin() as connection:
                result = work(connection)
                for earlier in done():
                    connection.rollback()
                    return earlier
                try:
                    connection.commit()
                except DBAPIError as error:
                    connection.invalidate(error)  # else it might go back to the pool in the middle of its transaction
                    if self._is_passing(error):
                        doubtful.append(result)
                    raise
                return result
        except Exception as error:
            if not self._is_passing(error):
                for earlier in done():  # and it failed because of that
                    return earlier
            raise

    def _look(self, work: Callable[[Connection], T]) -> T:
        with self._reading.connect() as connection:
            return work(connection)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        writing = self._writing
        taken = self.is_sqlite and writing.acquire(timeout=TURN_SECONDS)
        try:
            yield
        finally:
            if taken:
                writing.release()

    def _retried(self, call: Callable[[], T]) -> T:
        try:
            return call()  # the usual case pays for no retry machinery
        except DBAPIError as error:
            if not self._is_passing(error):
                with self._named_errors():
                    raise
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._is_passing),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
            stop=tenacity.stop_after_delay(RETRY_SECONDS),
            reraise=True,
        )
        with self._named_errors():
            return attempts(call)

    def _is_passing(self, error: BaseException) -> bool:
        fault = self._fault(error)
        return fault is not None and fault.retried

    def _fault(self, error: BaseException) -> Fault | None:
        return self.dialect.fault(error.orig) if isinstance(error, DBAPIError) and error.orig is not None else None

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            fault = self._fault(error)
            if fault is not None and error.orig is not None:
                kind = StorageFull if fault is Fault.FULL else Unreachable
                raise kind(f"the database {self.safe_url} {fault.words}: {_first_line(error.orig)}") from error
            if isinstance(error, OperationalError | ProgrammingError) and _is_missing_table(error):
                raise SchemaMismatch(
                    f"the database {self.safe_url} has no torchrelay tables yet; run `torchrelay db upgrade`"
                ) from error
            raise

    # --- the clock ----------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds since 1970 on the database's clock: the only clock that machines share."""
        return self.query(self.clock)

    def clock(self, connection: Connection) -> float:
        """The same inside a transaction."""
        return float(connection.exec_driver_sql(f"SELECT {self.dialect.now}").scalar_one())

    @property
    def safe_url(self) -> str:
        """The URL without its password."""
        return self.url.render_as_string(hide_password=True)

    def dispose(self) -> None:
        """Close the connections that nobody uses."""
        self.engine.dispose()

    # --- the schema's revision: see `revisions`, whose Alembic an application has no need to import ----------

    def revision(self) -> tuple[str | None, str]:
        """Return the revision that the database has (None: no tables yet) and the one that this code was made for."""
        with self.read() as connection:
            try:
                current = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            except DBAPIError as error:
                if not _is_missing_table(error):
                    raise
                current = None
        return current, REVISION

    def upgrade(self) -> None:
        """Bring the schema to this code's revision. Two at once: one does it, the other waits and finds it done.

        Done whole, or anew where it and the work that goes on have waited for each other.
        """
        from torchrelay_storage import revisions

        self.transact(lambda connection: revisions.upgrade(connection, self.safe_url))

    def check(self) -> None:
        """Raise SchemaMismatch if this code cannot run on the database's schema; the message says which to upgrade."""
        current, _ = self.revision()
        if current != REVISION:
            from torchrelay_storage import revisions

            with self.read() as connection:
                revisions.check(connection, self.safe_url, current)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_missing_table(error: DBAPIError) -> bool:
    message = str(error.orig)
    return "no such table" in message or ("relation" in message and "does not exist" in message)
