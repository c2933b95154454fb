"""The history of a job's tries: when, by whom, how each ended; on both databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text

from integration.storage.job_scene import ERROR, Scene
from torchrelay_storage import ids
from torchrelay_storage.database import Database
from torchrelay_storage.errors import JobNotFound
from torchrelay_storage.job_error import JobError
from torchrelay_storage.lost import Evidence
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.retention import Retention
from torchrelay_storage.states import End, JobState


@pytest.fixture
def scene(database: Database) -> Iterator[Scene]:
    scene = Scene(database)
    yield scene
    scene.check()


def test_a_job_that_waits_has_none(scene: Scene) -> None:
    [job] = scene.submit(1)
    assert scene.jobs.attempts(job) == []
    with pytest.raises(JobNotFound, match="retention"):
        scene.jobs.attempts(17)


def test_every_outcome_in_its_order(scene: Scene) -> None:
    [job] = scene.submit(1, max_attempts=5)
    began = scene.database.now()
    scene.worker = scene.hire("first")
    scene.finish(scene.claim(job), End.OPEN)
    scene.worker = scene.hire("second")
    scene.claim(job)
    scene.die(Evidence(frozenset({job})), ended="killed by SIGSEGV")
    scene.worker = scene.hire("third")
    scene.claim_alone(job)
    scene.die(Evidence(frozenset({job})), ended="exited with code 1")
    scene.worker = scene.hire("fourth")
    claimed = scene.claim(job)
    running = scene.last_attempt(job)
    assert (running.number, running.outcome, running.worker, running.ended_at) == (4, "running", "fourth", None)
    assert running.started_at is not None
    assert (running.error, running.worker_ended) == (None, None)
    scene.finish(claimed)
    tries = scene.jobs.attempts(job)
    assert [one.number for one in tries] == [1, 2, 3, 4]
    assert [one.outcome for one in tries] == ["failed", "lost", "failed", "succeeded"]
    assert [one.worker for one in tries] == ["first", "second", "third", "fourth"]
    assert [one.worker_ended for one in tries] == [None, "killed by SIGSEGV", "exited with code 1", None]
    assert [one.error.type if one.error else None for one in tries] == ["ValueError", "WorkerLost", "WorkerLost", None]
    times = [time for one in tries for time in (one.started_at, one.ended_at)]
    assert None not in times
    assert times == sorted(times, key=lambda time: time or 0)
    assert times[0] is not None
    assert began <= times[0]
    assert scene.row(job).failures == 2


def test_the_order_is_the_databases_whatever_a_workers_clock_says(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    [job] = scene.submit(1, max_attempts=5)
    for name, drawn in (("first", 2**60), ("second", 7)):  # a clock that went back by years
        monkeypatch.setattr("torchrelay_storage.attempts.draw", lambda n, drawn=drawn: drawn)
        scene.worker = scene.hire(name)
        scene.finish(scene.claim(job), End.OPEN)
    assert [one.worker for one in scene.jobs.attempts(job)] == ["first", "second"]


def test_a_job_that_succeeds_at_once_costs_no_row(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.finish(scene.claim(jobs[0]))
    assert all(scene.outcomes(job) == ["succeeded"] for job in jobs)
    with scene.database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM attempts")).scalar() == 0


def test_a_failure_for_good_is_the_last_try(scene: Scene) -> None:
    jobs = scene.submit(2)
    scene.finish(scene.claim(jobs[0]), End.FAILED)
    assert [scene.outcomes(job) for job in jobs] == [["failed"]] * 2
    assert scene.last_attempt(jobs[1]).error == JobError("ValueError", "no") == scene.row(jobs[1]).error


def test_a_hand_back_and_a_cancel_leave_no_trace(scene: Scene) -> None:
    jobs = scene.submit(4)
    claimed = scene.claim(jobs[0])
    scene.chunks.hand_back([(claimed.chunk, claimed.token)], scene.worker)
    assert [scene.outcomes(job) for job in jobs] == [[]] * 4
    claimed = scene.claim(jobs[0])
    scene.jobs.cancel(jobs[:2])
    scene.finish(claimed, End.FAILED)
    assert [scene.outcomes(job) for job in jobs] == [[], [], ["failed"], ["failed"]]


def test_what_was_refused_leaves_no_trace(scene: Scene) -> None:
    jobs = scene.submit(2)
    claimed = scene.claim(jobs[0])
    stranger = scene.hire()
    scene.finish(claimed, End.FAILED, worker=stranger)
    late = [Outcome(job, claimed.chunk, claimed.token + 1, End.OPEN, error=ERROR) for job in jobs]
    scene.jobs.finish(late, scene.worker)
    assert [scene.outcomes(job) for job in jobs] == [["running"]] * 2


def test_a_result_keeps_its_times_when_its_mates_run_again(scene: Scene) -> None:
    jobs = scene.submit(4)
    claimed = scene.claim(jobs[0])
    scene.finish(claimed, jobs=jobs[:1])
    first = scene.last_attempt(jobs[0])
    assert first.started_at is not None
    scene.chunks.hand_back([(claimed.chunk, claimed.token)], scene.worker)
    assert scene.last_attempt(jobs[0]).started_at is None, "nobody knows any more"
    later = scene.hire("later")
    with scene.database.write() as connection:  # so that the second claim is later by more than the clock's tick
        connection.execute(text("UPDATE jobs SET finished_at = finished_at - 1 WHERE state = 1"))
    scene.claim(jobs[1], later)
    again = scene.last_attempt(jobs[0])
    assert (again.outcome, again.worker, again.started_at) == ("succeeded", "w", None)
    assert scene.last_attempt(jobs[1]).worker == "later"


def test_a_users_retry_keeps_the_history(scene: Scene) -> None:
    [job] = scene.submit(1)
    scene.finish(scene.claim(job), End.FAILED)
    assert scene.jobs.retry([job]).count == 1
    assert (scene.row(job).failures, scene.outcomes(job)) == (0, ["failed"])
    scene.finish(scene.claim(job))
    assert [(one.number, one.outcome) for one in scene.jobs.attempts(job)] == [(1, "failed"), (2, "succeeded")]


def test_a_worker_that_is_forgotten_is_nameless(scene: Scene) -> None:
    [job] = scene.submit(1)
    scene.finish(scene.claim(job), End.FAILED)
    scene.fleet.stop(scene.worker)
    scene.fleet.forget(-1)
    [one] = scene.jobs.attempts(job)
    assert (one.worker, one.worker_ended, one.outcome) == (None, None, "failed")
    assert scene.row(job).worker is None


def test_retention_deletes_them_with_their_jobs(scene: Scene) -> None:
    purged, kept = scene.submit(3), scene.submit(3)
    scene.finish(scene.claim(purged[0]), End.OPEN)
    scene.finish(scene.claim(purged[0]), End.FAILED)
    scene.finish(scene.claim(kept[0]), End.OPEN)
    assert Retention(scene.database).purge(-1, reference=b"\x07").jobs == 3
    with scene.database.read() as connection:
        assert set(connection.execute(text("SELECT job FROM attempts")).scalars()) == set(kept)
    assert {scene.row(job).state for job in kept} == {JobState.RETRYING}
    scene.check()
    with pytest.raises(JobNotFound):
        scene.jobs.attempts(purged[0])


def test_ids_of_attempts_are_drawn_like_others(scene: Scene) -> None:
    [job] = scene.submit(1)
    before = ids.draw()
    scene.finish(scene.claim(job), End.FAILED)
    with scene.database.read() as connection:
        assert before < connection.execute(text("SELECT id FROM attempts")).scalar_one()
