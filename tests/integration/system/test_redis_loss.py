"""Redis loses everything, a part, or its head: every job runs, and what is there still is not sent many times over.

SQL knows what was announced. Where a queue is empty, what is missing goes out again within seconds; else within half a
minute. The messages are counted by Redis itself.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import redis
from sqlalchemy import text

from servers import RedisServer, free_port, wait_until
from torchrelay import Relay
from torchrelay.settings import Settings

ON_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
QUEUE = "torchrelay.slow"
AT_ONCE = 8.0  # seconds, where the queue is empty: LOST_AFTER, the leader's round, and a loaded machine
BY_AGE = 30.0  # seconds, where it is not


def pushes(server: RedisServer) -> int:
    """Return how many messages were put into lists since the server's start."""
    with server.client() as client:
        stats = client.info("commandstats")
    return sum(int(stats[name]["calls"]) for name in ("cmdstat_lpush", "cmdstat_rpush") if name in stats)


def depth(server: RedisServer) -> int:
    """Return how many messages are in the queue's lists, of which there is one a priority."""
    with server.client() as client:
        return sum(client.llen(key) for key in client.keys(f"{QUEUE}*"))


def announced(relay: Relay) -> int:
    """Return how many chunks were announced and have not been claimed."""
    with relay._core.db.read() as connection:
        return int(connection.execute(text("SELECT count(*) FROM chunks WHERE state = 1")).scalar_one())


def unclaimed(relay: Relay, chunks: set[int]) -> set[int]:
    """Return those of these chunks that no worker has claimed yet."""
    with relay._core.db.read() as connection:
        return chunks & set(connection.execute(text("SELECT id FROM chunks WHERE state < 2")).scalars())


@pytest.fixture
def slow(relay: Relay) -> Relay:
    """A relay with a model that takes 0.2 s for each chunk of eight."""
    relay.register_model("slow", handler="slow", config={"seconds": 0.2}, chunk_size=8)
    return relay


@pytest.fixture
def quiet(settings: Settings, slow: Relay, start: Callable[..., Any], redis_server: RedisServer) -> Callable[[], Any]:
    """A worker of another model, which is the leader of the maintenance; and a function that starts one for `slow`."""
    slow.register_model("double", handler="double")
    start("--models", "double")
    assert slow.submit("double", 1).result(timeout=60) == 2
    return lambda: start("--models", "slow")


def ends_within(relay: Relay, batch: Any, seconds: float) -> None:
    counts = batch.wait(timeout=seconds)
    assert counts.succeeded == counts.total, counts


# --- everything -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flushed", "restarted", "killed"])
def test_everything_is_lost(how: str, slow: Relay, start: Any, redis_server: RedisServer, runs: Any) -> None:
    start()
    assert slow.submit("slow", 1000).result(timeout=60) == 2000
    batch = slow.submit_batch("slow", range(160))  # 4 s of work
    wait_until(lambda: len(runs.inputs()) > 24, 30, "some device batches")
    if how == "flushed":
        redis_server.flush()
    elif how == "restarted":
        redis_server.restart()
    else:
        redis_server.kill()
        redis_server.start()
    ends_within(slow, batch, 4 + AT_ONCE + (8 if how != "flushed" else 0))  # a worker reconnects within 8 s
    assert sorted(runs.inputs()) == [*range(160), 1000], "and nothing ran twice"


class Switch:
    """A TCP proxy whose port stays when the server behind it is another."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def to(self, target: int) -> None:
        """Lead to another server from now on; connections to the old one break."""
        self.target = target
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            _close(one)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.to(0)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            self._sockets += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        _close(source)
        _close(target)


def _close(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@pytest.fixture
def switch(redis_server: RedisServer) -> Iterator[Switch]:
    switch = Switch(redis_server.port)
    yield switch
    switch.close()


@pytest.fixture
def redis_url(request: pytest.FixtureRequest, redis_server: RedisServer) -> str:
    """As for all tests; where a test has a switch, by way of it."""
    redis_server.ensure().flush()
    if "switch" in request.fixturenames:
        port = request.getfixturevalue("switch").port
        return f"redis://127.0.0.1:{port}/0"
    return redis_server.url


@ON_POSTGRESQL
def test_a_failover_to_an_empty_replica(switch: Switch, slow: Relay, start: Any, runs: Any) -> None:
    """The replica has nothing, takes no writes for two seconds, and is the master then."""
    start()
    assert slow.submit("slow", 1000).result(timeout=60) == 2000
    with RedisServer(replicaof=f"127.0.0.1 {free_port()}") as replica:
        batch = slow.submit_batch("slow", range(160))
        wait_until(lambda: len(runs.inputs()) > 24, 30, "some device batches")
        switch.to(replica.port)
        time.sleep(2.0)
        job = slow.submit("slow", 2000)
        with replica.client() as client:
            client.replicaof("NO", "ONE")
        ends_within(slow, batch, 4 + AT_ONCE + 8)
        assert job.result(timeout=10) == 4000
        assert slow.submit("slow", 3000).result(timeout=15) == 6000
        assert sorted(runs.inputs()) == [*range(160), 1000, 2000, 3000]


# --- a part -----------------------------------------------------------------------------------------------------------


@ON_POSTGRESQL
def test_what_waits_is_not_sent_again(quiet: Any, slow: Relay, redis_server: RedisServer, settings: Settings) -> None:
    """No worker takes the messages for longer than `announce_again`; all of them are still there."""
    assert settings.announce_again <= 10
    batch = slow.submit_batch("slow", range(400))
    wait_until(lambda: depth(redis_server) > 0 and depth(redis_server) == announced(slow), 10, "a full window")
    window, sent = depth(redis_server), pushes(redis_server)
    time.sleep(settings.announce_again + 4)
    assert pushes(redis_server) - sent <= 2, "what is in the queue is not sent again"
    assert depth(redis_server) == window
    quiet()
    ends_within(slow, batch, 60)
    chunks = 400 // 8
    assert pushes(redis_server) - sent <= (chunks - window) * 1.2 + 4, "one message a chunk, or few more"


@ON_POSTGRESQL
@pytest.mark.parametrize("loss", ["an element", "a key", "five seconds"])
def test_a_part_is_lost(loss: str, slow: Relay, start: Any, redis_server: RedisServer, runs: Any) -> None:
    """Others keep the queue from being empty, for longer than it may take."""
    start()
    assert slow.submit("slow", 1000).result(timeout=60) == 2000
    batch = slow.submit_batch("slow", range(1600))  # 40 s of work
    urgent = slow.submit_batch("slow", range(2000, 2016), priority=9) if loss == "a key" else None
    wait_until(lambda: depth(redis_server) >= 4, 10, "a full window")
    sent, done = pushes(redis_server), len(runs.inputs())
    with redis.Redis(port=redis_server.port) as client:
        keys = client.keys(f"{QUEUE}*")
        if loss == "an element":
            assert client.rpop(keys[0])
        elif loss == "a key":
            assert client.delete(keys[0])
        else:
            before = {key: client.dump(key) for key in client.keys("*")}
            time.sleep(5.0)
            client.flushall()
            for key, value in before.items():
                client.restore(key, 0, value)
    lost = unclaimed(slow, _announced_ids(slow))
    began = time.monotonic()
    wait_until(lambda: not unclaimed(slow, lost), BY_AGE, "the lost ones")
    assert time.monotonic() - began < BY_AGE
    ends_within(slow, batch, 90)
    if urgent is not None:
        ends_within(slow, urgent, 5)
    expected = [*range(1600), 1000, *(range(2000, 2016) if urgent else ())]
    assert sorted(runs.inputs()) == sorted(expected), "nothing ran twice"
    chunks = (len(expected) - done) / 8
    assert pushes(redis_server) - sent <= chunks * 1.2 + 20, "one message a chunk, or few more"


def _announced_ids(relay: Relay) -> set[int]:
    with relay._core.db.read() as connection:
        return set(connection.execute(text("SELECT id FROM chunks WHERE state = 1")).scalars())


# --- it stands still --------------------------------------------------------------------------------------------------


@ON_POSTGRESQL
def test_it_stands_still(slow: Relay, start: Any, redis_server: RedisServer, runs: Any) -> None:
    """Workers go on from SQL while it does."""
    start()
    assert slow.submit("slow", 1000).result(timeout=60) == 2000
    redis_server.pause()
    try:
        batch = slow.submit_batch("slow", range(160))
        wait_until(lambda: batch.counts().succeeded >= 80, 30, "work that goes on")
    finally:
        redis_server.resume()
    ends_within(slow, batch, 30)
    assert sorted(runs.inputs()) == [*range(160), 1000]
    assert slow.submit("slow", 2000).result(timeout=15) == 4000
