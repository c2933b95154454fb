"""The main tests of the stores and of the whole system once more, through a PgBouncer in transaction mode.

They run in a pytest of their own. All others run so too with TORCHRELAY_TEST_DATABASES=pgbouncer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psycopg
import pytest

from pgbouncer import PgBouncerServer
from servers import PostgresServer
from torchrelay_storage.database import Database

HERE = Path(__file__).parent
SECONDS = 420.0

STORES = ("test_stores.py", "test_schema.py", "test_runs.py", "test_state_machine.py", "test_doubtful_commits.py")
SYSTEM = ("test_inference.py", "test_recovery.py")
SYSTEM_TESTS = ("single_jobs", "two_workers", "thousand_transactions", "tried_again", "cancel_while", "kill_of")


def run(files: Sequence[Path], chosen: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "inner",
               "-k", chosen, *files]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command],
        cwd=HERE.parents[1],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        | {"TORCHRELAY_TEST_DATABASES": "pgbouncer"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= len(files), "the tests that were meant have run"
    assert "skipped" not in done.stdout


@pytest.mark.timeout(SECONDS + 30)
def test_the_stores(tmp_path: Path) -> None:
    run([HERE / "storage" / name for name in STORES], "not sqlite", tmp_path)


@pytest.mark.timeout(SECONDS + 30)
def test_the_whole_system(tmp_path: Path) -> None:
    run([HERE / "system" / name for name in SYSTEM], f"({' or '.join(SYSTEM_TESTS)}) and not sqlite", tmp_path)


def test_a_pooler_is_noticed(pgbouncer_server: PgBouncerServer, postgres_server: PostgresServer) -> None:
    """By each connection for itself; behind it nothing is prepared, which the next in the session would trip over."""
    for server, threshold in ((pgbouncer_server.ensure(), None), (postgres_server, 5)):
        database = Database(server.url())
        with database.read() as connection:
            driver = connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            assert driver.prepare_threshold == threshold
        for _ in range(20):
            assert database.now() > 0
        database.dispose()
