"""A commit whose confirmation never came: it was done, and who asked for it does not know."""

from __future__ import annotations

import sqlite3
from typing import Any

import psycopg
import pytest

from torchrelay_storage.database import Database


def lost_connection(database: Database) -> Exception:
    """What the driver raises then."""
    if not database.is_sqlite:
        return psycopg.OperationalError("consuming input failed: server closed the connection unexpectedly")
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    return error


def lose_a_confirmation(database: Database, monkeypatch: pytest.MonkeyPatch, *, done: bool = True) -> list[bool]:
    """Let the next commit be cut off, after it was done or before. Returns a list that then has an element."""
    commit, cut = database.engine.dialect.do_commit, list[bool]()

    def do_commit(connection: Any) -> None:
        if cut:
            commit(connection)
            return
        cut.append(done)
        if done:
            commit(connection)
        raise lost_connection(database)

    monkeypatch.setattr(database.engine.dialect, "do_commit", do_commit)
    return cut
