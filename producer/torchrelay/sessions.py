"""submit(session=...): a job in the caller's own SQLAlchemy transaction, announced when that commits.

The job exists if and only if the caller commits: nothing is announced before, and nothing is left after a rollback.
Not here: what is stored (`JobStore.submit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session

from torchrelay_storage import faults
from torchrelay_storage.errors import InvalidInput, KeyConflict
from torchrelay_storage.submission import Submission, Submitted

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from torchrelay.admission import Place
    from torchrelay.core import Core, Prepared

# In session.info: the cores and models to wake at the commit, and the room that is taken until the transaction ends.
_INFO = "torchrelay.pending"
_PLACES = "torchrelay.places"


def submit_in(core: Core, session: Session, prepared: Prepared, place: Place | None = None) -> Submitted:
    """Store a job through the session's connection. The session is flushed first, as by any query.

    Args:
        place: the room for it, where that was taken before.

    Raises:
        InvalidInput: the session is not on torchrelay's database.
        KeyConflict, QueueFull: the session's transaction goes on.
    """
    place = place or core.admit(prepared)

    def store(connection: Connection) -> Submitted | KeyConflict:
        [[placed]] = core.jobs.submit([Submission(prepared.version, prepared.options, [prepared.job])], connection)
        return placed

    with place:
        placed = store_in(core, session, prepared.version.name, store)
    if placed.existed:
        place.close()
    else:
        session.info.setdefault(_PLACES, []).append(place)
    return placed


def store_in(
    core: Core, session: Session, model: str, store: Callable[[Connection], Submitted | KeyConflict]
) -> Submitted:
    """Store through the session's connection, and announce the model when that commits. Raises as `submit_in`."""
    core.ready()
    connection = session.connection()
    _check_same(core, connection)
    _begin(connection)
    try:
        placed = store(connection)
    except DBAPIError as error:
        if "no such table" in str(error.orig) or "does not exist" in str(error.orig):
            raise InvalidInput(
                "the session's database has no torchrelay tables: it is another one than the relay's, "
                f"{core.db.safe_url}; a job can be part of your transaction only where both share a database"
            ) from error
        raise
    if isinstance(placed, KeyConflict):
        raise placed
    _announce_at_commit(core, session, model)
    return placed


def sync_session(session: Any) -> Session:
    """Return the Session that was passed or stands behind what was passed. Raises InvalidInput."""
    if isinstance(session, scoped_session):
        session = session()
    if isinstance(session, Session):
        return session
    hint = "; AsyncRelay takes an AsyncSession" if hasattr(session, "run_sync") else ""
    raise InvalidInput(f"session must be a SQLAlchemy Session, not {type(session).__name__}{hint}")


def async_session(session: Any) -> AsyncSession:
    """Return the AsyncSession that was passed or stands behind what was passed. Raises InvalidInput."""
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    if isinstance(session, async_scoped_session):
        session = session()
    if isinstance(session, AsyncSession):
        return session
    raise InvalidInput(f"AsyncRelay takes a SQLAlchemy AsyncSession, not {type(session).__name__}")


def _check_same(core: Core, connection: Connection) -> None:
    theirs, ours = connection.engine.url, core.db.url
    if connection.dialect.name != ours.get_backend_name():
        raise InvalidInput(
            f"the session is on {connection.dialect.name}, the relay on {core.db.safe_url}: "
            "a job can be part of your transaction only where both share a database"
        )
    if connection.dialect.name == "postgresql" and theirs.database != ours.database:
        raise InvalidInput(
            f"the session is on the database {theirs.database!r}, the relay on {core.db.safe_url}: "
            "a job can be part of your transaction only where both share a database"
        )


def _begin(connection: Connection) -> None:
    """Begin a SQLite transaction for real.

    The driver's own BEGIN comes before the first INSERT only. The savepoint in which a job is stored would come first,
    be the outermost, and commit the job when it is released.
    """
    if connection.dialect.name == "sqlite":
        driver = connection.connection.driver_connection
        if driver is not None and not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")


def _announce_at_commit(core: Core, session: Session, model: str) -> None:
    first = _INFO not in session.info
    session.info.setdefault(_INFO, []).append((core, model))
    if first:
        event.listen(session, "after_commit", _committed)
        event.listen(session, "after_soft_rollback", _rolled_back)
        event.listen(session, "after_transaction_end", _ended)


def _committed(session: Session) -> None:
    # Releasing a savepoint comes here too, and commits nothing yet.
    if session.in_nested_transaction():
        return
    pending = session.info.get(_INFO, [])
    wakes = dict.fromkeys((id(core), model) for core, model in pending)
    cores = {id(core): core for core, _ in pending}
    pending.clear()
    for place in session.info.pop(_PLACES, []):
        place.stored()
    faults.reach("committed")
    for core_id, model in wakes:
        cores[core_id].wake(model)


def _rolled_back(session: Session, previous: Any) -> None:
    # A savepoint's rollback leaves the rest pending: to wake for a job that is not there is harmless.
    if previous.parent is None:
        session.info.get(_INFO, []).clear()


def _ended(session: Session, transaction: Any) -> None:
    # What was committed has left its places by now: the rest is rolled back, also where the session was just closed.
    if transaction.parent is None:
        for place in session.info.pop(_PLACES, []):
            place.close()
