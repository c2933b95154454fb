"""The launcher with processes of the test in the run's place: its log shipped, its death recorded, its end by force."""

from __future__ import annotations

import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from servers import wait_until
from torchrelay.settings import Settings
from torchrelay_storage import values
from torchrelay_storage.chunk_store import ChunkStore, Claimed
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Backoff, Options
from torchrelay_storage.registry import Registry
from torchrelay_storage.run_spec import Dataset, RunSpec
from torchrelay_storage.run_writer import RunHold, RunWriter
from torchrelay_storage.runs import RunStore
from torchrelay_storage.states import JobState
from torchrelay_storage.submission import NewJob, Submitted
from torchrelay_worker.training import launcher
from torchrelay_worker.training.launcher import Launcher, Site

SPEC = RunSpec(model="m", recipe="r", dataset=Dataset(uri="file:///none", format="csv"))


class Rig:
    """A database with runs, and a launcher whose runs are a script of the test."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.worker = Fleet(database).register("w", host="h", pid=1, device="cpu").id
        self.lane = Registry(database).lane("r", {})
        self.site = Site(settings, self.worker, "cpu", threads=2, grace=20.0)
        self.published: list[int] = []
        self.launcher = Launcher(database, self.site, lambda chunks, _: self.published.extend(chunks))

    def run(self, *, timeout: float | None = None, max_attempts: int = 3, spec: object = None) -> Claimed:
        """Submit a run and claim it."""
        document = SPEC.model_dump(mode="json") if spec is None else spec
        job = NewJob(values.encode(document))
        options = Options(timeout=timeout, max_attempts=max_attempts)
        placed = RunStore(self.database).submit(self.lane, options, job, SPEC)
        assert isinstance(placed, Submitted)
        return self.claim(placed.chunk)

    def claim(self, chunk: int) -> Claimed:
        [claimed] = ChunkStore(self.database).claim([chunk], self.worker)
        return claimed

    def follow(self, claimed: Claimed) -> Any:
        """Start it, wait until nothing runs any more, and return its job's row."""
        self.launcher.start(claimed)
        self.wait()
        return self.row(claimed)

    def wait(self) -> None:
        wait_until(lambda: not self.launcher.chunks(), 40, "the end of the run")

    def row(self, claimed: Claimed) -> Any:
        return JobStore(self.database).get([claimed.jobs[0].id])[claimed.jobs[0].id]

    def lines(self, claimed: Claimed) -> list[str]:
        return [line.line for line in RunStore(self.database).logs(claimed.jobs[0].id)]


@pytest.fixture
def rig(database: Database, settings: Settings) -> Iterator[Rig]:
    made = Rig(database, settings)
    yield made
    made.launcher.stop()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Let runs be this Python code; it has `ready`, the path of a file to touch."""

    def put(code: str) -> None:
        path = tmp_path / "run.py"
        path.write_text("import os, signal, sys, time, pathlib\n" + textwrap.dedent(code))
        monkeypatch.setattr(launcher, "command", lambda *_: [sys.executable, str(path)])

    return put


def test_a_process_that_is_killed_goes_on_elsewhere_with_its_log_kept(rig: Rig, script: Callable[[str], None]) -> None:
    script("""
        print("first"); print("zweite Zeile: äöü", file=sys.stderr); sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    claimed = rig.run()
    row = rig.follow(claimed)
    assert row.state is JobState.RETRYING
    assert row.failures == 0, "a lost process is not a failure of the run"
    assert sorted(rig.lines(claimed)) == ["first", "zweite Zeile: äöü"]
    assert rig.published == [claimed.chunk]
    assert not list((rig.site.settings.home / "runs").iterdir())


def test_a_run_that_always_dies_fails_and_says_how(rig: Rig, script: Callable[[str], None]) -> None:
    script("print('about to fall'); sys.stdout.flush(); os.abort()")
    claimed = rig.run(max_attempts=2)
    rig.follow(claimed)
    wait_until(lambda: bool(ChunkStore(rig.database).due_models()), 20, "its time")
    rig.database.transact(lambda c: c.exec_driver_sql("UPDATE chunks SET due = true"))
    row = rig.follow(rig.claim(claimed.chunk))
    assert row.state is JobState.FAILED
    assert row.error.type == "WorkerLost"
    assert "SIGABRT" in row.error.message
    assert "about to fall" in row.error.traceback


def test_an_end_that_was_not_recorded_is_a_death(rig: Rig, script: Callable[[str], None]) -> None:
    script("pass")
    row = rig.follow(rig.run(max_attempts=1))
    assert row.state is JobState.FAILED
    assert "without recording an end" in row.error.message


def test_a_drain_asks_the_run_to_end_and_hands_it_back(rig: Rig, script: Callable[[str], None], tmp_path: Path) -> None:
    script(f"""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        pathlib.Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(60)
    """)
    claimed = rig.run()
    rig.launcher.start(claimed)
    wait_until((tmp_path / "ready").exists, 20, "the run")
    rig.launcher.stop()
    assert not rig.launcher.has_room()
    row = rig.row(claimed)
    assert row.state is JobState.QUEUED
    assert row.failures == 0


@pytest.mark.parametrize("obeys", [True, False])
def test_a_cancelled_run_is_ended_within_seconds(
    rig: Rig, script: Callable[[str], None], tmp_path: Path, obeys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "CANCEL_SECONDS", 1.0)
    script(f"""
        signal.signal(signal.SIGTERM, lambda *_: {"sys.exit(0)" if obeys else "None"})
        pathlib.Path({str(tmp_path / "ready")!r}).write_text(str(os.getpid()))
        while True: time.sleep(0.1)
    """)
    claimed = rig.run()
    rig.launcher.start(claimed)
    wait_until(lambda: (tmp_path / "ready").exists() and (tmp_path / "ready").read_text() != "", 20, "the run")
    JobStore(rig.database).cancel([claimed.jobs[0].id])
    rig.wait()
    assert not psutil.pid_exists(int((tmp_path / "ready").read_text()))
    assert rig.row(claimed).state is JobState.CANCELLED
    assert rig.launcher.has_room()


def test_a_run_over_its_timeout_fails(rig: Rig, script: Callable[[str], None]) -> None:
    script("time.sleep(60)")
    row = rig.follow(rig.run(timeout=0.5))
    assert row.state is JobState.FAILED
    assert row.error.type == "Timeout"


def test_an_input_that_is_no_run_fails(rig: Rig) -> None:
    row = rig.follow(rig.run(spec={"recipe": 7}))
    assert row.state is JobState.FAILED
    assert row.error.type == "Corrupt"


def test_what_the_process_wrote_itself_stays(rig: Rig, script: Callable[[str], None], tmp_path: Path) -> None:
    claimed = rig.run()
    done = tmp_path / "done"
    script(f"""
        while not pathlib.Path({str(done)!r}).exists(): time.sleep(0.05)
    """)
    rig.launcher.start(claimed)
    hold = RunHold(claimed.jobs[0].id, claimed.chunk, claimed.token, rig.worker)
    threading.Timer(0.2, done.touch).start()
    assert RunWriter(rig.database, hold).hand_back()
    rig.wait()
    assert rig.row(claimed).state is JobState.QUEUED


def test_the_process_ends_with_its_launcher(rig: Rig, script: Callable[[str], None], tmp_path: Path) -> None:
    script(f"""
        pathlib.Path({str(tmp_path / "ready")!r}).touch()
        sys.stdin.read()
        pathlib.Path({str(tmp_path / "eof")!r}).touch()
        sys.exit(1)
    """)
    claimed = rig.run()
    child = launcher._Child(rig.site, RunHold(claimed.jobs[0].id, claimed.chunk, claimed.token, rig.worker), SPEC)
    with child:
        wait_until((tmp_path / "ready").exists, 20, "the run")
        assert child.process.stdin is not None
        child.process.stdin.close()
        wait_until((tmp_path / "eof").exists, 20, "its end of file")
        child.process.wait(20)


def test_the_command_line(rig: Rig, tmp_path: Path) -> None:
    hold = RunHold(1, 2, 3, 4)
    one = launcher.command(rig.site, hold, 1)
    assert one[1:3] == ["-m", "torchrelay_worker.training.process"]
    assert one[one.index("--threads") + 1] == "2"
    assert "--gate" not in one
    two = launcher.command(Site(rig.site.settings, 4, "cpu", 2, tmp_path / "gate"), hold, 2)
    assert two[1:3] == ["-m", "torch.distributed.run"]
    assert two[two.index("--nproc-per-node") + 1] == "2"
    assert two[two.index("--threads") + 1] == "1", "the processes share the cores"
    assert two[two.index("--gate") + 1] == str(tmp_path / "gate")
    patient = Backoff(seconds=60.0)
    own = launcher.command(rig.site, hold, 1, patient)
    assert Backoff.decode(own[own.index("--backoff") + 1]) == patient
