"""Processes of training runs without the seconds that importing torch takes: forked off one that has imported it.

They are processes like any other: they can be killed, have a leash and a log. The zygote ends with who started it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

TESTS = Path(__file__).parent
MESSAGE = 1 << 18  # bytes of the longest


class Zygote:
    """The process that forks. A context manager."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "import zygote; zygote.serve()"]
        self._process = subprocess.Popen(command, stdin=theirs, env=environment)
        theirs.close()
        self._socket = ours

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: IO[bytes], script: str = ""
    ) -> Forked:
        """Fork a process that runs `script` and then the process of a run."""
        read, write = os.pipe()
        message = {"arguments": arguments, "environment": dict(environment), "script": script}
        socket.send_fds(self._socket, [json.dumps(message).encode()], [read, log.fileno()])
        os.close(read)
        return Forked(self, self._answer(), os.fdopen(write, "wb"))

    def poll(self, pid: int) -> int | None:
        """Return the exit code of a process, or None while it runs."""
        self._socket.send(json.dumps({"poll": pid}).encode())
        return self._answer()

    def _answer(self) -> Any:
        return json.loads(self._socket.recv(MESSAGE))

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()
        self._process.wait(30)


class Forked:
    """A process that was forked off, with the part of Popen's methods that tests need."""

    def __init__(self, zygote: Zygote, pid: int, stdin: IO[bytes]) -> None:
        self._zygote = zygote
        self.pid = pid
        self.stdin = stdin
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.poll(self.pid)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve() -> None:
    """The zygote: fork and reap as asked, until nobody asks any more."""
    import accelerate  # noqa: F401
    import tensorboardX  # noqa: F401
    import torch._dynamo
    import torch._inductor  # noqa: F401  (with the first optimiser that is made)

    import training_runs  # noqa: F401
    from torchrelay_worker.training import process

    asked = socket.socket(fileno=os.dup(0))
    running: set[int] = set()
    while True:
        data, descriptors, _, _ = socket.recv_fds(asked, MESSAGE, 2)
        if not data:
            break
        message = json.loads(data)
        if "poll" in message:
            pid, status = os.waitpid(message["poll"], os.WNOHANG)
            running -= {pid}
            asked.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
            continue
        pid = os.fork()
        if pid == 0:
            _become(message, descriptors, asked, process.main)
        running.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        asked.send(json.dumps(pid).encode())
    for pid in running:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _become(message: dict[str, Any], descriptors: list[int], asked: socket.socket, main: Any) -> None:
    code = 1
    try:
        asked.close()
        os.setpgid(0, 0)
        for target, source in ((0, descriptors[0]), (1, descriptors[1]), (2, descriptors[1])):
            os.dup2(source, target)
        for descriptor in descriptors:
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(message["environment"])
        exec(message["script"], {"__name__": "script"})
        code = main(message["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
