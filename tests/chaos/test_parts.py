"""The parts that a run is replayed by: the same seed gives the same faults and the same work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import redis
from sqlalchemy import text

from chaos import audit, checker, journal
from chaos.faults import SNAPSHOT, Injected, Injector, roll_back
from chaos.journal import Journal, answer
from chaos.operations import ROOM, operations
from chaos.recovery import recoveries, resumptions
from chaos.report import Report
from chaos.run import Plan
from chaos.schedule import DATABASE_KINDS, POISON_KINDS, Fault, kinds, schedule
from chaos.system import System
from chaos.table import faults, runs
from servers import RedisServer
from torchrelay_storage.database import Database
from torchrelay_storage.faults import POINTS
from workers import TESTS


@pytest.mark.parametrize("database", DATABASE_KINDS)
def test_a_schedule_is_drawn_from_its_seed(database: str) -> None:
    first = schedule(3, database, 100, 190.0)
    assert first == schedule(3, database, 100, 190.0)
    assert first != schedule(4, database, 100, 190.0)
    assert [f.at for f in first] == sorted(f.at for f in first)
    assert {f.kind for f in first} == set(kinds(database)), "each kind at least once"
    assert len(Plan(3, database).schedule()) >= 100


@pytest.mark.parametrize("database", DATABASE_KINDS)
def test_each_kind_of_fault_can_be_made(database: str) -> None:
    for kind in kinds(database):
        if kind.startswith("at "):
            assert kind.removeprefix("at ") in POINTS
        elif kind not in POISON_KINDS:
            assert callable(getattr(Injector, f"_{kind.replace(' ', '_')}"))
    assert {f"at {point}" for point in POINTS} <= set(kinds(database))


def test_the_work_is_drawn_from_its_seed() -> None:
    plan = list(operations(5, 1, 1000))
    assert plan == list(operations(5, 1, 1000))
    numbers = [n for step in plan for n in step.numbers]
    assert len(numbers) == len(set(numbers)) >= 1000
    assert max(len(step.numbers) for step in plan) < ROOM
    sessions = [step for step in plan if step.what == "session"]
    assert 0.3 < sum(step.commits for step in sessions) / len(sessions) < 0.7, "half of them are rolled back"
    assert not set(numbers) & {n for step in operations(5, 2, 1000) for n in step.numbers}


def test_a_journal_says_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "client-1.jsonl"
    one = Journal(path)
    one.write(asked="a", what="single", jobs=[1], do={"1": "raise"})
    one.write(op="a", outcome="committed")
    one.write(asked="b", what="session", jobs=[2, 3], do={})
    one.write(op="b", outcome="rolled back")
    one.write(asked="c", what="burst", jobs=[4, 5], do={})
    one.write(op="c", outcome="unknown", stored=[5])
    one.write(cancel=[1])
    one.write(retry=[1])
    one.write(n=1, seen="failed", value=None)
    one.write(asked="d", what="batch", jobs=[6], do={}, expires=True)  # and then it was killed
    one.close()
    with path.open("ab") as file:
        file.write(b'{"half": a li')
    found = journal.read([path, tmp_path / "none"])
    assert {n: e.exists for n, e in found.jobs.items()} == {1: True, 2: False, 3: False, 4: None, 5: True, 6: None}
    assert found.jobs[1].ends == {"failed", "cancelled"}
    assert found.jobs[1].error == "ValueError"
    assert found.jobs[1].retries == 1
    assert found.jobs[6].ends == {"succeeded", "expired"}
    assert found.atomic == {"b": (2, 3)}
    assert found.batches == {}
    assert found.seen == (journal.Seen(1, "failed"),)


def test_the_trail_holds_what_was_committed(database: Database, database_url: str) -> None:
    audit.keep(database)
    with database.engine.connect() as connection:
        connection.execute(text("INSERT INTO jobs (id, chunk, input) VALUES (1, 1, :x)"), {"x": b"{}"})
        connection.rollback()
        connection.execute(text("INSERT INTO jobs (id, chunk, input) VALUES (2, 1, :x)"), {"x": b"{}"})
        connection.execute(text("UPDATE jobs SET metadata = :x WHERE id = 2"), {"x": b"{}"})
        connection.execute(text("UPDATE jobs SET state = 1, output = :x WHERE id = 2"), {"x": b"1"})
        connection.execute(text("DELETE FROM jobs WHERE id = 2"))
        connection.commit()
    trail = checker.rows(database_url, "SELECT job, was, became FROM audit_jobs ORDER BY seq")
    assert trail == [(2, None, 0), (2, 0, 1), (2, 1, None)]
    [(at,)] = checker.rows(database_url, "SELECT min(at) FROM audit_jobs")
    assert abs(audit.mark(database) - at) < 60


def test_recovery_is_read_from_the_trail(database: Database, database_url: str) -> None:
    audit.keep(database)
    rows = [
        (10.0, 1, None, 0, None), (11.0, 1, 0, 2, 7), (15.0, 1, 2, 0, 7), (17.5, 1, 0, 2, 8), (18.0, 1, 2, 3, 8),
        (10.0, 2, None, 0, None), (11.5, 2, 0, 1, None), (16.0, 2, 1, 2, 8), (16.5, 2, 2, 3, 8),
    ]  # fmt: skip
    with database.engine.begin() as connection:
        connection.execute(text("INSERT INTO workers (id, name, host, pid, device, started_at, beat_at) "
                                "VALUES (7, 'w0', 'h', 1, 'cpu', 0, 0), (8, 'w1', 'h', 1, 'cpu', 0, 0)"))  # fmt: skip
        for at, chunk, was, became, worker in rows:
            values = {"at": at, "chunk": chunk, "was": was, "became": became, "worker": worker}
            connection.execute(text("INSERT INTO audit_chunks (at, chunk, was, became, worker) "
                                    "VALUES (:at, :chunk, :was, :became, :worker)"), values)  # fmt: skip

    def made(kind: str, began: float, ended: float, hit: str | None = None) -> Injected:
        return Injected(Fault(0, 0.0, kind, 0), began, ended, hit)

    injected = [
        made("kill worker", 12.0, 12.0, "w0"), made("kill inner process", 12.0, 12.0, "w1"),
        made("flush redis", 12.0, 12.0), made("kill redis", 12.0, 15.0), made("kill database", 12.0, 13.0),
    ]  # fmt: skip
    assert recoveries(database_url, injected) == {
        "kill worker": [3.0], "flush redis": [4.0], "kill redis": [1.0], "kill database": [2.0],
    }  # fmt: skip
    assert resumptions(database_url, injected) == {  # w0 has claimed nothing any more
        "kill inner process": [4.0], "flush redis": [4.0], "kill redis": [1.0], "kill database": [3.0],
    }  # fmt: skip


def test_a_point_kills_whoever_takes_it(tmp_path: Path) -> None:
    (tmp_path / "claimed").touch()
    script = (
        "from torchrelay_storage.faults import reach; reach('popped'); print('alive', flush=True); reach('claimed')"
    )
    path = os.pathsep.join([str(TESTS / "chaos" / "site"), str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "CHAOS_FAULTS": str(tmp_path), "CHAOS_NAME": "w0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "alive\n"
    assert json.loads((tmp_path / "log").read_text())["point"] == "claimed"
    assert not (tmp_path / "claimed").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, "one bullet kills once"


def test_a_clock_jumps(tmp_path: Path) -> None:
    (tmp_path / "clock-w1").write_text("3600")
    path = os.pathsep.join([str(TESTS / "chaos" / "site"), str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "CHAOS_FAULTS": str(tmp_path)}
    script = "import os, time; print(time.time() - float(os.environ['NOW']))"
    for name, least in (("w1", 3500), ("w0", -100), ("c1", -100)):
        variables = environment | {"CHAOS_NAME": name, "NOW": str(time.time())}
        done = subprocess.run(
            [sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True, timeout=60
        )
        assert least < float(done.stdout) < least + 200


def test_the_table(tmp_path: Path) -> None:
    report = Report(
        seed=1, database="sqlite", seconds=200.0, settled=3.0, faults={"kill worker": 2}, missed={},
        recovery={"kill worker": [1.0, 4.0]}, counts={"jobs": 5001}, found={"twice": ["a"], "counts": ["b"]}, wanted=2,
        resumed={"kill worker": [0.5]},
    )  # fmt: skip
    report.save(tmp_path / "r.json")
    again = Report.load(tmp_path / "r.json")
    assert str(again) == str(report)
    assert not report.passed
    assert "| sqlite | 1 | 5,001 | 2 | 0 | 0 | 1 | 1 | 3.0 s | 200 s |" in runs([again])
    assert "| kill worker | 2 | 0.5 s | 0.5 s | 2 | 2.5 s | 4.0 s |" in faults([again])
    assert Counter(answer(n) for n in range(1000)).most_common(1)[0][1] == 1


def test_redis_is_rolled_back_to_one_moment() -> None:
    server = RedisServer()
    server.start()
    try:
        with redis.Redis(port=server.port) as client:
            client.lpush("queue", "b", "a")
            client.hset("unacked", "tag", b"\x00\xff")
            client.zadd("unacked_index", {"tag": 1.5})
            snapshot = client.eval(SNAPSHOT, 0)
            client.flushall()
            client.set("late", "1")
            roll_back(client, snapshot)
            assert client.lrange("queue", 0, -1) == [b"a", b"b"]
            assert client.hgetall("unacked") == {b"tag": b"\x00\xff"}
            assert client.zrange("unacked_index", 0, -1, withscores=True) == [(b"tag", 1.5)]
            assert client.dbsize() == 3
    finally:
        server.stop()


def test_only_messages_that_a_wrong_clock_holds_back_are_left_out() -> None:
    server = RedisServer()
    server.start()
    try:
        system = System.__new__(System)
        system.redis = server
        with redis.Redis(port=server.port) as client:
            client.hset("unacked", mapping={"late": "1", "lost": "1", "popped": "1"})
            client.zadd("unacked_index", {"late": time.time() + 3600, "popped": time.time(), "acked": time.time() + 9})
            client.lpush("torchrelay.m", "1")
            assert system.ahead() == 1
            assert system.messages() == {"torchrelay.m": 1, "unacked": 2}
    finally:
        server.stop()
