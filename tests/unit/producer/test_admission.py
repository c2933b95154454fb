"""Back-pressure: what is counted and how often, who is refused, and that what is not stored gives its room back."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from forking import run_in_child
from servers import wait_until
from torchrelay import QueueFull
from torchrelay.admission import FREE, LONGEST_RETRY, RETRY_SECONDS, Admission
from torchrelay.submitter import Submitter
from torchrelay.testing import AsyncInlineRelay, InlineRelay
from torchrelay_storage.errors import KeyConflict, Unreachable
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.submission import NewJob, Submission, Submitted


def version(max_queued: int | None = None, model: int = 1) -> ModelVersion:
    return ModelVersion(
        id=model, model=model, name=f"m{model}", version=1, handler="h", weights=None, sha256=None, config={},
        chunk_size=256, paused=False, created_at=0.0, max_queued=max_queued,
    )  # fmt: skip


class Database:
    """A queue that can be counted, and a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waiting: dict[int | None, int] = {}
        self.limits: dict[int, int | None] = {}
        self.reads: list[int | None] = []
        self.keys: set[str] = set()
        self.error: Exception | None = None
        self.took = 0.0

    def queued(self, model: int | None = None) -> int:
        self.reads.append(model)
        if self.error is not None:
            raise self.error
        self.now += self.took
        return self.waiting.get(model, 0)

    def of_key(self, model: int, tenant: str, key: str) -> tuple[int, bytes] | None:
        return (7, b"") if key in self.keys else None

    def version(self, number: int) -> ModelVersion:
        return version(self.limits[number], number)

    def admission(self, total: int | None = None, **more: Any) -> Admission:
        return Admission(self, self, total, clock=lambda: self.now, **more)

    def limited(self, max_queued: int, model: int = 1) -> ModelVersion:
        self.limits[model] = max_queued
        return version(max_queued, model)


@pytest.fixture
def database() -> Database:
    return Database()


# --- what is counted, and how often -----------------------------------------------------------------------


def test_where_no_limit_is_set_nothing_is_read(database: Database) -> None:
    admission = database.admission()
    assert not admission.limits(version())
    assert admission.admit_job(version(), "", None) is FREE
    assert admission.admit(version(), 10**9).count == 10**9
    assert admission.admit_some(version(), 5).count == 5
    assert database.reads == []


def test_own_submits_are_added_to_the_count_and_it_is_read_once_a_second(database: Database) -> None:
    admission, digits = database.admission(), database.limited(10)
    database.waiting[1] = 4
    for _ in range(5):
        admission.admit(digits, 1).stored()
    assert database.reads == [1]
    database.now += 0.99
    admission.admit(digits, 1).stored()
    assert database.reads == [1]
    database.now += 0.02
    database.waiting[1] = 2
    assert admission.admit_some(digits, 100).count == 8, "counted anew"
    assert database.reads == [1, 1]


def test_a_full_queue_is_not_counted_again_for_each_who_is_refused(database: Database) -> None:
    admission, digits = database.admission(), database.limited(3)
    database.waiting[1] = 3
    for _ in range(50):
        database.now += 0.01
        with pytest.raises(QueueFull):
            admission.admit(digits, 1)
    assert database.reads == [1]


def test_what_own_submits_have_filled_is_counted_anew_soon_since_it_may_have_run(database: Database) -> None:
    admission, digits = database.admission(), database.limited(3)
    admission.admit(digits, 3).stored()
    with pytest.raises(QueueFull):
        admission.admit(digits, 1)
    assert database.reads == [1], "not at once"
    database.now += 0.11
    admission.admit(digits, 1).stored()
    assert database.reads == [1, 1]


def test_a_count_that_takes_long_is_not_made_often(database: Database) -> None:
    admission, digits = database.admission(), database.limited(3)
    database.took = 0.6
    admission.admit(digits, 1).stored()
    database.now += 2.2  # since it began 2.8
    admission.admit(digits, 1).stored()
    assert database.reads == [1]
    database.now += 0.3
    admission.admit(digits, 1).stored()
    assert database.reads == [1, 1]


def test_the_total_counts_all_models_and_both_limits_hold(database: Database) -> None:
    admission, first, second = database.admission(total=10), database.limited(4), version(None, 2)
    database.waiting = {1: 1, None: 5}
    admission.admit(second, 1).stored()
    assert database.reads == [None], "of a model without a limit only the total is counted"
    place = admission.admit_some(first, 100)
    assert place.count == 3, "the model's limit"
    place.stored()
    with pytest.raises(QueueFull, match=r"all models has 9 of at most 10 jobs \(setting max_queued\)"):
        admission.admit(second, 2)
    database.now += 2
    database.waiting = {1: 1, None: 9}
    assert admission.admit_some(first, 100).count == 1, "the total's"


def test_a_limit_that_was_lifted_or_changed_elsewhere_holds_with_the_next_count(database: Database) -> None:
    admission, digits = database.admission(), database.limited(1)
    database.waiting[1] = 5
    with pytest.raises(QueueFull):
        admission.admit(digits, 1)
    database.limits[1] = 7
    database.now += 1.1
    assert admission.admit_some(digits, 100).count == 2, "the version that the caller has is older"
    database.limits[1] = None
    admission.forget()
    assert admission.admit_some(digits, 100).count == 100


# --- what is refused --------------------------------------------------------------------------------------


def test_the_message_says_which_limit_how_many_wait_and_what_to_do(database: Database) -> None:
    admission, digits = database.admission(), database.limited(1500)
    database.waiting[1] = 1500
    with pytest.raises(QueueFull) as caught:
        admission.admit(digits, 1)
    assert str(caught.value) == (
        "the queue of model 'm1' has 1,500 of at most 1,500 jobs: there is no room for another; "
        "try again in 5 s, add workers, or raise the limit (`torchrelay models limit m1 N`)"
    )
    assert (caught.value.retry_after, caught.value.batch, caught.value.stored) == (RETRY_SECONDS, None, 0)
    with pytest.raises(QueueFull, match=r"1,501 never fit at once: submit fewer, or pass a generator") as caught:
        admission.admit(digits, 1501)
    assert caught.value.retry_after == LONGEST_RETRY


def test_a_limit_of_zero_refuses_all(database: Database) -> None:
    with pytest.raises(QueueFull, match="nothing fits; or raise the limit"):
        database.admission().admit_job(database.limited(0), "", None)


@pytest.mark.parametrize(("left", "wanted", "expected"), [(200, 500, 5.0), (5000, 500, 1.0), (10, 900, 60.0)])
def test_retry_after_follows_how_fast_the_queue_drains(
    database: Database, left: int, wanted: int, expected: float
) -> None:
    admission, digits = database.admission(), database.limited(6000)
    database.waiting[1] = 5000
    admission.admit(digits, 1000).stored()
    database.now += 2
    database.waiting[1] = 6000 - 2 * left  # so many a second, though 1,000 came
    admission.admit_some(digits, 1).stored()
    database.now += 0.05
    place = admission.admit_some(digits, 10**6)
    assert place.count == 2 * left - 1 or left == 5000
    with pytest.raises(QueueFull) as caught:
        admission.admit(digits, wanted)
    assert caught.value.retry_after == pytest.approx(wanted / left if 1 < wanted / left < 60 else expected, rel=0.3)


def test_a_job_whose_key_is_known_needs_no_room(database: Database) -> None:
    admission, digits = database.admission(), database.limited(0)
    database.keys.add("order-17")
    assert admission.admit_job(digits, "", "order-17") is FREE
    with pytest.raises(QueueFull):
        admission.admit_job(digits, "", "order-18")


def test_the_error_survives_pickling_and_copying() -> None:
    error = QueueFull("full", 2.5, batch="b_x", stored=7)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(again), str(again), again.retry_after, again.batch, again.stored) == (
            QueueFull, "full", 2.5, "b_x", 7
        )  # fmt: skip


# --- room that is given back ------------------------------------------------------------------------------


def test_room_is_taken_until_it_is_known_whether_the_job_was_stored(database: Database) -> None:
    admission, digits = database.admission(), database.limited(3)
    place = admission.admit(digits, 3)
    database.now += 5
    with pytest.raises(QueueFull):
        admission.admit(digits, 1)
    place.close()
    place.close()
    assert admission.admit_some(digits, 9).count == 3


def test_a_part_that_was_stored_stays_counted(database: Database) -> None:
    admission, digits = database.admission(), database.limited(10)
    place = admission.admit(digits, 10)
    place.stored(4)
    place.close()
    assert admission.admit_some(digits, 99).count == 6


def test_a_place_that_nobody_has_any_more_is_given_back(database: Database) -> None:
    admission, digits = database.admission(), database.limited(2)
    held = [admission.admit(digits, 2)]
    with pytest.raises(QueueFull):
        admission.admit(digits, 1)
    held.clear()
    assert admission.admit(digits, 2).count == 2


def test_threads_never_get_more_than_there_is_room_for(database: Database) -> None:
    admission, digits = database.admission(), database.limited(100)

    def one(_: int) -> bool:
        try:
            admission.admit(digits, 1).stored()
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(one, range(1000))) == 100
    assert database.reads == [1]


def test_a_forked_child_counts_for_itself_though_the_lock_was_held(database: Database) -> None:
    admission, digits = database.admission(), database.limited(2)
    held = admission.admit(digits, 2)
    release, locked = threading.Event(), threading.Event()

    def hold() -> None:
        with admission.lock:
            locked.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(5)

    def child() -> None:
        held.close()  # which the parent has too
        assert admission.admit(digits, 2).count == 2

    run_in_child(child, 20)
    release.set()
    thread.join()
    assert held.count == 2


# --- group commit -----------------------------------------------------------------------------------------


class Store:
    """A JobStore that remembers, and can be held up."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.groups = 0
        self.stored: list[bytes] = []
        self.error: Exception | None = None

    def submit(self, submissions: Sequence[Submission]) -> list[list[Submitted | KeyConflict]]:
        self.groups += 1
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return [[self._place(job) for job in submission.jobs] for submission in submissions]

    def _place(self, job: NewJob) -> Submitted | KeyConflict:
        if job.key == "taken":
            return KeyConflict("taken", "j_x")
        if job.key == "known":
            return Submitted(1, 1, existed=True)
        self.stored.append(job.input)
        return Submitted(len(self.stored), 1)


def submitter(database: Database, total: int | None = None) -> tuple[Store, Submitter, Admission]:
    store, admission = Store(), database.admission(total)
    return store, Submitter(store, lambda models, announced: None, admission), admission


def outcome(future: Future[Submitted]) -> Any:
    return future.exception(5) or future.result(5)


def test_only_those_of_a_group_without_room_are_refused(database: Database) -> None:
    store, group, _ = submitter(database)
    digits, free = database.limited(2), version(None, 2)
    store.gate.clear()
    first = group.submit(free, Options(), NewJob(b"first"))
    wait_until(lambda: store.groups)
    limited = [group.submit(digits, Options(), NewJob(b"%d" % i)) for i in range(5)]
    others = [group.submit(free, Options(), NewJob(b"free %d" % i)) for i in range(5)]
    store.gate.set()
    assert outcome(first).job == 1
    assert [type(outcome(f)) for f in limited] == [Submitted] * 2 + [QueueFull] * 3
    assert [type(outcome(f)) for f in others] == [Submitted] * 5
    assert store.groups == 2, "in one transaction"
    assert database.reads == [1]
    group.close()


@pytest.mark.parametrize("key", ["taken", "known"])
def test_what_was_not_stored_leaves_its_room(database: Database, key: str) -> None:
    _, group, admission = submitter(database)
    digits = database.limited(1)
    outcome(group.submit(digits, Options(), NewJob(b"a", key)))
    assert admission.admit_some(digits, 9).count == 1
    group.close()


def test_what_could_not_be_stored_leaves_its_room(database: Database) -> None:
    store, group, admission = submitter(database)
    digits = database.limited(3)
    for error in (Unreachable("away"), ValueError("broken")):
        store.error = error
        assert outcome(group.submit(digits, Options(), NewJob(b"a"))) is error
    assert admission.admit_some(digits, 9).count == 3
    group.close()


def test_a_count_that_fails_is_tried_once_a_group_and_hurts_only_the_limited(database: Database) -> None:
    store, group, _ = submitter(database)
    digits, free = database.limited(2), version(None, 2)
    database.error = Unreachable("away")
    store.gate.clear()
    group.submit(free, Options(), NewJob(b"first"))
    wait_until(lambda: store.groups)
    limited = [group.submit(digits, Options(), NewJob(b"x")) for _ in range(20)]
    other = group.submit(free, Options(), NewJob(b"y"))
    store.gate.set()
    assert {type(outcome(f)) for f in limited} == {Unreachable}
    assert isinstance(outcome(other), Submitted)
    assert len(database.reads) == 1
    group.close()


# --- an application's own tests ---------------------------------------------------------------------------


def test_an_inline_relay_refuses_too() -> None:
    with InlineRelay(models={"double": lambda x: 2 * x}) as relay:
        relay.limit_model("double", 2)
        assert [relay.submit("double", n).result() for n in range(10)] == [2 * n for n in range(10)], "they run at once"
        relay.pause("double")
        kept = [relay.submit("double", n, key=str(n)) for n in range(2)]
        with pytest.raises(QueueFull, match="'double' has 2 of at most 2 jobs"):
            relay.submit("double", 3)
        with pytest.raises(QueueFull):
            relay.submit_batch("double", [4])
        assert relay.batches() == []
        assert relay.submit("double", 1, key="1").id == kept[1].id
        relay.limit_model("double", None)
        relay.submit_batch("double", range(10))
        assert relay.models()[0].newest.max_queued is None


def test_an_asynchronous_inline_relay_too() -> None:
    async def main() -> None:
        async with AsyncInlineRelay(models={"double": lambda x: 2 * x}) as relay:
            await relay.limit_model("double", 1)
            await relay.pause("double")
            await relay.submit("double", 1)
            with pytest.raises(QueueFull):
                await relay.submit("double", 2)

    asyncio.run(main())
