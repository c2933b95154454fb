"""A worker comes alive, ends in order on SIGTERM, and leaves no process behind however it ends."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from servers import wait_until
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from workers import WorkerProcess

StartWorker = Callable[..., WorkerProcess]


def test_sigterm_ends_both_processes_and_is_told_to_the_fleet(
    worker: StartWorker, database: Database, settings: Settings
) -> None:
    process = worker("--device", "cpu")
    (row,) = Fleet(database).workers(settings.stale_after)
    assert (row.name, row.alive) == (process.name, True)
    wait_until(lambda: process.children, what="the inner process")
    family = process.children
    assert process.stop() == 0, process.log
    assert not [child for child in family if child.is_running()]
    (row,) = Fleet(database).workers(settings.stale_after)
    assert row.stopped_at is not None


def test_the_inner_process_ends_when_its_supervisor_is_killed(worker: StartWorker) -> None:
    process = worker("--device", "cpu")
    wait_until(lambda: process.children, what="the inner process")
    family = process.children
    process.process.kill()
    process.process.wait()
    _, left = psutil.wait_procs(family, timeout=30)
    assert not left, process.log
