"""The proxy forwards, and makes the faults that it is named for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from chaos.proxy import SLOW_SECONDS, Proxy


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy in front of a server that echoes."""
    server = socket.create_server(("127.0.0.1", 0))

    def echo(one: socket.socket) -> None:
        with one:
            while data := one.recv(100):
                one.sendall(data)

    def serve() -> None:
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(one,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with Proxy(server.getsockname()[1]) as proxy:
        yield proxy
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def dial(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def ask(one: socket.socket) -> bytes:
    one.sendall(b"hello")
    return one.recv(100)


def test_it_forwards_and_cuts(proxy: Proxy) -> None:
    with dial(proxy) as one:
        assert ask(one) == b"hello"
        proxy.cut()
        assert one.recv(100) == b""
    with dial(proxy) as two:
        assert ask(two) == b"hello", "what comes new works"


def test_it_swallows_and_gives_back(proxy: Proxy) -> None:
    with dial(proxy) as one:
        proxy.swallow(True)
        one.settimeout(0.3)
        with pytest.raises(TimeoutError):
            ask(one)
        proxy.swallow(False)
        one.settimeout(5)
        assert one.recv(100) == b"hello"


def test_it_refuses(proxy: Proxy) -> None:
    proxy.refuse(True)
    with dial(proxy) as one, suppress(ConnectionError):  # it ends or is reset, as the kernel likes
        assert ask(one) == b""
    proxy.refuse(False)
    with dial(proxy) as two:
        assert ask(two) == b"hello"


def test_it_is_slow(proxy: Proxy) -> None:
    with dial(proxy) as one:
        proxy.delay(True)
        began = time.monotonic()
        assert ask(one) == b"hello"
        assert time.monotonic() - began >= 2 * SLOW_SECONDS
        proxy.delay(False)
