"""What a run's process writes: every call, held and not held any more, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import text

from integration.storage.run_scene import ROOM, VERSION, Scene, progress
from torchrelay_storage import run_log
from torchrelay_storage.aliases import AliasStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobError
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.run_writer import NewVersion, Order, Point, RunHold, RunWriter
from torchrelay_storage.states import ChunkState, JobState

ERROR = JobError("NonFinite", "the loss is NaN", "trace")


@pytest.fixture
def scene(database: Database) -> Scene:
    return Scene(database)


# What each call answers once the run is not held any more.
WRITES: dict[str, tuple[Callable[[RunWriter], object], object]] = {
    "start": (lambda w: w.start(split={"train": 8}, dataset_sha256="cd", steps=10, epochs=1), Order.LOST),
    "report": (lambda w: w.report(progress(), [Point("loss", 1, 0, 0.5)], (1, 0.5)), Order.LOST),
    "rewind": (lambda w: w.rewind(0), Order.LOST),
    "checkpoint": (lambda w: w.checkpoint(5, {"state": "file:///5"}, 0.5, keep=1), (Order.LOST, ())),
    "hand_back": (lambda w: w.hand_back(), False),
    "complete": (lambda w: w.complete(VERSION, b"1"), None),
    "fail": (lambda w: w.fail(ERROR, retry_in=None), False),
    "fail_once": (lambda w: w.fail(ERROR, retry_in=0), False),
    "died": (lambda w: w.died(ERROR, retry_in=0), False),
}  # fmt: skip


def test_every_write_is_fenced() -> None:
    written = {name for name in vars(RunWriter) if not name.startswith("_")} - {"log", "is_held"}
    assert {name.removesuffix("_once") for name in WRITES} == written


@pytest.mark.parametrize("state", ChunkState)
@pytest.mark.parametrize("name", WRITES)
def test_only_who_holds_a_run_writes(scene: Scene, name: str, state: ChunkState) -> None:
    _, writer = scene.started()
    scene.put_chunk(state=int(state))
    before = scene.everything()
    write, refused = WRITES[name]
    answer = write(writer)
    assert (answer == refused) is (state is not ChunkState.CLAIMED)
    assert (scene.everything() == before) is (state is not ChunkState.CLAIMED)
    assert writer.is_held() is (state is ChunkState.CLAIMED and name not in {"hand_back", "complete", "fail",
                                                                             "fail_once", "died"})  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_another_claim_and_another_worker_write_nothing(scene: Scene, name: str) -> None:
    job, held = scene.started()
    write, refused = WRITES[name]
    before = scene.everything()
    for hold in (
        RunHold(job, held.hold.chunk, held.hold.token - 1, scene.worker),
        RunHold(job, held.hold.chunk, held.hold.token + 1, scene.worker),
        RunHold(job, held.hold.chunk, held.hold.token, scene.worker + 1),
        RunHold(job + 1, held.hold.chunk, held.hold.token, scene.worker),
    ):
        writer = RunWriter(scene.database, hold)
        assert write(writer) == refused
        assert not writer.is_held()
    assert scene.everything() == before
    assert held.is_held()


@pytest.mark.parametrize("name", WRITES)
def test_a_cancelled_run_writes_nothing_more(scene: Scene, name: str) -> None:
    job, writer = scene.started()
    assert scene.jobs.cancel([job]).count == 1
    before = scene.everything()
    write, refused = WRITES[name]
    assert write(writer) == refused
    assert scene.everything() == before
    assert scene.row(job).state is JobState.CANCELLED


@pytest.mark.parametrize("name", WRITES)
def test_who_was_rescued_from_writes_nothing_while_another_goes_on(scene: Scene, name: str) -> None:
    job, first = scene.started()
    scene.fleet.stop(scene.worker)
    scene.chunks.rescue(60)
    second = RunWriter(scene.database, scene.hold(job, scene.hire()))
    before = scene.everything()
    write, refused = WRITES[name]
    assert write(first) == refused
    assert scene.everything() == before
    assert second.is_held()


# --- on the way -----------------------------------------------------------------------------------------------


def test_progress_is_told(scene: Scene) -> None:
    job, writer = scene.started()
    assert writer.start(split={"train": 8, "validation": 2}, dataset_sha256="cd", steps=10, epochs=2) is Order.GO
    started = scene.runs.get(job)
    assert (started.steps, started.epochs, started.dataset_sha256) == (10, 2, "cd")
    assert started.split == {"train": 8, "validation": 2}
    assert started.started_at is not None
    assert writer.report(progress(3, epoch=1, examples_per_s=20.5, eta=7.0), best=(2, 0.25)) is Order.GO
    run = scene.runs.get(job)
    assert (run.phase, run.step, run.epoch, run.examples_per_s, run.eta) == ("training", 3, 1, 20.5, 7.0)
    assert (run.best_step, run.best) == (2, 0.25)
    writer.report(progress(4))
    assert (scene.runs.get(job).best_step, scene.runs.get(job).eta) == (2, None), "the best stays, what is over goes"
    writer.start(split={}, dataset_sha256="cd", steps=10, epochs=2)
    assert scene.runs.get(job).started_at == started.started_at, "of its first start"


def test_points_are_written_over_and_what_is_no_number_is_left_out(scene: Scene) -> None:
    job, writer = scene.started()
    writer.report(progress(), [Point("loss", 1, 0, 0.5), Point("loss", 2, 0, float("nan")), Point("lr", 1, 0, 1e-3)])
    writer.report(progress(examples_per_s=float("inf")), [Point("loss", 1, 1, 0.25), Point("loss", 3, 1, float("inf"))],
                  best=(3, float("nan")))  # fmt: skip
    assert scene.runs.metrics(job) == [Point("loss", 1, 1, 0.25), Point("lr", 1, 0, 1e-3)]
    assert scene.runs.get(job).examples_per_s is None
    assert scene.runs.get(job).best_step is None


def test_a_run_that_goes_on_from_a_checkpoint_forgets_what_came_after_it(scene: Scene) -> None:
    job, writer = scene.started()
    other, other_writer = scene.started()
    for one in (writer, other_writer):
        one.report(progress(8), [Point("loss", step, 0, 1 / step) for step in range(1, 9)], best=(7, 0.5))
    assert writer.rewind(7) is Order.GO
    assert (scene.runs.get(job).step, scene.runs.get(job).best_step) == (7, 7)
    writer.rewind(5)
    assert [p.step for p in scene.runs.metrics(job)] == [1, 2, 3, 4, 5]
    assert (scene.runs.get(job).best_step, scene.runs.get(job).best) == (None, None)
    assert len(scene.runs.metrics(other)) == 8


# --- checkpoints ----------------------------------------------------------------------------------------------


def test_checkpoints_beyond_those_kept_are_pruned_and_only_unnamed_files_returned(scene: Scene) -> None:
    job, writer = scene.started()
    other, other_writer = scene.started()
    other_writer.checkpoint(1, {"state": "file:///other"}, None, keep=1)
    answers = [
        writer.checkpoint(step, {"state": f"file:///{step}", "best": f"file:///best{step // 3}"}, 0.5, keep=2)
        for step in (1, 2, 3, 4, 5)
    ]
    assert answers == [
        (Order.GO, ()),
        (Order.GO, ()),
        (Order.GO, ("file:///1",)),  # the second still names best0
        (Order.GO, ("file:///2", "file:///best0")),
        (Order.GO, ("file:///3",)),
    ]
    assert [(c.step, c.value) for c in scene.runs.checkpoints(job)] == [(5, 0.5), (4, 0.5)]
    assert scene.runs.checkpoints(job)[0].files == {"state": "file:///5", "best": "file:///best1"}
    assert [c.step for c in scene.runs.checkpoints(other)] == [1]


def test_the_checkpoint_written_last_is_the_newest_even_of_an_earlier_step(scene: Scene) -> None:
    """A run that went on from an older checkpoint, because the newest was damaged, must not lose what it does now."""
    job, writer = scene.started()
    writer.checkpoint(100, {"state": "file:///100"}, None, keep=2)
    with scene.database.write() as connection:  # as if the clock had been set back since
        connection.execute(text("UPDATE checkpoints SET created_at = created_at + 1000"))
    writer.checkpoint(60, {"state": "file:///60"}, None, keep=2)
    assert [c.step for c in scene.runs.checkpoints(job)] == [60, 100]
    assert writer.checkpoint(70, {"state": "file:///70"}, None, keep=2)[1] == ("file:///100",)
    assert [c.step for c in scene.runs.checkpoints(job)] == [70, 60]


def test_a_checkpoint_of_the_same_step_replaces_its_row(scene: Scene) -> None:
    job, writer = scene.started()
    writer.checkpoint(5, {"state": "file:///a", "best": "file:///b"}, 0.1, keep=1)
    assert writer.checkpoint(5, {"state": "file:///c", "best": "file:///b"}, 0.2, keep=1) == (
        Order.GO,
        ("file:///a",),
    )
    assert [(c.step, c.value) for c in scene.runs.checkpoints(job)] == [(5, 0.2)]


# --- its end --------------------------------------------------------------------------------------------------


def test_a_complete_run_registers_a_version_and_ends_in_one_stroke(scene: Scene) -> None:
    job, writer = scene.started()
    writer.report(progress(eta=1.0))
    version = writer.complete(VERSION, lambda registered: registered.ref.encode())
    assert version is not None
    assert version == scene.registry.resolve("digits@champion")
    assert (version.ref, version.handler, version.weights, version.sha256) == ("digits@1", "images", "file:///w", "ab")
    assert (version.config, version.metrics, version.lineage) == ({"classes": 2}, {"accuracy": 0.5}, {"seed": 0})
    assert (version.run, version.aliases) == (job, ("champion",))
    row = scene.row(job)
    assert (row.state, row.output, row.worker, row.failures) == (JobState.SUCCEEDED, b"digits@1", "w", 0)
    assert (row.model, row.trains, row.trained) == ("train:images", "digits", 1)
    assert (scene.runs.get(job).version_ref, scene.runs.get(job).eta) == ("digits@1", None)
    [move] = AliasStore(scene.database).history("digits")
    assert (move.alias, move.version, move.by) == ("champion", 1, show(Kind.JOB, job))
    with scene.database.read() as connection:
        assert connection.execute(text("SELECT state, succeeded FROM chunks")).one() == (3, 1)


def test_a_completion_whose_confirmation_was_lost_registers_once(scene: Scene) -> None:
    job, writer = scene.started()
    first = writer.complete(VERSION, b"1")
    assert writer.complete(VERSION, b"2") == first
    assert len(scene.registry.versions("digits")) == 1
    assert scene.row(job).output == b"1"


def test_a_completion_that_fails_on_the_way_writes_nothing(scene: Scene) -> None:
    """As if the process had died between any two statements."""

    def output(_: ModelVersion) -> bytes:
        raise RuntimeError("killed")

    _, writer = scene.started()
    before = scene.everything()
    with pytest.raises(RuntimeError, match="killed"):
        writer.complete(VERSION, output)
    assert scene.everything() == before
    with pytest.raises(InvalidInput, match="alias"):
        writer.complete(NewVersion("images", "file:///w", "ab", promote="3"), b"")
    with pytest.raises(InvalidInput, match="lineage"):
        writer.complete(NewVersion("images", "file:///w", "ab", lineage={"x": {1}}), b"")
    assert scene.everything() == before


def test_what_is_no_number_is_no_metric_of_a_version(scene: Scene) -> None:
    _, writer = scene.started()
    version = writer.complete(NewVersion("images", "file:///w", "ab", metrics={"a": float("nan"), "b": 1.0}), b"1")
    assert version is not None
    assert version.metrics == {"b": 1.0}
    assert version.aliases == ()


def test_runs_of_one_model_that_end_at_once_get_numbers_of_their_own(scene: Scene) -> None:
    writers = [scene.started()[1] for _ in range(4)]
    barrier = threading.Barrier(len(writers))
    versions: list[ModelVersion | None] = []

    def complete(writer: RunWriter) -> None:
        barrier.wait()
        versions.append(writer.complete(VERSION, b"1"))

    threads = [threading.Thread(target=complete, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(v.version for v in versions if v is not None) == [1, 2, 3, 4]
    assert sorted(r.version or 0 for r in scene.runs.find([w.hold.job for w in writers]).values()) == [1, 2, 3, 4]
    assert AliasStore(scene.database).of("digits") == {"champion": scene.registry.resolve("digits@champion").version}
    assert len(AliasStore(scene.database).history("digits")) == 4


def test_a_failure_for_good_keeps_what_there_is(scene: Scene) -> None:
    job, writer = scene.started()
    writer.checkpoint(5, {"state": "file:///5"}, None, keep=2)
    writer.log([(1.0, "line")])
    assert writer.fail(ERROR, retry_in=None)
    row = scene.row(job)
    assert (row.state, row.failures, row.error, row.worker) == (JobState.FAILED, 1, ERROR, "w")
    assert row.finished_at is not None
    assert [c.step for c in scene.runs.checkpoints(job)] == [5]
    assert [line.line for line in scene.runs.logs(job)] == ["line"]


def test_a_failure_is_tried_again_until_its_attempts_are_spent(scene: Scene) -> None:
    job, writer = scene.started(max_attempts=2)
    assert writer.fail(ERROR, retry_in=60)
    row = scene.row(job)
    assert (row.state, row.failures, row.error) == (JobState.RETRYING, 1, ERROR)
    assert scene.chunks.announce(scene.lane.model, ROOM) == [], "not before its time"
    scene.age()
    [announced] = scene.chunks.announce(scene.lane.model, ROOM)
    assert announced.chunk == row.chunk
    assert scene.writer(job).fail(ERROR, retry_in=60)
    assert (scene.row(job).state, scene.row(job).failures) == (JobState.FAILED, 2)


def test_deaths_without_a_checkpoint_in_between_add_up(scene: Scene) -> None:
    job, writer = scene.started(max_attempts=3)
    for _ in range(2):
        assert writer.died(ERROR, retry_in=0)
        assert (scene.row(job).state, scene.row(job).error) == (JobState.RETRYING, ERROR)
        writer = scene.writer(job)
    assert scene.runs.get(job).deaths == 2
    writer.checkpoint(5, {"state": "file:///5"}, None, keep=1)
    assert scene.runs.get(job).deaths == 0
    for _ in range(2):
        writer.died(ERROR, retry_in=0)
        writer = scene.writer(job)
    assert scene.row(job).failures == 0, "a death spends no attempt"
    writer.died(ERROR, retry_in=0)
    row = scene.row(job)
    assert (row.state, row.failures) == (JobState.FAILED, 1)
    assert row.error is not None
    assert (row.error.type, row.error.traceback) == ("NonFinite", "trace")
    assert row.error.message == "the loss is NaN (death 3 without a checkpoint in between)"


def test_a_death_waits_before_the_next_try(scene: Scene) -> None:
    _, writer = scene.started()
    writer.died(ERROR, retry_in=60)
    assert scene.chunks.announce(scene.lane.model, ROOM) == []
    assert scene.chunks.claim([writer.hold.chunk], scene.worker) == []
    scene.age()
    assert len(scene.chunks.claim_next([scene.lane.model], scene.worker, 1)) == 1


def test_a_rescue_counts_a_death_and_suspects_nobody(scene: Scene) -> None:
    job, _ = scene.started(max_attempts=3)
    for deaths in (1, 2):
        scene.fleet.stop(scene.worker)
        assert scene.chunks.rescue(60).count == 1
        row = scene.row(job)
        assert (row.state, row.failures) == (JobState.RETRYING, 0)
        assert row.error is not None
        assert row.error.type == "WorkerLost"
        assert scene.runs.get(job).deaths == deaths
        scene.worker = scene.hire()
        [claimed] = scene.chunks.claim_next([scene.lane.model], scene.worker, 1)
        assert not claimed.suspect
    scene.fleet.stop(scene.worker)
    scene.chunks.rescue(60)
    row = scene.row(job)
    assert (row.state, row.failures) == (JobState.FAILED, 1)
    assert row.error is not None
    assert row.error.message == "worker w was lost while it trained this run (death 3 without a checkpoint in between)"
    assert scene.chunks.rescue(60).chunks == ()


def test_a_run_that_is_handed_back_waits_and_has_spent_nothing(scene: Scene) -> None:
    job, writer = scene.started()
    assert writer.hand_back()
    row = scene.row(job)
    assert (row.state, row.failures, row.error) == (JobState.QUEUED, 0, None)
    assert scene.runs.get(job).deaths == 0
    assert scene.writer(job).hand_back(delay=60)
    assert scene.row(job).state is JobState.SCHEDULED
    assert scene.chunks.claim([row.chunk], scene.worker) == []


def test_what_was_started_in_time_does_not_expire_later(scene: Scene) -> None:
    late = scene.submit(expires_in=1000)
    job, writer = scene.started(expires_in=1000)
    writer.start(split={}, dataset_sha256="", steps=1, epochs=1)
    writer.hand_back()
    with scene.database.write() as connection:
        connection.execute(text("UPDATE chunks SET expires_at = 1 WHERE expires_at IS NOT NULL"))
    assert scene.chunks.expire().count == 1
    assert scene.row(late).state is JobState.EXPIRED
    assert scene.writer(job).is_held()


# --- the log --------------------------------------------------------------------------------------------------


def test_the_log_is_kept_in_order_and_read_on_from_a_line(scene: Scene) -> None:
    job, writer = scene.started()
    writer.log([])
    writer.log([(1.0, "a"), (2.0, "b")])
    with scene.database.write() as connection:  # as if a machine with a clock that is fast had written them
        connection.execute(text("UPDATE run_logs SET id = id + 1000000000000"))
    scene.jobs.cancel([job])
    writer.log([(3.0, "last \0words \ud800" + "x" * 3000)])
    first, second, third = scene.runs.logs(job)
    assert [(line.at, line.line) for line in (first, second)] == [(1.0, "a"), (2.0, "b")]
    assert third.line.startswith("last words ?x")
    assert len(third.line) < run_log.MAX_LINE + 1
    assert scene.runs.logs(job, after=first.id, limit=1) == [second]
    assert scene.runs.logs(job, after=third.id) == []


def test_of_a_long_log_the_newest_lines_are_kept(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MAX_LINES", 20)
    monkeypatch.setattr(run_log, "LINES_DROPPED", 5)
    job, writer = scene.started()
    other, other_writer = scene.started()
    other_writer.log([(0.0, "other")])
    for start in range(0, 20, 4):
        writer.log([(0.0, str(i)) for i in range(start, start + 4)])
    assert len(scene.runs.logs(job)) == 20
    writer.log([(0.0, "20")])
    assert [line.line for line in scene.runs.logs(job)] == [str(i) for i in range(5, 21)]
    writer.log([(0.0, str(i)) for i in range(21, 121)])
    assert [line.line for line in scene.runs.logs(job)] == [str(i) for i in range(101, 121)]
    assert len(scene.runs.logs(other)) == 1


def test_a_purged_run_logs_no_more(scene: Scene) -> None:
    writer = RunWriter(scene.database, RunHold(1, 1, 1, 1))
    writer.log([(0.0, "x")])
    assert scene.everything()["run_logs"] == []
