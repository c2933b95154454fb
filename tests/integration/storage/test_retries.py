"""Jobs run again: by a worker, after the wait of their policy; by a user, all those of a filter. On both databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, text

from integration.storage import run_scene
from integration.storage.job_scene import ERROR, Scene
from torchrelay_storage import retries
from torchrelay_storage.batch_store import BatchStore
from torchrelay_storage.database import Database
from torchrelay_storage.job_reader import JobFilter
from torchrelay_storage.lost import Evidence
from torchrelay_storage.options import Backoff, Options
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.settle import Moved, settle
from torchrelay_storage.states import End, JobState


@pytest.fixture
def scene(database: Database) -> Iterator[Scene]:
    scene = Scene(database)
    yield scene
    scene.check()


# --- the policy -----------------------------------------------------------------------------------------------


def test_a_policy_travels_with_its_job(scene: Scene) -> None:
    policy = Backoff(seconds=3, factor=4, longest=50, jitter=False)
    jobs = scene.submit(2, backoff=policy)
    claimed = scene.claim(jobs[0])
    assert claimed.backoff == policy
    scene.finish(claimed, End.OPEN, jobs[:1])
    assert scene.claim(jobs[0]).backoff == policy, "also on its next try"
    scene.finish(claimed, End.FAILED, jobs[1:])
    scene.jobs.retry(jobs[1:])
    assert scene.claim(jobs[1]).backoff == policy, "also when a user lets it run again"


def test_without_one_it_is_the_models(scene: Scene) -> None:
    [job] = scene.submit(1)
    assert scene.claim(job).backoff is None


def test_a_policy_stays_with_the_parts_of_a_chunk(scene: Scene) -> None:
    policy = Backoff(seconds=3)
    jobs = scene.submit(4, backoff=policy)
    scene.claim(jobs[0])
    scene.die(Evidence(frozenset(jobs[:2])))
    assert [scene.claim(job).backoff for job in jobs[:3]] == [policy] * 3


def test_a_worker_lost_without_a_policy_waits_by_the_default(scene: Scene) -> None:
    [job] = scene.submit(1)
    scene.claim(job)
    scene.die(Evidence(frozenset({job})))
    scene.claim_alone(job)
    scene.die(Evidence(frozenset({job})))
    not_before = scene.row(job).not_before
    assert not_before is not None
    assert not_before <= scene.database.now() + 1.0


def test_each_waits_as_long_as_it_was_told(scene: Scene) -> None:
    jobs = scene.submit(4)
    claimed = scene.claim(jobs[0])
    now = scene.database.now()
    waits = [0.0, 60.0, 60.0, 600.0]
    scene.jobs.finish(
        [
            Outcome(job, claimed.chunk, claimed.token, End.OPEN, error=ERROR, retry_in=wait)
            for job, wait in zip(jobs, waits, strict=True)
        ],
        scene.worker,
    )
    rows = [scene.row(job) for job in jobs]
    assert {row.state for row in rows} == {JobState.RETRYING}
    assert rows[0].not_before is None
    assert [round(row.not_before - now) for row in rows[1:] if row.not_before is not None] == [60, 60, 600]
    assert rows[1].chunk == rows[2].chunk != rows[3].chunk, "who waits alike travels together"


# --- a filter -------------------------------------------------------------------------------------------------


def end_all(scene: Scene, jobs: list[int], end: End = End.FAILED) -> None:
    """Let jobs end: by their workers, or cancelled."""
    if end is End.CANCELLED:
        scene.jobs.cancel(jobs)
        return
    left = set(jobs)
    while left:
        claimed = scene.claim(min(left))
        scene.finish(claimed, end)
        left -= {job.id for job in claimed.jobs}


def test_all_that_failed_run_again(scene: Scene) -> None:
    failed, succeeded, cancelled, waiting = scene.submit(6), scene.submit(2), scene.submit(3), scene.submit(2)
    end_all(scene, failed)
    end_all(scene, succeeded, End.SUCCEEDED)
    end_all(scene, cancelled, End.CANCELLED)
    moved = scene.jobs.retry_where(JobFilter(states=(JobState.FAILED,)))
    assert (moved.count, moved.batches) == (6, ())
    assert {scene.row(job).state for job in failed + waiting} == {JobState.QUEUED}
    assert {scene.row(job).failures for job in failed} == {0}
    assert {scene.row(job).state for job in cancelled} == {JobState.CANCELLED}
    assert {scene.row(job).state for job in succeeded} == {JobState.SUCCEEDED}


def test_without_a_state_it_is_all_that_ended_without_success(scene: Scene) -> None:
    failed, cancelled, expired = scene.submit(2), scene.submit(2), scene.submit(2, expires_in=3600)
    end_all(scene, failed)
    end_all(scene, cancelled, End.CANCELLED)
    with scene.database.write() as connection:
        connection.execute(text("UPDATE chunks SET expires_at = 1 WHERE expires_at IS NOT NULL"))
    assert scene.chunks.expire().count == 2
    assert scene.jobs.retry_where(JobFilter()).count == 6
    assert scene.row(expired[0]).state is JobState.QUEUED
    assert scene.chunks.expire().count == 0, "it has no deadline any more"
    assert scene.jobs.retry_where(JobFilter()).count == 0


@pytest.mark.parametrize("states", [(JobState.QUEUED,), (JobState.SUCCEEDED, JobState.RUNNING)])
def test_what_is_open_or_succeeded_does_not_run_again(scene: Scene, states: tuple[JobState, ...]) -> None:
    end_all(scene, scene.submit(4), End.SUCCEEDED)
    running = scene.submit(4)
    scene.claim(running[0])
    end_all(scene, scene.submit(4))
    before = scene.everything()
    assert scene.jobs.retry_where(JobFilter(states=states)) == Moved()
    assert scene.everything() == before
    assert scene.jobs.retry_where(JobFilter(states=(*states, JobState.FAILED))).count == 4


def test_a_model_a_batch_and_a_tenant(scene: Scene) -> None:
    batch = BatchStore(scene.database).create(scene.version, Options()).id
    first, scene.version = scene.version, scene.registry.register("other", "h", chunk_size=4)
    others = scene.submit(3)
    scene.version = first
    batched, tenants, plain = scene.submit(5, batch=batch), scene.submit(2, tenant="t"), scene.submit(2)
    for jobs in (others, batched, tenants, plain):
        end_all(scene, jobs)
    assert scene.jobs.retry_where(JobFilter(model="other")).count == 3
    moved = scene.jobs.retry_where(JobFilter(batch=batch))
    assert (moved.count, moved.batches) == (5, (batch,))
    assert scene.jobs.retry_where(JobFilter(tenant="t", states=(JobState.FAILED,))).count == 2
    assert scene.jobs.retry_where(JobFilter(model="nothing")).count == 0
    assert {scene.row(job).state for job in plain} == {JobState.FAILED}


def test_many_in_slices(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "SLICE", 3)
    jobs = scene.submit(20)
    end_all(scene, jobs)
    assert scene.jobs.retry_where(JobFilter(states=(JobState.FAILED,))).count == 20
    assert {scene.row(job).state for job in jobs} == {JobState.QUEUED}


@pytest.mark.parametrize("of", ["filter", "batch"])
def test_what_fails_anew_meanwhile_is_not_met_twice(scene: Scene, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    """A worker that fails each job at once, between any two slices."""
    monkeypatch.setattr(retries, "SLICE", 3)
    monkeypatch.setattr(retries, "MAX_CHUNK", 3)
    batch = BatchStore(scene.database).create(scene.version, Options()).id
    jobs = scene.submit(10, batch=batch)
    end_all(scene, jobs)
    whole, rounds = scene.jobs._again, []

    def again(some: list[int], ends: tuple[End, ...]) -> Moved:
        moved = whole(some, ends)
        rounds.append(sorted(some))
        assert len(rounds) < 20
        end_all(scene, list(some))
        return moved

    monkeypatch.setattr(scene.jobs, "_again", again)
    if of == "filter":
        moved = scene.jobs.retry_where(JobFilter(states=(JobState.FAILED,)))
    else:
        moved = scene.jobs.retry_batch(batch)
    assert (moved.count, moved.batches) == (10, (batch,))
    assert sorted(job for some in rounds for job in some) == jobs
    assert all(scene.outcomes(job) == ["failed", "failed"] for job in jobs)


def test_a_batch_by_how_its_jobs_ended(scene: Scene) -> None:
    store = BatchStore(scene.database)
    batch, other = (store.create(scene.version, Options()).id for _ in range(2))
    failed, cancelled, elsewhere = (scene.submit(5, batch=b) for b in (batch, batch, other))
    end_all(scene, failed)
    end_all(scene, cancelled, End.CANCELLED)
    end_all(scene, elsewhere)
    assert scene.jobs.retry_batch(batch, (End.SUCCEEDED, End.OPEN)) == Moved()
    assert scene.jobs.retry_batch(batch).count == 5
    assert {scene.row(job).state for job in failed} == {JobState.QUEUED}
    assert {scene.row(job).state for job in cancelled} == {JobState.CANCELLED}
    assert scene.jobs.retry_batch(batch, (End.FAILED, End.CANCELLED)).count == 5
    assert {scene.row(job).state for job in elsewhere} == {JobState.FAILED}


def test_a_slice_whose_transaction_fails_changes_nothing_of_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "SLICE", 4)
    jobs = scene.submit(8)
    end_all(scene, jobs)
    calls: list[list[int]] = []

    def settle_once(connection: Connection, chunks: list[int], now: float) -> None:
        calls.append(chunks)
        if len(calls) == 2:
            raise RuntimeError("in the middle")
        settle(connection, chunks, now)

    monkeypatch.setattr("torchrelay_storage.retries.settle", settle_once)
    with pytest.raises(RuntimeError, match="in the middle"):
        scene.jobs.retry_where(JobFilter())
    scene.check()
    states = [scene.row(job).state for job in jobs]
    assert states == [JobState.FAILED] * 4 + [JobState.QUEUED] * 4, "from the newest down"
    monkeypatch.undo()
    assert scene.jobs.retry_where(JobFilter()).count == 4


def test_a_run_goes_on(database: Database) -> None:
    scene = run_scene.Scene(database)
    job, _ = scene.started(max_attempts=1)
    scene.chunks.give_up(scene.worker, "killed by SIGSEGV", None)
    assert scene.row(job).state is JobState.FAILED
    assert scene.jobs.retry_where(JobFilter(states=(JobState.FAILED,))).count == 1
    scene.worker = scene.hire()
    assert scene.hold(job).job == job
