"""The duties and who does them: one leader, faults that stop nothing, slices until nothing is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
from structlog.testing import capture_logs

from servers import wait_until
from torchrelay_storage import values
from torchrelay_storage.artifacts import run_path
from torchrelay_storage.errors import InvalidInput, Unreachable
from torchrelay_storage.retention import Purged
from torchrelay_storage.settle import Moved
from torchrelay_storage.upkeep import Needed
from torchrelay_storage.values import Reference
from torchrelay_storage.waiting import ModelDue
from torchrelay_worker.maintenance.announce import Announce
from torchrelay_worker.maintenance.expire import Expire
from torchrelay_worker.maintenance.leader import LEASE_SECONDS, RENEW_SECONDS, TICK_SECONDS, Leader
from torchrelay_worker.maintenance.look import IDLE_SECONDS, SECONDS, Look
from torchrelay_worker.maintenance.purge import DAY, Purge
from torchrelay_worker.maintenance.reach import Reach
from torchrelay_worker.maintenance.rescue import Rescue
from worker_fakes import Clock


class Leases:
    """One lease, on a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.holder: int | None = None
        self.until = 0.0
        self.away = False

    def acquire(self, lease: str, holder: int, seconds: float) -> bool:
        if self.away:
            raise Unreachable("away")
        if self.holder not in (None, holder) and self.clock() < self.until:
            return False
        self.holder, self.until = holder, self.clock() + seconds
        return True

    def release(self, lease: str, holder: int) -> None:
        if self.holder == holder:
            self.holder = None


class Count:
    """A duty that counts how often it was done, and fails as told."""

    def __init__(self, name: str, every: float) -> None:
        self.name = name
        self.every = every
        self.runs = 0
        self.faults: list[Exception] = []

    def run(self) -> None:
        self.runs += 1
        if self.faults:
            raise self.faults.pop(0)


def test_one_leads_and_another_takes_over_when_it_falls_silent() -> None:
    clock = Clock()
    leases = Leases(clock)
    duties = [Count("d", 1.0), Count("d", 1.0)]
    leaders = [Leader(leases, lambda n=n: n, [duty], clock) for n, duty in enumerate(duties, 1)]  # type: ignore[misc]
    for _ in range(4):
        clock.now += 1.0
        for leader in leaders:
            leader.tick()
    assert (duties[0].runs, duties[1].runs) == (4, 0)
    clock.now += LEASE_SECONDS + RENEW_SECONDS
    leaders[1].tick()
    assert duties[1].runs == 1
    clock.now += 1.0
    leaders[0].tick()
    assert duties[0].runs == 4, "it has noticed that it leads no more"


def test_each_duty_has_its_own_time_and_no_fault_stops_the_others() -> None:
    clock = Clock()
    often, seldom = Count("often", 1.0), Count("seldom", 5.0)
    often.faults = [Unreachable("a"), Unreachable("b"), InvalidInput("c"), RuntimeError("d")]
    leader = Leader(Leases(clock), lambda: 1, [often, seldom], clock)
    for _ in range(10):
        leader.tick()
        clock.now += 1.0
    assert (often.runs, seldom.runs) == (10, 2)


def test_without_a_database_nobody_leads() -> None:
    clock = Clock()
    leases = Leases(clock)
    duty = Count("d", 1.0)
    leader = Leader(leases, lambda: 1, [duty], clock)
    leases.away = True
    leader.tick()
    assert duty.runs == 0
    leases.away = False
    clock.now += RENEW_SECONDS
    leader.tick()
    assert duty.runs == 1


def test_the_thread_gives_the_lease_back() -> None:
    clock = Clock()
    leases = Leases(clock)
    duty = Count("d", 1.0)
    with Leader(leases, lambda: 1, [duty], clock):
        wait_until(lambda: duty.runs, 10, "a run")
    assert leases.holder is None


# --- what a look finds --------------------------------------------------------------------------------------

QUIET = Needed(announce=False, rescue=False, expire=False, held=False, next_due=None)


class Eyes:
    """An Upkeep that sees what it is told."""

    def __init__(self, needed: Needed = QUIET) -> None:
        self.needed = needed
        self.stale_after: list[float | None] = []
        self.faults: list[Exception] = []

    def look(self, stale_after: float | None) -> Needed:
        self.stale_after.append(stale_after)
        if self.faults:
            raise self.faults.pop(0)
        return self.needed


class Watched:
    """A leader on a clock, with its look and a duty of each name."""

    def __init__(self, needed: Needed = QUIET) -> None:
        self.clock = Clock()
        self.eyes = Eyes(needed)
        self.duties = [Count(kind.name, kind.every) for kind in (Announce, Rescue, Expire)]
        look = Look(self.eyes, 10.0, Reach(10.0, self.clock))
        self.leader = Leader(Leases(self.clock), lambda: 1, self.duties, self.clock, look=look)
        self.tick()  # as whoever begins to lead, it does everything once
        self.reset()

    def tick(self) -> None:
        self.leader.tick()
        self.clock.now += TICK_SECONDS

    def reset(self) -> None:
        self.eyes.stale_after.clear()
        for duty in self.duties:
            duty.runs = 0

    def pass_by(self, seconds: float) -> tuple[int, list[int]]:
        """Let seconds pass; return how often it looked, and how often each duty was done."""
        self.reset()
        for _ in range(round(seconds / TICK_SECONDS)):
            self.tick()
        return len(self.eyes.stale_after), [duty.runs for duty in self.duties]


def needed(**changes: Any) -> Needed:
    return dataclasses.replace(QUIET, **changes)


def test_what_is_not_needed_is_not_done_but_for_now_and_then() -> None:
    it = Watched()
    assert it.pass_by(20.0) == (10, [0, 0, 0])
    assert it.pass_by(60.0) == (30, [1, 1, 1]), "a look may be wrong"


@pytest.mark.parametrize(("place", "need"), [(0, "announce"), (1, "rescue"), (2, "expire")])
def test_what_is_needed_is_done_at_once_and_alone(place: int, need: str) -> None:
    it = Watched()
    it.pass_by(IDLE_SECONDS)
    it.eyes.needed = needed(**{need: True})
    looks, runs = it.pass_by(10.0)
    assert 9 <= looks <= 10
    assert runs == [looks if i == place else 0 for i in range(3)]
    it.eyes.needed = QUIET
    it.pass_by(SECONDS)
    assert it.pass_by(10.0) == (5, [0, 0, 0])


def test_while_chunks_are_held_it_looks_more_often() -> None:
    assert Watched(needed(held=True)).pass_by(10.0) == (10, [0, 0, 0])


@pytest.mark.parametrize(("due", "waits"), [(0.01, 0.5), (0.9, 1.0), (1.5, 1.5), (1.6, 2.0), (60.0, 2.0)])
def test_it_looks_when_something_becomes_due(due: float, waits: float) -> None:
    it = Watched(needed(next_due=due))
    it.pass_by(10.0)  # until a look that was told so
    while not it.pass_by(TICK_SECONDS)[0]:
        pass
    asleep = 1
    while not it.pass_by(TICK_SECONDS)[0]:
        asleep += 1
    assert asleep * TICK_SECONDS == waits


def test_a_look_that_fails_is_said_once_and_stops_nothing() -> None:
    it = Watched()
    it.eyes.faults = [Unreachable("away")] * 80
    with capture_logs() as logs:
        looks, runs = it.pass_by(70.0)
        it.pass_by(20.0)
    assert 69 <= looks <= 70
    assert runs == [1, 1, 1]
    assert [(entry["event"], entry["duty"]) for entry in logs] == [("duty_waits", "look"), ("duty_goes_on", "look")]


def test_a_duty_that_fails_is_tried_again_while_it_is_needed() -> None:
    it = Watched(needed(announce=True))
    it.duties[0].faults = [Unreachable("away")] * 3
    with capture_logs() as logs:
        assert it.pass_by(10.0) == (10, [10, 0, 0])
    assert [(entry["event"], entry["duty"]) for entry in logs] == [
        ("duty_waits", "announce"),
        ("duty_goes_on", "announce"),
    ]


# --- the duties ---------------------------------------------------------------------------------------------


class Chunks:
    """Answers of a ChunkStore, one a call."""

    def __init__(self, *moves: Moved) -> None:
        self.moves = list(moves)
        self.stale_after: float | None = -1.0

    def rescue(self, stale_after: float | None) -> Moved:
        self.stale_after = stale_after
        return self.moves.pop(0) if self.moves else Moved()

    def expire(self) -> Moved:
        return self.moves.pop(0) if self.moves else Moved()

    def due_models(self) -> list[ModelDue]:
        return [ModelDue(1, "both", True, True), ModelDue(2, "waiting", True, False), ModelDue(3, "sent", False, True)]


def test_rescue_and_expire_go_on_until_nothing_is_left_and_tell_who_waits() -> None:
    moves = (Moved(2, (1,), (7,)), Moved(1, (2,), ()))
    told: list[Any] = []

    def publish(chunks: Any, batches: Any) -> None:
        told.append((chunks, batches))

    reach = Reach(10.0)
    for duty in (Rescue(Chunks(*moves), publish, 10.0, reach), Expire(Chunks(*moves), publish)):
        told.clear()
        duty.run()
        assert told == [((1,), (7,)), ((2,), ())]


def test_silence_means_death_only_to_who_was_in_reach_all_along() -> None:
    clock = Clock()
    reach, chunks, eyes = Reach(10.0, clock), Chunks(), Eyes(needed(rescue=True))
    rescue = Rescue(chunks, lambda *_: None, 10.0, reach)
    leader = Leader(Leases(clock), lambda: 1, [rescue], clock, look=Look(eyes, 10.0, reach), answered=reach.note)

    def seconds_of_doubt() -> int:
        """Let 30 seconds pass; return after how many of them the silent were rescued."""
        doubt = 0
        for _ in range(30):
            leader.tick()
            doubt += chunks.stale_after is None
            assert eyes.stale_after[-1] == chunks.stale_after
            clock.now += 1.0
        assert chunks.stale_after == 10.0
        return doubt

    assert 9 <= seconds_of_doubt() <= 12, "it has just begun: the database may have been away"
    assert seconds_of_doubt() == 0
    clock.now += 8.0  # stopped, or the database did not answer
    assert 9 <= seconds_of_doubt() <= 12


def test_announce_does_for_each_model_what_is_due() -> None:
    done: list[tuple[str, str]] = []

    class Announcer:
        def announce(self, model: str) -> int:
            done.append(("announce", model))
            return 1

        def announce_again(self, model: str) -> int:
            done.append(("again", model))
            return 0

    Announce(Chunks(), Announcer()).run()
    assert done == [("again", "both"), ("announce", "both"), ("announce", "waiting"), ("again", "sent")]


class Old:
    """A Retention with so many slices, a Fleet and an object store."""

    def __init__(self, slices: int) -> None:
        self.slices = slices
        self.deleted: list[str] = []
        self.older_than: float | None = None
        self.forgot: list[float] = []

    def purge(self, older_than: float, *, reference: bytes) -> Purged:
        self.older_than = older_than
        if not self.slices:
            return Purged(0, 0, ())
        self.slices -= 1
        stored = values.encode_reference(Reference(f"memory:///{self.slices}", 1, "0" * 64, "x/y"))
        assert stored[:1] == reference
        return Purged(1, 1, (stored,), (7,) if self.slices == 1 else ())

    def under(self, path: str) -> list[str]:
        return [f"memory:///{path}/orphan"]

    def delete(self, uris: Iterable[str]) -> None:
        self.deleted.extend(uris)

    def forget(self, older_than: float) -> int:
        self.forgot.append(older_than)
        return 0


def test_purge_deletes_rows_then_artifacts() -> None:
    old = Old(3)
    Purge(old, old, old, days=2.0).run()
    assert old.deleted == [
        "memory:///2",
        "memory:///1",
        f"memory:///{run_path(7, 'checkpoints')}/orphan",
        "memory:///0",
    ]
    assert old.older_than == 2 * DAY
    assert old.forgot == [7 * DAY], "their names and handlers stand in jobs that are kept"


def test_purge_is_bounded_and_can_be_off() -> None:
    many = Old(1_000)
    Purge(many, many, many, days=1.0).run()
    assert 0 < len(many.deleted) < 100
    kept = Old(3)
    Purge(kept, kept, kept, days=0.0).run()
    assert (kept.deleted, kept.forgot) == ([], [])
    Purge(kept, kept, kept, days=30.0).run()
    assert kept.forgot == [30 * DAY]
