"""A connection to PostgreSQL that breaks in the middle of a COMMIT: nothing twice, nothing lost, no wrong count."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from integration.system.commit_proxy import LATE, CommitProxy, How
from servers import PostgresServer, wait_until
from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_storage.states import End
from torchrelay_storage.submission import NewJob, Submission, Submitted

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

HOWS: tuple[How, ...] = ("before", "after", "late")
every_way = pytest.mark.parametrize("how", HOWS)


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[CommitProxy]:
    with CommitProxy(postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
def cut_off(database_url: str, proxy: CommitProxy, postgres_server: PostgresServer) -> Iterator[Database]:
    """The database, by way of the proxy."""
    database = Database(
        postgres_server.url(database_url.rpartition("/")[2]).replace(str(postgres_server.port), str(proxy.port))
    )
    yield database
    database.dispose()


@pytest.fixture
def version(database: Database) -> ModelVersion:
    return Registry(database).register("model", handler="h", chunk_size=64)


def submit(database: Database, version: ModelVersion, n: int) -> list[int]:
    [placed] = JobStore(database).submit([Submission(version, Options(), [NewJob(b"1")] * n)])
    return [p.job for p in placed if isinstance(p, Submitted)]


def count(database: Database, table: str) -> int:
    with database.read() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


@every_way
def test_submits(how: How, database: Database, cut_off: Database, version: ModelVersion, proxy: CommitProxy) -> None:
    cut_off.now()
    for n in (1, 100):
        proxy.cut(how)
        began = time.monotonic()
        jobs = submit(cut_off, version, n)
        assert time.monotonic() - began < LATE + 3
        assert len(JobStore(database).get(jobs)) == n
    assert proxy.cuts == 2
    assert count(database, "jobs") == 101
    assert count(database, "chunks") == 1 + 2


@every_way
def test_a_finish(how: How, database: Database, cut_off: Database, version: ModelVersion, proxy: CommitProxy) -> None:
    jobs = submit(database, version, 3)
    worker = Fleet(database).register("w", host="h", pid=1, device="cpu").id
    [claimed] = ChunkStore(database).claim([jobs[0]], worker)
    ends = [(End.SUCCEEDED, b"1", None), (End.FAILED, None, b'{"type":"E","message":"m"}')]
    ends.append((End.OPEN, None, b'{"type":"E","message":"m"}'))
    outcomes = [Outcome(j, claimed.chunk, claimed.token, *end) for j, end in zip(jobs, ends, strict=True)]
    cut_off.now()
    proxy.cut(how)
    finished = JobStore(cut_off).finish(outcomes, worker)
    assert proxy.cuts == 1
    assert (finished.recorded, finished.dropped) == (3, frozenset())
    assert count(database, "attempts") == 2
    with database.read() as connection:
        rows = connection.execute(text("SELECT state, failures FROM jobs ORDER BY id")).all()
    assert [tuple(row) for row in rows] == [(1, 0), (2, 1), (0, 1)]


@every_way
def test_a_cancel_and_a_retry(
    how: How, database: Database, cut_off: Database, version: ModelVersion, proxy: CommitProxy
) -> None:
    jobs = submit(database, version, 5)
    cut_off.now()
    proxy.cut(how)
    assert JobStore(cut_off).cancel(jobs).count == 5
    proxy.cut(how)
    assert JobStore(cut_off).retry(jobs).count == 5
    assert proxy.cuts == 2
    assert JobStore(database).cancel(jobs).count == 5


@every_way
def test_an_announce_and_a_claim(
    how: How, database: Database, cut_off: Database, version: ModelVersion, proxy: CommitProxy
) -> None:
    """What was announced by it is announced again; what was claimed by it is handed back by the worker's warden."""
    jobs = submit(database, version, 64)
    chunks, room = ChunkStore(cut_off), dict.fromkeys(range(10), 4)
    cut_off.now()
    proxy.cut(how)
    announced = [a.chunk for a in chunks.announce(version.model, room)]
    assert announced in ([], [jobs[0]])
    if not announced:
        wait_until(lambda: [a.chunk for a in chunks.announce_again(version.model, 0, 4)] == [jobs[0]], 5, "the message")
    worker = Fleet(database).register("w", host="h", pid=1, device="cpu").id
    proxy.cut(how)
    claimed = chunks.claim([jobs[0]], worker)
    time.sleep(LATE + 0.5)
    held = ChunkStore(database).held(worker)
    assert proxy.cuts == 2
    assert len(held) == 1
    if claimed:
        assert held[0].token == claimed[0].token
    assert ChunkStore(database).hand_back([(held[0].chunk, held[0].token)], worker) == 1


@every_way
def test_a_relay_tells_what_it_did(how: How, settings: Settings, database: Database, proxy: CommitProxy) -> None:
    """The whole client: group commit, a batch, and a job in the caller's own transaction."""
    url = (
        settings.database_url.rpartition("@")[0]
        + f"@127.0.0.1:{proxy.port}/"
        + settings.database_url.rpartition("/")[2]
    )
    chosen = settings.model_dump(exclude_none=True) | {"database": url}
    with Relay(settings=Settings.load(**chosen)) as relay:
        relay.register_model("double", handler="double")
        proxy.cut(how)
        job = relay.submit("double", 1)
        proxy.cut(how)
        batch = relay.submit_batch("double", range(500))
        assert proxy.cuts == 2
        assert batch.counts().total == 500
        assert count(database, "jobs") == 501
        proxy.cut(how)
        assert job.cancel()
        proxy.cut(how)
        assert batch.cancel() == 500
        assert proxy.cuts == 4
        assert batch.counts().cancelled == 500
