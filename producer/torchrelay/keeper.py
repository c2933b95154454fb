"""Child processes that never outlive the process which started them, not even when that one is killed by SIGKILL.

Each child has a keeper between it and its owner: a small process that holds the reading end of a pipe. Whatever ends
the owner closes the pipe, and the keeper then ends the child: SIGTERM, a grace, SIGKILL. It works the same on Linux and
macOS, in any thread; Linux's PR_SET_PDEATHSIG would need a hook between fork and exec, and fires when the thread that
started the child ends. Not here: which processes are started, and why (`embedded`).

The keeper runs this very file as a script, with the standard library alone, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE = 10.0  # seconds between SIGTERM and SIGKILL


class Kept:
    """A running child and its keeper. Made by `start`; whoever starts it calls `stop`."""

    def __init__(self, name: str, keeper: subprocess.Popen[bytes], log: Path, logged: int, grace: float) -> None:
        self.name = name
        self.log = log
        self.grace = grace
        self._keeper = keeper
        self._logged = logged

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        hold: Sequence[int] = (),
        grace: float = GRACE,
    ) -> Kept:
        """Start `command` with its output appended to `log`.

        Args:
            hold: file descriptors, such as a lock's, that the keeper keeps open until the child is gone.
            grace: seconds that the child has to end after SIGTERM.
        """
        with log.open("ab") as output:
            logged = output.tell()
            keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, repr(grace), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                pass_fds=tuple(hold),
                start_new_session=True,  # Ctrl-C in a terminal is the owner's; it ends the children in its own order
            )
        return cls(name, keeper, log, logged, grace)

    @property
    def pid(self) -> int:
        """The keeper's process id."""
        return self._keeper.pid

    def poll(self) -> int | None:
        """Return the child's exit code (128 + n where signal n ended it), or None while it runs."""
        return self._keeper.poll()

    def wait(self, seconds: float) -> int | None:
        """Wait for the child to end by itself and return its exit code, or None where it has not by then."""
        try:
            return self._keeper.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def ask_to_end(self) -> None:
        """Let the keeper end the child, without waiting for it."""
        if self._keeper.stdin is not None and not self._keeper.stdin.closed:
            self._keeper.stdin.close()

    def stop(self) -> int:
        """End the child and return its exit code. Takes no longer than the grace and a moment."""
        self.ask_to_end()
        try:
            return self._keeper.wait(self.grace + 5.0)
        except subprocess.TimeoutExpired:
            # Only a stopped (SIGSTOP) keeper comes here; its child is in a group of its own and out of our reach.
            self._keeper.kill()
            return self._keeper.wait()

    def said(self, lines: int = 15) -> str:
        """Return the last lines that the child has logged."""
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(min(self._logged, size), size - 20_000))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-lines:])


def main(arguments: Sequence[str]) -> int:
    """The keeper itself: run the command until it ends or standard input does."""
    grace, command = float(arguments[0]), list(arguments[1:])
    wake, wakened = os.pipe()
    os.set_blocking(wakened, False)
    signal.set_wakeup_fd(wakened, warn_on_full_buffer=False)
    ending: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: ending.append(received))
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # wakes the select below

    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", flush=True)
        return 127
    while child.poll() is None and not ending:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 512)
        if 0 in ready and not os.read(0, 512):
            break
    return _end(child, wake, grace)


def _end(child: subprocess.Popen[bytes], wake: int, grace: float) -> int:
    deadline = time.monotonic() + grace
    if child.poll() is None:
        child.terminate()
    while child.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
            # The child's own children are in its group, and must not stay behind either.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            break
        if select.select([wake], [], [], left)[0]:
            os.read(wake, 512)
    code = child.returncode
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
