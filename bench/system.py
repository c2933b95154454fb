"""A whole system for a benchmark: servers of its own, a database, workers; all of it ended afterwards.

Not a benchmark itself. The servers are those of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from servers import PostgresServer, RedisServer  # noqa: E402
from torchrelay import Relay  # noqa: E402
from torchrelay.settings import Settings  # noqa: E402
from torchrelay_storage.database import Database  # noqa: E402

HANDLERS = {"noop": "noop_model:Noop"}


@contextmanager
def system(kind: str) -> Iterator[Settings]:
    """Yield the settings of a fresh system on `sqlite` or `postgresql`, without workers."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchrelay-bench-")))
        redis = stack.enter_context(RedisServer())
        if kind == "postgresql":
            url = stack.enter_context(PostgresServer(durable=True)).create("bench")
        else:
            url = f"sqlite:///{folder / 'torchrelay.db'}"
        database = Database(url)
        database.upgrade()
        database.dispose()
        yield Settings.load(
            home=folder, database=url, broker=redis.url, artifacts=f"file://{folder}/artifacts", handlers=HANDLERS
        )


@contextmanager
def workers(settings: Settings, n: int = 1, *arguments: str) -> Iterator[None]:
    """Run n workers, with these arguments, until the block ends."""
    environment = {**os.environ, **settings.as_environment(), "PYTHONPATH": str(ROOT / "bench")}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torchrelay_worker", "--name", f"bench-{i}", *arguments], env=environment
        )
        for i in range(n)
    ]
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


def warm(relay: Relay, model: str, value: object, n: int) -> None:
    """Wait until n workers have served the model."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        relay.submit(model, value).result(timeout=120)
        if sum(w.alive for w in relay.workers()) >= n:
            return
    raise TimeoutError(f"{n} workers did not come up")
