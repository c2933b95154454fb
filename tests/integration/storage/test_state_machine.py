"""The stores against a small model of the states: random operations, both databases, the same promises."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from torchrelay_storage.batch_store import BatchStore
from torchrelay_storage.chunk_store import ChunkStore, Claimed
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_reader import JobFilter
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.lost import Evidence
from torchrelay_storage.options import Options
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.registry import Registry
from torchrelay_storage.states import End
from torchrelay_storage.submission import NewJob, Submission

MAX_ATTEMPTS = 2
TABLES = ("attempts", "jobs", "chunks", "batches", "keys", "turns", "workers", "model_versions", "models")


@dataclass
class Job:
    """What the model remembers of a job."""

    end: End = End.OPEN
    failures: int = 0
    tries: list[str] = field(default_factory=list)  # how those ended that did not succeed


@dataclass
class Hold:
    """What a worker remembers of a chunk; the database may know better by now."""

    worker: int
    chunk: int
    token: int
    jobs: list[int]
    valid: bool = True


@dataclass
class Held:
    """What the database says of a chunk that a worker holds. `guilty`: its job is to blame if the worker dies of it."""

    chunk: int
    jobs: list[int]
    suspect: bool
    alone: bool
    guilty: bool


@dataclass
class World:
    """The whole model."""

    jobs: dict[int, Job] = field(default_factory=dict)
    holds: list[Hold] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)  # workers


class Stores(RuleBasedStateMachine):
    """Random users, workers and maintenance."""

    database: Database

    @initialize()
    def begin(self) -> None:
        with self.database.write() as connection:
            for table in TABLES:
                connection.execute(text(f"DELETE FROM {table}"))
        self.job_store = JobStore(self.database)
        self.chunk_store = ChunkStore(self.database)
        self.batch_store = BatchStore(self.database)
        self.registry = Registry(self.database)
        self.fleet = Fleet(self.database)
        self.version = self.registry.register("m", "h", chunk_size=3)
        self.world = World()
        self.batch = self.batch_store.create(self.version, Options())
        self.workers = [self.fleet.register(n, host="h", pid=1, device="cpu").id for n in ("a", "b")]
        self.paused_model = self.paused_batch = False

    # --- what users do ------------------------------------------------------------------------------------

    @rule(n=st.integers(1, 7), priority=st.sampled_from([0, 5, 9]), batched=st.booleans(), expiring=st.booleans())
    def submit(self, n: int, priority: int, batched: bool, expiring: bool) -> None:
        options = Options(priority=priority, max_attempts=MAX_ATTEMPTS, expires_in=0.001 if expiring else None)
        jobs = [NewJob(b"%d" % i) for i in range(n)]
        batch = self.batch.id if batched else None
        [placed] = self.job_store.submit([Submission(self.version, options, jobs, batch=batch)])
        if expiring:
            time.sleep(0.003)  # else it would be chance whether the next claim comes in time
        for one in placed:
            self.world.jobs[one.job] = Job()

    @precondition(lambda self: self.world.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.world.jobs)), min_size=1, max_size=4, unique=True))
        moved = self.job_store.cancel(some)
        was_open = [j for j in some if self.world.jobs[j].end is End.OPEN]
        assert moved.count == len(was_open)
        self._end(was_open, End.CANCELLED)

    @rule()
    def cancel_batch(self) -> None:
        was_open = self._open_of_batch()
        assert self.job_store.cancel_batch(self.batch.id).count == len(was_open)
        self._end(was_open, End.CANCELLED)

    @precondition(lambda self: self.world.jobs)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.world.jobs)), min_size=1, max_size=4, unique=True))
        expected = [j for j in some if self.world.jobs[j].end in (End.FAILED, End.CANCELLED, End.EXPIRED)]
        assert self.job_store.retry(some).count == len(expected)
        for job in expected:
            self.world.jobs[job] = Job(tries=self.world.jobs[job].tries)

    @rule()
    def retry_all(self) -> None:
        expected = [j for j, job in self.world.jobs.items() if job.end not in (End.OPEN, End.SUCCEEDED)]
        assert self.job_store.retry_where(JobFilter(model="m")).count == len(expected)
        for job in expected:
            self.world.jobs[job] = Job(tries=self.world.jobs[job].tries)

    @rule()
    def pause_or_resume_model(self) -> None:
        self.paused_model = not self.paused_model
        (self.registry.pause if self.paused_model else self.registry.resume)("m")

    @rule()
    def pause_or_resume_batch(self) -> None:
        self.paused_batch = not self.paused_batch
        (self.batch_store.pause if self.paused_batch else self.batch_store.resume)(self.batch.id)

    # --- what workers do ----------------------------------------------------------------------------------

    @rule(room=st.integers(1, 5))
    def announce(self, room: int) -> None:
        announced = self.chunk_store.announce(self.version.model, dict.fromkeys(range(10), room))
        assert len(announced) <= room
        assert not (announced and self.paused_model)
        assert [a.priority for a in announced] == sorted((a.priority for a in announced), reverse=True)

    @rule(worker=st.integers(0, 1), data=st.data())
    def claim(self, worker: int, data: st.DataObject) -> None:
        with self.database.read() as connection:
            rows = connection.execute(text("SELECT id, state, batch FROM chunks ORDER BY id")).all()
        if not rows:
            return
        row = data.draw(st.sampled_from(rows))
        claimed = self.chunk_store.claim([row.id], self.workers[worker])
        paused = self.paused_model or (self.paused_batch and row.batch is not None)
        if row.state in (2, 3) or paused:
            assert claimed == []
        for one in claimed:
            jobs = [j.id for j in one.jobs]
            assert jobs, "a chunk without open jobs was claimed"
            assert all(self.world.jobs[j].end is End.OPEN for j in jobs)
            assert [j.failures for j in one.jobs] == [self.world.jobs[j].failures for j in jobs]
            self._hold(self.workers[worker], one, data.draw(st.booleans()))

    @rule(worker=st.integers(0, 1), limit=st.integers(1, 3))
    def claim_next(self, worker: int, limit: int) -> None:
        claimed = self.chunk_store.claim_next([self.version.model], self.workers[worker], limit)
        assert len(claimed) <= limit
        assert not (claimed and self.paused_model)
        for one in claimed:
            self._hold(self.workers[worker], one, alone=True)
        assert sum(one.suspect for one in claimed) <= 1, "each suspect runs alone"

    @precondition(lambda self: self.world.holds)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        holds = data.draw(st.lists(st.sampled_from(range(len(self.world.holds))), min_size=1, max_size=3, unique=True))
        worker = self.world.holds[holds[0]].worker
        chosen = [self.world.holds[i] for i in holds if self.world.holds[i].worker == worker]
        outcomes = []
        ends = st.sampled_from([End.SUCCEEDED, End.SUCCEEDED, End.FAILED, End.OPEN])
        for hold in chosen:
            done, hold.jobs = hold.jobs[:2], hold.jobs[2:]
            for job in done:
                end = data.draw(ends)
                if end is End.OPEN and self.world.jobs[job].failures + 1 >= MAX_ATTEMPTS:
                    end = End.FAILED
                outcomes.append(Outcome(job, hold.chunk, hold.token, end, b"1", b'{"type":"E","message":""}'))
        if not outcomes:
            return
        valid = {(h.chunk, h.token) for h in chosen if self._holds(h)}
        # A job that was cancelled and retried lives in another chunk now, which this hold says nothing about.
        home = {job: row.chunk for job, row in self.job_store.get([o.job for o in outcomes]).items()}
        finished = self.job_store.finish(outcomes, worker)
        assert finished.dropped == {o.chunk for o in outcomes if (o.chunk, o.token) not in valid}
        recorded = 0
        for outcome in outcomes:
            job = self.world.jobs[outcome.job]
            mine = (outcome.chunk, outcome.token) in valid and home[outcome.job] == outcome.chunk
            if mine and job.end is End.OPEN:
                recorded += 1
                job.end = outcome.end
                if outcome.end is not End.SUCCEEDED:
                    job.failures += 1
                    job.tries.append("failed")
        assert finished.recorded == recorded

    @precondition(lambda self: self.world.holds)
    @rule(data=st.data())
    def hand_back(self, data: st.DataObject) -> None:
        hold = self.world.holds.pop(data.draw(st.integers(0, len(self.world.holds) - 1)))
        went = self._holds(hold)
        assert self.chunk_store.hand_back([(hold.chunk, hold.token)], hold.worker) == int(went)

    # --- what maintenance does ----------------------------------------------------------------------------

    @precondition(lambda self: self.world.dead)
    @rule(data=st.data())
    def a_zombie_gets_nothing(self, data: st.DataObject) -> None:
        zombie = data.draw(st.sampled_from(self.world.dead))
        assert not self.fleet.beat(zombie)
        assert self.chunk_store.claim_next([self.version.model], zombie, 5) == []
        assert self.chunk_store.held(zombie) == []

    @rule(worker=st.integers(0, 1), silent=st.booleans())
    def worker_dies_and_is_rescued(self, worker: int, silent: bool) -> None:
        dead = self.workers[worker]
        held = self._held(dead)
        if silent:
            with self.database.write() as connection:
                connection.execute(text("UPDATE workers SET beat_at = beat_at - 100 WHERE id = :id"), {"id": dead})
            assert self.chunk_store.rescue(None).count == 0, "perhaps it had no chance to beat"
        else:
            self.fleet.stop(dead)
        self.chunk_store.rescue(60 if silent else None)
        for one in held:
            if one.guilty:
                self._lose_by_chance(one.jobs)
            else:
                self._lose(one.jobs)
        self._replace(worker)

    @rule(worker=st.integers(0, 1), data=st.data(), knows=st.booleans(), loading=st.booleans(),
          cause=st.sampled_from(["itself", "overran", "from outside"]))  # fmt: skip
    def process_dies_and_is_given_up(
        self, worker: int, data: st.DataObject, knows: bool, loading: bool, cause: str
    ) -> None:
        timed_out = cause == "overran"
        from_outside = knows and cause == "from outside"
        dead = self.workers[worker]
        held = self._held(dead)
        everything = sorted(job for one in held for job in one.jobs)
        ran = data.draw(st.sets(st.sampled_from(everything))) if everything else set()
        versions = frozenset({self.version.id} if loading else ())
        evidence = Evidence(frozenset(ran), versions, timed_out, from_outside) if knows else None
        moved = self.chunk_store.give_up(dead, "killed by SIGSEGV", evidence)
        assert set(moved.chunks) == {one.chunk for one in held}
        suspected: dict[int, bool] = {}
        for one in held:
            running = [job for job in one.jobs if not knows or job in ran]
            if knows and loading and not running:  # they wait for a model that perhaps cannot be loaded
                if not ran and from_outside:
                    if one.alone:
                        self._lose_by_chance(one.jobs)
                    suspected |= dict.fromkeys(one.jobs, True) if not one.alone else {}
                    continue
                if not ran:
                    self._lose(one.jobs, blamed=True)
                suspected |= dict.fromkeys(one.jobs, one.suspect or bool(ran))
            elif one.guilty and from_outside:
                self._lose_by_chance(one.jobs)
                suspected |= dict.fromkeys(one.jobs, True)
            elif one.guilty:
                self._lose(one.jobs, blamed=True, for_good=knows and timed_out)
                suspected |= dict.fromkeys(one.jobs, True)
            elif knows and timed_out and not loading and running and len(ran) == 1:  # nothing else overran its limit
                self._lose(running, blamed=True, for_good=True)
                suspected |= dict.fromkeys(one.jobs, one.suspect or len(one.jobs) == 1)
            else:
                self._lose(running)
                suspected |= {job: one.suspect or job in running for job in one.jobs}
        with self.database.read() as connection:
            rows = connection.execute(text("SELECT j.id, c.suspect FROM jobs j JOIN chunks c ON c.id = j.chunk"))
            after = {row.id: bool(row.suspect) for row in rows}
        assert {job: after[job] for job in suspected} == suspected, "only what ran is suspected, until it has ended"
        self._replace(worker)

    @rule()
    def expire(self) -> None:
        time.sleep(0.003)
        with self.database.read() as connection:
            late = connection.execute(text(
                "SELECT j.id FROM jobs j JOIN chunks c ON c.id = j.chunk WHERE j.state = 0 AND c.state < 2 "
                "AND c.expires_at IS NOT NULL")).scalars().all()  # fmt: skip
        assert self.chunk_store.expire().count == len(late)
        self._end(list(late), End.EXPIRED)

    # --- what is always true ------------------------------------------------------------------------------

    @invariant()
    def promises_hold(self) -> None:
        if not hasattr(self, "world"):
            return
        rows = self.job_store.get(sorted(self.world.jobs), with_input=True)
        assert len(rows) == len(self.world.jobs)
        with self.database.read() as connection:
            chunks = connection.execute(text("SELECT * FROM chunks")).all()
            ends = dict(connection.execute(text("SELECT id, state FROM jobs")).all())
            shown = dict(connection.execute(text("SELECT id, state FROM job_status")).all())
            tried = connection.execute(text("SELECT job, outcome FROM attempts ORDER BY ended_at, id")).all()
        for job, expected in self.world.jobs.items():
            assert ends[job] == expected.end
            assert rows[job].failures == expected.failures <= MAX_ATTEMPTS
            assert [row.outcome for row in tried if row.job == job] == expected.tries
            assert shown[job] == rows[job].state.value, "the view and the code derive the same state"
        for chunk in chunks:
            mine = [ends[j] for j, row in rows.items() if row.chunk == chunk.id]
            counted = (chunk.size, chunk.succeeded, chunk.failed, chunk.cancelled, chunk.expired)
            assert counted == (len(mine), *(mine.count(e) for e in (1, 2, 3, 4)))
            assert (chunk.state == 3) == (0 not in mine), "a chunk is done exactly when none of its jobs is open"
        counts = self.batch_store.counts(self.batch.id)
        assert counts.open == len(self._open_of_batch())

    def _hold(self, worker: int, one: Claimed, alone: bool) -> None:
        if alone and one.suspect:
            assert self.chunk_store.run_alone(one.chunk, one.token, worker)
        self.world.holds.append(Hold(worker, one.chunk, one.token, [j.id for j in one.jobs]))

    def _held(self, worker: int) -> list[Held]:
        """What a worker holds; a job is to blame for its loss that is by itself in a chunk that runs alone."""
        found = []
        for held in self.chunk_store.held(worker):
            jobs = sorted(self.chunk_store.open_jobs([held.chunk]))
            with self.database.read() as connection:
                row = connection.execute(
                    text("SELECT suspect, alone FROM chunks WHERE id = :c"), {"c": held.chunk}
                ).one()
            alone = bool(row.alone)
            found.append(Held(held.chunk, jobs, bool(row.suspect), alone, alone and len(jobs) == 1))
        return found

    def _lose_by_chance(self, jobs: list[int]) -> None:
        """Of jobs that ran alone only the second such loss is held against them."""
        again = all("lost_alone" in self.world.jobs[job].tries for job in jobs)
        self._lose(jobs, blamed=again, alone=True)

    def _lose(self, jobs: list[int], *, blamed: bool = False, for_good: bool = False, alone: bool = False) -> None:
        for job in (self.world.jobs[j] for j in jobs):
            job.tries.append("failed" if blamed else "lost_alone" if alone else "lost")
            job.failures += blamed  # nobody else is ever blamed
            if for_good or job.failures >= MAX_ATTEMPTS:
                job.end = End.FAILED

    def _replace(self, worker: int) -> None:
        assert self.chunk_store.held(self.workers[worker]) == []
        self.world.dead.append(self.workers[worker])
        self.workers[worker] = self.fleet.register("n", host="h", pid=1, device="cpu").id

    def _holds(self, hold: Hold) -> bool:
        with self.database.read() as connection:
            row = connection.execute(
                text("SELECT state, token, worker FROM chunks WHERE id = :id"), {"id": hold.chunk}
            ).one()
        return bool(row.state == 2 and row.token == hold.token and row.worker == hold.worker)

    def _open_of_batch(self) -> list[int]:
        with self.database.read() as connection:
            found = connection.execute(text("SELECT id FROM jobs WHERE batch = :b AND state = 0"), {"b": self.batch.id})
            return list(found.scalars())

    def _end(self, jobs: list[int], end: End) -> None:
        for job in jobs:
            self.world.jobs[job].end = end


def test_stores_keep_their_promises_under_random_operations(database: Database) -> None:
    bound = type("BoundStores", (Stores,), {"database": database})
    examples = 100 if database.is_sqlite else 60
    run_state_machine_as_test(
        bound,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense"])
def test_other_databases_are_refused(url: str) -> None:
    from torchrelay_storage.errors import InvalidInput

    with pytest.raises(InvalidInput), contextlib.closing(Database(url)):  # type: ignore[type-var]
        pass
