"""What the warden, the ledger, the watch and the pace make of what they see."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay_storage.chunk_store import Held
from torchrelay_worker.pipeline.batcher import Batcher, Limits
from torchrelay_worker.pipeline.ledger import Hold, Ledger, Work
from torchrelay_worker.pipeline.pace import LARGEST_CHUNK, Pace
from torchrelay_worker.pipeline.warden import IDLE_ROUNDS, STRAY_ROUNDS, Warden
from torchrelay_worker.pipeline.watch import Watch
from worker_fakes import Clock, Store, chunk


class Held3:
    """A ledger with three chunks of four jobs, prepared and waiting in the batcher."""

    def __init__(self) -> None:
        self.store = Store()
        self.ledger = Ledger()
        self.batcher: Batcher[Work] = Batcher()
        self.holds: list[Hold] = self.ledger.claim([chunk(n, range(4)) for n in (1, 2, 3)])
        for hold in self.holds:
            self.batcher.put(1, Limits(8), [Work(hold, job.id, 0, job.id) for job in hold.claimed.jobs])
        self.store.held_now = [Held(n, 1, 0) for n in (1, 2, 3)]
        self.lost: list[int] = []
        self.warden = Warden(self.store, self.ledger, self.batcher, worker=7, lost=self.lost.append)


def test_what_is_still_ours_is_left_alone() -> None:
    it = Held3()
    it.warden.look()
    assert it.batcher.counts() == {1: 12}
    assert it.lost == []


@pytest.mark.parametrize("now", [[Held(1, 1, 0), Held(3, 1, 0)], [Held(1, 1, 0), Held(2, 3, 0), Held(3, 1, 0)]])
def test_a_rescued_chunk_is_dropped(now: list[Held]) -> None:
    it = Held3()
    it.store.held_now = now
    it.warden.look()
    assert it.batcher.counts() == {1: 8}
    assert [h.dropped for h in it.holds] == [False, True, False]
    assert len(it.ledger) == 2
    assert it.lost == [1]


def test_a_chunk_that_is_being_recorded_is_not_lost() -> None:
    it = Held3()
    it.store.held_now = []
    for hold in it.holds:
        hold.recording = True
    it.warden.look()
    assert len(it.ledger) == 3


def test_cancelled_jobs_are_forgotten() -> None:
    it = Held3()
    it.store.held_now = [Held(1, 1, 0), Held(2, 1, 2), Held(3, 1, 0)]
    it.store.open = {200, 203}
    it.warden.look()
    assert it.holds[1].cancelled == {201, 202}
    assert it.batcher.counts() == {1: 10}
    assert it.ledger.ahead(10) == (3, 10)
    it.store.open = set()
    it.warden.look()  # nothing new was cancelled: nothing is asked
    assert it.holds[1].cancelled == {201, 202}


def test_a_chunk_that_only_the_database_knows_goes_back_after_a_while() -> None:
    it = Held3()
    it.store.held_now = [*it.store.held_now, Held(9, 4, 0)]
    for _ in range(STRAY_ROUNDS - 1):
        it.warden.look()
    assert it.store.handed_back == []
    it.warden.look()
    assert it.store.handed_back == [(9, 4)]


def test_nothing_held_is_asked_about_now_and_then_only() -> None:
    store = Store()
    asked: list[int] = []
    store.held = lambda worker: asked.append(worker) or []  # type: ignore[method-assign, func-returns-value]
    warden = Warden(store, Ledger(), Batcher(), worker=7)
    for _ in range(2 * IDLE_ROUNDS):
        warden.look()
    assert len(asked) == 2


def test_a_stray_that_was_seen_while_nothing_is_held_goes_back_as_soon() -> None:
    store = Store()
    store.held_now = [Held(9, 4, 0)]
    warden = Warden(store, Ledger(), Batcher(), worker=7)
    for _ in range(IDLE_ROUNDS + STRAY_ROUNDS - 2):
        warden.look()
    assert store.handed_back == []
    warden.look()
    assert store.handed_back == [(9, 4)]


# --- the ledger ---------------------------------------------------------------------------------------------


def test_the_ledger_counts_what_is_left() -> None:
    told: list[Any] = []
    ledger = Ledger()
    ledger.changed = lambda: told.append("changed")
    ledger.released = lambda hold: told.append(hold.claimed.chunk)
    one, two = ledger.claim([chunk(1, range(3)), chunk(2, range(2))])
    works = [Work(one, job.id, 0) for job in one.claimed.jobs]
    assert ledger.ahead(10) == (2, 5)
    assert ledger.ended(works[:2]) == {}
    assert ledger.ended(works[2:]) == {10: 1}
    assert ledger.ended(works) == {}  # said twice
    assert ledger.ahead(10) == (1, 2)
    assert ledger.drop([2, 77]) == [two]
    assert ledger.ahead(10) == (0, 0)
    assert [t for t in told if t != "changed"] == [1, 2]


def test_a_chunk_claimed_anew_is_another_hold() -> None:
    ledger = Ledger()
    [old] = ledger.claim([chunk(1, range(2))])
    ledger.drop([1])
    [new] = ledger.claim([chunk(1, range(2), token=3)])
    ledger.ended([Work(old, 100, 0), Work(old, 101, 0)])
    assert ledger.holds() == [new]
    assert not Work(old, 100, 0).is_wanted
    assert Work(new, 100, 0).is_wanted


# --- the watch and the pace ---------------------------------------------------------------------------------


def test_the_watch_tells_the_first_deadline() -> None:
    clock = Clock()
    watch = Watch(clock)
    assert watch.left() is None
    slow = watch.begin(10.0)
    with watch.running(3.0):
        assert watch.left() == 3.0
        clock.now += 5.0
        assert watch.left() == -2.0
    assert watch.left() == 5.0
    watch.end(slow)
    watch.end(slow)
    assert watch.left() is None


def test_a_rate_counts_busy_time_only() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.jobs_per_s(1) is None
    for _ in range(10):
        pace.began(1)
        clock.now += 0.1
        pace.ended(1, jobs=10, chunks=1, left=0)
        clock.now += 60.0  # idle
    assert pace.jobs_per_s(1) == pytest.approx(100.0)
    assert pace.chunks_per_s(1) == pytest.approx(10.0)
    assert pace.chunks_per_s(2) == 0.0


@given(st.floats(0.1, 100_000), st.integers(1, 512))
def test_room_and_chunk_size_follow_the_rate(rate: float, batch: int) -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.began(1)
    clock.now += 100.0
    pace.ended(1, jobs=int(rate * 100), chunks=1, left=1)
    measured = int(rate * 100) / 100
    assert pace.has_room(1, chunks=1, jobs=10**9, batch=batch)
    assert not pace.has_room(1, chunks=2, jobs=0, batch=None)
    assert pace.has_room(1, chunks=9, jobs=2 * batch - 1, batch=batch)
    assert not pace.has_room(1, chunks=9, jobs=int(max(2 * batch, measured)) + 1, batch=batch)
    size = pace.chunk_size(1, batch)
    assert 1 <= size <= LARGEST_CHUNK
    assert size <= max(measured, batch, 1)


def paced(jobs_per_s: int) -> Pace:
    clock = Clock()
    pace = Pace(clock)
    pace.began(1)
    clock.now += 100.0
    pace.ended(1, jobs=100 * jobs_per_s, chunks=1, left=1)
    return pace


def test_more_is_held_of_what_is_sorted_by_length_but_no_more_than_two_seconds_of_work() -> None:
    fast, slow = paced(1000), paced(80)
    assert not fast.has_room(1, chunks=9, jobs=1000, batch=256)
    assert fast.has_room(1, chunks=9, jobs=1999, batch=256, choice=8 * 256)
    assert not fast.has_room(1, chunks=9, jobs=2000, batch=256, choice=8 * 256)
    assert slow.has_room(1, chunks=9, jobs=159, batch=32, choice=8 * 32)
    assert not slow.has_room(1, chunks=9, jobs=160, batch=32, choice=8 * 32)


def test_a_chunk_is_a_tenth_of_a_second_to_a_second_of_work() -> None:
    assert paced(20_000).chunk_size(1, 32) == 2_000
    assert paced(1_000_000).chunk_size(1, 32) == LARGEST_CHUNK
    assert paced(500).chunk_size(1, 32) == 128
    assert paced(80).chunk_size(1, 32) == 80
    assert paced(1).chunk_size(1, 32) == 32


def test_what_is_held_elsewhere_in_this_worker_is_no_stray() -> None:
    it = Held3()
    it.warden = Warden(it.store, it.ledger, it.batcher, worker=7, elsewhere=lambda: {9})
    it.store.held_now.extend([Held(9, 1, 0), Held(8, 1, 0)])
    for _ in range(STRAY_ROUNDS):
        it.warden.look()
    assert it.store.handed_back == [(8, 1)]
