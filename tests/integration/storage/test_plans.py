"""What PostgreSQL does with a large queue once it has statistics of it: no move may read the whole table of jobs."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from sqlalchemy import text

from integration.storage.job_scene import Scene
from torchrelay_storage.database import Database
from torchrelay_storage.lost import Evidence
from torchrelay_storage.options import Options
from torchrelay_storage.retention import Retention
from torchrelay_storage.states import End
from torchrelay_storage.submission import NewJob, Submission
from torchrelay_storage.upkeep import Upkeep

WAITING = 20_000  # lone jobs: far more than any move may look at


def _claim_and_finish(scene: Scene, jobs: list[int]) -> None:
    announced = [one.chunk for one in scene.chunks.announce(scene.version.model, dict.fromkeys(range(10), 8))]
    claimed = scene.chunks.claim(announced, scene.worker)
    assert len(claimed) == 8
    for chunk in claimed:
        assert scene.finish(chunk).recorded == 1


def _claim_next(scene: Scene, jobs: list[int]) -> None:
    claimed = scene.chunks.claim_next([scene.version.model], scene.worker, 8)
    assert len(claimed) == 8
    assert scene.chunks.open_jobs([one.chunk for one in claimed]) == {one.jobs[0].id for one in claimed}


def _cancel(scene: Scene, jobs: list[int]) -> None:
    assert scene.jobs.cancel(jobs[-8:]).count == 8


def _retry(scene: Scene, jobs: list[int]) -> None:
    scene.jobs.cancel(jobs[-8:])
    assert scene.jobs.retry(jobs[-8:]).count == 8


def _expire(scene: Scene, jobs: list[int]) -> None:
    late = scene.submit(8, expires_in=0.001)
    time.sleep(0.01)
    assert scene.chunks.expire().count == len(late)


def _lose(scene: Scene, jobs: list[int]) -> None:
    scene.chunks.claim(jobs[:4], scene.worker)
    assert scene.die(Evidence(frozenset(jobs[:2]))).count == 4
    scene.chunks.claim(jobs[4:8], scene.worker)
    scene.grow_old()
    assert scene.chunks.rescue(10).count == 4


def _read(scene: Scene, jobs: list[int]) -> None:
    claimed = scene.chunks.claim(jobs[:8], scene.worker)
    for chunk in claimed:
        scene.finish(chunk, End.FAILED)
    assert len(scene.jobs.ended_in([one.chunk for one in claimed])) == 8
    assert scene.outcomes(jobs[0]) == ["failed"]


def _purge(scene: Scene, jobs: list[int]) -> None:
    for chunk in scene.chunks.claim(jobs[:8], scene.worker):
        scene.finish(chunk)
    assert Retention(scene.database).purge(-1, reference=b"@").jobs == 8


MOVES: dict[str, Callable[[Scene, list[int]], None]] = {
    "claim and finish": _claim_and_finish, "claim next": _claim_next, "cancel": _cancel, "retry": _retry,
    "expire": _expire, "lose": _lose, "read": _read, "purge": _purge,
}  # fmt: skip


def _read_in_passing(database: Database, table: str = "jobs") -> int:
    """Rows of a table read by going through the whole of it, so far."""
    with database.read() as connection:
        query = text("SELECT COALESCE(seq_tup_read, 0) FROM pg_stat_user_tables WHERE relname = :table")
        return int(connection.execute(query, {"table": table}).scalar_one())


def _count(database: Database, where: str) -> int:
    with database.read() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM chunks WHERE {where}")).scalar_one())


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("move", MOVES)
def test_no_move_reads_all_jobs(database: Database, move: str) -> None:
    scene = Scene(database)
    lone = [Submission(scene.version, Options(), [NewJob(b"1")]) for _ in range(WAITING)]
    jobs = [placed[0].job for placed in scene.jobs.submit(lone)]  # type: ignore[union-attr]
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE jobs, chunks"))
    database.dispose()  # a session that ends tells what it has read
    before = _read_in_passing(database)
    MOVES[move](scene, jobs)
    database.dispose()
    assert _read_in_passing(database) - before < WAITING


STATES = {
    "waiting": "state = 0", "delayed": "due = false, not_before = 9e9",
    "announced": "state = 1, announced_at = 1", "held": "state = 2, worker = 7",
}  # fmt: skip


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("state", STATES)
def test_no_look_reads_all_chunks(database: Database, state: str) -> None:
    """Also where the statistics say that there is something everywhere, and all of it has ended since."""
    scene, upkeep = Scene(database), Upkeep(database)
    scene.jobs.submit([Submission(scene.version, Options(), [NewJob(b"1")]) for _ in range(WAITING)])
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ALTER TABLE chunks SET (autovacuum_enabled = false)"))
        connection.execute(text(f"UPDATE chunks SET {STATES[state]}"))
        connection.execute(text("VACUUM ANALYZE chunks"))
        connection.execute(text("UPDATE chunks SET state = 3"))
    database.dispose()
    before = _read_in_passing(database, "chunks")
    for _ in range(10):  # the last of them by a plan for whatever is asked
        found = upkeep.look(60.0)
        assert (found.announce, found.rescue, found.held) == (False, False, False)
    for _ in range(10):  # nor does who asks whether a lone job may be announced at once
        scene.jobs.submit([Submission(scene.version, Options(), [NewJob(b"1")], window=20)])
    assert _count(database, "state = 1") == 10
    database.dispose()
    assert _read_in_passing(database, "chunks") - before < 5 * WAITING, "it was updated twice just before"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_no_finish_of_a_large_chunk_reads_all_jobs(database: Database) -> None:
    scene = Scene(database, chunk_size=1000)
    jobs = scene.submit(WAITING)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE jobs, chunks"))
    database.dispose()
    before = _read_in_passing(database)
    assert scene.finish(scene.claim(jobs[0])).recorded == 1000
    assert scene.finish(scene.claim(jobs[1000]), jobs=jobs[1000:2000:2]).recorded == 500
    database.dispose()
    assert _read_in_passing(database) - before < WAITING
