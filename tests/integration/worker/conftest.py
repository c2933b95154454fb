"""A worker's inner process by itself, started and read as its supervisor does, without what follows from it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from servers import wait_until
from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.job_store import JobStore
from torchrelay_worker.inner import Inner, Options

TESTS = Path(__file__).parents[2]
HANDLERS = {n.lower(): f"integration.inner_models:{n}" for n in ("Waits", "Slow")}


class Process:
    """One inner process."""

    def __init__(self, settings: Settings, database: Database, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        self.database = database
        self.chunks = ChunkStore(database)
        self.worker = Fleet(database).register("w", host="h", pid=1, device="cpu").id
        self.inner = Inner(settings, Options(**{"name": "w", "device": "cpu", "torch_threads": 1, **options}))

    def go(self) -> Process:
        """Let it work, and wait until it does."""
        self.inner.go(self.worker)
        self.wait(lambda: self.inner.has_reported, "the first report")
        return self

    def wait(self, holds: Callable[[], object], what: str, seconds: float = 30.0) -> None:
        """Wait for something while the reports are read."""

        def look() -> object:
            assert self.inner.process.poll() is None, f"it ended with {self.inner.process.returncode} before {what}"
            self.inner.read()
            return holds()

        wait_until(look, seconds, what)

    def began(self, value: int) -> None:
        """Wait until a device batch runs whose first input is this one."""
        self.wait((self.folder / f"began-{value}").exists, f"the batch of {value}")

    def let_go(self) -> None:
        """Let what waits go on."""
        (self.folder / "go").touch()

    def rows(self) -> list[JobRow]:
        """The jobs, in the order of their ids."""
        with self.database.read() as connection:
            ids = list(connection.execute(text("SELECT id FROM jobs ORDER BY id")).scalars())
        rows = JobStore(self.database).get(ids)
        return [rows[job] for job in ids]

    def held(self) -> int:
        """How many chunks it holds, as the database says."""
        return len(self.chunks.held(self.worker))

    def terminate(self) -> None:
        self.inner.process.send_signal(signal.SIGTERM)

    def end(self, seconds: float = 30.0) -> int:
        """Wait for its end; return the exit code."""
        try:
            return self.inner.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.inner.process.kill()
            raise


@pytest.fixture
def relay(settings: Settings) -> Iterator[Relay]:
    """An application's relay on the test's database and Redis."""
    with Relay(settings=settings) as relay:
        yield relay


@pytest.fixture
def process(
    settings: Settings, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Process]]:
    """Return a function that starts an inner process in standby. All are killed at the end."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    started: list[Process] = []

    def start(changes: dict[str, Any] | None = None, **options: Any) -> Process:
        chosen = {**settings.model_dump(exclude_none=True), "handlers": HANDLERS, **(changes or {})}
        made = Process(Settings.load(**chosen), database, tmp_path, options)
        started.append(made)
        return made

    yield start
    for made in started:
        made.inner.end()
