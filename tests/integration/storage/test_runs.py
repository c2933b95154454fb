"""Training runs as users see and steer them, and the lanes that they travel by, on both databases."""

from __future__ import annotations

import random
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from integration.storage.doubt import lose_a_confirmation
from integration.storage.run_scene import ROOM, VERSION, Scene, progress, spec
from torchrelay_storage import ids, runs
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, JobNotFound, KeyConflict, ModelNotFound
from torchrelay_storage.job_reader import JobError, JobFilter
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.retention import Retention
from torchrelay_storage.run_writer import NewVersion, Order, Point
from torchrelay_storage.states import JobState
from torchrelay_storage.submission import NewJob, Submission, Submitted

ERROR = JobError("E", "m")


@pytest.fixture
def scene(database: Database) -> Scene:
    return Scene(database)


# --- submit ---------------------------------------------------------------------------------------------------


def test_a_run_is_a_job_and_more(scene: Scene) -> None:
    job = scene.submit(priority=7)
    run, row = scene.runs.get(job), scene.row(job)
    assert (run.model, run.recipe, run.version_ref, run.paused) == ("digits", "images", None, False)
    assert (run.phase, run.step, run.steps, run.best, run.split) == ("", 0, 0, None, {})
    assert run.created_at == pytest.approx(row.created_at, abs=60)
    assert (row.state, row.model, row.trains, row.trained, row.priority) == (
        JobState.QUEUED, "train:images", "digits", None, 7)  # fmt: skip
    assert scene.runs.find([job, job + 1]) == {job: run}


def test_what_is_no_run_is_not_found(scene: Scene) -> None:
    version = scene.registry.register("m", "h")
    [[placed]] = scene.jobs.submit([Submission(version, Options(), [NewJob(b"1")])])
    assert isinstance(placed, Submitted)
    row = scene.row(placed.job)
    assert (row.model, row.trains, row.trained) == ("m", None, None)
    for call in (scene.runs.get, scene.runs.pause, scene.runs.resume):
        with pytest.raises(JobNotFound, match=ids.show(ids.Kind.JOB, placed.job)):
            call(placed.job)


def test_a_key_gives_the_same_run(scene: Scene) -> None:
    def submit(digest: bytes) -> Submitted | KeyConflict:
        return scene.runs.submit(scene.lane, Options(), NewJob(b"{}", key="k", digest=digest), spec())

    first = submit(b"x")
    assert isinstance(first, Submitted)
    assert submit(b"x") == Submitted(first.job, first.chunk, existed=True)
    assert isinstance(submit(b"y"), KeyConflict)
    assert len(scene.runs.page()) == 1


def test_a_run_exists_when_the_caller_commits(scene: Scene) -> None:
    for commit in (False, True):
        with Session(scene.database.engine) as session:
            placed = scene.runs.submit(scene.lane, Options(), NewJob(b"{}"), spec(), session.connection())
            assert isinstance(placed, Submitted)
            session.commit() if commit else session.rollback()
        assert bool(scene.runs.find([placed.job])) is commit
        assert bool(scene.jobs.get([placed.job])) is commit


def test_a_submit_whose_confirmation_was_lost_stores_one_run(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_a_confirmation(scene.database, monkeypatch)
    job = scene.submit()
    assert [run.job for run, _ in scene.runs.page()] == [job]
    assert [row.id for row in scene.jobs.page(JobFilter())] == [job]


def test_an_id_that_is_taken_is_drawn_anew(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = scene.submit()
    draws = iter([taken, taken + 1, taken, taken + 2])
    monkeypatch.setattr(runs, "draw", lambda: next(draws))
    assert scene.submit() == taken + 1
    with Session(scene.database.engine) as session:
        placed = scene.runs.submit(scene.lane, Options(), NewJob(b"{}"), spec(), session.connection())
        session.commit()
    assert isinstance(placed, Submitted)
    assert sorted(run.job for run, _ in scene.runs.page()) == [taken, taken + 1, taken + 2]


def test_what_no_version_can_be_registered_under_is_refused(scene: Scene) -> None:
    for bad in (spec("No Name"), spec(promote="3")):
        with pytest.raises(InvalidInput):
            scene.runs.submit(scene.lane, Options(), NewJob(b"{}"), bad)
    assert scene.jobs.page(JobFilter()) == []


# --- look -----------------------------------------------------------------------------------------------------


def test_pages_are_what_a_full_scan_would_give(scene: Scene) -> None:
    rng = random.Random(3)
    jobs = [scene.submit(rng.choice(["digits", "tiny"]), delay=rng.choice([None, 1000.0])) for _ in range(24)]
    for job in rng.sample(jobs, 14):
        if scene.row(job).state is not JobState.QUEUED:
            scene.jobs.cancel([job])
            continue
        writer = scene.writer(job)
        rng.choice([
            lambda w=writer: w.complete(VERSION, b"1"), lambda w=writer: w.fail(ERROR, retry_in=None),
            lambda w=writer: w.fail(ERROR, retry_in=60), lambda w=writer: w.report(progress()),
        ])()  # fmt: skip
    version = scene.registry.register("digits", "h")
    scene.jobs.submit([Submission(version, Options(), [NewJob(b"1")])])  # which is no run
    rows = scene.jobs.get(jobs)
    assert len({row.state for row in rows.values()}) >= 5
    filters: list[tuple[str | None, tuple[JobState, ...]]] = [
        (None, ()), ("tiny", ()), ("nobody", ()), ("digits", (JobState.QUEUED, JobState.FAILED)),
        *((None, (state,)) for state in JobState),
    ]  # fmt: skip
    for model, states in filters:
        expected = [
            job for job in sorted(jobs, reverse=True)
            if (not states or rows[job].state in states) and model in (None, rows[job].trains)
        ]  # fmt: skip
        seen: list[int] = []
        while page := scene.runs.page(model=model, states=states, limit=5, before=seen[-1] if seen else None):
            assert [run.job for run, _ in page] == [row.id for _, row in page]
            assert [row.state for _, row in page] == [rows[row.id].state for _, row in page]
            seen.extend(run.job for run, _ in page)
            assert len(seen) <= len(expected)
        assert seen == expected, (model, states)


def test_metrics_by_name_and_from_a_step_on(scene: Scene) -> None:
    job, writer = scene.started()
    writer.report(progress(), [Point(name, step, 0, step / 2) for step in (3, 0, 1) for name in ("loss", "accuracy")])
    assert [(p.step, p.name) for p in scene.runs.metrics(job)] == [
        (0, "accuracy"), (0, "loss"), (1, "accuracy"), (1, "loss"), (3, "accuracy"), (3, "loss"),
    ]  # fmt: skip
    assert scene.runs.metrics(job, ["loss"], after=1) == [Point("loss", 3, 0, 1.5)]
    assert [p.step for p in scene.runs.metrics(job, ["loss", "nothing"])] == [0, 1, 3]
    assert scene.runs.metrics(job, []) == []
    assert scene.runs.metrics(job + 1) == []


def test_the_view_shows_runs_as_what_they_train(scene: Scene) -> None:
    scene.registry.register("digits", "h")
    waiting = scene.submit("tiny")
    job, writer = scene.started()
    writer.complete(VERSION, b'{"a":1}')
    version = scene.registry.resolve("digits@2")
    [[placed]] = scene.jobs.submit([Submission(version, Options(), [NewJob(b"1")])])
    assert isinstance(placed, Submitted)
    with scene.database.read() as connection:
        shown = {r.id: r for r in connection.execute(text("SELECT * FROM job_status"))}
    assert list(next(iter(shown.values()))._mapping)[-2:] == ["kind", "handler_revision"]
    assert {i: (r.kind, r.model, r.version, r.state) for i, r in shown.items()} == {
        waiting: ("training", "tiny", None, "queued"),
        job: ("training", "digits", 2, "succeeded"),
        placed.job: ("inference", "digits", 2, "queued"),
    }


# --- pause and resume -----------------------------------------------------------------------------------------


def claimable(scene: Scene, chunk: int) -> bool:
    """Whether any way leads to this chunk's claim."""
    worker = scene.hire()
    announced = scene.chunks.announce(scene.lane.model, ROOM)
    again = scene.chunks.announce_again(scene.lane.model, 0, 10)
    claimed = [*scene.chunks.claim([chunk], worker), *scene.chunks.claim_next([scene.lane.model], worker, 10)]
    found = [a.chunk for a in [*announced, *again]] + [c.chunk for c in claimed]
    return chunk in found


def test_a_run_that_waits_is_not_started_while_it_is_paused(scene: Scene) -> None:
    job = scene.submit()
    chunk = scene.row(job).chunk
    assert scene.runs.pause(job)
    assert scene.runs.pause(job), "once more changes nothing"
    assert scene.runs.get(job).paused
    assert scene.row(job).state is JobState.QUEUED
    assert not claimable(scene, chunk)
    other = scene.submit()
    assert [a.chunk for a in scene.chunks.announce(scene.lane.model, ROOM)] == [scene.row(other).chunk]
    assert scene.runs.resume(job)
    assert not scene.runs.get(job).paused
    assert [a.chunk for a in scene.chunks.announce(scene.lane.model, ROOM)] == [chunk]


def test_a_run_that_was_announced_is_announced_again_after_its_pause(scene: Scene) -> None:
    job = scene.submit()
    chunk = scene.row(job).chunk
    assert scene.chunks.announce(scene.lane.model, ROOM)
    scene.runs.pause(job)
    assert not claimable(scene, chunk), "its message is thrown away"
    scene.runs.resume(job)
    assert [a.chunk for a in scene.chunks.announce(scene.lane.model, ROOM)] == [chunk]
    assert scene.writer(job).is_held()


def test_a_run_that_is_paused_on_its_way_is_told_and_goes_on_after_it(scene: Scene) -> None:
    job, writer = scene.started()
    assert writer.report(progress(1)) is Order.GO
    assert scene.runs.pause(job)
    assert writer.start(split={}, dataset_sha256="", steps=10, epochs=1) is Order.PAUSE
    assert writer.report(progress(2)) is Order.PAUSE
    assert writer.rewind(2) is Order.PAUSE
    assert writer.checkpoint(2, {"state": "file:///2"}, None, keep=2) == (Order.PAUSE, ())
    assert writer.is_held()
    assert writer.hand_back()
    assert not claimable(scene, writer.hold.chunk)
    assert scene.runs.resume(job)
    second = scene.writer(job)
    assert second.report(progress(3)) is Order.GO
    assert (scene.row(job).state, scene.row(job).failures) == (JobState.RUNNING, 0)


def test_a_pause_that_comes_too_late_changes_nothing(scene: Scene) -> None:
    job, writer = scene.started()
    scene.runs.pause(job)
    assert writer.complete(VERSION, b"1") is not None, "what has reached its end has no use for a pause"
    assert not scene.runs.get(job).paused
    assert not scene.runs.pause(job)
    assert not scene.runs.resume(job)
    assert scene.row(job).state is JobState.SUCCEEDED


def test_a_paused_model_and_a_paused_run_are_two_things(scene: Scene) -> None:
    """The pause of the model that a run trains is of its inference."""
    scene.registry.register("digits", "h")
    scene.registry.pause("digits")
    assert scene.started()[1].is_held()


# --- cancel and retry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancelled", "cancelled while paused", "failed", "dead", "expired"])
def test_a_retry_goes_on_from_what_is_there(scene: Scene, how: str) -> None:
    job, writer = scene.started(max_attempts=1, expires_in=1000)
    writer.checkpoint(5, {"state": "file:///5"}, 0.5, keep=2)
    writer.report(progress(7), [Point("loss", 5, 0, 0.5)])
    if how == "failed":
        writer.fail(ERROR, retry_in=0)
    elif how == "dead":
        writer.died(ERROR, retry_in=0)
    elif how == "expired":
        writer.hand_back()
        scene.put_chunk(expires_at=1)
        scene.chunks.expire()
    else:
        if "paused" in how:
            scene.runs.pause(job)
        scene.jobs.cancel([job])
        assert not scene.runs.get(job).paused
    assert scene.row(job).state in (JobState.CANCELLED, JobState.FAILED, JobState.EXPIRED)
    assert scene.jobs.retry([job]).count == 1
    run, row = scene.runs.get(job), scene.row(job)
    assert (run.deaths, run.paused, row.failures) == (0, False, 0)
    assert row.chunk != writer.hold.chunk
    assert [c.step for c in scene.runs.checkpoints(job)] == [5]
    assert len(scene.runs.metrics(job)) == 1
    assert [a.chunk for a in scene.chunks.announce(scene.lane.model, ROOM)] == [row.chunk]
    second = scene.writer(job)
    assert writer.complete(VERSION, b"1") is None, "the late one"
    scene.runs.pause(job)
    assert second.report(progress(8)) is Order.PAUSE, "the new chunk finds its run"
    second.hand_back()
    assert not claimable(scene, row.chunk)
    scene.runs.resume(job)
    third = scene.writer(job)
    assert third.complete(VERSION, b"1") is not None
    assert len(scene.registry.versions("digits")) == 1
    assert scene.jobs.retry([job]).count == 0


def test_a_cancelled_run_is_no_death_and_not_rescued(scene: Scene) -> None:
    job, _ = scene.started()
    scene.jobs.cancel([job])
    scene.fleet.stop(scene.worker)
    assert scene.chunks.rescue(60).chunks == ()
    assert scene.runs.get(job).deaths == 0


# --- lanes ----------------------------------------------------------------------------------------------------


def test_a_lane_is_made_once_and_keeps_up_with_its_schema(scene: Scene) -> None:
    lane = scene.registry.lane("tabular", {"properties": {"epochs": 1}})
    assert (lane.name, lane.recipe, lane.handler, lane.version, lane.chunk_size) == (
        "train:tabular", "tabular", "tabular", 1, 1)  # fmt: skip
    assert scene.registry.lane("tabular", {"properties": {"epochs": 1}}) == lane
    changed = scene.registry.lane("tabular", {"properties": {"epochs": 2}})
    assert (changed.id, changed.config) == (lane.id, {"properties": {"epochs": 2}})
    assert scene.registry.find_lane("tabular") == changed
    assert scene.registry.find_lane("nothing") is None
    assert [found.recipe for found in scene.registry.lanes()] == ["images", "tabular"]
    assert scene.registry.version(lane.id) == changed
    for bad in ("No Name", "a:b", ""):
        with pytest.raises(InvalidInput, match="recipe"):
            scene.registry.lane(bad, {})
    with pytest.raises(InvalidInput, match="JSON"):
        scene.registry.lane("tabular", {"x": {1}})


def test_a_lane_made_by_many_at_once_is_one(scene: Scene) -> None:
    barrier = threading.Barrier(6)
    found: list[ModelVersion] = []

    def make(number: int) -> None:
        barrier.wait()
        found.append(scene.registry.lane("new", {"n": number % 2}))

    threads = [threading.Thread(target=make, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({lane.id for lane in found}) == 1
    with scene.database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM model_versions WHERE handler = 'new'")).scalar() == 1


def test_lanes_are_hidden_from_who_asks_for_models(scene: Scene) -> None:
    scene.submit()
    scene.registry.register("digits", "images")
    assert [v.ref for v in scene.registry.versions()] == ["digits@1"]
    assert scene.registry.versions("train:images") == []
    assert [(m.newest.name, m.waiting) for m in scene.registry.models()] == [("digits", 0)]
    assert scene.registry.resolve("digits").recipe is None
    for ref in ("train:images", "train:images@1", "train:imagez"):
        with pytest.raises(ModelNotFound) as refusal:
            scene.registry.resolve(ref)
        assert "registered are: digits" in str(refusal.value)
    with pytest.raises(ModelNotFound):
        scene.registry.pause("train:images")
    with pytest.raises(InvalidInput):
        scene.registry.register("train:images", "h")
    assert [m.name for m in scene.chunks.due_models()] == ["train:images"], "but they are announced"


# --- retention ------------------------------------------------------------------------------------------------


def test_a_purged_run_takes_all_with_it_but_for_what_serves(scene: Scene) -> None:
    job, writer = scene.started()
    kept, kept_writer = scene.started()
    for number, one in ((1, writer), (2, kept_writer)):
        one.log([(0.0, "line")])
        one.report(progress(), [Point("loss", 1, 0, 0.5)])
        one.checkpoint(4, {"state": f"file:///{number}/4", "best": f"file:///{number}/best"}, None, keep=2)
        one.checkpoint(5, {"state": f"file:///{number}/5", "best": f"file:///{number}/best"}, None, keep=2)
    writer.complete(NewVersion("images", "file:///1/best", "ab"), b"1")
    purged = Retention(scene.database).purge(-1, reference=b"\x07")
    assert (purged.jobs, purged.artifacts) == (1, ())
    assert purged.runs == (job,)
    with pytest.raises(JobNotFound):
        scene.runs.get(job)
    assert (scene.runs.checkpoints(job), scene.runs.metrics(job), scene.runs.logs(job)) == ([], [], [])
    assert len(scene.runs.checkpoints(kept)) == 2
    assert (len(scene.runs.metrics(kept)), len(scene.runs.logs(kept))) == (1, 1)
    version = scene.registry.resolve("digits")
    assert (version.weights, version.run) == ("file:///1/best", job)


def test_the_chunk_that_a_retry_left_behind_takes_no_run_with_it(scene: Scene) -> None:
    job, writer = scene.started()
    writer.checkpoint(5, {"state": "file:///5"}, None, keep=2)
    scene.jobs.cancel([job])
    scene.jobs.retry([job])
    purged = Retention(scene.database).purge(-1, reference=b"\x07")
    assert (purged.chunks, purged.jobs, purged.runs) == (1, 0, ())
    assert len(scene.runs.checkpoints(job)) == 1
    assert scene.writer(job).is_held()
