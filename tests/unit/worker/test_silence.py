"""A consumer that is silent is built anew, then its process is replaced; one that has nothing to say is left alone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from servers import wait_until
from torchrelay_storage.errors import Unreachable
from torchrelay_worker import recycling
from torchrelay_worker.pipeline.silence import Silence
from torchrelay_worker.recycling import Recycling, resident_mib
from worker_fakes import Clock


class Rig:
    """An intake, a consumer and queues in one."""

    def __init__(self, limit: float = 30.0) -> None:
        self.clock = Clock()
        self.heard_at = 0.0
        self.is_offered = False
        self.room = True
        self.depth = 3
        self.away = False
        self.rebuilt = 0
        self.silence = Silence(self, self, served=lambda: {"m": 1}, depths=self.depths, seconds=limit, clock=self.clock)

    def has_room(self, model: str) -> bool:
        return self.room

    def rebuild(self) -> None:
        self.rebuilt += 1

    def depths(self, queue: str) -> dict[int, int]:
        if self.away:
            raise Unreachable("away")
        return {5: self.depth}

    def pass_(self, seconds: float) -> str | None:
        for _ in range(int(seconds)):
            self.clock.now += 1
            reason = self.silence.look()
            if reason is not None:
                return reason
        return None


def test_it_is_built_anew_then_replaced() -> None:
    rig = Rig()
    assert rig.pass_(25) is None
    assert rig.rebuilt == 0
    assert rig.pass_(10) is None
    assert rig.rebuilt == 1
    assert "silent" in (rig.pass_(30) or "")
    assert rig.rebuilt == 1


def test_a_message_that_comes_begins_it_all_again() -> None:
    rig = Rig()
    rig.pass_(40)
    assert rig.rebuilt == 1
    rig.heard_at = 7.0
    assert rig.pass_(28) is None
    assert rig.rebuilt == 1


@pytest.mark.parametrize("why", ["nothing waits", "no room", "an offer waits for the database", "no redis"])
def test_who_has_a_reason_is_not_silent(why: str) -> None:
    rig = Rig()
    rig.depth = 0 if why == "nothing waits" else 3
    rig.room = why != "no room"
    rig.is_offered = why == "an offer waits for the database"
    rig.away = why == "no redis"
    assert rig.pass_(200) is None
    assert rig.rebuilt == 0


def test_a_process_that_was_stopped_was_not_silent() -> None:
    rig = Rig()
    rig.pass_(10)
    rig.clock.now += 600
    assert rig.pass_(10) is None
    assert rig.rebuilt == 0


# --- what follows ------------------------------------------------------------------------------------------------


@pytest.fixture
def signals() -> Iterator[list[int]]:
    """The SIGTERMs that this process got."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    yield got
    signal.signal(signal.SIGTERM, before)


class Worn:
    def __init__(self, **limits: int) -> None:
        self.recorded = 0
        self.silent: str | None = None
        self.stopping = False
        self.away = False
        self.stopped = threading.Event()
        self.recycling = Recycling(
            recorded=lambda: self.recorded,
            silent=lambda: self.silent,
            stop=self.stopped.set,
            is_stopping=lambda: self.stopping,
            must_wait=lambda: self.away,
            **limits,
        )


def test_enough_jobs_are_a_reason_to_be_replaced(signals: list[int]) -> None:
    it = Worn(max_jobs=10)
    it.recorded = 9
    with it.recycling:
        threading.Event().wait(3 * recycling.LOOK_SECONDS)
        assert it.recycling.wanted is None
        it.recorded = 11
        wait_until(lambda: signals, 10, "the signal")
    assert "11 jobs" in (it.recycling.wanted or "")
    assert len(signals) == 1


def test_so_is_memory(signals: list[int]) -> None:
    used = resident_mib()
    assert 5 < used < 100_000
    with Worn(max_memory=used * 10).recycling as well, Worn(max_memory=1).recycling as fat:
        wait_until(lambda: signals, 10, "the signal")
        assert "MiB" in (fat.wanted or "")
        assert well.wanted is None


def test_so_is_silence_and_a_main_thread_that_takes_no_signal_is_not_waited_for(
    signals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recycling, "STUCK_SECONDS", 0.1)
    it = Worn()
    it.silent = "silent"
    with it.recycling:
        assert it.stopped.wait(10)
    assert it.recycling.wanted == "silent"
    wait_until(lambda: signals, 10, "the signal")


def test_who_drains_already_is_left_alone(signals: list[int]) -> None:
    it = Worn(max_jobs=1)
    it.recorded, it.stopping = 5, True
    with it.recycling:
        threading.Event().wait(3 * recycling.LOOK_SECONDS)
    assert it.recycling.wanted is None
    assert not signals


def test_results_that_wait_for_the_database_are_not_thrown_away(signals: list[int]) -> None:
    it = Worn(max_jobs=1)
    it.recorded, it.away = 5, True
    with it.recycling:
        threading.Event().wait(3 * recycling.LOOK_SECONDS)
        assert it.recycling.wanted is None
        it.away = False
        wait_until(lambda: signals, 10, "the signal")
