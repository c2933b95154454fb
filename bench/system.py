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

from sqlalchemy import text  # noqa: E402

from servers import PostgresServer, RedisServer  # noqa: E402
from torchrelay import Relay  # noqa: E402
from torchrelay.settings import Settings  # noqa: E402
from torchrelay_storage.database import Database  # noqa: E402

STOP_SECONDS = 60
HANDLERS = {"noop": "noop_model:Noop", "sleeper": "sleeper_model:Sleeper"}


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
def workers(settings: Settings, n: int = 1, *arguments: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run n workers, with these arguments, until the block ends. Yield their supervisors."""
    environment = {**os.environ, **settings.as_environment(), "PYTHONPATH": str(ROOT / "bench")}
    started = []
    for i in range(n):
        command = [sys.executable, "-m", "torchrelay_worker", "--name", f"bench-{i}", *arguments]
        with _log(settings).open("ab") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # its inner process sees that, and ends


def warm(relay: Relay, model: str, value: object, n: int) -> None:
    """Wait until n workers have the model loaded and have served it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for job in [relay.submit(model, value) for _ in range(n)]:
            job.result(timeout=120)
        if _serving(relay) >= n:
            return
        time.sleep(0.05)
    log = _log(relay.settings)
    raise TimeoutError(f"{n} workers did not come up:\n{log.read_text()[-2000:] if log.exists() else ''}")


def _log(settings: Settings) -> Path:
    """Where the workers write what they would tell an operator."""
    return settings.home / "workers.log"


def _serving(relay: Relay) -> int:
    """Return how many workers have loaded a model: one that is alive may still be importing torch."""
    statement = text("""
        SELECT count(DISTINCT w.id) FROM workers w JOIN served s ON s.worker = w.id WHERE w.stopped_at IS NULL
    """)
    return int(relay._core.db.query(lambda connection: connection.execute(statement).scalar_one()))
