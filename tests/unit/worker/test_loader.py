"""The loading thread: its deadline, the black box, which revision serves, chunks that are gone when it is done."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from servers import wait_until
from torchrelay_storage.errors import Unreachable
from torchrelay_worker.models.model import revision_of
from torchrelay_worker.models.residency import LoadFailed, Resident
from torchrelay_worker.pipeline.ledger import Hold
from torchrelay_worker.pipeline.loader import Loader
from worker_fakes import Line, Loaded, Plus, chunk


class Slow(Loaded):
    """A residency that loads version 2 when it may."""

    def __init__(self) -> None:
        super().__init__({2: Plus()})
        self.missing = self.all.pop(2)
        self.loading, self.go_on = threading.Event(), threading.Event()
        self.trouble: LoadFailed | None = None

    def acquire(self, number: int) -> Resident:
        self.loading.set()
        assert self.go_on.wait(20)
        if self.trouble is not None:
            raise self.trouble
        self.all[number] = self.missing
        self.pins[number] += 1
        return self.missing


class Rig:
    def __init__(self) -> None:
        self.line = Line(Plus())
        self.residency = Slow()
        self.sent: list[Hold] = []
        self.served: list[tuple[int, str]] = []
        self.faults: list[Exception] = []
        residency: Any = self.residency
        self.loader = Loader(
            residency, self.line.recorder, self.line.watch, self.line.box, send=self.sent.append, serves=self.serves
        )
        self.line.ledger.released = self.loader.unpin

    def serves(self, version: int, revision: str) -> None:
        if self.faults:
            raise self.faults.pop()
        self.served.append((version, revision))

    def put(self, number: int) -> Hold:
        [hold] = self.line.ledger.claim([chunk(number, [1, 2], version=2)])
        assert not self.loader.pin(hold)
        self.loader.put(hold)
        return hold


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.line.__enter__()
    made.loader.start()
    yield made
    made.residency.go_on.set()
    made.loader.close()
    made.line.__exit__()


def test_a_load_is_watched_and_noted(rig: Rig) -> None:
    hold = rig.put(1)
    assert rig.residency.loading.wait(20)
    assert rig.line.box.read().versions == {2}
    assert 50 < (rig.line.watch.left() or 0) <= 60
    assert "version 2" in (rig.line.watch.reason() or "")
    rig.residency.go_on.set()
    wait_until(lambda: rig.sent == [hold], 10, "the chunk")
    assert rig.line.box.read().versions == set()
    assert rig.line.watch.left() is None
    assert hold.pinned
    wait_until(lambda: rig.residency.pins[2] == 1, 10, "the chunk's pin alone")


def test_the_revision_that_serves_is_recorded_though_the_database_was_away(rig: Rig) -> None:
    rig.faults = [Unreachable("away")]
    rig.residency.go_on.set()
    rig.put(1)
    wait_until(lambda: rig.sent, 10, "the chunk")
    assert rig.served == []
    rig.loader.say()
    assert rig.served == [(2, revision_of(Plus))]
    rig.loader.say()
    assert len(rig.served) == 1


def test_a_chunk_that_is_gone_when_its_model_is_there_keeps_no_pin(rig: Rig) -> None:
    hold = rig.put(1)
    assert rig.residency.loading.wait(20)
    rig.line.ledger.drop([1])
    rig.residency.go_on.set()
    wait_until(lambda: rig.served, 10, "the load")
    wait_until(lambda: rig.residency.pins[2] == 0, 10, "no pin")
    assert not hold.pinned


def test_a_load_that_fails_fails_the_jobs_that_waited(rig: Rig) -> None:
    rig.residency.trouble = LoadFailed("no such file")
    rig.residency.go_on.set()
    rig.put(1)
    outcomes = rig.line.store.wait_for(2)
    assert all(b"LoadFailed" in (o.error or b"") for o in outcomes.values())
    assert rig.sent == []
