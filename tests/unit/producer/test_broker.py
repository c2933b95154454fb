"""The broker: it sends real Celery tasks, ten priorities are real, and a silent Redis costs less than a second."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forking import run_in_child
from servers import RedisServer
from torchrelay import messages
from torchrelay.broker import SEPARATOR, Broker, connect, make_app, redis_url
from torchrelay.settings import Settings
from torchrelay_storage import ids
from torchrelay_storage.errors import Unreachable

QUEUE = messages.queue_name("digits")


@pytest.fixture
def broker(redis_url: str, tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(Settings.load(home=tmp_path, broker=redis_url))
    yield broker
    broker.close()


def test_the_app_takes_json_only_and_keeps_no_results() -> None:
    settings = Settings.load(broker="redis://localhost:1/0")
    for worker in (False, True):
        conf = make_app(settings, worker=worker).conf
        assert conf.accept_content == ["json"]
        assert conf.task_ignore_result
        assert conf.result_backend is None
        assert conf.broker_transport_options["priority_steps"] == list(range(10))
        assert conf.broker_transport_options["queue_order_strategy"] == "round_robin"
    assert conf.broker_transport_options["socket_timeout"] == 5


@pytest.mark.parametrize(
    ("celery", "plain"),
    [
        ("redis://:pw@host:6379/1", "redis://:pw@host:6379/1"),
        ("rediss://host:6379/0", "rediss://host:6379/0"),
        ("redis+socket:///tmp/x.sock", "unix:///tmp/x.sock?db=0"),
        ("redis+socket://:pw@/tmp/x.sock?virtual_host=2", "unix://:pw@/tmp/x.sock?db=2"),
    ],
)
def test_urls_for_redis_py(celery: str, plain: str) -> None:
    assert redis_url(celery) == plain


def test_a_message_is_a_celery_task_with_a_chunks_id(broker: Broker) -> None:
    chunk = ids.draw()
    assert broker.send([(QUEUE, 9, chunk)]) == 1
    message = json.loads(broker.redis.rpop(QUEUE))  # type: ignore[arg-type]
    args, kwargs, _ = json.loads(b64decode(message["body"]))
    assert message["content-type"] == "application/json"
    assert message["headers"]["task"] == messages.TASK
    assert message["headers"]["ignore_result"]
    assert messages.decode(args) == chunk
    assert kwargs == {}


def test_each_priority_has_a_list_of_its_own(broker: Broker) -> None:
    assert broker.depths(QUEUE) == dict.fromkeys(range(10), 0)
    broker.send((QUEUE, p, ids.draw()) for p in range(10) for _ in range(p + 1))
    assert broker.depths(QUEUE) == {p: p + 1 for p in range(10)}
    assert broker.redis.llen(QUEUE) == 10  # priority 9 is Redis's first list
    assert broker.redis.llen(f"{QUEUE}{SEPARATOR}9") == 1


def test_many_messages_go_in_their_order(broker: Broker) -> None:
    chunks = [ids.draw() for _ in range(250)]
    assert broker.send((QUEUE, 5, c) for c in chunks) == 250
    sent: Any = broker.redis.lrange(f"{QUEUE}{SEPARATOR}4", 0, -1)
    found = [messages.decode(json.loads(b64decode(json.loads(m)["body"]))[0]) for m in reversed(sent)]
    assert found == chunks


def test_a_flushed_redis_needs_no_declaring_anew(broker: Broker) -> None:
    broker.send([(QUEUE, 5, ids.draw())])
    broker.redis.flushall()
    broker.send([(QUEUE, 5, ids.draw())])
    assert sum(broker.depths(QUEUE).values()) == 1


def test_silent_redis_is_given_up_soon_and_used_again(redis_server: RedisServer, broker: Broker) -> None:
    broker.send([(QUEUE, 5, ids.draw())])
    redis_server.pause()
    try:
        for call in (lambda: broker.send([(QUEUE, 5, ids.draw())]), lambda: broker.depths(QUEUE)):
            began = time.monotonic()
            with pytest.raises(Unreachable, match=r"Redis at redis://.* does not answer"):
                call()
            assert time.monotonic() - began < 5  # PRODUCER_TIMEOUT, on a loaded machine; unbounded it would be minutes
        assert not broker.is_up()
        assert not broker.publish_ended([1], [])
        broker._quiet_until = time.monotonic() + 60
        began = time.monotonic()
        for _ in range(100):
            assert not broker.publish_ended([1], [])  # it was silent a moment ago, and is not asked
        assert time.monotonic() - began < 20  # a timeout each would be 70
        broker._quiet_until = 0.0
    finally:
        redis_server.resume()
    assert broker.is_up()
    broker.send([(QUEUE, 5, ids.draw())])


def test_no_redis_is_unreachable_without_its_password(tmp_path: Path) -> None:
    broker = Broker(Settings.load(home=tmp_path, broker="redis://:geheim@127.0.0.1:1/0"))
    with pytest.raises(Unreachable) as caught:
        broker.send([(QUEUE, 5, 1)])
    assert "geheim" not in str(caught.value)
    assert not broker.is_up()
    broker.close()


def test_publishing(broker: Broker) -> None:
    with connect(broker.settings, timeout=5).pubsub() as channel:  # type: ignore[no-untyped-call]
        channel.subscribe(messages.CHANNEL)
        assert channel.get_message(timeout=5)["type"] == "subscribe"
        assert broker.publish_ended([1, 2], [3])
        assert messages.decode_ended(channel.get_message(timeout=5)["data"]) == messages.Ended((1, 2), (3,))


def test_a_forked_child_has_connections_of_its_own(broker: Broker) -> None:
    broker.send([(QUEUE, 5, ids.draw())])
    mine = broker.redis.client_id()

    def child() -> None:
        broker.send([(QUEUE, 5, ids.draw())])
        assert broker.redis.client_id() != mine

    run_in_child(child)
    assert sum(broker.depths(QUEUE).values()) == 2
    assert broker.redis.client_id() == mine
