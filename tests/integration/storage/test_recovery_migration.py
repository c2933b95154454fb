"""From the schema before recovery to the one after, with jobs in every state in place; on both databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from integration.storage.job_scene import ERROR
from integration.storage.old_schema import upgrade_to
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_error import JobError
from torchrelay_storage.job_reader import JobFilter
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.lost import Evidence
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.registry import Registry
from torchrelay_storage.retention import Retention
from torchrelay_storage.runs import RunStore
from torchrelay_storage.schema import metadata
from torchrelay_storage.states import End, JobState

# As the release before wrote them: a chunk that waits, one for its time, one announced, one that a worker holds (one
# job of it has succeeded), one that is suspected, one whose job failed; and a training run of two deaths.
MODELS = """
    INSERT INTO models (name, created_at, training) VALUES ('digits', 1, false), ('train:images', 1, true);
    INSERT INTO model_versions (model, version, handler, chunk_size, created_at)
        SELECT id, 1, 'h', 4, 1 FROM models ORDER BY id;
    INSERT INTO workers (id, name, host, pid, device, started_at, beat_at) VALUES (7, 'w', 'h', 1, 'cpu', 1, 1)
"""
# id, version, state, due, suspect, retrying, size, succeeded, failed, worker
CHUNKS = [
    (10, 1, 0, True, False, False, 2, 0, 0, None),
    (20, 1, 0, False, False, True, 1, 0, 0, None),
    (30, 1, 1, True, False, False, 1, 0, 0, None),
    (40, 1, 2, True, False, False, 3, 1, 0, 7),
    (50, 1, 2, True, True, False, 1, 0, 0, 7),
    (60, 1, 3, True, False, False, 1, 0, 1, None),
    (70, 2, 2, True, False, False, 1, 0, 0, 7),
]
# id, chunk, state, failures, error, worker, finished_at
JOBS = [
    (10, 10, 0, 0, None, None, None),
    (11, 10, 0, 0, None, None, None),
    (20, 20, 0, 1, b'{"type":"E","message":"m"}', None, None),
    (30, 30, 0, 0, None, None, None),
    (40, 40, 1, 0, None, 7, 2.0),
    (41, 40, 0, 0, None, None, None),
    (42, 40, 0, 0, None, None, None),
    (50, 50, 0, 1, None, None, None),
    (60, 60, 2, 3, b'{"type":"E","message":"m"}', 7, 2.0),
    (70, 70, 0, 0, None, None, None),
]
STATES = {
    10: "queued", 11: "queued", 20: "retrying", 30: "queued", 40: "succeeded", 41: "running", 42: "running",
    50: "running", 60: "failed", 70: "running",
}  # fmt: skip


@pytest.fixture
def upgraded(empty_database_url: str) -> Iterator[Database]:
    database = Database(empty_database_url)
    upgrade_to(database, "0002")
    with database.write() as connection:
        for statement in MODELS.split(";"):
            connection.exec_driver_sql(statement)
        connection.execute(
            text("""
                INSERT INTO chunks (id, model, version, flow, priority, turn, first_id, last_id, size, succeeded,
                                    failed, state, due, suspect, retrying, token, worker, max_attempts, created_at,
                                    claimed_at, announced_at, ended_at, not_before)
                VALUES (:id, :version, :version, 0, 5, 1, :id, :last, :size, :succeeded, :failed, :state, :due,
                        :suspect, :retrying, 3, :worker, 3, 1, CASE WHEN :state = 2 THEN 1 END,
                        CASE WHEN :state = 1 THEN 1 END, CASE WHEN :state = 3 THEN 2 END,
                        CASE WHEN :due THEN NULL ELSE 4000000000 END)
            """),
            [
                {"id": i, "version": v, "state": s, "due": d, "suspect": u, "retrying": r, "size": n, "succeeded": ok,
                 "failed": bad, "worker": w, "last": i + n - 1}
                for i, v, s, d, u, r, n, ok, bad, w in CHUNKS
            ],
        )  # fmt: skip
        connection.execute(
            text("INSERT INTO jobs (id, chunk, state, failures, error, worker, finished_at, input) "
                 "VALUES (:id, :chunk, :state, :failures, :error, :worker, :at, :input)"),
            [
                {"id": i, "chunk": c, "state": s, "failures": f, "error": e, "worker": w, "at": at, "input": b"1"}
                for i, c, s, f, e, w, at in JOBS
            ],
        )  # fmt: skip
        connection.exec_driver_sql(
            "INSERT INTO runs (job, model, recipe, deaths, created_at) VALUES (70, 'tiny', 'images', 2, 1)"
        )
    database.upgrade()
    yield database
    database.dispose()


def test_old_rows_are_read_as_before(upgraded: Database) -> None:
    upgraded.check()
    with upgraded.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        shown = connection.execute(text("SELECT * FROM job_status ORDER BY id")).all()
    assert {row.id: row.state for row in shown} == STATES
    assert {row.handler_revision for row in shown} == {None}
    assert {row.id: row.model for row in shown} == {job: "tiny" if job == 70 else "digits" for job in STATES}
    jobs = JobStore(upgraded)
    assert {row.id: row.state.value for row in jobs.page(JobFilter())} == STATES
    version = Registry(upgraded).resolve("digits")
    assert version.max_queued is None
    assert jobs.queued(version.model) == jobs.queued() == 4
    [worker] = Fleet(upgraded).workers(60)
    assert (worker.name, worker.ended) == ("w", None)
    assert [run.deaths for run, _ in RunStore(upgraded).page()] == [2]


def test_the_history_of_old_jobs_is_what_their_rows_tell(upgraded: Database) -> None:
    jobs = JobStore(upgraded)
    assert {job: [one.outcome for one in jobs.attempts(job)] for job in STATES} == {
        10: [], 11: [], 20: [], 30: [], 40: ["succeeded"], 41: ["running"], 42: ["running"], 50: ["running"], 60: [],
        70: ["running"],
    }  # fmt: skip
    assert jobs.get([60])[60].error == JobError("E", "m")


def test_a_worker_that_holds_old_chunks_goes_on(upgraded: Database) -> None:
    jobs, chunks = JobStore(upgraded), ChunkStore(upgraded)
    outcomes = [Outcome(41, 40, 3, End.SUCCEEDED, b"1"), Outcome(42, 40, 3, End.OPEN, error=ERROR, retry_in=9)]
    assert jobs.finish(outcomes, 7).recorded == 2
    assert chunks.run_alone(50, 3, 7)
    chunks.give_up(7, "killed by SIGSEGV", Evidence(frozenset({50})))
    rows = jobs.get([41, 42, 50, 70])
    assert [rows[job].state for job in (41, 42, 50)] == [JobState.SUCCEEDED, JobState.RETRYING, JobState.RETRYING]
    assert rows[50].failures == 2
    assert rows[70].state is JobState.FAILED, "its third death"


def test_old_chunks_are_rescued_and_run(upgraded: Database) -> None:
    jobs, chunks, fleet = JobStore(upgraded), ChunkStore(upgraded), Fleet(upgraded)
    assert chunks.rescue(60).count == 4
    assert jobs.get([50])[50].failures == 1, "nobody said that it ran alone"
    worker = fleet.register("new", host="h", pid=1, device="cpu").id
    model = Registry(upgraded).resolve("digits").model
    for _ in range(20):
        for claimed in chunks.claim_next([model], worker, 9):
            assert claimed.backoff is None
            jobs.finish(
                [Outcome(job.id, claimed.chunk, claimed.token, End.SUCCEEDED, b"1") for job in claimed.jobs], worker
            )
    assert jobs.retry_where(JobFilter(states=(JobState.FAILED,), model="digits")).count == 1
    done = {row.id for row in jobs.page(JobFilter(states=(JobState.SUCCEEDED,)))}
    assert done == {10, 11, 30, 40, 41, 42, 50}
    assert Retention(upgraded).purge(-1, reference=b"\x07").jobs == 8, "and the run, after its third death"
    with upgraded.read() as connection:
        assert list(connection.execute(text("SELECT id FROM jobs ORDER BY id")).scalars()) == [20, 60]
        assert connection.execute(text("SELECT count(*) FROM attempts")).scalar() == 0
