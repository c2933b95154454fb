"""How many jobs wait, and how many may; on both databases."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sqlalchemy import event, text

from integration.storage.job_scene import Scene
from integration.storage.run_scene import Scene as RunScene
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, ModelNotFound
from torchrelay_storage.registry import MOST_QUEUED
from torchrelay_storage.states import End


def test_queued_counts_what_waits_for_a_worker(database: Database) -> None:
    scene = Scene(database)
    model = scene.version.model
    assert (scene.jobs.queued(model), scene.jobs.queued()) == (0, 0)
    jobs = scene.submit(10)
    scene.submit(2, delay=1000)
    assert scene.jobs.queued(model) == 12, "delayed ones too"
    scene.chunks.announce(model, dict.fromkeys(range(10), 1))
    assert scene.jobs.queued(model) == 12, "announced or not"
    scene.jobs.cancel(jobs[8:9])
    assert scene.jobs.queued(model) == 11
    claimed = scene.claim(jobs[0])
    assert scene.jobs.queued(model) == 7, "what is held waits no longer"
    scene.finish(claimed, jobs=jobs[:1])
    scene.finish(claimed, End.OPEN, jobs[1:2])
    assert scene.jobs.queued(model) == 8, "a retry waits"
    scene.chunks.hand_back([(claimed.chunk, claimed.token)], scene.worker)
    assert scene.jobs.queued(model) == 10, "of a chunk that was handed back what is open"
    scene.registry.pause("m")
    assert scene.jobs.queued(model) == 10


def test_queued_of_one_model_and_of_all(database: Database) -> None:
    scene = Scene(database)
    scene.submit(3)
    first, scene.version = scene.version, scene.registry.register("other", "h", chunk_size=4)
    scene.submit(2)
    assert scene.jobs.queued(first.model) == 3
    assert scene.jobs.queued(scene.version.model) == 2
    assert scene.jobs.queued(10**6) == 0
    assert scene.jobs.queued() == 5


def test_runs_are_not_counted(database: Database) -> None:
    runs = RunScene(database)
    runs.submit()
    assert runs.jobs.queued() == 0
    assert runs.jobs.queued(runs.lane.model) == 1
    Scene(database).submit(4)
    assert runs.jobs.queued() == 4


def test_what_is_done_is_not_looked_at(database: Database) -> None:
    """There may be a thousand times as many chunks that are done."""
    scene = Scene(database)
    seen: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, row: Any, *_: object) -> None:
        if "FROM chunks" in statement:
            seen.append((statement, row))

    event.listen(database.engine, "before_cursor_execute", note)
    scene.jobs.queued(scene.version.model)
    scene.jobs.queued()
    event.remove(database.engine, "before_cursor_execute", note)
    assert len(seen) == 2
    explain = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
    with database.write() as connection:
        if not database.is_sqlite:  # the table is tiny
            connection.execute(text("SET LOCAL enable_seqscan = off"))
        for statement, row in seen:
            plan = [str(tuple(line)) for line in connection.exec_driver_sql(explain + statement, row)]
            of_chunks = [line for line in plan if re.search(r"(SCAN|SEARCH) c\b|Scan.* on (chunks|ix_chunks)", line)]
            assert len(of_chunks) >= 2, plan
            assert all("ix_chunks_" in line or "Bitmap Heap" in line for line in of_chunks), plan


def test_a_limit_is_of_the_model_and_not_of_a_version(database: Database) -> None:
    scene = Scene(database)
    assert scene.version.max_queued is None
    scene.registry.limit("m", 100)
    assert scene.registry.resolve("m").max_queued == 100
    assert scene.registry.register("m", "h2").max_queued == 100
    assert [v.max_queued for v in scene.registry.versions()] == [100, 100]
    scene.registry.register("other", "h")
    assert scene.registry.resolve("other").max_queued is None
    scene.registry.limit("m", 0)
    assert scene.registry.resolve("m@1").max_queued == 0
    scene.registry.limit("m", None)
    assert scene.registry.resolve("m").max_queued is None


@pytest.mark.parametrize("bad", [-1, 1.5, True, "7", MOST_QUEUED + 1, float("nan")])
def test_what_is_no_limit_is_refused(database: Database, bad: Any) -> None:
    scene = Scene(database)
    with pytest.raises(InvalidInput, match="a limit is a whole number"):
        scene.registry.limit("m", bad)
    assert scene.registry.resolve("m").max_queued is None


def test_the_largest_limit_fits_and_a_model_must_exist(database: Database) -> None:
    scene = Scene(database)
    scene.registry.limit("m", MOST_QUEUED)
    assert scene.registry.resolve("m").max_queued == MOST_QUEUED
    with pytest.raises(ModelNotFound):
        scene.registry.limit("nothing", 1)
