"""What maintenance frees of workers that are lost, and that these get nothing new; on both databases."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from integration.storage.job_scene import Scene
from torchrelay_storage.chunk_store import Claimed
from torchrelay_storage.database import Database
from torchrelay_storage.options import Backoff
from torchrelay_storage.states import JobState

STALE_AFTER = 60.0


@pytest.fixture
def scene(database: Database) -> Iterator[Scene]:
    scene = Scene(database)
    yield scene
    scene.check()


# --- whose chunks are freed -----------------------------------------------------------------------------------


def test_while_nobody_could_beat_only_the_stopped_and_the_gone_lose_what_they_held(scene: Scene) -> None:
    silent, stopped, gone = scene.hire(), scene.hire(), scene.hire()
    jobs = scene.submit(12)
    for job, worker in zip(jobs[::4], (silent, stopped, gone), strict=True):
        scene.claim(job, worker)
    scene.grow_old()
    scene.fleet.stop(stopped)
    with scene.database.write() as connection:
        connection.execute(text("DELETE FROM workers WHERE id = :id"), {"id": gone})
    moved = scene.chunks.rescue(None)
    assert (moved.count, moved.chunks) == (8, (jobs[4], jobs[8]))
    assert [held.chunk for held in scene.chunks.held(silent)] == [jobs[0]]
    assert scene.fleet.beat(silent)
    assert scene.chunks.rescue(STALE_AFTER).count == 0, "it has beaten since"
    error = scene.last_attempt(jobs[8]).error
    assert error is not None
    assert f"worker {gone} was lost" in error.message


def test_a_silent_worker_is_stopped_though_it_holds_nothing(scene: Scene) -> None:
    silent = scene.hire()
    scene.grow_old()
    living = scene.hire()
    assert scene.chunks.rescue(STALE_AFTER).count == 0
    assert not scene.fleet.beat(silent)
    assert scene.fleet.beat(living)
    rows = {w.id: w for w in scene.fleet.workers(STALE_AFTER)}
    assert rows[silent].ended == "fell silent"
    assert (rows[living].ended, rows[living].stopped_at) == (None, None)


def test_what_was_said_of_an_end_stays(scene: Scene) -> None:
    scene.fleet.stop(scene.worker, "it was asked to end")
    scene.grow_old()
    scene.chunks.rescue(STALE_AFTER)
    scene.fleet.stop(scene.worker, "again")
    [row] = scene.fleet.workers(STALE_AFTER)
    assert row.ended == "it was asked to end"
    assert scene.fleet.workers(STALE_AFTER, ended=False) == []


def test_a_paused_worker_that_comes_back_writes_nothing(scene: Scene) -> None:
    jobs = scene.submit(2)
    zombie = scene.worker
    claimed = scene.claim(jobs[0])
    scene.grow_old()
    scene.worker = scene.hire()
    assert scene.chunks.rescue(STALE_AFTER).count == 2
    assert scene.finish(claimed, worker=zombie).dropped == {claimed.chunk}
    assert scene.chunks.hand_back([(claimed.chunk, claimed.token)], zombie) == 0
    assert not scene.chunks.run_alone(claimed.chunk, claimed.token, zombie)
    assert {scene.row(job).state for job in jobs} == {JobState.QUEUED}
    for job in jobs:
        assert scene.finish(scene.claim(job)).recorded == 1
    assert [scene.outcomes(job) for job in jobs] == [["lost", "succeeded"]] * 2


def test_in_slices_until_nothing_is_left(scene: Scene) -> None:
    jobs = scene.submit(20)
    for job in jobs[::4]:
        scene.claim(job)
    scene.fleet.stop(scene.worker)
    counts = []
    while moved := scene.chunks.rescue(STALE_AFTER, limit=2).count:
        counts.append(moved)
        assert len(counts) < 10
    assert counts == [8, 8, 4]


def test_a_machine_that_falls_silent_twice_is_blamed_on_what_ran_alone(scene: Scene) -> None:
    [job] = scene.submit(1, max_attempts=2, backoff=Backoff(seconds=0))
    for _ in range(2):  # by itself, and perhaps not alone
        scene.claim(job)
        scene.grow_old()
        assert scene.chunks.rescue(STALE_AFTER).count == 1
        scene.worker = scene.hire()
    assert scene.row(job).failures == 0
    for failures in (0, 1, 2):
        scene.claim_alone(job)
        scene.grow_old()
        scene.chunks.rescue(STALE_AFTER)
        scene.worker = scene.hire()
        assert scene.row(job).failures == failures
    row = scene.row(job)
    assert row.state is JobState.FAILED
    assert row.error is not None
    assert row.error.message == "worker w was lost while it ran this job, and nothing beside it"
    assert scene.outcomes(job) == ["lost", "lost", "lost", "failed", "failed"]


def test_halves_of_a_whole_chunk_end_in_single_jobs(scene: Scene) -> None:
    jobs = scene.submit(4)
    for _ in range(3):
        for job in jobs:
            if not scene.chunk(job).worker:
                scene.claim(job)
        scene.fleet.stop(scene.worker)
        scene.chunks.rescue(STALE_AFTER)
        scene.worker = scene.hire()
    assert len({scene.row(job).chunk for job in jobs}) == 4
    assert [scene.row(job).failures for job in jobs] == [0] * 4


# --- who may claim --------------------------------------------------------------------------------------------


def both_ways(scene: Scene, worker: int, chunk: int) -> list[Claimed]:
    """All that a worker gets, asked in both ways."""
    return scene.chunks.claim([chunk], worker) + scene.chunks.claim_next([scene.version.model], worker, 5)


def test_who_has_ended_or_never_registered_gets_nothing(scene: Scene) -> None:
    [job] = scene.submit(1)
    stopped, silent = scene.hire(), scene.hire()
    scene.fleet.stop(stopped)
    before = scene.everything()
    for worker in (stopped, 1, 2**62):
        assert both_ways(scene, worker, job) == []
    assert scene.everything() == before
    scene.grow_old()
    assert len(both_ways(scene, silent, job)) == 1, "who is late may still beat"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_who_claims_does_not_wait_for_a_beat(scene: Scene) -> None:
    """A beat that has not committed holds the worker's row."""
    [job] = scene.submit(1)
    done: list[int] = []

    def work() -> None:
        done.append(len(both_ways(scene, scene.worker, job)))
        done.append(scene.chunks.rescue(-1e9).count)  # to which all are silent

    thread = threading.Thread(target=work)
    with scene.database.write() as connection:
        connection.execute(text("UPDATE workers SET beat_at = beat_at + 1"))
        thread.start()
        thread.join(10)
        assert done == [1, 1]
    thread.join()


def suspects(scene: Scene, n: int) -> list[int]:
    """Jobs that are suspected, each by itself."""
    jobs = []
    for _ in range(n):
        jobs += scene.submit(1)
        scene.claim(jobs[-1])
    scene.die(None)
    assert all(scene.chunk(job).suspect for job in jobs)
    return jobs


@pytest.mark.parametrize("announced", [False, True])
def test_a_claim_takes_one_suspect_and_the_others_wait(scene: Scene, announced: bool) -> None:
    bad = suspects(scene, 3)
    good = scene.submit(4)
    if announced:
        assert len(scene.chunks.announce(scene.version.model, dict.fromkeys(range(10), 9))) == 4
    taken = scene.chunks.claim([*bad, good[0]], scene.worker)
    assert sorted((one.chunk, one.suspect) for one in taken) == [(bad[0], True), (good[0], False)]
    assert [scene.chunk(job).state for job in bad] == [2, 0, 0], "to be announced anew"
    assert len(scene.chunks.announce(scene.version.model, dict.fromkeys(range(10), 9))) == 2


def test_claims_from_sql_take_the_suspects_one_by_one(scene: Scene) -> None:
    bad = suspects(scene, 3)
    good = scene.submit(4)
    seen: list[int] = []
    for _ in range(4):
        taken = scene.chunks.claim_next([scene.version.model], scene.worker, 4)
        assert sum(one.suspect for one in taken) <= 1
        seen += [one.chunk for one in taken]
    assert sorted(seen) == [*bad, good[0]]


# --- beats and incarnations -----------------------------------------------------------------------------------


def test_a_worker_that_restarts_under_its_name_takes_over_nothing(scene: Scene) -> None:
    jobs = scene.submit(4)
    old = scene.worker
    claimed = scene.claim(jobs[0])
    new = scene.hire("w")
    assert scene.chunks.held(new) == []
    assert scene.finish(claimed, worker=new).dropped == {claimed.chunk}
    assert scene.fleet.beat(old), "nor does it end the old one"
    scene.fleet.stop(old)
    assert scene.chunks.rescue(STALE_AFTER).count == 4, "nor is anything stranded"
    assert scene.fleet.beat(new)
