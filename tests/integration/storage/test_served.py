"""Which revision of a handler computed a result: recorded once a worker and version; on both databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text

from integration.storage.job_scene import Scene
from torchrelay_storage.database import Database
from torchrelay_storage.job_reader import JobFilter
from torchrelay_storage.states import End


@pytest.fixture
def scene(database: Database) -> Iterator[Scene]:
    scene = Scene(database)
    yield scene
    scene.check()


def shown(scene: Scene, job: int) -> str | None:
    """What the view says, which the stores must say too."""
    with scene.database.read() as connection:
        row = connection.execute(text("SELECT * FROM job_status WHERE id = :id"), {"id": job}).one()
    assert list(row._mapping)[-1] == "handler_revision"
    revision = row.handler_revision
    assert scene.row(job).handler_revision == revision
    [paged] = [one for one in scene.jobs.page(JobFilter()) if one.id == job]
    assert paged.handler_revision == revision
    assert revision is None or isinstance(revision, str)
    return revision


def test_who_recorded_the_end_tells_the_revision(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.fleet.serves(scene.worker, scene.version.id, "abc123")
    claimed = scene.claim(jobs[0])
    assert shown(scene, jobs[0]) is None, "it is not computed yet"
    scene.finish(claimed, jobs=jobs[:1])
    scene.finish(claimed, End.FAILED, jobs=jobs[1:2])
    scene.jobs.cancel(jobs[2:3])
    assert [shown(scene, job) for job in jobs] == ["abc123", "abc123", None, None]
    assert [row.handler_revision for row in scene.jobs.ended_in([claimed.chunk])] == ["abc123", "abc123", None]


def test_two_revisions_side_by_side(scene: Scene) -> None:
    jobs = scene.submit(8)
    new = scene.hire("new")
    scene.fleet.serves(scene.worker, scene.version.id, "old")
    scene.fleet.serves(new, scene.version.id, "new")
    scene.fleet.serves(new, scene.version.id + 1, "of another version")
    scene.finish(scene.claim(jobs[0]))
    scene.finish(scene.claim(jobs[4], new), worker=new)
    assert [shown(scene, job) for job in jobs] == ["old"] * 4 + ["new"] * 4


def test_a_worker_that_said_nothing_left_nothing(scene: Scene) -> None:
    [job] = scene.submit(1)
    scene.finish(scene.claim(job))
    assert shown(scene, job) is None


def test_said_again_the_last_holds(scene: Scene) -> None:
    [job] = scene.submit(1)
    for revision in ("a", "a", "b"):
        scene.fleet.serves(scene.worker, scene.version.id, revision)
    scene.finish(scene.claim(job))
    assert shown(scene, job) == "b"


def test_it_is_forgotten_with_its_worker(scene: Scene) -> None:
    [job] = scene.submit(1)
    scene.fleet.serves(scene.worker, scene.version.id, "a")
    living = scene.hire()
    scene.fleet.serves(living, scene.version.id, "b")
    scene.finish(scene.claim(job))
    scene.fleet.stop(scene.worker)
    assert scene.fleet.forget(3600) == 0
    assert shown(scene, job) == "a", "for as long as the worker is remembered"
    with scene.database.write() as connection:
        connection.execute(text("UPDATE workers SET stopped_at = 1 WHERE stopped_at IS NOT NULL"))
    assert scene.fleet.forget(3600) == 1
    with scene.database.read() as connection:
        assert list(connection.execute(text("SELECT worker FROM served")).scalars()) == [living]
    assert shown(scene, job) is None
