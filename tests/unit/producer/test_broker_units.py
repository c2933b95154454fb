"""The broker's questions to Redis, on a fake one: which keys it reads, what it publishes, what silence becomes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fakeredis
import orjson
import pytest
from kombu.transport.redis import Channel

from torchrelay import messages
from torchrelay.broker import SEPARATOR, Broker
from torchrelay.completions import Completions, Delivery
from torchrelay.settings import Settings
from torchrelay_storage.errors import Unreachable
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.states import JobState


@pytest.fixture
def server() -> fakeredis.FakeServer:
    return fakeredis.FakeServer()


@pytest.fixture
def broker(server: fakeredis.FakeServer, tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(Settings.load(home=tmp_path, broker="redis://127.0.0.1:1/0"))
    broker._redis = fakeredis.FakeRedis(server=server)
    yield broker
    broker.close()


def test_depths_are_read_by_our_priorities(broker: Broker) -> None:
    broker.redis.rpush("torchrelay.m", "a", "b")  # the list that Celery serves first
    broker.redis.rpush(f"torchrelay.m{SEPARATOR}9", "c")
    broker.redis.rpush(f"torchrelay.m{SEPARATOR}4", "d")
    broker.redis.rpush("torchrelay.other", "e")
    depths = broker.depths("torchrelay.m")
    assert {p: n for p, n in depths.items() if n} == {9: 2, 5: 1, 0: 1}
    assert set(depths) == set(range(10))


def test_the_separator_is_kombu_s() -> None:
    assert Channel.sep == SEPARATOR


def test_what_ended_is_published_as_the_message_says(broker: Broker) -> None:
    subscription = broker.redis.pubsub(ignore_subscribe_messages=True)
    subscription.subscribe(messages.CHANNEL)
    subscription.get_message(timeout=1)
    assert broker.publish_ended([1, 2], [3])
    heard = subscription.get_message(timeout=1)
    subscription.close()
    assert orjson.loads(heard["data"]) == {"v": messages.VERSION, "chunks": [1, 2], "batches": [3]}


def test_a_redis_that_is_away(broker: Broker, server: fakeredis.FakeServer) -> None:
    server.connected = False
    assert not broker.is_up()
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1"):
        broker.depths("torchrelay.m")
    assert not broker.publish_ended([1])
    server.connected = True
    assert broker.is_up()


def _row(state: JobState) -> JobRow:
    return JobRow(
        id=1, chunk=7, batch=None, model="m", version=1, state=state, priority=5, failures=0, max_attempts=3,
        timeout=None, tenant="", key=None, metadata={}, error=None, worker=None, created_at=0.0, not_before=None,
        expires_at=None, finished_at=None,
    )  # fmt: skip


def test_a_waiter_is_woken_by_the_announcement_and_not_by_polling(broker: Broker) -> None:
    row = _row(JobState.QUEUED)
    woken = threading.Event()
    news: list[Delivery] = []

    def deliver(delivery: Delivery) -> None:
        news.append(delivery)
        woken.set()

    completions = Completions(lambda jobs: {1: row}, broker.redis.pubsub)
    completions.wait_for(1, 7, deliver)
    for _ in range(200):  # until it listens
        if dict(broker.redis.pubsub_numsub(messages.CHANNEL)).get(messages.CHANNEL.encode()):
            break
        time.sleep(0.01)
    row = _row(JobState.SUCCEEDED)
    began = time.monotonic()
    broker.publish_ended([7])
    assert woken.wait(5)
    assert time.monotonic() - began < 5
    assert isinstance(news[0], JobRow)
    assert news[0].state is JobState.SUCCEEDED
    completions.close()
