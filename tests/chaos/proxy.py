"""A TCP proxy in front of a server that can break connections, swallow what is sent, and be slow.

Some workers and clients of a chaos run reach the database and Redis through it, the others directly: so it also makes
the partitions in which one side still works.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

SLOW_SECONDS = 0.15  # a direction's delay for each piece while the proxy is slow


class Proxy:
    """Forwards a loopback port to another one. A context manager; threads end with it."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._listener.getsockname()[1]
        self._flowing = threading.Event()
        self._flowing.set()
        self._refusing = self._slow = self._closing = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    # --- faults ---------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Break every connection there is, with a reset where data are on the way."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for one in sockets:
            _shut(one)

    def swallow(self, on: bool) -> None:
        """A black hole: connections stay open, new ones are accepted, and nothing passes."""
        (self._flowing.clear if on else self._flowing.set)()

    def refuse(self, on: bool) -> None:
        """Break what there is and accept nothing new."""
        self._refusing = on
        if on:
            self.cut()

    def delay(self, on: bool) -> None:
        """Let each piece of data wait."""
        self._slow = on

    # --- forwarding -----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._start(self._accept, "proxy-accept")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing = True
        self._flowing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def _start(self, target: object, name: str, *arguments: object) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, name=name, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing or self._closing:
                _shut(near)
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                _shut(near)
                continue
            far.settimeout(None)
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {near, far}
            self._start(self._forward, "proxy-up", near, far)
            self._start(self._forward, "proxy-down", far, near)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                while not self._flowing.wait(1.0) and not self._closing:
                    pass
                if self._slow:
                    time.sleep(SLOW_SECONDS)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            with self._lock:
                self._sockets -= {source, sink}
            _shut(source)
            _shut(sink)


def _shut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
