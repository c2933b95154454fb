"""The connection is lost in the middle of a commit, which was done or was not: what it did is done once and told right.

Each move is cut off in both ways. With a real connection: `tests/integration/system/test_database_faults.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from sqlalchemy import text

from integration.storage.doubt import lose_a_confirmation
from integration.storage.run_scene import Scene
from torchrelay_storage.aliases import AliasStore
from torchrelay_storage.batch_store import BatchStore
from torchrelay_storage.database import Database
from torchrelay_storage.ids import draw
from torchrelay_storage.job_error import JobError, encode_error
from torchrelay_storage.job_reader import JobFilter
from torchrelay_storage.options import Options
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.retention import Retention
from torchrelay_storage.run_log import append_lines
from torchrelay_storage.states import End, JobState
from torchrelay_storage.submission import NewJob, Submission, Submitted

ERROR = encode_error(JobError("ValueError", "no"))
Cut = Callable[[], None]


@pytest.fixture
def scene(database: Database) -> Scene:
    return Scene(database)


@pytest.fixture
def version(scene: Scene) -> ModelVersion:
    return scene.registry.register("model", handler="h", chunk_size=64)


@pytest.fixture(params=["done", "not done"])
def cut(request: pytest.FixtureRequest, database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cut]:
    """A function that lets the next commit be cut off. At the end it must have been."""
    cuts: list[list[bool]] = []

    def go() -> None:
        cuts.append(lose_a_confirmation(database, monkeypatch, done=request.param == "done"))

    yield go
    assert all(cuts), "a commit that was to be cut off did not come"


def submit(scene: Scene, version: ModelVersion, n: int, batch: int | None = None, key: str | None = None) -> list[int]:
    jobs = [NewJob(b"%d" % i, key=f"{key}-{i}" if key else None, digest=b"d" if key else b"") for i in range(n)]
    options = Options(max_attempts=2)
    [placed] = scene.jobs.submit([Submission(version, options, jobs, batch=batch, ids=draw(n) if batch else None)])
    assert all(isinstance(p, Submitted) for p in placed)
    return [p.job for p in placed if isinstance(p, Submitted)]


def count(scene: Scene, table: str) -> int:
    with scene.database.read() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def states(scene: Scene, jobs: Sequence[int]) -> set[JobState]:
    rows = scene.jobs.get(jobs)
    assert len(rows) == len(jobs)
    return {row.state for row in rows.values()}


@pytest.mark.parametrize("n", [1, 100])
@pytest.mark.parametrize("key", [None, "k"])
def test_a_submit(scene: Scene, version: ModelVersion, cut: Cut, n: int, key: str | None) -> None:
    cut()
    jobs = submit(scene, version, n, key=key)
    assert count(scene, "jobs") == n
    assert states(scene, jobs) == {JobState.QUEUED}
    if key is not None:
        assert submit(scene, version, n, key=key) == jobs


def test_the_inputs_of_a_batch(scene: Scene, version: ModelVersion, cut: Cut) -> None:
    batches = BatchStore(scene.database)
    batch = batches.create(version, Options()).id
    cut()
    scene.jobs.extend(Submission(version, Options(), (), batch=batch), [b"%d" % i for i in range(100)])
    assert count(scene, "jobs") == batches.counts(batch).queued == 100


def test_a_finish(scene: Scene, version: ModelVersion, cut: Cut) -> None:
    batch = BatchStore(scene.database).create(version, Options(max_attempts=2)).id
    done, failed, retried, *rest = submit(scene, version, 4, batch)
    [claimed] = scene.chunks.claim([done], scene.worker)
    ends = [(done, End.SUCCEEDED, b"1", None), (failed, End.FAILED, None, ERROR), (retried, End.OPEN, None, ERROR)]
    outcomes = [Outcome(job, claimed.chunk, claimed.token, end, out, error) for job, end, out, error in ends]
    cut()
    finished = scene.jobs.finish(outcomes, scene.worker)
    assert (finished.recorded, finished.dropped, finished.batches) == (3, frozenset(), (batch,))
    assert count(scene, "attempts") == 2
    rows = scene.jobs.get([done, failed, retried, *rest])
    assert [(rows[job].state, rows[job].failures) for job in (done, failed, retried, *rest)] == [
        (JobState.SUCCEEDED, 0),
        (JobState.FAILED, 1),
        (JobState.RETRYING, 1),
        (JobState.RUNNING, 0),
    ]
    counts = BatchStore(scene.database).counts(batch)
    assert (counts.succeeded, counts.failed, counts.retrying, counts.running, counts.total) == (1, 1, 1, 1, 4)


def test_the_last_finish_of_a_chunk(scene: Scene, version: ModelVersion, cut: Cut) -> None:
    jobs = submit(scene, version, 3)
    [claimed] = scene.chunks.claim([jobs[0]], scene.worker)
    outcomes = [Outcome(job, claimed.chunk, claimed.token, End.SUCCEEDED, b"1") for job in jobs]
    cut()
    finished = scene.jobs.finish(outcomes, scene.worker)
    assert (finished.recorded, finished.dropped, finished.chunks) == (3, frozenset(), (claimed.chunk,))
    assert scene.jobs.finish(outcomes, scene.worker).dropped == {claimed.chunk}, "and no second time"


def test_cancels(scene: Scene, version: ModelVersion, cut: Cut) -> None:
    jobs = submit(scene, version, 5)
    cut()
    assert scene.jobs.cancel(jobs[:3]).count == 3
    assert scene.jobs.cancel(jobs).count == 2


def test_a_cancelled_batch(scene: Scene, version: ModelVersion, cut: Cut) -> None:
    batch = BatchStore(scene.database).create(version, Options(max_attempts=2)).id
    submit(scene, version, 150, batch)
    cut()
    assert scene.jobs.cancel_batch(batch).count == 150
    assert BatchStore(scene.database).counts(batch).cancelled == 150


@pytest.mark.parametrize("by", ["id", "batch", "filter"])
def test_retries(scene: Scene, version: ModelVersion, cut: Cut, by: str) -> None:
    batch = BatchStore(scene.database).create(version, Options(max_attempts=2)).id
    jobs = submit(scene, version, 5, batch)
    scene.jobs.cancel(jobs)
    cut()
    if by == "id":
        moved = scene.jobs.retry(jobs)
    elif by == "batch":
        moved = scene.jobs.retry_batch(batch, (End.CANCELLED,))
    else:
        moved = scene.jobs.retry_where(JobFilter(batch=batch))
    assert (moved.count, moved.batches) == (5, (batch,))
    assert BatchStore(scene.database).counts(batch).queued == 5


def test_a_registered_version(scene: Scene, version: ModelVersion, cut: Cut) -> None:
    cut()
    assert scene.registry.register("model", handler="h").version == 2
    assert len(scene.registry.versions("model")) == 2


def test_moves_of_an_alias(scene: Scene, version: ModelVersion, cut: Cut) -> None:
    aliases = AliasStore(scene.database)
    for number in (1, 2, 3):
        if number > 1:
            scene.registry.register("model", handler="h")
        aliases.set("model", "live", number)
    cut()
    assert aliases.rollback("model", "live") == 2
    cut()
    aliases.remove("model", "live")
    assert aliases.of("model") == {}
    cut()
    aliases.set("model", "live", 1)
    assert [move.version for move in aliases.history("model")] == [1, None, 2, 3, 2, 1]


def test_a_new_worker(scene: Scene, cut: Cut) -> None:
    before = count(scene, "workers")
    cut()
    assert scene.fleet.beat(scene.hire())
    assert count(scene, "workers") == before + 1


def test_lines_of_a_log(scene: Scene, cut: Cut) -> None:
    run = scene.submit()
    append_lines(scene.database, run, [(1.0, "first")])
    cut()
    append_lines(scene.database, run, [(2.0, "second"), (2.0, "third")])
    assert [line.line for line in scene.runs.logs(run)] == ["first", "second", "third"]


def test_a_submitted_run(scene: Scene, cut: Cut) -> None:
    cut()
    job = scene.submit()
    assert [run.job for run, _ in scene.runs.page()] == [job]


def test_a_purge_tells_of_its_files(scene: Scene, version: ModelVersion, cut: Cut) -> None:
    options = Options()
    [[placed]] = scene.jobs.submit([Submission(version, options, [NewJob(b"\x03file")])])
    assert isinstance(placed, Submitted)
    scene.jobs.cancel([placed.job])
    cut()
    purged = Retention(scene.database).purge(-10, reference=b"\x03")
    assert (purged.jobs, purged.artifacts) == (1, (b"\x03file",))
    assert count(scene, "jobs") == 0
