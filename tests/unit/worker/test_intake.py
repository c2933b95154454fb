"""The intake with fake stores: claiming in one statement, room, Redis or the database away, loading, suspects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from servers import wait_until
from torchrelay_storage.chunk_store import Claimed
from torchrelay_storage.errors import Unreachable
from torchrelay_worker.models.model import revision_of
from torchrelay_worker.models.residency import LoadFailed, Resident
from torchrelay_worker.pipeline.intake import Intake
from torchrelay_worker.pipeline.loader import Loader
from torchrelay_worker.pipeline.pace import Pace
from worker_fakes import Line, Plus, Store, chunk


class Places:
    """Who starts training runs: `room` at a time."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.started: list[int] = []

    def has_room(self) -> bool:
        return len(self.started) < self.room

    def start(self, claimed: Claimed) -> None:
        self.started.append(claimed.chunk)


class Rig:
    """A line with an intake before it. Version 1 is a model, versions 2 and 3 are lanes of runs."""

    def __init__(self, chunks: list[Claimed], *, redis_is_up: bool = True, room: int = 0) -> None:
        self.model = Plus()
        self.line = Line(self.model, Store(chunks))
        self.pace = Pace()
        self.woken: list[str] = []
        self.opened = 0
        self.places = Places(room)
        residency: Any = self.line.residency
        self.served: list[tuple[int, str]] = []
        self.loader = Loader(
            residency,
            self.line.recorder,
            self.line.watch,
            self.line.box,
            send=self.line.preparer.put,
            serves=lambda version, revision: self.served.append((version, revision)),
        )
        self.intake = Intake(
            self.line.store,
            self.line.ledger,
            self.line.preparer,
            self.loader,
            pace=self.pace,
            worker=7,
            served=lambda: {"m": 10, "train:a": 20, "train:b": 30} if room else {"m": 10},
            wake=self.woken.append,
            redis_is_up=lambda: redis_is_up,
            opened=self._opened,
            lanes=lambda: {20, 30} if room else set(),
            runs=self.places,
        )
        self.line.ledger.changed = self.intake.nudge
        self.line.ledger.released = self.loader.unpin
        self.loader.loaded, self.loader.nudge = self.intake.has_loaded, self.intake.nudge

    def start(self) -> None:
        self.line.__enter__()
        self.loader.start()
        self.intake.start()

    def stop(self) -> None:
        self.intake.stop(10)
        self.loader.close()
        self.line.__exit__()

    def _opened(self) -> None:
        self.opened += 1

    def offer(self, *chunks: int) -> list[threading.Thread]:
        """Offer chunks as Celery's threads do."""
        threads = [threading.Thread(target=self.intake.offer, args=("m", c), daemon=True) for c in chunks]
        for thread in threads:
            thread.start()
        return threads


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    """A factory of started rigs; all are stopped at the end."""
    rigs: list[Rig] = []

    def make(chunks: list[Claimed], *, start: bool = True, **options: Any) -> Rig:
        made = Rig(chunks, **options)
        rigs.append(made)
        if start:
            made.start()
        return made

    yield make
    for made in rigs:
        made.stop()


def test_what_is_offered_is_claimed_run_and_followed_by_a_wake(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(1, [1, 2])])
    assert made.intake.offer("m", 1)
    assert len(made.line.store.wait_for(2)) == 2
    wait_until(lambda: made.woken == ["m"], 10, "the wake")
    wait_until(lambda: made.line.residency.pins[1] == 0, 10, "the pin given back")
    assert made.line.store.alone == []


def test_a_message_whose_chunk_is_not_ours_is_done_with(rig: Callable[..., Rig]) -> None:
    made = rig([])
    assert made.intake.offer("m", 1)
    assert made.intake.offer("unknown", 2)


def test_small_chunks_that_wait_are_claimed_together(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(n, [n]) for n in range(1, 9)], start=False)
    claims: list[int] = []
    claim = made.line.store.claim
    made.line.store.claim = lambda chunks, worker: claims.append(len(chunks)) or claim(chunks, worker)  # type: ignore[method-assign, func-returns-value]
    threads = made.offer(*range(1, 9))
    wait_until(lambda: len(made.intake._offers) == 8, 10, "the offers")
    made.start()
    made.line.store.wait_for(8)
    assert claims == [8]
    for thread in threads:
        thread.join(10)


def test_no_more_is_claimed_than_will_soon_run(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(n, range(8)) for n in range(1, 6)])
    go_on = threading.Event()
    made.model.trouble = lambda batch: go_on.wait(20) and None
    made.offer(1, 2)
    wait_until(lambda: len(made.line.ledger) == 2, 10, "two claims")
    wait_until(lambda: not made.intake.has_room("m"), 10, "no room")
    made.offer(3)
    assert not made.intake.has_room("m")
    assert 3 in made.line.store.waiting
    go_on.set()
    made.line.store.wait_for(24)
    assert made.opened
    wait_until(lambda: made.intake.has_room("m"), 10, "room again")


def test_while_redis_is_away_chunks_come_from_sql(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(n, [n]) for n in range(1, 30)], redis_is_up=False)
    assert len(made.line.store.wait_for(29)) == 29


def test_while_the_database_is_away_offers_wait(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(1, [1])], start=False)
    made.line.store.faults = [Unreachable("away")]
    made.start()
    assert made.intake.offer("m", 1)
    assert len(made.line.store.wait_for(1)) == 1


def test_stop_sends_back_who_waits(rig: Callable[..., Rig]) -> None:
    made = rig([], start=False)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(made.intake.offer("m", 1)))
    thread.start()
    wait_until(lambda: made.intake._offers, 10, "the offer")
    made.intake.stop(10)
    thread.join(10)
    assert answers == [False]
    assert not made.intake.offer("m", 2)
    assert not made.intake.has_room("m")


def test_a_model_that_cannot_be_loaded_fails_its_jobs_only(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(1, [1, 2], version=2, max_attempts=1), chunk(2, [5])])

    def acquire(number: int) -> Resident:
        raise LoadFailed(f"model version {number} cannot be loaded: no such file")

    made.line.residency.acquire = acquire  # type: ignore[method-assign]
    made.offer(1, 2)
    outcomes = made.line.store.wait_for(3)
    assert b"LoadFailed" in (outcomes[100].error or b"")
    assert outcomes[200].output is not None


def test_a_model_is_loaded_once_for_all_that_wait(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(1, [1]), chunk(2, [2])])
    resident = made.line.residency.all.pop(1)
    loads: list[int] = []

    def acquire(number: int) -> Resident:
        loads.append(number)
        wait_until(lambda: len(made.line.ledger) == 2, 10, "both claims")
        made.line.residency.all[1] = resident
        made.line.residency.pins[1] += 1
        return resident

    made.line.residency.acquire = acquire  # type: ignore[method-assign]
    made.offer(1, 2)
    made.line.store.wait_for(2)
    assert loads == [1]
    assert made.served == [(1, revision_of(Plus))]
    wait_until(lambda: made.line.residency.pins[1] == 0, 10, "the pins given back")


def test_chunks_that_came_back_run_alone_and_one_by_one(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(1, range(4)), chunk(2, [10, 11], suspect=True), chunk(3, [20], suspect=True), chunk(4, [30])])
    go_on = threading.Event()
    made.model.trouble = lambda batch: go_on.wait(20) and None
    made.offer(1)
    wait_until(lambda: made.model.batches, 10, "the first batch")
    made.offer(2, 3)
    wait_until(lambda: len(made.line.ledger) >= 2, 10, "a claim")
    assert not made.intake.has_room("m")
    made.offer(4)
    go_on.set()
    made.line.store.wait_for(8)
    assert sorted(made.model.batches[1:]) == [[10.0, 11.0], [20.0], [30.0]]
    assert sorted(made.line.store.alone) == [2, 3]
    wait_until(lambda: made.intake.has_room("m"), 10, "the end of it")


def test_a_run_is_started_and_its_message_done_with(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(1, ["a run"], version=2), chunk(2, [5])], room=1)
    assert made.intake.has_room("train:a")
    assert made.intake.offer("train:a", 1)
    assert made.places.started == [1]
    assert made.intake.offer("m", 2), "inference goes on beside it"
    made.line.store.wait_for(1)
    assert len(made.line.ledger) == 0, "the run is not in it"


def test_a_run_that_comes_too_late_is_anothers(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(1, ["a run"], version=2), chunk(2, ["a run"], version=3)], room=1, start=False)
    answers: dict[int, bool] = {}
    lanes = {1: "train:a", 2: "train:b"}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: made.intake.offer(lanes[n], n)}), daemon=True)
        for n in lanes
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(made.intake._offers) == 2, 10, "both offers")
    made.start()
    for thread in threads:
        thread.join(10)
    assert sorted(answers.values()) == [False, True]
    assert len(made.places.started) == 1
    assert not made.intake.has_room("train:a")
    assert not made.intake.has_room("train:b")
    assert not made.intake.offer("train:b", 2), "without waiting for hours"
    assert made.intake.has_room("m")


def test_while_redis_is_away_one_run_at_a_time_comes_from_sql(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(n, ["a run"], version=2) for n in (1, 2)] + [chunk(3, [7])], room=1, redis_is_up=False)
    made.line.store.wait_for(1)
    assert made.places.started == [1]
    assert list(made.line.store.waiting) == [2]


def test_a_suspect_does_not_wait_for_a_run(rig: Callable[..., Rig]) -> None:
    made = rig([chunk(1, ["a run"], version=2), chunk(2, [5], suspect=True)], room=1)
    assert made.intake.offer("train:a", 1)
    assert made.intake.offer("m", 2)
    made.line.store.wait_for(1)
