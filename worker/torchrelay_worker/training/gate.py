"""Inference goes first where a run shares its device: a file of one byte that both processes have in their memory.

The worker holds the gate while inference has work; the run looks at it between two steps and waits, but never for
long in a row, so that it always goes on. Not here: who has work (`pipeline.device`), and when a step ends (`loop`).
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path
from typing import Self

LONGEST_WAIT = 0.5  # seconds in a row that a run stands back; then it makes one step, whatever waits
LOOK_SECONDS = 0.001  # a small part of what a device batch takes, and next to no load

_FREE, _HELD = 0, 1


class Gate:
    """One gate: the worker makes it with `Gate.make`, the run's process opens it with `Gate.open`.

    A worker that dies with the gate held does not stop the run: each wait has an end.
    """

    def __init__(self, path: Path, descriptor: int, *, is_owner: bool) -> None:
        self.path = path
        self._is_owner = is_owner
        with os.fdopen(descriptor, "r+b") as file:
            self._byte = mmap.mmap(file.fileno(), 1)

    @classmethod
    def make(cls, path: Path) -> Self:
        """Make the gate, free: the worker's side. Raises OSError."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, 1)
        gate = cls(path, descriptor, is_owner=True)
        gate.free()
        return gate

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the gate that a worker has made: the run's side. Raises OSError if there is none."""
        return cls(path, os.open(path, os.O_RDWR), is_owner=False)

    # --- the worker's side --------------------------------------------------------------------------------

    def set(self, busy: bool) -> None:
        """Hold it or free it. One store into memory: cheap enough for each device batch."""
        self._byte[0] = _HELD if busy else _FREE

    def hold(self) -> None:
        """Let the run wait."""
        self.set(True)

    def free(self) -> None:
        """Let the run go on."""
        self.set(False)

    # --- the run's side -----------------------------------------------------------------------------------

    @property
    def is_held(self) -> bool:
        """Whether inference has work."""
        return self._byte[0] == _HELD

    def wait(self, limit: float = LONGEST_WAIT) -> float:
        """Wait until the gate is free, for at most `limit` seconds, and return the seconds that it took."""
        if not self.is_held:
            return 0.0
        started = time.monotonic()
        while self.is_held and time.monotonic() - started < limit:
            time.sleep(LOOK_SECONDS)
        return time.monotonic() - started

    # --- the end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take this process's hand off. The worker's side frees it first, and removes the file."""
        if self._byte.closed:
            return
        if self._is_owner:
            self.free()
            self.path.unlink(missing_ok=True)
        self._byte.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
