"""A database without room: a submit says so at once, a worker keeps its results, and both go on once there is some."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from integration.fault_models import SIZE, limit_pages
from servers import PostgresServer, wait_until
from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.errors import StorageFull
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.registry import Registry
from torchrelay_storage.submission import NewJob, Submission

LIMIT = 3 << 20  # bytes of one file of PostgreSQL: more than any of an empty database has
HANDLERS = {"blob": "integration.fault_models:Blob"}


class Disk:
    """The room of a database."""

    def __init__(self, url: str, fill: Callable[[], None], free: Callable[[], None], pages: Path) -> None:
        self.url, self.fill, self.free, self.pages = url, fill, free, pages


@contextmanager
def small_postgres() -> Iterator[Disk]:
    with PostgresServer(segment=1) as server:
        url = server.create("small")
        yield Disk(url, lambda: server.limit_files(LIMIT), lambda: server.limit_files(None), Path(os.devnull))


@contextmanager
def small_sqlite(folder: Path) -> Iterator[Disk]:
    path, pages = folder / "small.db", folder / "pages"
    pages.write_text("0")
    yield Disk(f"sqlite:///{path}", lambda: _write(pages, str(LIMIT // 4096)), lambda: _write(pages, "0"), pages)


def _write(path: Path, words: str) -> None:
    path.with_suffix(".new").write_text(words)
    path.with_suffix(".new").rename(path)


@pytest.fixture(params=["sqlite", "postgresql"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with small_sqlite(tmp_path) if request.param == "sqlite" else small_postgres() as disk:
        database = Database(disk.url)
        database.upgrade()
        database.dispose()
        yield disk


@pytest.fixture
def settings(disk: Disk, redis_url: str, tmp_path: Path) -> Settings:
    return Settings.load(
        home=tmp_path / "home", database=disk.url, broker=redis_url, artifacts=f"file://{tmp_path / 'artifacts'}"
    )


def count(database: Database, what: str = "*") -> int:
    with database.read() as connection:
        return int(connection.execute(text(f"SELECT count({what}) FROM jobs")).scalar_one())


def test_a_submit_says_so_at_once_and_stores_nothing(disk: Disk) -> None:
    database = Database(disk.url)
    if database.is_sqlite:
        limit_pages(database.engine, disk.pages)
    version = Registry(database).register("model", handler="h")
    store = JobStore(database)

    stored = 0

    def submit(n: int, times: int = 1) -> None:
        nonlocal stored
        for _ in range(times):
            [placed] = store.submit([Submission(version, Options(), [NewJob(os.urandom(SIZE)) for _ in range(n)])])
            stored += len(placed)

    submit(5)
    disk.fill()
    began = time.monotonic()
    for n in (200, 20):  # by COPY, and not
        with pytest.raises(StorageFull, match="has no room left"):
            submit(n, times=20)
    assert time.monotonic() - began < 8, "not tried again and again"
    assert count(database) == stored
    disk.free()
    submit(200)
    assert count(database) == stored
    database.dispose()


def test_a_disk_that_is_really_full(postgres_server: PostgresServer) -> None:
    """The kernel's own ENOSPC, which it gives whoever writes to /dev/full."""
    name = "really_full"
    database = Database(postgres_server.ensure().create(name))
    database.upgrade()
    version = Registry(database).register("model", handler="h")
    database.dispose()
    file = postgres_server.file_of("jobs", name)
    aside = file.with_suffix(".aside")
    file.rename(aside)
    file.symlink_to("/dev/full")
    submission = Submission(version, Options(), [NewJob(b"1")])
    try:
        with pytest.raises(StorageFull, match="No space left on device") as caught:
            JobStore(database).submit([submission])
        cause = caught.value.__cause__
        assert getattr(getattr(cause, "orig", None), "sqlstate", None) == "53100"
        assert count(database) == 0
    finally:
        database.dispose()
        file.unlink()
        aside.rename(file)
    assert len(JobStore(database).submit([submission])[0]) == 1
    database.dispose()
    postgres_server.drop(name)


def test_a_worker_keeps_its_results(disk: Disk, settings: Settings, relay: Relay, start: Any, runs: Any) -> None:
    relay.register_model("blob", handler="blob", config={"seconds": 0.01}, chunk_size=16)
    process = start(handlers=HANDLERS, environment={"TEST_PAGES": str(disk.pages)})
    assert len(relay.submit("blob", 1000).result(timeout=60)) == SIZE
    disk.fill()
    batch = relay.submit_batch("blob", range(200))
    wait_until(lambda: "recording_waits" in process.log, 60, "a worker that waits to record")
    assert "has no room left" in process.log
    time.sleep(1.0)
    kept = batch.counts()
    assert 0 < kept.succeeded < 200
    assert kept.failed == 0
    disk.free()
    assert batch.wait(timeout=60).succeeded == 200
    assert sorted(runs.inputs()) == [*range(200), 1000], "nothing ran twice"
    assert all(len(result) == SIZE for result in batch.results())
