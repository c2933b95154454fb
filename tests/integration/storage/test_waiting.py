"""Who is announced next where a look at a whole queue is dear, as it is while somebody holds an old snapshot."""

from __future__ import annotations

import pytest

from integration.storage.job_scene import Scene
from torchrelay_storage import waiting
from torchrelay_storage.database import Database


@pytest.fixture
def scene(database: Database, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Chunks of one job; after a first look, all that can be are spared."""
    monkeypatch.setattr(waiting, "DEAR", -1.0)
    monkeypatch.setattr(waiting, "LOOKING", 1e-9)
    return Scene(database, chunk_size=1)


def announce(scene: Scene, n: int) -> list[int]:
    return [one.chunk for one in scene.chunks.announce(scene.version.model, dict.fromkeys(range(10), n))]


def chunks_of(scene: Scene, jobs: list[int]) -> list[int]:
    return [scene.row(job).chunk for job in jobs]


def test_the_order_is_the_same(scene: Scene) -> None:
    plain, urgent = scene.submit(8), scene.submit(4, priority=9)
    assert announce(scene, 5) == chunks_of(scene, urgent + plain[:1])
    more = scene.submit(2, priority=9)
    assert announce(scene, 5) == chunks_of(scene, more + plain[1:4])
    assert announce(scene, 5) == chunks_of(scene, plain[4:]), "what is left, though less than was asked for"
    assert announce(scene, 5) == []


def test_what_comes_back_with_an_earlier_turn_is_found_by_the_next_look_at_all(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = scene.submit(12)
    assert announce(scene, 4) == chunks_of(scene, jobs[:4])
    claimed = scene.claim(jobs[0])
    assert scene.chunks.hand_back([(claimed.chunk, claimed.token)], scene.worker) == 1
    assert announce(scene, 4) == chunks_of(scene, jobs[4:8])
    monkeypatch.setattr(waiting, "LOOKING", 1e9)
    assert announce(scene, 4) == chunks_of(scene, [jobs[0], *jobs[8:11]])
    monkeypatch.setattr(waiting, "LOOKING", 1e-9)
    assert announce(scene, 4) == chunks_of(scene, jobs[11:])


def test_a_priority_that_is_new_does_not_wait_for_long(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = scene.submit(12)
    announce(scene, 4)
    [urgent] = scene.submit(1, priority=9)
    assert announce(scene, 4) == chunks_of(scene, plain[4:8])
    monkeypatch.setattr(waiting, "LOOKING", 1e9)
    assert announce(scene, 1) == chunks_of(scene, [urgent])


def test_a_cheap_look_is_always_at_all(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "DEAR", 60.0)
    plain = scene.submit(12)
    announce(scene, 4)
    [urgent] = scene.submit(1, priority=9)
    assert announce(scene, 2) == chunks_of(scene, [urgent, plain[4]])
