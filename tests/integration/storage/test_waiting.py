"""Who is announced next where a look at a whole queue is dear, and who is announced by the submit itself."""

from __future__ import annotations

from typing import Any

import pytest

from integration.storage.job_scene import Scene
from torchrelay_storage import waiting
from torchrelay_storage.database import Database
from torchrelay_storage.options import Options
from torchrelay_storage.submission import NewJob, Submission, Submitted


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


# --- announced by the submit itself ---------------------------------------------------------------------------


@pytest.fixture
def quiet(database: Database) -> Scene:
    return Scene(database)


def submit_within(scene: Scene, window: int, n: int = 1, **options: Any) -> list[Submitted]:
    """Submit lone jobs whose submitter would send what may be announced at once."""
    jobs = [NewJob(b"1") for _ in range(n)]
    [placed] = scene.jobs.submit([Submission(scene.version, Options(**options), jobs, window=window)])
    return [one for one in placed if isinstance(one, Submitted)]


def states(scene: Scene, placed: list[Submitted]) -> list[int]:
    return [scene.chunk(one.job).state for one in placed]


def test_a_lone_job_is_announced_as_it_is_stored(quiet: Scene) -> None:
    [one] = submit_within(quiet, 4)
    chunk = quiet.chunk(one.job)
    assert (one.announced, chunk.state, chunk.announced_at) == (True, 1, chunk.created_at)
    [claimed] = quiet.chunks.claim([one.chunk], quiet.worker)
    assert quiet.finish(claimed).recorded == 1
    quiet.check()


def test_what_was_announced_so_and_got_lost_is_sent_again(quiet: Scene) -> None:
    [one] = submit_within(quiet, 4)
    assert quiet.chunks.announce_again(quiet.version.model, 60.0, 4) == []
    assert [again.chunk for again in quiet.chunks.announce_again(quiet.version.model, 0.0, 4)] == [one.chunk]


def test_no_more_than_the_window_takes(quiet: Scene) -> None:
    placed = submit_within(quiet, 2, n=12)  # three chunks of four
    assert states(quiet, placed) == [1] * 8 + [0] * 4
    assert [one.announced for one in placed] == [True] * 8 + [False] * 4
    assert states(quiet, submit_within(quiet, 2)) == [0]
    quiet.claim(placed[0].job)
    assert states(quiet, submit_within(quiet, 2)) == [0], "there is room, but others wait"
    assert announce(quiet, 9)[0] == placed[8].chunk
    assert states(quiet, submit_within(quiet, 9)) == [1]


@pytest.mark.parametrize("why", ["waiting", "paused", "delayed", "no window"])
def test_what_has_to_wait_waits(quiet: Scene, why: str) -> None:
    if why == "waiting":
        quiet.submit(1, priority=0)
    elif why == "paused":
        quiet.registry.pause("m")
    [one] = submit_within(quiet, 0 if why == "no window" else 4, **{"delay": 60} if why == "delayed" else {})
    assert (one.announced, states(quiet, [one])) == (False, [0])


def test_what_is_delayed_holds_up_nobody(quiet: Scene) -> None:
    quiet.submit(1, delay=60)
    assert states(quiet, submit_within(quiet, 4)) == [1]


def test_two_sets_of_options_share_the_window(quiet: Scene) -> None:
    submissions = [
        Submission(quiet.version, Options(priority=priority), [NewJob(b"1")], window=1) for priority in (5, 9)
    ]
    placed = quiet.jobs.submit(submissions)
    assert [one.announced for some in placed for one in some if isinstance(one, Submitted)] == [True, False]


def test_flows_that_wait_are_as_fair_as_ever(quiet: Scene) -> None:
    for _ in range(3):
        submit_within(quiet, 3)
    one, other = quiet.submit(8, tenant="a"), quiet.submit(8, tenant="b")
    lone = submit_within(quiet, 3)
    order = announce(quiet, 9)
    assert set(order[:3]) == {lone[0].chunk, *chunks_of(quiet, [one[0], other[0]])}, "the first of each flow"
