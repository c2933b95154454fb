"""Completions: waiters share one subscription and its queries, and are woken whatever Redis does."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from forking import run_in_child
from servers import wait_until
from torchrelay import completions as module
from torchrelay import messages
from torchrelay.completions import Completions, Delivery
from torchrelay_storage.errors import JobNotFound
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.states import JobState


def row(job: int, chunk: int, state: JobState = JobState.QUEUED) -> JobRow:
    return JobRow(
        id=job, chunk=chunk, batch=None, model="m", version=1, state=state, priority=5, failures=0, max_attempts=3,
        timeout=None, tenant="", key=None, metadata={}, error=None, worker=None, created_at=0.0, not_before=None,
        expires_at=None, finished_at=None,
    )  # fmt: skip


class World:
    """Rows, a channel, and what was asked of them."""

    def __init__(self) -> None:
        self.rows: dict[int, JobRow] = {}
        self.asked: list[list[int]] = []
        self.channels: list[Channel] = []
        self.away = False
        self.error: Exception | None = None

    def read(self, jobs: Sequence[int]) -> Mapping[int, JobRow]:
        self.asked.append(list(jobs))
        if self.error is not None:
            raise self.error
        return {job: self.rows[job] for job in jobs if job in self.rows}

    def subscribe(self) -> Channel:
        if self.away:
            raise ConnectionError("Redis is away")
        self.channels.append(Channel())
        return self.channels[-1]

    def end(self, *jobs: int, tell: bool = True) -> None:
        for job in jobs:
            self.rows[job] = row(job, self.rows[job].chunk, JobState.SUCCEEDED)
        if tell:
            self.tell(self.rows[job].chunk for job in jobs)

    def tell(self, chunks: Any, batches: Any = ()) -> None:
        for data in messages.encode_ended(chunks, batches):
            self.channels[-1].incoming.put({"type": "message", "data": data})


class Channel:
    """A redis-py PubSub, as far as it is used."""

    def __init__(self) -> None:
        self.incoming: queue.Queue[Any] = queue.Queue()
        self.closed = False
        self.pings = 0

    def subscribe(self, channel: str) -> None:
        assert channel == messages.CHANNEL
        self.incoming.put({"type": "subscribe"})

    def get_message(self, *, timeout: float) -> Any:
        try:
            item = self.incoming.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def ping(self) -> None:
        self.pings += 1

    def close(self) -> None:
        self.closed = True


class Waiter:
    """Someone who waits."""

    def __init__(self, completions: Completions, job: int, chunk: int, submitted_at: float = -math.inf) -> None:
        self.news: list[Delivery] = []
        self.arrived = threading.Event()
        self.ticket = completions.wait_for(job, chunk, self.deliver, submitted_at)

    def deliver(self, news: Delivery) -> None:
        self.news.append(news)
        self.arrived.set()

    def result(self) -> Delivery:
        assert self.arrived.wait(10)
        assert len(self.news) == 1
        return self.news[0]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(module, "POLL_SUBSCRIBED", 60.0)  # what wakes in these tests is the message
    monkeypatch.setattr(module, "READ_SECONDS", 0.02)
    monkeypatch.setattr(module, "RECONNECT_SECONDS", 0.02)
    return World()


@pytest.fixture
def make(world: World) -> Any:
    made: list[Completions] = []

    def make() -> Completions:
        made.append(Completions(world.read, world.subscribe))
        return made[-1]

    yield make
    for completions in made:
        completions.close()
    assert not [t for t in threading.enumerate() if t.name in ("torchrelay-completions", "torchrelay-subscription")]


def settled(world: World, completions: Completions) -> Callable[[], bool]:
    return lambda: completions._subscribed and not completions._look_at_all and not completions._fresh


def test_a_job_that_has_ended_is_delivered_at_once(world: World, make: Callable[[], Completions]) -> None:
    world.rows[1] = row(1, 10, JobState.FAILED)
    assert Waiter(make(), 1, 10).result() == world.rows[1]


def test_a_thousand_waiters_share_a_subscription_and_one_query(world: World, make: Callable[[], Completions]) -> None:
    completions = make()
    for job in range(1000):
        world.rows[job] = row(job, job // 100)
    waiters = [Waiter(completions, job, job // 100) for job in range(1000)]
    wait_until(settled(world, completions))
    time.sleep(0.05)
    world.asked.clear()
    world.end(*range(1000))
    for waiter in waiters:
        assert waiter.result().state is JobState.SUCCEEDED  # type: ignore[union-attr]
    assert len(world.channels) == 1
    assert len(world.asked) == 1
    assert completions.waiting == 0
    assert not completions._by_chunk


def test_news_of_other_chunks_asks_nothing(world: World, make: Callable[[], Completions]) -> None:
    completions = make()
    world.rows[1] = row(1, 10)
    waiter = Waiter(completions, 1, 10)
    wait_until(settled(world, completions))
    time.sleep(0.05)
    world.asked.clear()
    world.tell([11, 12])
    time.sleep(0.1)
    assert world.asked == []
    assert not waiter.news
    completions.drop(waiter.ticket)
    assert completions.waiting == 0


def subscribed(world: World, make: Callable[[], Completions]) -> Completions:
    """Completions that hear, since somebody waits already."""
    completions = make()
    world.rows[99] = row(99, 99)
    Waiter(completions, 99, 99)
    wait_until(settled(world, completions))
    time.sleep(0.05)
    world.asked.clear()
    return completions


def test_a_job_submitted_just_now_is_not_looked_up_before_its_end_is_heard(
    world: World, make: Callable[[], Completions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 60.0)
    completions = subscribed(world, make)
    world.rows[1] = row(1, 10)
    waiter = Waiter(completions, 1, 10, time.monotonic())
    time.sleep(0.1)
    assert world.asked == []
    world.end(1)
    assert waiter.result() == world.rows[1]
    assert world.asked == [[1]]
    assert not completions._young


def test_nor_is_it_forgotten_should_its_end_not_be_heard(world: World, make: Callable[[], Completions]) -> None:
    completions = subscribed(world, make)
    world.rows[1] = row(1, 10, JobState.SUCCEEDED)  # between its submit and the wait
    assert Waiter(completions, 1, 10, time.monotonic()).result() == world.rows[1]
    world.rows[2] = row(2, 20)
    dropped = Waiter(completions, 2, 20, time.monotonic())
    completions.drop(dropped.ticket)
    assert not completions._young


@pytest.mark.parametrize("why", ["long ago", "before the subscription"])
def test_a_job_that_may_have_ended_unheard_is_looked_up_at_once(
    world: World, make: Callable[[], Completions], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 60.0)
    world.rows[1] = row(1, 10, JobState.SUCCEEDED)
    if why == "long ago":
        waiter = Waiter(subscribed(world, make), 1, 10, time.monotonic() - 1.0)
    else:
        waiter = Waiter(make(), 1, 10, time.monotonic())
    assert waiter.result() == world.rows[1]


def test_what_ends_before_the_subscription_stands_is_not_missed(world: World, make: Callable[[], Completions]) -> None:
    completions, unheard = make(), threading.Event()
    world.rows[1] = row(1, 10)
    read, subscribe = world.read, world.subscribe

    def slow_read(jobs: Sequence[int]) -> Mapping[int, JobRow]:
        found = read(jobs)
        if not unheard.is_set():
            world.end(1, tell=False)  # ended after it was looked at, and nobody heard
            unheard.set()
        return found

    def late() -> Channel:
        assert unheard.wait(10)
        return subscribe()

    completions._read, completions._subscribe = slow_read, late
    assert Waiter(completions, 1, 10).result().state is JobState.SUCCEEDED  # type: ignore[union-attr]


def test_a_job_that_is_retried_is_followed_to_its_new_chunk(world: World, make: Callable[[], Completions]) -> None:
    completions = make()
    world.rows[1] = row(1, 10)
    waiter = Waiter(completions, 1, 10)
    wait_until(settled(world, completions))
    world.rows[1] = row(1, 11, JobState.RETRYING)
    world.tell([10])
    wait_until(lambda: list(completions._by_chunk) == [11])
    world.end(1)
    assert waiter.result() == world.rows[1]


def test_without_redis_sql_is_asked_now_and_then(world: World, make: Callable[[], Completions]) -> None:
    world.away = True
    completions = make()
    world.rows[1] = row(1, 10)
    with capture_logs() as logs:
        waiter = Waiter(completions, 1, 10)
        wait_until(lambda: len(world.asked) > 3)
        world.end(1, tell=False)
        assert waiter.result().state is JobState.SUCCEEDED  # type: ignore[union-attr]
        time.sleep(0.1)
    assert [line["event"] for line in logs] == ["subscription_lost"]


def test_a_lost_subscription_is_made_anew(world: World, make: Callable[[], Completions]) -> None:
    completions = make()
    world.rows[1] = row(1, 10)
    waiter = Waiter(completions, 1, 10)
    wait_until(settled(world, completions))
    world.channels[0].incoming.put(ConnectionError("gone"))
    wait_until(lambda: len(world.channels) == 2)
    wait_until(settled(world, completions))
    assert world.channels[0].closed
    world.end(1)
    assert waiter.result().state is JobState.SUCCEEDED  # type: ignore[union-attr]


def test_a_silent_subscription_is_tried_and_given_up(
    world: World, make: Callable[[], Completions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PING_SECONDS", 0.05)
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.2)
    world.rows[1] = row(1, 10)
    completions = make()
    waiter = Waiter(completions, 1, 10)
    wait_until(lambda: len(world.channels) == 2)
    assert 1 <= world.channels[0].pings <= 4
    completions.drop(waiter.ticket)


def test_a_job_that_is_gone_and_a_database_that_is_away_are_told(world: World, make: Callable[[], Completions]) -> None:
    completions = make()
    assert isinstance(Waiter(completions, 1, 10).result(), JobNotFound)
    world.error = ValueError("away")
    assert isinstance(Waiter(completions, 2, 10).result(), ValueError)


def test_watchers_of_a_batch_are_woken(world: World, make: Callable[[], Completions]) -> None:
    completions, woken = make(), threading.Event()
    completions.watch(5, woken.set)
    assert woken.wait(5)  # by the subscription: what came before it was not heard
    wait_until(lambda: completions._subscribed)
    woken.clear()
    world.tell([], [6])
    assert not woken.wait(0.1)
    world.tell([], [5])
    assert woken.wait(5)
    completions.unwatch(5, woken.set)
    assert completions.waiting == 0


def test_local_news_needs_no_redis(world: World, make: Callable[[], Completions]) -> None:
    world.away = True
    completions = make()
    world.rows[1] = row(1, 10)
    waiter = Waiter(completions, 1, 10)
    wait_until(lambda: world.asked)
    world.end(1, tell=False)
    completions.hit([10], [])
    assert waiter.result().state is JobState.SUCCEEDED  # type: ignore[union-attr]


def test_threads_end_when_nobody_waits_and_start_again(
    world: World, make: Callable[[], Completions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.05)
    completions = make()
    for job in (1, 2):
        world.rows[job] = row(job, 10, JobState.SUCCEEDED)
        Waiter(completions, job, 10).result()
        wait_until(lambda: not completions._threads)
    assert all(channel.closed for channel in world.channels)


def test_closing_tells_who_still_waits(world: World, make: Callable[[], Completions]) -> None:
    completions = make()
    world.rows[1] = row(1, 10)
    waiter = Waiter(completions, 1, 10)
    completions.close()
    assert isinstance(waiter.result(), Exception)


def test_a_forked_child_waits_by_itself(world: World, make: Callable[[], Completions]) -> None:
    completions = make()
    world.rows[1] = row(1, 10)
    waiter = Waiter(completions, 1, 10)
    wait_until(settled(world, completions))

    def child() -> None:
        world.rows[2] = row(2, 10, JobState.SUCCEEDED)
        assert Waiter(completions, 2, 10).result() == world.rows[2]
        assert completions.waiting == 0

    run_in_child(child)
    world.end(1)
    assert waiter.result().state is JobState.SUCCEEDED  # type: ignore[union-attr]
