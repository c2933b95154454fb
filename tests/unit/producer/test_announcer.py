"""The announcer: how much room there is, that lost messages come again, and a thread that outlives Redis."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from forking import run_in_child
from servers import RedisServer, wait_until
from torchrelay import announcer as module
from torchrelay import messages
from torchrelay.announcer import Announcer, AnnouncerThread, room, window
from torchrelay.broker import SEPARATOR, Broker
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.errors import ModelNotFound, Unreachable
from torchrelay_storage.fleet import Fleet, WorkerRow
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_storage.submission import NewJob, Submission
from torchrelay_storage.waiting import Announced

QUEUE = messages.queue_name("digits")

WORKER = WorkerRow(
    id=1, name="w", host="h", pid=1, device="cpu", models=None, stats={}, started_at=0.0, beat_at=0.0, stopped_at=None,
    alive=True, beat_age=0.0,
)  # fmt: skip


def fast(rate: float) -> WorkerRow:
    return replace(WORKER, stats={"rates": {"digits": rate}})


@pytest.mark.parametrize(
    ("workers", "chunks"),
    [
        ([], 4),
        ([WORKER], 4),
        ([WORKER] * 10, 20),
        ([replace(WORKER, alive=False)] * 10, 4),
        ([replace(WORKER, models=("other",))] * 10, 4),
        ([replace(WORKER, models=("digits",))] * 10, 20),
        ([fast(40.0)], 30),
        ([fast(40.0), fast(0.5)], 31),
        ([fast(40.0), replace(fast(900.0), alive=False)], 30),
        ([fast(1e9)], 512),
        ([WORKER] * 400, 800),
        ([replace(WORKER, stats={"rates": {"digits": "many"}})], 4),
        ([replace(WORKER, stats={"rates": 3})], 4),
        ([fast(float("nan"))], 4),
    ],
)
def test_a_window_is_what_the_workers_do_not_hold_and_two_chunks_each(workers: list[WorkerRow], chunks: int) -> None:
    assert window("digits", workers, 2.0) == chunks


def test_room_is_counted_among_what_is_as_urgent_or_more() -> None:
    assert room({}, 4) == dict.fromkeys(range(10), 4)
    left = room({9: 1, 5: 2, 0: 10}, 4)
    assert left == {9: 3, 8: 3, 7: 3, 6: 3, 5: 1, 4: 1, 3: 1, 2: 1, 1: 1, 0: 0}


# --- against a database and Redis ---------------------------------------------------------------------------


class System:
    """A database with a model, a broker, and an announcer."""

    def __init__(self, settings: Settings) -> None:
        self.db = Database(settings.database_url)
        self.broker = Broker(settings)
        self.announcer = Announcer(self.db, self.broker)
        self.version: ModelVersion = Registry(self.db).register("digits", "digits", chunk_size=1)

    def submit(self, count: int, priority: int = 5) -> None:
        jobs = [NewJob(b"1") for _ in range(count)]
        JobStore(self.db).submit([Submission(self.version, Options(priority=priority), jobs)])

    def sent(self) -> dict[int, int]:
        return {p: n for p, n in self.broker.depths(QUEUE).items() if n}


@pytest.fixture
def system(sqlite_settings: Settings) -> Iterator[System]:
    system = System(sqlite_settings)
    yield system
    system.broker.close()
    system.db.dispose()


def test_no_more_goes_out_than_the_window_holds(system: System) -> None:
    system.submit(10)
    assert system.announcer.announce("digits") == 4
    assert system.announcer.announce("digits") == 0
    assert system.sent() == {5: 4}
    system.broker.redis.rpop(f"{QUEUE}{SEPARATOR}4")
    assert system.announcer.announce("digits") == 1


def test_an_urgent_chunk_never_waits_for_room_that_lesser_ones_hold(system: System) -> None:
    system.submit(10, priority=0)
    system.announcer.announce("digits")
    system.submit(2, priority=9)
    assert system.announcer.announce("digits") == 2
    assert system.sent() == {0: 4, 9: 2}


def test_the_fleet_widens_the_window(system: System) -> None:
    fleet = Fleet(system.db)
    worker = fleet.register("w", host="h", pid=1, device="cpu").id
    fleet.beat(worker, {"rates": {"digits": 10.0}})
    system.submit(20)
    assert system.announcer.announce("digits") == 8


def test_a_queue_that_runs_dry_doubles_and_shrinks_again(system: System) -> None:
    def announced(taken: int) -> int:
        for _ in range(taken):
            assert system.broker.redis.rpop(f"{QUEUE}{SEPARATOR}4")
        return system.announcer.announce("digits")

    system.submit(200)
    assert [announced(taken) for taken in (0, 4, 4, 4, 4)] == [4] * 5, "workers may only hold what they have taken"
    assert [announced(taken) for taken in (4, 8, 16)] == [8, 16, 32]
    assert announced(31) == 31, "it was not dry, and needs no more"
    assert [announced(taken) for taken in (0, 0, 0, 28)] == [0, 0, 0, 0], "who is slow leaves it full: it halves"
    assert announced(4) == 4, "and it takes some more to convince it again"


def test_what_runs_dry_because_nothing_is_left_does_not_grow(system: System) -> None:
    for n in (3, 3, 30):
        system.submit(n)
        assert system.announcer.announce("digits") == min(n, 4)
        system.broker.redis.delete(f"{QUEUE}{SEPARATOR}4")


def test_lost_messages_come_again_when_the_queue_is_empty(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOST_AFTER", 0.05)
    system.submit(3)
    system.announcer.announce("digits")
    system.broker.redis.flushall()
    wait_until(lambda: system.announcer.announce_again("digits") == 3, 5)
    assert system.sent() == {5: 3}
    time.sleep(0.1)
    assert system.announcer.announce_again("digits") == 0  # not lost: they wait


def test_of_a_queue_that_is_not_empty_only_what_is_missing_is_sent_again(sqlite_settings: Settings) -> None:
    system = System(sqlite_settings.model_copy(update={"announce_again": 0.2}))
    system.submit(6)
    assert system.announcer.announce("digits") == 4
    kept = system.broker.waiting(QUEUE)
    assert len(kept) == 4
    assert system.announcer.announce_again("digits") == 0, "too young"
    system.broker.redis.rpop(f"{QUEUE}{SEPARATOR}4")
    system.broker.redis.lpush(QUEUE, b"not one of ours")
    [lost] = kept - system.broker.waiting(QUEUE)
    wait_until(lambda: system.announcer.announce_again("digits") == 1, 5)
    assert system.broker.waiting(QUEUE) == kept, f"{lost} is there again"
    for _ in range(3):
        time.sleep(0.25)
        assert system.announcer.announce_again("digits") == 0, "all that is announced is there, however old"
    assert system.sent() == {5: 4, 9: 1}
    system.broker.close()
    system.db.dispose()


def test_a_lane_of_training_runs_is_announced_and_does_not_fill_redis(sqlite_settings: Settings) -> None:
    system = System(sqlite_settings.model_copy(update={"announce_again": 0.05}))
    with pytest.raises(ModelNotFound):
        system.announcer.announce("train:regression")
    system.version = Registry(system.db).lane("regression", {"type": "object"})
    system.submit(6)
    queue = messages.queue_name("train:regression")
    assert system.announcer.announce("train:regression") == 4
    system.broker.redis.rpop(f"{queue}{SEPARATOR}4")
    time.sleep(0.06)
    assert system.announcer.announce_again("train:regression") == 1  # what there is room for, be it lost or not
    time.sleep(0.06)
    assert system.announcer.announce_again("train:regression") == 0
    assert sum(system.broker.depths(queue).values()) == 4
    system.broker.close()
    system.db.dispose()


def test_nothing_is_moved_while_redis_is_away(system: System, redis_server: RedisServer) -> None:
    system.submit(1)
    redis_server.pause()
    try:
        with pytest.raises(Unreachable):
            system.announcer.announce("digits")
    finally:
        redis_server.resume()
    assert system.announcer.announce("digits") == 1


def test_an_unknown_model_is_refused(system: System) -> None:
    with pytest.raises(ModelNotFound):
        system.announcer.announce_again("nobody")


# --- the thread ---------------------------------------------------------------------------------------------


class Double:
    """An announcer that can be blocked and be away."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.away = False
        self.gate = threading.Event()
        self.gate.set()

    def announce(self, model: str) -> int:
        self.calls.append(model)
        assert self.gate.wait(10)
        if self.away:
            raise Unreachable("Redis is away")
        return 1

    def announce_again(self, model: str) -> int:
        self.calls.append(f"again {model}")
        return 0

    def send(self, model: str, announced: Sequence[Announced]) -> int:
        if announced:
            self.calls.append(f"{model} {[a.chunk for a in announced]}")
            if self.away:
                raise Unreachable("Redis is away")
        return len(announced)

    def window(self, model: str) -> int:
        return 4


def test_wakes_of_one_model_coalesce() -> None:
    double = Double()
    with AnnouncerThread(double) as thread:
        double.gate.clear()
        thread.wake("a")
        wait_until(lambda: double.calls)
        for _ in range(100):
            thread.wake("a")
            thread.wake("b")
        double.gate.set()
        assert thread.flush(5)
        assert sorted(double.calls) == ["a", "a", "b"]


def test_what_is_announced_already_is_only_sent() -> None:
    double = Double()
    with AnnouncerThread(double) as thread:
        assert thread.window("a") == 4
        thread.send_many([], {"a": [Announced(1, 5), Announced(2, 5)]})
        assert thread.flush(5)
        assert double.calls == ["a [1, 2]"]
        thread.send_many(["b"], {"b": [Announced(3, 5)]})
        assert thread.flush(5)
    assert double.calls == ["a [1, 2]", "b [3]", "b"]
    assert thread.window("a") == 0, "it is closed"


def test_what_could_not_be_sent_is_sent_later() -> None:
    double = Double()
    double.away = True
    with AnnouncerThread(double, retry_seconds=0.01) as thread:
        thread.send_many([], {"a": [Announced(1, 5)]})
        wait_until(lambda: len(double.calls) > 3)
        assert thread.window("a") == 0, "what is stored now waits in SQL"
        double.away = False
        wait_until(lambda: not thread.is_down)
        assert thread.flush(5)
    assert "a" in double.calls
    assert double.calls[-1] == "again a"


def test_redis_away_is_said_once_and_made_up_for() -> None:
    double = Double()
    double.away = True
    with capture_logs() as logs, AnnouncerThread(double, retry_seconds=0.01) as thread:
        began = time.monotonic()
        thread.wake("a")
        assert time.monotonic() - began < 2
        wait_until(lambda: len(double.calls) > 5)
        assert thread.is_down
        assert not thread.flush(60)  # at once: it is known to be away
        assert time.monotonic() - began < 30
        thread.wake("b")
        double.away = False
        wait_until(lambda: not thread.is_down)
        assert thread.flush(5)
        assert {"a", "b"} <= set(double.calls)
        assert any(call.startswith("again ") for call in double.calls)
    assert [line["event"] for line in logs] == ["redis_unreachable", "redis_reachable"]


def test_a_model_that_cannot_be_announced_does_not_stop_the_others() -> None:
    double = Double()

    def announce(model: str) -> int:
        if model == "gone":
            raise ModelNotFound("no such model")
        if model == "odd":
            raise ZeroDivisionError
        return Double.announce(double, model)

    double.announce = announce  # type: ignore[method-assign]
    with capture_logs() as logs, AnnouncerThread(double) as thread:
        for model in ("gone", "odd", "a"):
            thread.wake(model)
        assert thread.flush(5)
    assert double.calls == ["a"]
    assert {line["event"] for line in logs} == {"announce_refused", "announce_failed"}


def test_closing_announces_what_is_left_and_ends_the_thread() -> None:
    double = Double()
    thread = AnnouncerThread(double)
    for n in range(20):
        thread.wake(str(n))
    thread.close()
    assert len(double.calls) == 20
    assert not [t for t in threading.enumerate() if t.name == "torchrelay-announcer"]
    thread.wake("late")
    assert len(double.calls) == 20


def test_an_idle_thread_ends_and_the_next_wake_starts_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.02)
    double = Double()
    with AnnouncerThread(double) as thread:
        thread.wake("a")
        wait_until(lambda: not [t for t in threading.enumerate() if t.name == "torchrelay-announcer"])
        thread.wake("b")
        assert thread.flush(5)
    assert double.calls == ["a", "b"]


def test_a_forked_child_announces_by_itself() -> None:
    double = Double()
    with AnnouncerThread(double) as thread:
        thread.wake("parent")
        assert thread.flush(5)

        def child() -> None:
            thread.wake("child")
            assert thread.flush(30)
            assert double.calls == ["parent", "child"]

        run_in_child(child)
