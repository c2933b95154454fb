"""The checker finds each way in which a history can be wrong, and nothing in one that is right."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace

import psycopg
import pytest

from chaos import audit, checker
from chaos.journal import CANCELLED, EXPIRED, FAILED, SUCCEEDED, Expected, History, Seen, answer
from torchrelay_storage.database import Database


def execute(url: str, *statements: str) -> None:
    """Run statements in one transaction, by the database's own driver."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
            for statement in statements:
                connection.execute(statement)
        return
    with psycopg.connect(url) as session:
        for statement in statements:
            session.execute(statement)


def chunk(url: str, id: int, jobs: dict[int, int], batch: int | None = None) -> None:
    """Submit jobs (id -> number in the input) as a chunk."""
    first, last = min(jobs), max(jobs)
    execute(
        url,
        "INSERT INTO chunks (id, model, version, batch, flow, priority, turn, first_id, last_id, size, max_attempts, "
        f"created_at) VALUES ({id}, 1, 1, {batch or 'NULL'}, 0, 5, 1, {first}, {last}, {len(jobs)}, 3, 0)",
        *(
            f"INSERT INTO jobs (id, chunk, batch, input) "
            f"VALUES ({job}, {id}, {batch or 'NULL'}, CAST('{{\"n\":{n}}}' AS {blob(url)}))"
            for job, n in jobs.items()
        ),
    )


def blob(url: str) -> str:
    return "BLOB" if url.startswith("sqlite") else "BYTEA"


def claim(url: str, id: int) -> None:
    execute(url, f"UPDATE chunks SET state = 1 WHERE id = {id}")
    execute(url, f"UPDATE chunks SET state = 2, token = token + 1, worker = 7 WHERE id = {id}")


def end(url: str, id: int, jobs: dict[int, int], *, done: bool = True) -> None:
    """Record results of a claimed chunk's jobs (id -> number in the input)."""
    execute(
        url,
        *(
            f"UPDATE jobs SET state = 1, output = CAST('{answer(n)}' AS {blob(url)}), worker = 7, finished_at = 1 "
            f"WHERE id = {job}"
            for job, n in jobs.items()
        ),
        f"UPDATE chunks SET succeeded = succeeded + {len(jobs)}, state = {3 if done else 2} WHERE id = {id}",
    )


PLAIN = frozenset({SUCCEEDED})
GOOD = History(
    {
        **{n: Expected(n, "c1/0", True, PLAIN) for n in (1, 2, 3)},  # a batch, job 12 of it in a chunk of its own
        4: Expected(4, "c1/1", True, frozenset({FAILED}), "ValueError"),
        5: Expected(5, "c1/2", True, frozenset({SUCCEEDED, CANCELLED})),
        6: Expected(6, "c2/0", False, PLAIN),
        7: Expected(7, "c2/1", None, PLAIN),  # nobody knows; it is not there
        8: Expected(8, "c2/2", True, PLAIN),
        9: Expected(9, "c2/2", True, PLAIN),
        10: Expected(10, "c2/3", True, frozenset({SUCCEEDED, EXPIRED}), retries=1),
    },
    seen=(Seen(1, SUCCEEDED, answer(1)), Seen(4, FAILED), Seen(5, CANCELLED), Seen(10, EXPIRED)),
    atomic={"c2/2": (8, 9)},
    batches={"c1/0": 3},
)
# Where things are: job of input n is 10 + n; chunks 11 and 99 hold the batch 5, 14, 15, 18 and 20 the others.


@pytest.fixture
def url(database: Database, database_url: str) -> str:
    """A database with a history in which all went well: a hand-back, a retry, a failure, a cancel, an expiry."""
    audit.keep(database)
    url = database_url
    execute(
        url,
        "INSERT INTO models (id, name, created_at) VALUES (1, 'm', 0)",
        "INSERT INTO model_versions (id, model, version, handler, chunk_size, created_at) VALUES (1, 1, 1, 'h', 9, 0)",
        "INSERT INTO batches (id, model, version, priority, created_at) VALUES (5, 1, 1, 5, 0)",
    )
    chunk(url, 11, {11: 1, 12: 2, 13: 3}, batch=5)
    claim(url, 11)
    end(url, 11, {11: 1, 13: 3}, done=False)
    execute(  # the third failed, and is tried again in a chunk of its own
        url,
        "INSERT INTO chunks (id, model, version, batch, flow, priority, turn, first_id, last_id, size, max_attempts, "
        "created_at) VALUES (99, 1, 1, 5, 0, 5, 1, 12, 12, 1, 3, 0)",
        "UPDATE jobs SET chunk = 99, failures = 1 WHERE id = 12",
        "INSERT INTO attempts (job, id, ended_at, outcome) VALUES (12, 1, 1, 'failed')",
        "UPDATE chunks SET size = 2, state = 3 WHERE id = 11",
    )
    claim(url, 99)
    end(url, 99, {12: 2})
    chunk(url, 14, {14: 4})
    claim(url, 14)
    execute(url, "UPDATE chunks SET state = 0, token = token + 1, worker = NULL WHERE id = 14")  # handed back
    claim(url, 14)
    error = f'CAST(\'{{"type":"ValueError","message":"no"}}\' AS {blob(url)})'
    execute(
        url,
        f"UPDATE jobs SET state = 2, failures = 1, error = {error}, finished_at = 1 WHERE id = 14",
        "INSERT INTO attempts (job, id, ended_at, outcome) VALUES (14, 1, 1, 'failed')",
        "UPDATE chunks SET state = 3, failed = 1 WHERE id = 14",
    )
    chunk(url, 15, {15: 5})
    execute(url, "UPDATE jobs SET state = 3, finished_at = 1 WHERE id = 15",
            "UPDATE chunks SET state = 3, cancelled = 1 WHERE id = 15")  # fmt: skip
    chunk(url, 18, {18: 8, 19: 9})
    claim(url, 18)
    end(url, 18, {18: 8, 19: 9})
    execute(url, "INSERT INTO chaos_orders VALUES ('c2/2')")
    chunk(url, 20, {20: 10})
    execute(url, "UPDATE jobs SET state = 4, finished_at = 1 WHERE id = 20",
            "UPDATE chunks SET state = 3, expired = 1 WHERE id = 20")  # fmt: skip
    execute(  # and opened again by a retry
        url,
        "INSERT INTO chunks (id, model, version, flow, priority, turn, first_id, last_id, size, max_attempts, "
        "created_at) VALUES (21, 1, 1, 0, 5, 1, 20, 20, 1, 3, 0)",
        "UPDATE jobs SET chunk = 21, state = 0, finished_at = NULL WHERE id = 20",
        "UPDATE chunks SET size = 0, expired = 0 WHERE id = 20",
    )
    claim(url, 21)
    end(url, 21, {20: 10})
    return url


def found(url: str, history: History = GOOD, **more: object) -> set[str]:
    verdict = checker.check(url, history, **more)  # type: ignore[arg-type]
    assert verdict.passed == (not any(verdict.found.values()))
    return {name for name in checker.CHECKS if verdict.n(name)}


def test_a_right_history_passes(url: str) -> None:
    verdict = checker.check(url, GOOD, messages={"torchrelay.m": 0})
    assert verdict.passed, str(verdict)
    assert verdict.counts["jobs"] == 8
    assert verdict.counts["succeeded"] == 6
    assert (verdict.counts["committed"], verdict.counts["rolled back"], verdict.counts["unknown"]) == (8, 1, 1)
    assert verdict.counts["chunks"] == 7
    assert verdict.counts["moves of jobs"] >= 17


UNTRACED = ("DELETE FROM audit_jobs WHERE job = {0}", "DELETE FROM audit_chunks WHERE chunk = {0}")

CORRUPTIONS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "a job is gone": (("DELETE FROM jobs WHERE id = 14",), {"lost", "counts", "seen"}),
    "a job never got stored": (
        ("DELETE FROM jobs WHERE id = 18", "DELETE FROM audit_jobs WHERE job = 18",
         "UPDATE chunks SET size = 1, succeeded = 1 WHERE id = 18"),
        {"lost", "torn"},
    ),
    "a job is open": (
        ("UPDATE jobs SET state = 0, output = NULL WHERE id = 18",
         "DELETE FROM audit_jobs WHERE job = 18 AND was IS NOT NULL", "UPDATE audit_jobs SET was = NULL WHERE job = 18",
         "UPDATE chunks SET succeeded = 1 WHERE id = 18"),
        {"open"},
    ),
    "a wrong result": (("UPDATE jobs SET output = CAST('1' AS {blob}) WHERE id = 18",), {"wrong", "twice"}),
    "a result recorded again": (("UPDATE jobs SET finished_at = 2 WHERE id = 18",), {"twice"}),
    "a wrong error": (
        ("UPDATE jobs SET error = CAST('{{\"type\":\"WorkerLost\"}}' AS {blob}) WHERE id = 14",), {"wrong"},
    ),
    "an innocent failed": (
        ("UPDATE jobs SET state = 2, output = NULL WHERE id = 18", "UPDATE chunks SET succeeded = 1, failed = 1 "
         "WHERE id = 18"), {"wrong", "twice"},
    ),
    "a count is wrong": (("UPDATE chunks SET succeeded = 2 WHERE id = 11 AND size = 2 OR id = 99",), {"counts"}),
    "a job in another batch": (("UPDATE jobs SET batch = NULL WHERE id = 12",), {"counts"}),
    "a job in another chunk": (("UPDATE jobs SET chunk = 18 WHERE id = 12",), {"counts"}),
    "a job reopened": (
        ("UPDATE jobs SET state = 0 WHERE id = 15", "UPDATE jobs SET state = 3 WHERE id = 15"), {"backwards"},
    ),
    "a chunk left done": (
        ("UPDATE chunks SET state = 0 WHERE id = 15", "UPDATE chunks SET state = 3 WHERE id = 15"), {"backwards"},
    ),
    "a token went back": (("UPDATE chunks SET token = 0 WHERE id = 14",), {"backwards"}),
    "claimed without a new token": (
        ("UPDATE audit_chunks SET old_token = 1 WHERE chunk = 18 AND became = 2",), {"backwards", "trail"},
    ),
    "failures went back": (("UPDATE jobs SET failures = 0 WHERE id = 12",), {"backwards", "attempts", "twice"}),
    "failed too often": (("UPDATE jobs SET failures = 4 WHERE id = 14",), {"attempts", "twice"}),
    "no history of the tries": (("DELETE FROM attempts WHERE job = 14",), {"attempts"}),
    "a chunk left announced": (
        ("UPDATE chunks SET state = 1 WHERE id = 99", "DELETE FROM audit_chunks WHERE chunk = 99 AND became IN (2, 3)",
         "UPDATE audit_chunks SET was = 0, old_token = 0, token = 1 WHERE chunk = 99 AND became = 1"
         " AND was = 0", "DELETE FROM audit_chunks WHERE chunk = 99 AND was = 3"),
        {"stuck"},
    ),
    "a chunk left claimed": (
        ("UPDATE chunks SET state = 2 WHERE id = 99",
         "DELETE FROM audit_chunks WHERE chunk = 99 AND 3 IN (was, became)"),
        {"stuck"},
    ),
    "a job of nobody": (
        ("UPDATE jobs SET input = CAST('{{\"n\":77}}' AS {blob}) WHERE id = 11",), {"phantom", "lost", "seen"},
    ),
    "a rolled-back job": (("UPDATE jobs SET input = CAST('{{\"n\":6}}' AS {blob}) WHERE id = 15",),
                          {"phantom", "lost", "seen", "wrong"}),
    "a job twice": (
        ("UPDATE jobs SET input = CAST('{{\"n\":8}}' AS {blob}) WHERE id = 19",), {"twice", "lost", "torn", "wrong"},
    ),
    "the client's own row is missing": (("DELETE FROM chaos_orders",), {"torn"}),
    "no trail of a job": (("DELETE FROM audit_jobs WHERE job = 15",), {"trail"}),
    "a gap in a job's trail": (("DELETE FROM audit_jobs WHERE job = 20 AND became = 4",), {"trail"}),
    "no trail of a chunk": (("DELETE FROM audit_chunks WHERE chunk = 15",), {"trail"}),
}  # fmt: skip


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupted_history_is_found(url: str, corruption: str) -> None:
    statements, expected = CORRUPTIONS[corruption]
    execute(url, *(statement.format(blob=blob(url)) for statement in statements))
    assert found(url) == expected, str(checker.check(url, GOOD))


def test_what_stands_beside_the_database_is_checked(url: str) -> None:
    assert found(url, messages={"torchrelay.m": 2}) == {"messages"}
    assert found(url, replace(GOOD, seen=(Seen(5, SUCCEEDED, answer(5)),))) == {"seen"}
    assert found(url, replace(GOOD, seen=(Seen(1, SUCCEEDED, 3),))) == {"seen"}
    unasked = {**GOOD.jobs, 10: replace(GOOD.jobs[10], retries=0)}
    assert found(url, replace(GOOD, jobs=unasked)) == {"backwards", "seen"}
    assert found(url, replace(GOOD, batches={"c1/0": 3, "c1/1": 1})) == {"counts"}
    execute(url, "INSERT INTO chaos_orders VALUES ('c2/0')")
    assert found(url, replace(GOOD, atomic={**GOOD.atomic, "c2/0": (6,)})) == {"torn"}, "rolled back, but for one row"


def test_training_runs_are_compared(url: str) -> None:
    def run(number: int, name: str, sha256: str, state: int = 1) -> None:
        execute(
            url,
            f"INSERT INTO models (id, name, created_at) VALUES ({number}, '{name}', 0)",
            "INSERT INTO model_versions (id, model, version, handler, chunk_size, created_at, sha256, run) "
            f"VALUES ({number}, {number}, 1, 'h', 1, 0, '{sha256}', {number})",
            "INSERT INTO chunks (id, model, version, flow, priority, turn, first_id, last_id, size, max_attempts, "
            f"created_at) VALUES ({number}, 50, 1, 0, 5, 1, {number}, {number}, 1, 3, 0)",
            f"INSERT INTO runs (job, model, recipe, created_at) VALUES ({number}, '{name}', 'tiny', 0)",
            f"INSERT INTO jobs (id, chunk, input) VALUES ({number}, {number}, CAST('{{}}' AS {blob(url)}))",
            f"UPDATE jobs SET state = {state} WHERE id = {number}",
            f"UPDATE chunks SET state = 3, succeeded = 1 WHERE id = {number}",
        )

    execute(url, "INSERT INTO models (id, name, created_at, training) VALUES (50, 'lane', 0, true)")
    run(51, "quiet", "aa")
    assert found(url) == set()
    assert found(url, runs={"loud": "quiet"}) == {"training"}
    run(52, "loud", "aa")
    assert found(url, runs={"loud": "quiet"}) == set()
    run(53, "other", "bb")
    assert found(url, runs={"other": "quiet"}) == {"training"}
    run(54, "broken", "aa", state=2)
    assert found(url, runs={"loud": "quiet"}) == {"training"}


def test_what_moves_meanwhile_is_no_fault(url: str) -> None:
    with checker.snapshot(url) as rows:
        before = rows("SELECT count(*) FROM jobs")
        chunk(url, 30, {30: 30})
        assert rows("SELECT count(*) FROM jobs") == before
    assert found(url) == {"phantom", "open", "stuck"}
