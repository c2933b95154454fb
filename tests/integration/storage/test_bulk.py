"""The bulk paths: many inputs of a batch stored at once, and many outputs of a chunk; on both databases."""

from __future__ import annotations

import pytest

from torchrelay_storage import sqlite
from torchrelay_storage.batch_store import BatchStore
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.outcomes import Successes
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_storage.states import JobState
from torchrelay_storage.submission import NewJob, Submission, Submitted


@pytest.fixture
def version(database: Database) -> ModelVersion:
    return Registry(database).register("m", "h", chunk_size=100)


def submit(database: Database, version: ModelVersion, n: int) -> list[int]:
    jobs = [NewJob(b"%d" % i) for i in range(n)]
    [placed] = JobStore(database).submit([Submission(version, Options(), jobs)])
    return [p.job for p in placed if isinstance(p, Submitted)]


@pytest.mark.parametrize("which", ["whole", "backwards", "shuffled", "with holes", "few"])
def test_outputs_go_to_their_jobs_in_whatever_order_they_come(
    database: Database, version: ModelVersion, which: str
) -> None:
    jobs = submit(database, version, 200)
    chunks, store = ChunkStore(database), JobStore(database)
    worker = Fleet(database).register("w", host="h", pid=1, device="cpu").id
    claimed = chunks.claim(sorted({row.chunk for row in store.get(jobs).values()}), worker)
    done = []
    for one in claimed:
        ids = [job.id for job in one.jobs]
        if which == "backwards":
            ids.reverse()
        elif which == "shuffled":
            ids.sort(key=lambda job: job * 7919 % 101)
        elif which == "with holes":
            del ids[3::4]
        elif which == "few":
            del ids[2:]
        done.append(Successes(one.chunk, one.token, ids, [b"%d" % job for job in ids]))
    wanted = [job for group in done for job in group.jobs]
    assert store.finish([], worker, done).recorded == len(wanted)
    rows = store.get(jobs)
    assert all(rows[job].output == b"%d" % job for job in wanted)
    assert {rows[job].state for job in set(jobs) - set(wanted)} <= {JobState.RUNNING}
    assert store.finish([], worker, done).recorded == 0, "they have ended"


@pytest.mark.parametrize("limit", ["LONGEST", "MOST_WHOLE", None])
def test_outputs_of_any_bytes_and_length_are_kept(
    database: Database, version: ModelVersion, limit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setattr(sqlite, limit, 1_000)
    jobs = submit(database, version, 60)
    worker = Fleet(database).register("w", host="h", pid=1, device="cpu").id
    [claimed] = ChunkStore(database).claim([jobs[0]], worker)
    outputs = [bytes(range(256)) * i for i in range(59)] + [b'{"a": null}']
    done = [Successes(claimed.chunk, claimed.token, jobs, outputs)]
    assert JobStore(database).finish([], worker, done).recorded == 60
    rows = JobStore(database).get(jobs)
    assert [rows[job].output for job in jobs] == outputs


def test_an_input_of_a_batch_goes_to_the_job_of_its_place(database: Database, version: ModelVersion) -> None:
    batch = BatchStore(database).create(version, Options()).id
    store = JobStore(database)
    inputs = [b"%d" % i for i in range(250)]
    store.extend(Submission(version, Options(), (), batch=batch), inputs[:150])
    store.extend(Submission(version, Options(), (), batch=batch), inputs[150:])
    chunks = BatchStore(database).chunks(batch)
    assert [chunk.size for chunk in chunks] == [100, 50, 100]
    ids = [job for chunk in chunks for job in range(chunk.first, chunk.last + 1)]
    rows = store.get(ids, with_input=True)
    assert [rows[job].input for job in ids] == inputs
    assert all(rows[job].batch == batch and rows[job].state is JobState.QUEUED for job in ids)
    assert BatchStore(database).counts(batch).queued == 250


def test_large_inputs_of_a_batch_travel_in_smaller_company(database: Database, version: ModelVersion) -> None:
    batch = BatchStore(database).create(version, Options()).id
    inputs = [b'"' + b"x" * (3 << 20) + b'"' for _ in range(5)]
    JobStore(database).extend(Submission(version, Options(), (), batch=batch), inputs)
    assert [chunk.size for chunk in BatchStore(database).chunks(batch)] == [2, 2, 1]


def test_no_output_is_no_empty_one(database: Database, version: ModelVersion) -> None:
    jobs = submit(database, version, 40)
    store = JobStore(database)
    worker = Fleet(database).register("w", host="h", pid=1, device="cpu").id
    [claimed] = ChunkStore(database).claim([store.get(jobs)[jobs[0]].chunk], worker)
    done = [Successes(claimed.chunk, claimed.token, jobs, [None, b""] * 20)]
    assert store.finish([], worker, done).recorded == 40
    rows = store.get(jobs)
    assert [rows[job].output for job in jobs] == [None, b""] * 20
