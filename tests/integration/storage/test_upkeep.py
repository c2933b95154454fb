"""What one look says that the maintenance has to do; on both databases."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from integration.storage.job_scene import Scene
from torchrelay_storage.database import Database
from torchrelay_storage.states import End
from torchrelay_storage.upkeep import Needed, Upkeep

STALE_AFTER = 60.0


@pytest.fixture
def scene(database: Database) -> Scene:
    return Scene(database)


def look(scene: Scene, stale_after: float | None = STALE_AFTER) -> Needed:
    return Upkeep(scene.database).look(stale_after)


def needs(scene: Scene, stale_after: float | None = STALE_AFTER) -> set[str]:
    """Return the names of what is needed."""
    found = look(scene, stale_after)
    return {name for name in ("announce", "rescue", "expire", "held") if getattr(found, name)}


def change(scene: Scene, statement: str, **values: Any) -> None:
    with scene.database.write() as connection:
        connection.execute(text(statement), values)


# --- nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale_after", [None, STALE_AFTER])
def test_an_idle_system_needs_nothing(scene: Scene, stale_after: float | None) -> None:
    quiet = Needed(announce=False, rescue=False, expire=False, held=False, next_due=None)
    assert look(scene, stale_after) == quiet
    jobs = scene.submit(8, expires_in=3600)
    for job in jobs[::4]:
        scene.finish(scene.claim(job), End.FAILED)
    scene.fleet.stop(scene.hire())
    assert look(scene, stale_after) == quiet


# --- to announce --------------------------------------------------------------------------------------------


def test_what_waits_and_what_was_announced_is_to_be_announced(scene: Scene) -> None:
    [job] = scene.submit()
    assert needs(scene) == {"announce"}
    assert scene.chunks.announce(scene.version.model, dict.fromkeys(range(10), 8))
    assert needs(scene) == {"announce"}, "its message may be lost"
    claimed = scene.claim(job)
    assert needs(scene) == {"held"}
    scene.finish(claimed)
    assert needs(scene) == set()


def test_a_paused_model_has_nothing_to_announce_and_hides_no_other(scene: Scene) -> None:
    scene.submit(8)
    scene.chunks.announce(scene.version.model, dict.fromkeys(range(10), 1))
    change(scene, "UPDATE models SET paused = true")
    assert needs(scene) == set()
    scene.version = scene.registry.register("other", "h")
    scene.submit()
    assert needs(scene) == {"announce"}


def test_a_delayed_chunk_is_to_be_announced_once_its_time_has_come(scene: Scene) -> None:
    scene.submit(delay=500)
    scene.submit(delay=50)
    found = look(scene)
    assert not found.announce
    assert found.next_due == pytest.approx(50, abs=10)
    change(scene, "UPDATE chunks SET not_before = not_before - 100")
    assert look(scene).announce
    assert scene.chunks.announce(scene.version.model, dict.fromkeys(range(10), 8))
    assert look(scene).next_due == pytest.approx(400, abs=10)


# --- to rescue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale_after", [None, STALE_AFTER])
def test_what_the_stopped_and_the_gone_hold_is_to_be_rescued(scene: Scene, stale_after: float | None) -> None:
    stopped, gone = scene.hire(), scene.hire()
    jobs = scene.submit(12)
    for job, worker in zip(jobs[::4], (scene.worker, stopped, gone), strict=True):
        scene.claim(job, worker)
    assert needs(scene, stale_after) == {"held"}
    scene.fleet.stop(stopped)
    assert needs(scene, stale_after) == {"held", "rescue"}
    assert scene.chunks.rescue(stale_after).count == 4
    assert needs(scene, stale_after) == {"held", "announce"}
    change(scene, "DELETE FROM workers WHERE id = :id", id=gone)
    assert needs(scene, stale_after) == {"held", "announce", "rescue"}


def test_the_silent_are_to_be_rescued_only_where_their_silence_means_something(scene: Scene) -> None:
    [job] = scene.submit()
    scene.claim(job)
    scene.grow_old()
    assert needs(scene, None) == {"held"}
    assert needs(scene, 1000.0) == {"held"}
    assert needs(scene) == {"held", "rescue"}
    assert scene.chunks.rescue(STALE_AFTER).count == 1
    assert needs(scene) == {"announce"}


def test_a_silent_worker_that_holds_nothing_is_to_be_stopped(scene: Scene) -> None:
    scene.grow_old()
    assert needs(scene, None) == set()
    assert needs(scene) == {"rescue"}
    scene.chunks.rescue(STALE_AFTER)
    assert needs(scene) == set()


# --- to expire ----------------------------------------------------------------------------------------------


def test_what_was_not_started_in_time_is_to_be_expired(scene: Scene) -> None:
    held, *_ = scene.submit(4, expires_in=20)
    scene.claim(held)
    scene.submit(expires_in=500)
    found = look(scene)
    assert not found.expire
    assert found.next_due == pytest.approx(500, abs=10), "what has begun does not expire"
    change(scene, "UPDATE chunks SET expires_at = expires_at - 1000")
    assert needs(scene) == {"held", "announce", "expire"}
    assert look(scene).next_due is None
    assert scene.chunks.expire().count == 1
    assert needs(scene) == {"held"}


def test_the_next_due_is_the_first_of_both(scene: Scene) -> None:
    scene.submit(delay=300, expires_in=100)
    assert look(scene).next_due == pytest.approx(100, abs=10)
    scene.submit(delay=30)
    assert look(scene).next_due == pytest.approx(30, abs=10)
