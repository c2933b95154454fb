"""What a supervisor says of a process that has died, and what that costs whom; on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text

from integration.storage import run_scene
from integration.storage.job_scene import ERROR, Scene
from torchrelay_storage.database import Database
from torchrelay_storage.lost import SINGLES, Evidence
from torchrelay_storage.options import Backoff
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.states import End, JobState


@pytest.fixture
def scene(database: Database) -> Iterator[Scene]:
    scene = Scene(database)
    yield scene
    scene.check()


def evidence(*jobs: int, timed_out: bool = False) -> Evidence:
    return Evidence(frozenset(jobs), timed_out=timed_out)


# --- who is suspected -----------------------------------------------------------------------------------------


def test_nothing_known_everything_comes_back_in_halves(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.claim(jobs[0])
    moved = scene.die(None)
    assert (moved.count, moved.chunks) == (4, (jobs[0],))
    homes = [scene.row(job).chunk for job in jobs]
    assert homes[0] == homes[1] != homes[2] == homes[3]
    assert all(scene.chunk(job).suspect for job in jobs)
    assert [scene.row(job).failures for job in jobs] == [0] * 4
    assert all(scene.outcomes(job) == ["lost"] for job in jobs)


def test_what_did_not_run_waits_again_as_if_handed_back(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.claim(jobs[0])
    assert scene.die(evidence()).count == 4
    chunk = scene.chunk(jobs[0])
    assert (chunk.state, chunk.suspect, chunk.worker, chunk.size) == (0, False, None, 4)
    assert all(scene.outcomes(job) == [] for job in jobs)
    assert [job.failures for job in scene.claim(jobs[0]).jobs] == [0] * 4


def test_evidence_on_others_jobs_is_none_on_these(scene: Scene) -> None:
    jobs = scene.submit(8)
    scene.claim(jobs[0])
    scene.claim(jobs[4])
    scene.die(evidence(*jobs[:4], 1, 2**62))
    assert [bool(scene.chunk(job).suspect) for job in jobs] == [True] * 4 + [False] * 4
    assert len({scene.row(job).chunk for job in jobs[4:]}) == 1


def test_each_job_that_ran_comes_back_by_itself(scene: Scene) -> None:
    jobs = scene.submit(4, priority=7, timeout=9, max_attempts=2, tenant="t", backoff=Backoff(seconds=5))
    scene.claim(jobs[0])
    scene.die(evidence(jobs[1], jobs[2]))
    first, second, third, fourth = (scene.chunk(job) for job in jobs)
    assert first.id == fourth.id == jobs[0]
    assert len({first.id, second.id, third.id}) == 3
    assert (first.suspect, second.suspect, third.suspect) == (False, True, True)
    assert (first.size, second.size, third.size) == (2, 1, 1)
    for chunk in (second, third):
        assert (chunk.priority, chunk.timeout, chunk.max_attempts, chunk.tenant) == (7, 9, 2, "t")
        assert (chunk.turn, chunk.flow, chunk.backoff) == (first.turn, first.flow, first.backoff)
        assert (chunk.due, chunk.state, chunk.retrying) == (True, 0, False)
    assert [scene.outcomes(job) for job in jobs] == [[], ["lost"], ["lost"], []]
    assert [scene.row(job).failures for job in jobs] == [0] * 4
    error = scene.last_attempt(jobs[1]).error
    assert error is not None
    assert error.type == "WorkerLost"
    assert "killed by SIGSEGV" in error.message


def test_all_of_a_chunk_ran_and_each_is_by_itself(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.claim(jobs[0])
    scene.die(evidence(*jobs))
    assert len({scene.row(job).chunk for job in jobs}) == 4
    assert all(scene.chunk(job).suspect for job in jobs)


@pytest.mark.parametrize("more", [0, 1])
def test_many_that_ran_come_back_in_halves(database: Database, more: int) -> None:
    scene = Scene(database, chunk_size=100)
    jobs = scene.submit(100)
    scene.claim(jobs[0])
    scene.die(evidence(*jobs[10 : 10 + SINGLES + more]))
    homes = [scene.row(job).chunk for job in jobs[10 : 10 + SINGLES + more]]
    assert len(set(homes)) == (2 if more else SINGLES)
    assert jobs[0] not in homes
    assert not scene.chunk(jobs[0]).suspect
    assert scene.chunk(jobs[0]).size == 100 - SINGLES - more
    assert all(scene.chunk(home).suspect for home in (jobs[10], jobs[10 + SINGLES + more - 1]))
    scene.check()


def test_what_has_ended_is_never_suspected(scene: Scene) -> None:
    jobs = scene.submit(4)
    claimed = scene.claim(jobs[0])
    scene.finish(claimed, jobs=jobs[:1])
    scene.jobs.cancel(jobs[1:2])
    assert scene.die(evidence(*jobs)).count == 2
    assert [scene.row(job).state for job in jobs[:2]] == [JobState.SUCCEEDED, JobState.CANCELLED]
    assert scene.outcomes(jobs[0]) == ["succeeded"]
    assert scene.outcomes(jobs[1]) == []
    assert scene.outcomes(jobs[2]) == ["lost"]


def test_a_chunk_whose_jobs_were_all_cancelled_is_done(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.claim(jobs[0])
    scene.jobs.cancel(jobs)
    assert scene.die(evidence(*jobs)).count == 0
    assert scene.chunk(jobs[0]).state == 3


def test_who_was_suspected_stays_so_though_it_did_not_run(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.claim(jobs[0])
    scene.die(None)
    scene.claim(jobs[0])
    scene.die(evidence())
    assert scene.chunk(jobs[0]).suspect
    assert scene.outcomes(jobs[0]) == ["lost"]


def test_a_suspect_that_has_failed_before_still_shows_as_retrying(scene: Scene) -> None:
    jobs = scene.submit(3)
    scene.finish(scene.claim(jobs[0]), End.OPEN)
    assert {scene.row(job).state for job in jobs} == {JobState.RETRYING}
    scene.claim(jobs[0])
    scene.die(evidence(jobs[0], jobs[1]))
    assert {scene.row(job).state for job in jobs} == {JobState.RETRYING}


# --- who is blamed --------------------------------------------------------------------------------------------


def suspect(scene: Scene, **options: Any) -> int:
    """A job that was by itself when its process died."""
    usual: dict[str, Any] = {"max_attempts": 2, "backoff": Backoff(seconds=7, jitter=False)}
    [job] = scene.submit(1, **(usual | options))
    scene.claim(job)
    scene.die(evidence(job))
    return job


def test_one_by_itself_is_not_blamed_before_it_ran_alone(scene: Scene) -> None:
    job = suspect(scene)
    assert scene.row(job).failures == 0
    scene.claim(job)  # and its turn to run alone has not come
    scene.die(evidence(job))
    assert (scene.row(job).failures, scene.outcomes(job)) == (0, ["lost", "lost"])


def test_the_guilty_one_waits_and_fails_with_its_last(scene: Scene) -> None:
    job = suspect(scene)
    scene.claim_alone(job)
    before = scene.database.now()
    scene.die(evidence(job))
    row = scene.row(job)
    assert (row.state, row.failures) == (JobState.RETRYING, 1)
    assert row.not_before is not None
    assert before + 6.9 <= row.not_before <= scene.database.now() + 7.1
    assert scene.chunks.claim([row.chunk], scene.worker) == [], "not before its time"
    worker = scene.worker
    scene.claim_alone(job)
    scene.die(evidence(job), ended="killed by SIGKILL (out of memory?)")
    row = scene.row(job)
    assert (row.state, row.failures, row.worker) == (JobState.FAILED, 2, "w")
    assert row.finished_at is not None
    assert row.error is not None
    assert row.error.type == "WorkerLost"
    assert "killed by SIGKILL (out of memory?)" in row.error.message
    assert scene.chunk(job).state == 3
    attempts = scene.jobs.attempts(job)
    assert [one.outcome for one in attempts] == ["lost", "failed", "failed"]
    assert attempts[-1].error == row.error
    assert attempts[-1].worker_ended == "killed by SIGKILL (out of memory?)"
    assert worker != scene.worker


def test_the_waits_grow_with_the_failures(scene: Scene) -> None:
    job = suspect(scene, max_attempts=4, backoff=Backoff(seconds=10, factor=3, longest=50, jitter=False))
    waits = []
    for _ in range(3):
        scene.claim_alone(job)
        now = scene.database.now()
        scene.die(evidence(job))
        not_before = scene.row(job).not_before
        assert not_before is not None
        waits.append(not_before - now)
    assert waits == pytest.approx([10, 30, 50], abs=2)


def test_the_guilty_one_needs_no_further_evidence(scene: Scene) -> None:
    job = suspect(scene)
    scene.claim_alone(job)
    scene.die(evidence())
    assert scene.row(job).failures == 1
    scene.claim_alone(job)
    scene.die(None)
    assert scene.row(job).state is JobState.FAILED


def test_a_kill_from_outside_is_held_against_what_ran_alone_the_second_time(scene: Scene) -> None:
    job = suspect(scene)
    killed = Evidence(frozenset([job]), from_outside=True)
    for failures in (0, 1, 2):  # each time: it takes more memory than this machine has
        scene.claim_alone(job)
        scene.die(killed, ended="killed by SIGKILL (out of memory?)")
        assert scene.row(job).failures == failures
    assert scene.row(job).state is JobState.FAILED
    attempts = scene.jobs.attempts(job)
    assert [one.outcome for one in attempts] == ["lost", "lost", "failed", "failed"]
    assert [one.worker_ended for one in attempts[1:]] == ["killed by SIGKILL (out of memory?)"] * 3
    assert all(one.error and "nothing beside it" in one.error.message for one in attempts[1:])


def test_after_a_kill_from_outside_a_crash_is_blamed_at_once(scene: Scene) -> None:
    job = suspect(scene)
    scene.claim_alone(job)
    scene.die(Evidence(frozenset([job]), from_outside=True))
    assert (scene.row(job).failures, bool(scene.chunk(job).suspect), scene.row(job).not_before) == (0, True, None)
    scene.claim_alone(job)
    scene.die(evidence(job))
    assert scene.row(job).failures == 1


def test_several_that_ran_alone_together_are_not_blamed(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.claim(jobs[0])
    scene.die(None)
    scene.claim_alone(jobs[0])
    scene.die(evidence(*jobs[:2]))
    assert [scene.row(job).failures for job in jobs] == [0] * 4
    assert scene.row(jobs[0]).chunk != scene.row(jobs[1]).chunk


def test_the_last_of_a_chunk_that_runs_alone_is_to_blame(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.claim(jobs[0])
    scene.die(None)
    scene.finish(scene.claim_alone(jobs[0]), jobs=jobs[:1])
    scene.die(evidence(jobs[1]))
    assert [scene.row(job).failures for job in jobs] == [0, 1, 0, 0]


def test_a_suspect_handed_back_has_to_run_alone_again(scene: Scene) -> None:
    job = suspect(scene)
    claimed = scene.claim_alone(job)
    assert scene.chunks.hand_back([(claimed.chunk, claimed.token)], scene.worker) == 1
    scene.claim(job)
    scene.die(evidence(job))
    assert scene.row(job).failures == 0


def test_who_does_not_hold_it_cannot_say_that_it_runs_alone(scene: Scene) -> None:
    job = suspect(scene)
    claimed = scene.claim(job)
    assert not scene.chunks.run_alone(claimed.chunk, claimed.token + 1, scene.worker)
    assert not scene.chunks.run_alone(claimed.chunk, claimed.token, scene.hire())
    assert not scene.chunk(job).alone
    assert scene.chunks.run_alone(claimed.chunk, claimed.token, scene.worker)
    assert scene.chunks.run_alone(claimed.chunk, claimed.token, scene.worker), "said twice"


# --- a batch that overran its limit ---------------------------------------------------------------------------


def test_one_that_timed_out_alone_fails_for_good(scene: Scene) -> None:
    job = suspect(scene, max_attempts=9)
    scene.claim_alone(job)
    scene.die(evidence(job, timed_out=True), ended="killed: a device batch overran its limit of 5 s")
    row = scene.row(job)
    assert (row.state, row.failures) == (JobState.FAILED, 1)
    assert row.error is not None
    assert row.error.type == "Timeout"
    assert "limit of 5 s" in row.error.message
    assert scene.outcomes(job) == ["lost", "failed"]


def test_one_that_timed_out_with_nothing_beside_it_needs_no_second_proof(scene: Scene) -> None:
    jobs = scene.submit(4, max_attempts=9)
    scene.claim(jobs[0])
    scene.die(evidence(jobs[1], timed_out=True))
    assert [scene.row(job).state for job in jobs] == [JobState.QUEUED, JobState.FAILED, *[JobState.QUEUED] * 2]
    assert scene.outcomes(jobs[1]) == ["failed"]
    assert not scene.chunk(jobs[0]).suspect, "its mates were not running"


def test_those_that_timed_out_together_run_again_one_by_one(scene: Scene) -> None:
    jobs = scene.submit(4)
    scene.claim(jobs[0])
    scene.die(evidence(*jobs, timed_out=True))
    assert len({scene.row(job).chunk for job in jobs}) == 4
    assert [scene.row(job).failures for job in jobs] == [0] * 4


# --- a model that cannot be loaded ----------------------------------------------------------------------------


def test_a_load_that_kills_fails_all_that_waited_for_it(scene: Scene) -> None:
    jobs = scene.submit(3, max_attempts=2)
    loading = Evidence(versions=frozenset({scene.version.id}))
    scene.claim(jobs[0])
    scene.die(loading)
    assert [scene.row(job).failures for job in jobs] == [1, 1, 1]
    assert {scene.row(job).state for job in jobs} == {JobState.RETRYING}
    assert len({scene.row(job).chunk for job in jobs}) == 1
    scene.claim(jobs[0])
    scene.die(loading)
    assert {scene.row(job).state for job in jobs} == {JobState.FAILED}
    error = scene.row(jobs[0]).error
    assert error is not None
    assert error.type == "WorkerLost"
    assert "while it loaded the model" in error.message
    assert all(scene.outcomes(job) == ["failed", "failed"] for job in jobs)


def test_a_kill_from_outside_during_a_load_costs_nothing_at_first(scene: Scene) -> None:
    jobs = scene.submit(3, max_attempts=2)
    killed = Evidence(versions=frozenset({scene.version.id}), from_outside=True)
    scene.claim(jobs[0])
    scene.die(killed, ended="killed by SIGKILL")
    assert [scene.row(job).failures for job in jobs] == [0, 0, 0]
    for failures in (0, 1, 2):  # it happens each time: the model is too large for this machine
        scene.claim_alone(jobs[0])
        scene.die(killed, ended="killed by SIGKILL")
        assert [scene.row(job).failures for job in jobs] == [failures] * 3
    assert {scene.row(job).state for job in jobs} == {JobState.FAILED}
    assert all(scene.outcomes(job) == ["lost", "failed", "failed"] for job in jobs)


def test_a_load_beside_jobs_that_ran_is_only_suspected(scene: Scene) -> None:
    other = scene.registry.register("other", "h", chunk_size=4)
    ran = scene.submit(1)
    scene.claim(ran[0])
    first, scene.version = scene.version, other
    loaded = scene.submit(2)
    scene.claim(loaded[0])
    scene.die(Evidence(frozenset(ran), frozenset({other.id})))
    assert [scene.row(job).failures for job in ran + loaded] == [0, 0, 0]
    assert scene.chunk(loaded[0]).suspect
    assert scene.chunk(ran[0]).suspect
    scene.claim_alone(loaded[0])
    scene.die(Evidence(versions=frozenset({other.id})))
    assert [scene.row(job).failures for job in ran + loaded] == [0, 1, 1]
    assert first.id != other.id


def test_a_load_of_another_model_costs_nothing(scene: Scene) -> None:
    jobs = scene.submit(2)
    scene.claim(jobs[0])
    scene.die(Evidence(versions=frozenset({scene.version.id + 1})))
    assert [scene.row(job).failures for job in jobs] == [0, 0]
    assert not scene.chunk(jobs[0]).suspect


# --- the worker, and training runs ----------------------------------------------------------------------------


def test_the_worker_has_ended_and_its_late_writes_are_refused(scene: Scene) -> None:
    jobs = scene.submit(4)
    claimed = scene.claim(jobs[0])
    dead = scene.worker
    scene.die(evidence(jobs[0]))
    [row] = [w for w in scene.fleet.workers(60) if w.id == dead]
    assert (row.alive, row.ended) == (False, "killed by SIGSEGV")
    assert row.stopped_at is not None
    assert not scene.fleet.beat(dead)
    assert scene.finish(claimed, worker=dead).dropped == {claimed.chunk}
    assert scene.chunks.hand_back([(claimed.chunk, claimed.token)], dead) == 0
    assert scene.chunks.held(dead) == []
    assert scene.die(evidence(jobs[0]), worker=dead).count == 0, "said twice"
    scene.die(None, worker=dead, ended="fell silent")
    [row] = [w for w in scene.fleet.workers(60) if w.id == dead]
    assert row.ended == "killed by SIGSEGV", "what was said first"


def test_other_workers_keep_what_they_hold(scene: Scene) -> None:
    jobs = scene.submit(8)
    other = scene.hire("other")
    scene.claim(jobs[0])
    theirs = scene.claim(jobs[4], other)
    scene.die(None)
    assert [held.chunk for held in scene.chunks.held(other)] == [theirs.chunk]
    assert scene.finish(theirs, worker=other).recorded == 4


@pytest.mark.parametrize("known", [None, Evidence()])
def test_a_run_dies_once_whatever_is_known(database: Database, known: Evidence | None) -> None:
    scene = run_scene.Scene(database)
    job, _ = scene.started(max_attempts=2)
    assert scene.chunks.give_up(scene.worker, "killed by SIGSEGV", known).count == 1
    row = scene.row(job)
    assert (row.state, row.failures) == (JobState.RETRYING, 0)
    assert [one.outcome for one in scene.jobs.attempts(job)] == ["lost"]
    scene.worker = scene.hire()
    scene.hold(job)
    scene.chunks.give_up(scene.worker, "killed by SIGSEGV", known)
    row = scene.row(job)
    assert row.state is JobState.FAILED
    assert row.error is not None
    assert row.error.type == "WorkerLost"
    assert "killed by SIGSEGV while it trained this run (death 2" in row.error.message
    assert [one.outcome for one in scene.jobs.attempts(job)] == ["lost", "failed"]


# --- deadlines --------------------------------------------------------------------------------------------------


def _late(scene: Scene) -> int:
    """Let all deadlines pass, and return how many jobs expire."""
    with scene.database.write() as connection:
        connection.execute(text("UPDATE chunks SET expires_at = 1 WHERE expires_at IS NOT NULL"))
    return scene.chunks.expire().count


@pytest.mark.parametrize("how", ["one of a chunk", "whole chunk", "blamed", "rescued", "failed"])
def test_what_started_in_time_does_not_expire_while_it_waits_for_its_next_try(scene: Scene, how: str) -> None:
    job, *mates = scene.submit(3 if how == "one of a chunk" else 1, expires_in=1000)
    claimed = scene.claim(job)
    if how == "failed":
        retry = Outcome(job, claimed.chunk, claimed.token, End.OPEN, error=ERROR, retry_in=1000)
        assert scene.jobs.finish([retry], scene.worker).recorded == 1
    elif how == "rescued":
        scene.grow_old()
        assert scene.chunks.rescue(10).count == 1
    else:
        scene.die(evidence(job))
    if how == "blamed":
        scene.claim_alone(job)
        scene.die(evidence(job))
        assert scene.row(job).failures == 1
    assert _late(scene) == len(mates), "who had not started must still start in time"
    assert scene.row(job).state in (JobState.QUEUED, JobState.RETRYING)


def test_what_was_only_handed_back_still_expires(scene: Scene) -> None:
    jobs = scene.submit(2, expires_in=1000)
    claimed = scene.claim(jobs[0])
    assert scene.chunks.hand_back([(claimed.chunk, claimed.token)], scene.worker) == 1
    assert _late(scene) == 2
