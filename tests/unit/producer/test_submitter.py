"""Group commit: who shares, who suffers, and that a lone caller waits for nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from forking import run_in_child
from servers import wait_until
from torchrelay import submitter as module
from torchrelay.submitter import Submitter
from torchrelay_storage.errors import KeyConflict, RelayError, Unreachable
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.submission import NewJob, Submission, Submitted
from torchrelay_storage.waiting import Announced


def version(number: int = 1, name: str = "digits") -> ModelVersion:
    return ModelVersion(
        id=number, model=number, name=name, version=1, handler="h", weights=None, sha256=None, config={},
        chunk_size=256, paused=False, created_at=0.0,
    )  # fmt: skip


class Store:
    """A JobStore that remembers, and can be held up."""

    def __init__(self) -> None:
        self.groups: list[list[Submission]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.stored: list[bytes] = []

    def submit(self, submissions: Sequence[Submission]) -> list[list[Submitted | KeyConflict]]:
        self.groups.append(list(submissions))
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        if any(job.input == b"poison" for s in submissions for job in s.jobs):
            raise ValueError("poison")
        placed: list[list[Submitted | KeyConflict]] = []
        for submission in submissions:
            results: list[Submitted | KeyConflict] = []
            for job in submission.jobs:
                if job.key == "taken":
                    results.append(KeyConflict("taken", "j_x"))
                else:
                    self.stored.append(job.input)
                    results.append(Submitted(len(self.stored), 7, announced=submission.window > 0))
            placed.append(results)
        return placed


def queued_behind(store: Store, submitter: Submitter, entries: list[tuple[ModelVersion, Options, NewJob]]) -> list[Any]:
    """Submit all these while an earlier group is being stored, so that they form one group."""
    store.gate.clear()
    first = submitter.submit(version(), Options(), NewJob(b"first"))
    wait_until(lambda: store.groups)
    futures = [submitter.submit(*entry) for entry in entries]
    store.gate.set()
    first.result(5)
    return futures


def outcome(future: Future[Submitted]) -> Any:
    return future.exception(5) or future.result(5)


def test_those_that_come_meanwhile_share_a_transaction_and_what_agrees_a_chunk() -> None:
    store = Store()
    woken: list[set[str]] = []
    submitter = Submitter(store, lambda models, announced: woken.append(set(models)))
    urgent = Options(priority=9)
    entries = [(version(), Options(), NewJob(b"a")), (version(), urgent, NewJob(b"b")),
               (version(), Options(), NewJob(b"c")), (version(2, "other"), Options(), NewJob(b"d"))]  # fmt: skip
    futures = queued_behind(store, submitter, entries)
    assert all(isinstance(outcome(f), Submitted) for f in futures)
    submitter.close()
    shape = [(s.version.name, s.options.priority, [j.input for j in s.jobs]) for s in store.groups[1]]
    assert shape == [("digits", 5, [b"a", b"c"]), ("digits", 9, [b"b"]), ("other", 5, [b"d"])]
    assert woken == [{"digits"}, {"digits", "other"}]


def test_what_was_announced_with_its_transaction_is_to_be_sent() -> None:
    store = Store()
    told: list[tuple[set[str], dict[str, list[Announced]]]] = []
    windows = {"digits": 4, "other": 0}

    def on_commit(models: Collection[str], announced: Mapping[str, Sequence[Announced]]) -> None:
        told.append((set(models), {name: list(chunks) for name, chunks in announced.items()}))

    submitter = Submitter(store, on_commit, window=windows.__getitem__)
    entries = [(version(), Options(priority=9), NewJob(b"a")), (version(), Options(priority=9), NewJob(b"b")),
               (version(2, "other"), Options(), NewJob(b"c"))]  # fmt: skip
    for future in queued_behind(store, submitter, entries):
        future.result(5)
    submitter.close()
    assert [s.window for s in store.groups[1]] == [4, 0]
    assert told[1] == ({"other"}, {"digits": [Announced(7, 9)]})


def test_a_conflict_is_raised_to_its_own_caller() -> None:
    store = Store()
    submitter = Submitter(store, lambda models, announced: None)
    jobs = [NewJob(b"a"), NewJob(b"b", key="taken", digest=b""), NewJob(b"c")]
    futures = queued_behind(store, submitter, [(version(), Options(), job) for job in jobs])
    submitter.close()
    assert [type(outcome(f)) for f in futures] == [Submitted, KeyConflict, Submitted]


def test_one_that_cannot_be_stored_does_not_hurt_its_group() -> None:
    store = Store()
    submitter = Submitter(store, lambda models, announced: None)
    inputs = [b"a", b"poison", b"c"]
    futures = queued_behind(store, submitter, [(version(), Options(), NewJob(i)) for i in inputs])
    submitter.close()
    assert [type(outcome(f)) for f in futures] == [Submitted, ValueError, Submitted]
    assert store.stored == [b"first", b"a", b"c"]


def test_a_database_that_is_away_is_told_to_all_and_asked_once() -> None:
    store = Store()
    submitter = Submitter(store, lambda models, announced: None)
    store.gate.clear()
    futures = [submitter.submit(version(), Options(), NewJob(b"a"))]
    wait_until(lambda: store.groups)
    futures += [submitter.submit(version(), Options(), NewJob(b"b")) for _ in range(5)]
    store.error = Unreachable("away")
    store.gate.set()
    assert [type(outcome(f)) for f in futures] == [Unreachable] * 6
    assert len(store.groups) == 2
    store.error = None
    assert isinstance(outcome(submitter.submit(version(), Options(), NewJob(b"c"))), Submitted)
    submitter.close()


def test_a_thousand_callers_cost_a_few_commits() -> None:
    store = Store()
    submitter = Submitter(store, lambda models, announced: None)
    entries = [(version(), Options(), NewJob(b"%d" % n)) for n in range(1000)]
    futures = queued_behind(store, submitter, entries)
    assert len({outcome(f).job for f in futures}) == 1000
    submitter.close()
    assert len(store.groups) == 2


def test_a_group_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_JOBS", 3)
    monkeypatch.setattr(module, "MOST_BYTES", 8)
    store = Store()
    submitter = Submitter(store, lambda models, announced: None)
    futures = queued_behind(store, submitter, [(version(), Options(), NewJob(b"1234")) for _ in range(6)])
    assert all(isinstance(outcome(f), Submitted) for f in futures)
    submitter.close()
    assert [sum(len(s.jobs) for s in group) for group in store.groups] == [1, 2, 2, 2]


def test_a_lone_caller_waits_for_nobody() -> None:
    submitter = Submitter(Store(), lambda models, announced: None)
    submitter.submit(version(), Options(), NewJob(b"a")).result(5)
    began = time.monotonic()
    for _ in range(200):
        submitter.submit(version(), Options(), NewJob(b"a")).result(5)
    assert time.monotonic() - began < 10
    submitter.close()


def test_what_is_cancelled_in_time_leaves_nothing() -> None:
    store = Store()
    submitter = Submitter(store, lambda models, announced: None)
    store.gate.clear()
    submitter.submit(version(), Options(), NewJob(b"first"))
    wait_until(lambda: store.groups)
    assert submitter.submit(version(), Options(), NewJob(b"never")).cancel()
    store.gate.set()
    submitter.close()
    assert store.stored == [b"first"]


def test_closing_stores_what_is_queued_and_takes_no_more() -> None:
    store = Store()
    submitter = Submitter(store, lambda models, announced: None)
    futures = [submitter.submit(version(), Options(), NewJob(b"a")) for _ in range(10)]
    submitter.close()
    assert all(f.done() for f in futures)
    with pytest.raises(RelayError, match="closed"):
        submitter.submit(version(), Options(), NewJob(b"a"))
    assert not [t for t in threading.enumerate() if t.name == "torchrelay-submitter"]


def test_an_idle_thread_ends_and_the_next_submit_starts_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.02)
    submitter = Submitter(Store(), lambda models, announced: None)
    for _ in range(3):
        submitter.submit(version(), Options(), NewJob(b"a")).result(5)
        wait_until(lambda: not [t for t in threading.enumerate() if t.name == "torchrelay-submitter"])
    submitter.close()


def test_many_threads_and_short_idle_times_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.0)
    store = Store()
    submitter = Submitter(store, lambda models, announced: None)
    with ThreadPoolExecutor(8) as pool:
        placed = list(
            pool.map(lambda n: submitter.submit(version(), Options(), NewJob(b"%d" % n)).result(5).job, range(500))
        )
    submitter.close()
    assert sorted(placed) == list(range(1, 501))


def test_a_forked_child_submits_by_itself() -> None:
    submitter = Submitter(Store(), lambda models, announced: None)
    submitter.submit(version(), Options(), NewJob(b"a")).result(5)

    def child() -> None:
        assert submitter.submit(version(), Options(), NewJob(b"b")).result(30).job == 2

    run_in_child(child)
    submitter.close()
