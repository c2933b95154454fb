"""Worker processes of tests, as an operator starts them. The fixture `worker` hands them out and stops them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet

TESTS = Path(__file__).parent


class WorkerProcess:
    """A `python -m torchrelay_worker` of a test. `name` is its name in the fleet."""

    def __init__(self, name: str, arguments: tuple[str, ...], settings: Settings, environment: Mapping[str, str],
                 log_path: Path) -> None:  # fmt: skip
        self.name = name
        self.log_path = log_path
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torchrelay_worker", "--name", name, *arguments],
                cwd=log_path.parent,
                env={**os.environ, **settings.as_environment(), "PYTHONPATH": path, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What the worker has written so far, both of its processes."""
        return self.log_path.read_text(errors="replace")

    @property
    def children(self) -> list[psutil.Process]:
        """The processes under the supervisor: the one that holds the device."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def is_alive(self, database: Database, stale_after: float) -> bool:
        """Whether the fleet's table says so. Raises RuntimeError, with its log, for a worker that has exited."""
        if self.process.poll() is not None:
            raise RuntimeError(f"worker {self.name} exited with {self.process.returncode}:\n{self.log[-8000:]}")
        return any(row.alive and row.name == self.name for row in Fleet(database).workers(stale_after))

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, wait, and return its exit code; kills it and raises TimeoutError when it does not end."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"worker {self.name} did not end within {seconds:g} s:\n{self.log[-8000:]}") from None

    def kill(self) -> None:
        """SIGKILL for all its processes at once, as a machine that loses its power."""
        family = self.children
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the group that we made for it, and no other
        self.process.wait()
        psutil.wait_procs(family, timeout=10)
