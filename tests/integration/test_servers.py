"""The servers that all other tests rely on do what they are told."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from servers import PostgresServer, RedisServer, wait_until


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with RedisServer(appendonly="yes", appendfsync="always") as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


def test_redis_keeps_its_port_and_what_it_was_told_to_keep(own_redis: RedisServer) -> None:
    port = own_redis.port
    with own_redis.client() as client:
        client.set("key", "value")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    own_redis.kill()
    assert not own_redis.is_running
    own_redis.start()
    assert own_redis.port == port
    with own_redis.client() as client:
        assert client.get("key") == "value"
    own_redis.flush()
    with own_redis.client() as client:
        assert client.get("key") is None
    assert own_redis.log.count("Ready to accept connections") == 2


def test_a_paused_redis_is_silent_until_it_is_resumed(own_redis: RedisServer) -> None:
    with redis.Redis(port=own_redis.port, socket_timeout=0.2, retry=Retry(NoBackoff(), 0)) as client:
        client.ping()
        own_redis.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        own_redis.resume()
        wait_until(client.ping)


def test_ensure_mends_whatever_a_test_left(own_redis: RedisServer) -> None:
    own_redis.kill()
    own_redis.ensure().flush()
    own_redis.pause()
    own_redis.ensure().flush()


def test_postgres_survives_a_kill_and_a_restart(own_postgres: PostgresServer) -> None:
    url = own_postgres.create("mine")
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE numbers AS SELECT generate_series(1, 1000) AS n")
    own_postgres.kill()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)
    own_postgres.start()
    own_postgres.restart()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM numbers").fetchone() == (1000,)


def test_a_paused_postgres_holds_open_connections_too(own_postgres: PostgresServer) -> None:
    with psycopg.connect(own_postgres.url(), autocommit=True) as connection:
        own_postgres.pause()
        connection.pgconn.send_query(b"SELECT 1")
        time.sleep(0.2)
        connection.pgconn.consume_input()
        assert connection.pgconn.is_busy()
        own_postgres.resume()
        assert connection.pgconn.get_result() is not None  # it waits for the answer
        assert connection.pgconn.get_result() is None


def test_stopping_leaves_nothing_behind() -> None:
    with RedisServer() as one, PostgresServer() as other:
        family = [
            process
            for pid in (one.pid, other.pid)
            for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
        ]
        assert len(family) > 2
    assert not [process for process in family if process.is_running()]
    assert not one.folder.exists()
    assert not other.folder.exists()


def test_a_server_that_cannot_start_says_why() -> None:
    server = RedisServer(maxmemory="nonsense")
    try:
        with pytest.raises(RuntimeError, match="did not start"):
            server.start()
    finally:
        server.close()
