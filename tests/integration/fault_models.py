"""A model for the tests of a full disk: outputs that take room, in a SQLite whose room is set while a worker runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Connection, Engine, event

from integration.system_models import Slow

SIZE = 40_000  # bytes of an output


def limit_pages(engine: Engine | type[Engine], file: Path) -> None:
    """Let a SQLite have no more pages than the number in `file` says, from its next transaction on; 0: any number."""

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        if connection.dialect.name == "sqlite" and file.exists():
            connection.exec_driver_sql(f"PRAGMA max_page_count = {int(file.read_text()) or 2**32 - 2}").close()


class Blob(Slow):
    """A number in; bytes out, as many as SIZE says, that no database compresses."""

    def load(self, weights: Any, device: torch.device) -> None:
        super().load(weights, device)
        if pages := os.environ.get("TEST_PAGES"):
            limit_pages(Engine, Path(pages))

    def decode(self, output: Any) -> bytes:
        return os.urandom(SIZE)
