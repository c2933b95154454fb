"""The duties and who does them: one leader, faults that stop nothing, slices until nothing is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from servers import wait_until
from torchrelay_storage import values
from torchrelay_storage.artifacts import run_path
from torchrelay_storage.errors import InvalidInput, Unreachable
from torchrelay_storage.retention import Purged
from torchrelay_storage.settle import Moved
from torchrelay_storage.values import Reference
from torchrelay_storage.waiting import ModelDue
from torchrelay_worker.maintenance.announce import Announce
from torchrelay_worker.maintenance.expire import Expire
from torchrelay_worker.maintenance.leader import LEASE_SECONDS, RENEW_SECONDS, Leader
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
    reach, chunks = Reach(10.0, clock), Chunks()
    leader = Leader(
        Leases(clock), lambda: 1, [Rescue(chunks, lambda *_: None, 10.0, reach)], clock, answered=reach.note
    )

    def seconds_of_doubt() -> int:
        """Let 30 seconds pass; return after how many of them the silent were rescued."""
        doubt = 0
        for _ in range(30):
            leader.tick()
            doubt += chunks.stale_after is None
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
