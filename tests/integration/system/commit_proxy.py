"""A TCP proxy before a PostgreSQL that cuts a client off in the middle of its COMMIT, once a request."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

How = Literal["before", "after", "late"]
LATE = 1.0  # seconds


class CommitProxy:
    """Listens on `port`, and passes everything on, but for the next COMMIT after `cut`.

    The client's connection is closed `before` the server has seen the COMMIT; `after` it was done, before its answer is
    passed on; or `late`: at once, while the server gets the COMMIT only a second later, when the client tries again.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cuts = 0
        self._how: How | None = None
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def cut(self, how: How) -> None:
        """Cut the next COMMIT off."""
        with self._lock:
            self._how = how

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            _close(one)
        for thread in self._threads:
            thread.join(5)

    def _spawn(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            self._sockets += [client, server]
            muted = threading.Event()
            self._spawn(lambda client=client, server=server, muted=muted: self._up(client, server, muted))
            self._spawn(lambda client=client, server=server, muted=muted: _down(client, server, muted))

    def _up(self, client: socket.socket, server: socket.socket, muted: threading.Event) -> None:
        """Pass the client's messages on. The first has no type: a length, and what it is."""
        with suppress(OSError, EOFError):
            first = True
            while True:
                kind = b"" if first else _read(client, 1)
                length = _read(client, 4)
                body = _read(client, struct.unpack("!I", length)[0] - 4)
                # A request for encryption is answered with one byte, and the real first message follows.
                first = first and body[:4] == struct.pack("!I", 80877103)
                message = kind + length + body
                how = self._taken() if kind == b"Q" and body.rstrip(b"\0") == b"COMMIT" else None
                if how is None:
                    server.sendall(message)
                    continue
                if how == "after":
                    muted.set()
                    server.sendall(message)
                    time.sleep(0.2)
                _close(client)
                if how == "late":
                    time.sleep(LATE)
                    server.sendall(message)
                    time.sleep(0.2)
                break
        _close(client)
        _close(server)

    def _taken(self) -> How | None:
        with self._lock:
            how, self._how = self._how, None
            self.cuts += how is not None
            return how


def _down(client: socket.socket, server: socket.socket, muted: threading.Event) -> None:
    with suppress(OSError):
        while data := server.recv(65536):
            if not muted.is_set():
                with suppress(OSError):
                    client.sendall(data)
    _close(client)


def _read(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        some = connection.recv(n - len(data))
        if not some:
            raise EOFError
        data += some
    return data


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        connection.close()
