"""The stores' promises, one by one, on both databases."""

from __future__ import annotations

import random
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from torchrelay_storage import ids
from torchrelay_storage.batch_store import BatchStore
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import BatchNotFound, InvalidInput, KeyConflict, ModelNotFound
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_reader import JobFilter
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Backoff, Options
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_storage.retention import Retention
from torchrelay_storage.states import End, JobState
from torchrelay_storage.submission import NewJob, Submission, Submitted

ROOM = dict.fromkeys(range(10), 1000)


@pytest.fixture
def version(database: Database) -> ModelVersion:
    return Registry(database).register("m", "h", chunk_size=4)


@pytest.fixture
def worker(database: Database) -> int:
    return Fleet(database).register("w", host="h", pid=1, device="cpu").id


def submit(
    database: Database, version: ModelVersion, n: int, *, batch: int | None = None, options: Options | None = None
) -> list[int]:
    jobs = [NewJob(b"%d" % i) for i in range(n)]
    [placed] = JobStore(database).submit([Submission(version, options or Options(), jobs, batch=batch)])
    return [p.job for p in placed if isinstance(p, Submitted)]


def drain(database: Database, version: ModelVersion, worker: int, end: End = End.SUCCEEDED) -> list[int]:
    """Announce, claim and finish until nothing waits; return the chunks' batches (0: none) in the order of service."""
    chunks, jobs = ChunkStore(database), JobStore(database)
    served = []
    while announced := chunks.announce(version.model, dict.fromkeys(range(10), 1)):
        for claimed in chunks.claim([announced[0].chunk], worker):
            served.append(claimed.batch or 0)
            error = b'{"type":"E","message":"m"}' if end is End.FAILED else None
            jobs.finish([Outcome(j.id, claimed.chunk, claimed.token, end, b"1", error) for j in claimed.jobs], worker)
    return served


# --- fairness and priority ------------------------------------------------------------------------------------


def test_two_batches_proceed_side_by_side(database: Database, version: ModelVersion, worker: int) -> None:
    store = BatchStore(database)
    first, second = (store.create(version, Options()).id for _ in range(2))
    submit(database, version, 80, batch=first)
    submit(database, version, 80, batch=second)
    served = drain(database, version, worker)
    half = served[: len(served) // 2]
    assert abs(half.count(first) - half.count(second)) <= 1


def test_a_tenant_has_one_share_however_many_batches(database: Database, version: ModelVersion, worker: int) -> None:
    store = BatchStore(database)
    many = [store.create(version, Options(tenant="a")).id for _ in range(3)]
    one = store.create(version, Options(tenant="b")).id
    for batch in many:
        submit(database, version, 20, batch=batch, options=Options(tenant="a"))
    submit(database, version, 20, batch=one, options=Options(tenant="b"))
    served = drain(database, version, worker)
    assert served[:10].count(one) == 5


def test_a_single_job_does_not_wait_for_the_batch_before_it(
    database: Database, version: ModelVersion, worker: int
) -> None:
    batch = BatchStore(database).create(version, Options()).id
    submit(database, version, 400, batch=batch)
    chunks = ChunkStore(database)
    window = chunks.announce(version.model, dict.fromkeys(range(10), 4))
    assert len(window) == 4
    submit(database, version, 1)
    # One turn later than what was announced last: at most one chunk of the batch comes before it.
    after = [a.chunk for a in chunks.announce(version.model, dict.fromkeys(range(10), 2))]
    assert any(c.batch is None for c in chunks.claim(after, worker))


def test_urgent_chunks_do_not_wait_for_room_that_lesser_ones_hold(database: Database, version: ModelVersion) -> None:
    submit(database, version, 40, options=Options(priority=0))
    submit(database, version, 4, options=Options(priority=9))
    room = {p: 1 if p == 9 else 0 for p in range(10)}  # the window is full of lesser ones
    [announced] = ChunkStore(database).announce(version.model, room)
    assert announced.priority == 9


def test_weight_of_a_flow_that_came_late_starts_at_the_present(
    database: Database, version: ModelVersion, worker: int
) -> None:
    submit(database, version, 40)
    drain(database, version, worker)
    batch = BatchStore(database).create(version, Options()).id
    submit(database, version, 40, batch=batch)
    submit(database, version, 40)
    served = drain(database, version, worker)
    assert served[:6].count(batch) == 3, "who was served before owes nothing, and is owed nothing"


def test_a_delayed_job_is_announced_when_its_time_has_come(database: Database, version: ModelVersion) -> None:
    [job] = submit(database, version, 1, options=Options(delay=0.2))
    store, chunks = JobStore(database), ChunkStore(database)
    assert store.get([job])[job].state is JobState.SCHEDULED
    assert chunks.announce(version.model, ROOM) == []
    assert chunks.claim([job], 1) == []
    deadline = threading.Event()
    for _ in range(100):
        if announced := chunks.announce(version.model, ROOM):
            break
        deadline.wait(0.05)
    assert [a.chunk for a in announced] == [job]
    assert store.get([job])[job].state is JobState.QUEUED


# --- keys, sessions, batches ----------------------------------------------------------------------------------


def test_a_key_gives_the_same_job_and_refuses_another_input(database: Database, version: ModelVersion) -> None:
    store = JobStore(database)
    [[a]] = store.submit([Submission(version, Options(), [NewJob(b"1", key="k", digest=b"x")])])
    [[b, c]] = store.submit(
        [Submission(version, Options(), [NewJob(b"1", key="k", digest=b"x"), NewJob(b"2", key="k", digest=b"y")])]
    )
    assert isinstance(a, Submitted)
    assert b == Submitted(a.job, a.chunk, existed=True)
    assert isinstance(c, KeyConflict)
    [[d]] = store.submit([Submission(version, Options(tenant="t"), [NewJob(b"2", key="k", digest=b"y")])])
    assert isinstance(d, Submitted)
    assert not d.existed, "keys are unique per tenant"


def test_one_key_from_many_threads_is_one_job(database: Database, version: ModelVersion) -> None:
    store = JobStore(database)
    seen: list[object] = []

    def one() -> None:
        seen.extend(store.submit([Submission(version, Options(), [NewJob(b"1", key="k", digest=b"x")])])[0])

    threads = [threading.Thread(target=one) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({s.job for s in seen if isinstance(s, Submitted)}) == 1
    with database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar() == 1


def test_a_job_exists_exactly_if_the_callers_transaction_commits(database: Database, version: ModelVersion) -> None:
    store = JobStore(database)
    kept = []
    for i in range(20):
        with Session(database.engine) as session:
            jobs = [NewJob(b"1", key=f"k{i}", digest=b"x")]
            [[placed]] = store.submit([Submission(version, Options(), jobs)], session.connection())
            assert isinstance(placed, Submitted)
            if i % 2:
                session.commit()
                kept.append(placed.job)
    with database.read() as connection:
        assert sorted(connection.execute(text("SELECT id FROM jobs")).scalars()) == sorted(kept)
        assert connection.execute(text("SELECT count(*) FROM keys")).scalar() == len(kept)


def test_ids_that_were_drawn_twice_are_drawn_again(
    database: Database, version: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = submit(database, version, 2)
    draws = iter([taken[0], ids.draw(2)])
    monkeypatch.setattr("torchrelay_storage.enqueue.draw", lambda n=1: next(draws))
    again = submit(database, version, 2)
    assert not set(again) & set(taken)


def test_batch_counts_follow_every_state(database: Database, version: ModelVersion, worker: int) -> None:
    store, jobs, chunks = BatchStore(database), JobStore(database), ChunkStore(database)
    batch = store.create(version, Options()).id
    mine = submit(database, version, 12, batch=batch)
    submit(database, version, 2, batch=batch, options=Options(delay=1000))
    assert not store.counts(batch).closed
    [a] = chunks.announce(version.model, dict.fromkeys(range(10), 1))
    [claimed] = chunks.claim([a.chunk], worker)
    ends = [End.SUCCEEDED, End.FAILED, End.OPEN, End.SUCCEEDED]
    jobs.finish(
        [Outcome(j.id, claimed.chunk, claimed.token, e, b"1", b'{"type":"E","message":""}', retry_in=60)
         for j, e in zip(claimed.jobs, ends, strict=True)], worker)  # fmt: skip
    jobs.cancel(mine[4:6])
    chunks.claim([mine[8]], worker)
    store.close(batch)
    counts = store.counts(batch)
    assert (counts.scheduled, counts.queued, counts.running, counts.retrying) == (2, 2, 4, 1)
    assert (counts.succeeded, counts.failed, counts.cancelled, counts.expired) == (2, 1, 2, 0)
    assert counts.total == 14
    assert counts.closed
    assert not counts.done


def test_a_batch_with_a_known_key_is_that_batch(database: Database, version: ModelVersion) -> None:
    store = BatchStore(database)
    first = store.create(version, Options(), key="k")
    assert store.create(version, Options(), key="k").id == first.id
    assert store.create(version, Options()).id != first.id
    with pytest.raises(BatchNotFound):
        store.get(17)


# --- pages ----------------------------------------------------------------------------------------------------


def test_pages_are_what_a_full_scan_would_give(database: Database, version: ModelVersion, worker: int) -> None:
    rng = random.Random(17)
    store, chunks, batches = JobStore(database), ChunkStore(database), BatchStore(database)
    other = Registry(database).register("other", "h", chunk_size=3)
    batch = batches.create(version, Options()).id
    for _ in range(12):
        submit(database, rng.choice([version, other]), rng.randint(1, 9),
               options=Options(delay=rng.choice([None, 1000.0]), tenant=rng.choice(["", "t"])))  # fmt: skip
        submit(database, version, 5, batch=batch)
    for model in (version.model, other.model):
        for a in chunks.announce(model, dict.fromkeys(range(10), 6)):
            for c in chunks.claim([a.chunk], worker):
                outcomes = [
                    Outcome(j.id, c.chunk, c.token, rng.choice([End.SUCCEEDED, End.FAILED, End.OPEN]), b"1",
                            b'{"type":"E","message":""}', retry_in=rng.choice([0.0, 60.0]))
                    for j in c.jobs if rng.random() < 0.8
                ]  # fmt: skip
                store.finish(outcomes, worker)
    with database.read() as connection:
        everything = list(connection.execute(text("SELECT id FROM jobs ORDER BY id DESC")).scalars())
    store.cancel(rng.sample(everything, 8))
    rows = store.get(everything)
    filters = [
        JobFilter(), JobFilter(model="other"), JobFilter(batch=batch), JobFilter(tenant="t"),
        *(JobFilter(states=(s,)) for s in JobState),
        JobFilter(states=(JobState.FAILED, JobState.QUEUED, JobState.RETRYING), model="m"),
    ]  # fmt: skip
    for wanted in filters:
        expected = [
            i for i in everything
            if (not wanted.states or rows[i].state in wanted.states)
            and (wanted.model is None or rows[i].model == wanted.model)
            and (wanted.batch is None or rows[i].batch == wanted.batch)
            and (wanted.tenant is None or rows[i].tenant == wanted.tenant)
        ]  # fmt: skip
        seen: list[int] = []
        while page := store.page(wanted, limit=7, before=seen[-1] if seen else None):
            seen.extend(row.id for row in page)
            assert len(seen) <= len(expected)
        assert seen == expected, wanted


# --- workers, leases, rescue ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(4))
def test_rescue_halves_until_the_guilty_job_is_alone(database: Database, version: ModelVersion, place: int) -> None:
    jobs = submit(database, version, 4, options=Options(max_attempts=2, backoff=Backoff(seconds=0)))
    store, chunks, fleet = JobStore(database), ChunkStore(database), Fleet(database)
    guilty = jobs[place]
    for _ in range(40):
        announced = chunks.announce(version.model, dict.fromkeys(range(10), 1))
        if not announced:
            break
        worker = fleet.register("w", host="h", pid=1, device="cpu").id
        for claimed in chunks.claim([announced[0].chunk], worker):
            if claimed.suspect:
                assert chunks.run_alone(claimed.chunk, claimed.token, worker)
            if guilty in [j.id for j in claimed.jobs]:
                fleet.stop(worker)  # it took the worker down
                chunks.rescue(60)
            else:
                store.finish(
                    [Outcome(j.id, claimed.chunk, claimed.token, End.SUCCEEDED, b"1") for j in claimed.jobs], worker
                )
    rows = store.get(jobs)
    assert [rows[j].state for j in jobs if j != guilty] == [JobState.SUCCEEDED] * 3
    assert [rows[j].failures for j in jobs if j != guilty] == [0] * 3
    assert rows[guilty].state is JobState.FAILED
    assert rows[guilty].failures == 2
    assert rows[guilty].error is not None
    assert rows[guilty].error.type == "WorkerLost"


def test_a_drain_makes_no_suspects_and_a_crash_does(database: Database, version: ModelVersion, worker: int) -> None:
    chunks = ChunkStore(database)
    [job] = submit(database, version, 1)
    [claimed] = chunks.claim([job], worker)
    chunks.hand_back([(job, claimed.token)], worker)
    [claimed] = chunks.claim([job], worker)
    assert not claimed.suspect
    chunks.hand_back([(job, claimed.token)], worker, suspect=True)
    [claimed] = chunks.claim([job], worker)
    assert claimed.suspect
    chunks.hand_back([(job, claimed.token)], worker)
    assert chunks.claim([job], worker)[0].suspect, "until it has ended"


def test_a_silent_worker_is_stale_and_a_beating_one_is_not(database: Database, version: ModelVersion) -> None:
    fleet, chunks = Fleet(database), ChunkStore(database)
    silent = fleet.register("a", host="h", pid=1, device="cpu").id
    jobs = submit(database, version, 4)
    chunks.claim([jobs[0]], silent)
    assert chunks.rescue(60).count == 0
    with database.write() as connection:
        connection.execute(text("UPDATE workers SET beat_at = beat_at - 100"))
    assert [w.alive for w in fleet.workers(60)] == [False]
    assert chunks.rescue(None).count == 0, "it may live: nobody could be heard"
    assert fleet.beat(silent, {"x": 1})
    with database.write() as connection:
        connection.execute(text("UPDATE workers SET beat_at = beat_at - 100"))
    assert chunks.rescue(60).count == 4
    assert not fleet.beat(silent, {"x": 1}), "should it come back, it learns that it was given up"
    [row] = fleet.workers(60, ended=True)
    assert (row.alive, row.ended) == (False, "fell silent")
    assert chunks.claim([jobs[0]], silent) == [], "nor does it get anything new"
    assert fleet.forget(0) == 1


def test_a_lease_has_one_holder(database: Database) -> None:
    fleet = Fleet(database)
    assert fleet.acquire("leader", 1, 60)
    assert not fleet.acquire("leader", 2, 60)
    assert fleet.acquire("leader", 1, -1), "the holder renews"
    assert fleet.acquire("leader", 2, 60), "it had run out"
    fleet.release("leader", 1)
    assert not fleet.acquire("leader", 1, 60)


# --- retention ------------------------------------------------------------------------------------------------


def test_retention_spares_what_someone_may_need(database: Database, version: ModelVersion, worker: int) -> None:
    store, chunks, batches = JobStore(database), ChunkStore(database), BatchStore(database)
    retention = Retention(database)
    opened, closed = (batches.create(version, Options()).id for _ in range(2))
    in_open = submit(database, version, 4, batch=opened)
    submit(database, version, 8, batch=closed)
    submit(database, version, 1)
    store.submit([Submission(version, Options(), [NewJob(b"\x07{}", key="k", digest=b"x")])])
    drain(database, version, worker)
    batches.close(closed)
    waiting = submit(database, version, 3)
    assert retention.purge(3600, reference=b"\x07").jobs == 0, "too young"
    purged = retention.purge(-1, reference=b"\x07")
    assert purged.jobs == 10
    assert purged.artifacts == (b"\x07{}",)
    with database.read() as connection:
        assert sorted(connection.execute(text("SELECT id FROM jobs")).scalars()) == sorted(in_open + waiting)
        assert connection.execute(text("SELECT count(*) FROM keys")).scalar() == 0
        assert list(connection.execute(text("SELECT id FROM batches")).scalars()) == [opened]
    assert retention.purge(-1, reference=b"\x07", limit=1).chunks == 0
    assert chunks.announce(version.model, ROOM)


# --- models ---------------------------------------------------------------------------------------------------


def test_versions_count_up_and_are_found_by_number(database: Database) -> None:
    registry = Registry(database)
    first = registry.register("digits", "h", config={"a": 1})
    second = registry.register("digits", "h2")
    assert (first.ref, second.ref) == ("digits@1", "digits@2")
    assert registry.resolve("digits") == second
    assert registry.resolve("digits@1") == first
    with pytest.raises(ModelNotFound, match="did you mean digits"):
        registry.resolve("digit")
    with pytest.raises(ModelNotFound, match="newest is digits@2"):
        registry.resolve("digits@9")
    with pytest.raises(InvalidInput):
        registry.register("no spaces", "h")
    with pytest.raises(InvalidInput):
        registry.register("x", "h", chunk_size=0)


@pytest.mark.parametrize("bad", [
    {"priority": 10}, {"priority": -1}, {"priority": True}, {"priority": 1.0}, {"max_attempts": 0}, {"delay": -1},
    {"delay": float("nan")}, {"timeout": 0}, {"expires_in": 0}, {"delay": 1, "not_before": 1}, {"delay": 1e12},
])  # fmt: skip
def test_bad_options_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(bad))):
        Options(**bad).validate()  # type: ignore[arg-type]
