"""Moves of the same jobs at the same time, each held up where it hurts most: no count goes wrong. PostgreSQL only,
for SQLite lets one write at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection

from integration.storage.job_scene import Scene
from torchrelay_storage import faults
from torchrelay_storage.chunk_store import Claimed
from torchrelay_storage.database import Database
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.lost import Evidence
from torchrelay_storage.states import JobState

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

SECONDS = 15.0  # that a thread may take
HELD_UP = 1.0  # seconds within which another would have come to the place where it waits


@pytest.fixture
def scene(database: Database) -> Iterator[Scene]:
    scene = Scene(database)
    yield scene
    scene.check()


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """Work in a thread, which has ended at the end of the block. What it raises is raised there."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(SECONDS)
    assert not thread.is_alive(), "it waits for ever"
    if raised:
        raise raised[0]


@contextmanager
def held_before_its_commit(scene: Scene, monkeypatch: pytest.MonkeyPatch, claimed: Claimed) -> Iterator[None]:
    """While a finish has written everything and not committed."""
    there, go = threading.Event(), threading.Event()

    def hook(point: str) -> None:
        if point == "recording":
            there.set()
            assert go.wait(SECONDS)

    monkeypatch.setattr(faults, "hook", hook)
    with beside(lambda: scene.finish(claimed)):
        try:
            assert there.wait(SECONDS)
            yield
        finally:
            go.set()


def moves_meanwhile(monkeypatch: pytest.MonkeyPatch, move: Callable[[], object]) -> None:
    """Let something happen once somebody has looked up the chunks of his jobs, before he locks them."""
    look, moved = JobStore._chunks_of, list[bool]()

    def chunks_of(self: JobStore, connection: Connection, jobs: Sequence[int]) -> list[int]:
        found = look(self, connection, jobs)
        if not moved:
            moved.append(True)
            move()
        return found

    monkeypatch.setattr(JobStore, "_chunks_of", chunks_of)


def test_a_cancel_of_a_job_that_has_just_moved_counts_right(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = scene.submit(4)
    scene.claim(jobs[0])
    again: list[Claimed] = []

    def move() -> None:
        scene.die(None)  # into halves, and one of them is claimed at once
        again.append(scene.claim(jobs[2]))

    looked = threading.Event()
    go = threading.Event()

    def move_and_wait() -> None:
        move()
        looked.set()
        assert go.wait(SECONDS)

    moves_meanwhile(monkeypatch, move_and_wait)
    with beside(lambda: scene.jobs.cancel([jobs[3]])) as cancel:
        assert looked.wait(SECONDS)
        [claimed] = again
        mate = Claimed(**{name: getattr(claimed, name) for name in Claimed.__slots__} | {"jobs": claimed.jobs[:1]})
        with held_before_its_commit(scene, monkeypatch, mate):
            go.set()
            cancel.join(HELD_UP)
            assert cancel.is_alive(), "it waits for the chunk that the job is in now"
    scene.check()
    assert [scene.row(job).state for job in jobs[2:]] == [JobState.SUCCEEDED, JobState.CANCELLED]
    assert scene.chunk(jobs[2]).state == 3


def test_a_process_given_up_while_its_last_results_are_written(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = scene.submit(4)
    claimed, dead = scene.claim(jobs[0]), scene.worker
    counts: list[int] = []
    give_up = threading.Thread(
        target=lambda: counts.append(scene.die(Evidence(frozenset(jobs)), dead).count), daemon=True
    )
    with held_before_its_commit(scene, monkeypatch, claimed):
        give_up.start()
        give_up.join(HELD_UP)
        assert give_up.is_alive(), "it waits for the end of that"
    give_up.join(SECONDS)
    assert counts == [0]
    assert {scene.row(job).state for job in jobs} == {JobState.SUCCEEDED}
    assert all(scene.outcomes(job) == ["succeeded"] for job in jobs)


def test_a_rescue_passes_over_what_is_being_written(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = scene.submit(8)
    claimed = scene.claim(jobs[0])
    scene.claim(jobs[4])
    scene.fleet.stop(scene.worker)
    monkeypatch.setattr(scene, "worker", scene.worker)
    with held_before_its_commit(scene, monkeypatch, claimed):
        assert scene.chunks.rescue(60).chunks == (jobs[4],)
    assert [scene.row(job).state for job in jobs] == [JobState.SUCCEEDED] * 4 + [JobState.QUEUED] * 4
    assert scene.chunks.rescue(60).count == 0


def test_two_leaders_rescue_each_chunk_once(scene: Scene) -> None:
    """One may have been paused while the other took its lease."""
    jobs = scene.submit(40)
    for job in jobs[::4]:
        scene.claim(job)
    scene.fleet.stop(scene.worker)
    start, counts = threading.Barrier(3), list[int]()

    def rescue() -> None:
        start.wait(SECONDS)
        for _ in range(20):
            counts.append(scene.chunks.rescue(60, limit=2).count)

    with beside(rescue), beside(rescue):
        start.wait(SECONDS)
    assert sum(counts) == 40
    assert all(scene.outcomes(job) == ["lost"] for job in jobs)


def test_one_who_retries_all_and_one_who_retries_some(scene: Scene) -> None:
    jobs = scene.submit(40)
    scene.jobs.cancel(jobs)
    start, counts = threading.Barrier(5), list[int]()

    def retry() -> None:
        start.wait(SECONDS)
        counts.append(scene.jobs.retry(jobs).count)

    with beside(retry), beside(retry), beside(retry), beside(retry):
        start.wait(SECONDS)
    assert sum(counts) == 40
    assert {scene.row(job).state for job in jobs} == {JobState.QUEUED}
