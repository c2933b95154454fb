"""The embedded stack with a real server: it starts, stops, and leaves nothing behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import psutil
import pytest

from servers import wait_until
from torchrelay import embedded
from torchrelay.broker import Broker, connect
from torchrelay.embedded import AlreadyRunning, Happening, Stack, find_server, holder, only_one, private_folder
from torchrelay.keeper import Kept
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, Unreachable
from torchrelay_storage.fleet import Fleet

OWNER = """
import sys
import time
from torchrelay.embedded import Stack
from torchrelay.settings import Settings
with Stack(Settings.load(home=sys.argv[1]), workers=0):
    print("ready", flush=True)
    sys.stdin.read()
"""


def server_process(settings: Settings) -> psutil.Process:
    client = connect(settings)
    try:
        return psutil.Process(int(client.info("server")["process_id"]))
    finally:
        client.close()


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_up(settings: Settings) -> bool:
    broker = Broker(settings)
    try:
        return broker.is_up()
    finally:
        broker.close()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.chdir(tmp_path)
    settings = Settings.load(home=tmp_path / "home")
    folder = settings.socket.parent
    yield settings
    if folder.exists():
        wait_until(lambda: not any(folder.iterdir()), 20, "the end of the server")
        folder.rmdir()  # all that a killed owner leaves, until the next start: an empty folder


@pytest.fixture
def owner(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs the stack."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(settings.home)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_it_runs_inside_the_block_and_not_after(settings: Settings) -> None:
    happened: list[Happening] = []
    with Stack(settings, workers=0, tell=happened.append) as stack:
        stack.wait_ready()
        server = server_process(settings)
        client = connect(settings)
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
        client.close()
        assert not server.net_connections("inet"), "no TCP port"
        assert settings.socket.parent.stat().st_mode & 0o777 == 0o700
        assert stack.database.revision()[0] is not None, "the schema is there"
        assert holder(settings.home) == os.getpid()
    assert is_gone(server)
    assert not settings.socket.parent.exists()
    assert holder(settings.home) is None
    assert [h.what for h in happened] == ["redis"]
    assert "Ready to accept connections" in (settings.home / "logs" / "redis.log").read_text()


def test_it_can_run_again_in_the_same_folder(settings: Settings) -> None:
    for _ in range(2):
        with Stack(settings, workers=0):
            assert is_up(settings)
        assert not is_up(settings)


def test_a_second_one_is_told_who_runs(settings: Settings, owner: subprocess.Popen[str]) -> None:
    with pytest.raises(AlreadyRunning, match=str(owner.pid)), Stack(settings, workers=0):
        pass
    assert is_up(settings), "the first goes on"


def test_when_the_owner_is_killed_nothing_stays_and_the_next_one_starts(
    settings: Settings, owner: subprocess.Popen[str]
) -> None:
    server = server_process(settings)
    owner.kill()
    owner.wait()
    with Stack(settings, workers=0):  # at once: it waits for what the killed one left
        assert is_gone(server)
        assert is_up(settings)
    assert not is_up(settings)


def test_the_socket_of_a_server_killed_with_its_keeper_is_replaced(settings: Settings) -> None:
    settings.socket.parent.mkdir(mode=0o700)
    settings.socket.write_text("not a socket any more")
    with Stack(settings, workers=0):
        assert is_up(settings)


def test_a_server_that_ends_is_started_again(settings: Settings) -> None:
    happened: list[str] = []
    with Stack(settings, workers=0, tell=lambda h: happened.append(h.what)) as stack:
        first = server_process(settings)
        first.kill()

        def back() -> bool:
            stack.look()
            return is_up(settings)

        wait_until(lambda: is_gone(first))
        wait_until(back)
        assert server_process(settings).pid != first.pid
    assert happened == ["redis", "lost", "restarted"]


def test_it_gives_up_on_what_ends_again_and_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "RESTARTS", 1)
    monkeypatch.setattr(embedded, "POLL", 0.02)
    with Stack(settings, workers=0) as stack:
        child = stack._children[0]
        server_process(settings).kill()
        child.start = lambda: Kept.start("redis", ["false"], log=settings.home / "logs" / "redis.log")
        with pytest.raises(Unreachable, match="redis ended with code 1"):
            stack.run(until=Event())


def test_a_server_that_does_not_start_says_why(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "server_command", lambda server, *_: [str(server), "--maxmemory-policy", "nonsense"])
    with pytest.raises(Unreachable, match=r"(?s)did not start.*maxmemory-policy"), Stack(settings, workers=0):
        pass
    assert holder(settings.home) is None


def test_what_is_configured_elsewhere_is_not_started(settings: Settings) -> None:
    with Stack(settings, workers=0):
        other = Settings.load(home=settings.home.parent / "other", broker=settings.broker_url)
        with Stack(other, workers=0) as stack:
            assert not stack._children
            assert is_up(other)
        assert is_up(settings), "it was not ours to stop"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_ends_cleanly_on_a_signal(settings: Settings, number: int) -> None:
    command = [sys.executable, "-m", "torchrelay", "--home", str(settings.home), "up", "--workers", "0", "--json"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as up:
        assert up.stdout is not None
        events = [json.loads(up.stdout.readline())["event"] for _ in range(2)]
        server = server_process(settings)
        up.send_signal(number)
        out, err = up.communicate(timeout=30)
    assert events == ["redis", "ready"]
    assert (json.loads(out), err, up.returncode) == ({"event": "ended"}, "", 0)
    assert is_gone(server)


def test_the_second_signal_does_not_wait_and_still_leaves_nothing(settings: Settings, tmp_path: Path) -> None:
    code = (
        "from torchrelay.cli.stack import stop_signals; from torchrelay.keeper import Kept; import pathlib, sys, time\n"
        "with stop_signals() as stop:\n"
        f"    kept = Kept.start('x', ['sleep', '60'], log=pathlib.Path({str(tmp_path / 'x')!r}))\n"
        "    print(kept.pid, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        keeper = psutil.Process(int(process.stdout.readline()))
        wait_until(keeper.children)
        [child] = keeper.children()
        process.send_signal(signal.SIGTERM)
        for _ in range(1000):  # signals that come at once are one
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
    assert process.returncode == 128 + signal.SIGTERM
    wait_until(lambda: is_gone(keeper) and is_gone(child))


# --- with a real worker ------------------------------------------------------------------------------------


def test_up_with_a_worker_leaves_nothing_when_it_is_killed(settings: Settings, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchrelay", "--home", str(settings.home), "up", "--device", "cpu", "--json"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as up:
        assert up.stdout is not None
        events = [json.loads(up.stdout.readline())["event"] for _ in range(3)]
        assert events == ["redis", "worker", "ready"], (settings.home / "logs" / "worker-1.log").read_text()
        family = psutil.Process(up.pid).children(recursive=True)
        assert len(family) == 5, "two keepers, the server, and a worker's two processes"
        up.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [process for process in alive if not is_gone(process)]
    with only_one(settings.home):
        pass
    database = Database(settings.database_url)
    [row] = Fleet(database).workers(settings.stale_after)
    database.dispose()
    assert row.stopped_at is not None, "the worker ended in order"


def test_a_worker_that_cannot_start_ends_up_with_its_last_words(settings: Settings) -> None:
    stack = Stack(settings, workers=1, device="nonsense:7")
    with stack, pytest.raises(InvalidInput, match=r"(?s)worker-1 ended with code 2.*nonsense"):
        stack.wait_ready()


# --- pieces ------------------------------------------------------------------------------------------------


def test_a_child_that_ignores_sigterm_is_killed_with_its_own_children(tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 61 & echo started; wait; wait"
    kept = Kept.start("stubborn", ["sh", "-c", script], log=tmp_path / "log", grace=0.2)
    wait_until(lambda: kept.said() == "started")
    family = psutil.Process(kept.pid).children(recursive=True)
    assert len(family) == 2
    assert kept.stop() == 128 + signal.SIGKILL
    wait_until(lambda: all(is_gone(member) for member in family))


def test_a_childs_exit_code_and_last_words_are_known(tmp_path: Path) -> None:
    kept = Kept.start("brief", ["sh", "-c", "echo one; echo two; exit 7"], log=tmp_path / "log")
    wait_until(lambda: kept.poll() is not None)
    assert (kept.stop(), kept.said(lines=1)) == (7, "two")


def test_a_command_that_is_not_there_says_so(tmp_path: Path) -> None:
    kept = Kept.start("missing", ["/nonexistent/command"], log=tmp_path / "log")
    wait_until(lambda: kept.poll() is not None)
    assert kept.stop() == 127
    assert "cannot start /nonexistent/command" in kept.said()


def test_the_lock_stays_with_the_keeper_until_the_child_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LEFTOVER_LIMIT", 0.2)
    with only_one(tmp_path) as lock:
        kept = Kept.start("child", ["sleep", "60"], log=tmp_path / "log", hold=(lock,))
    assert holder(tmp_path) is None, "nobody is named any more"
    with pytest.raises(AlreadyRunning, match="has not ended yet"), only_one(tmp_path):
        pass
    kept.stop()
    with only_one(tmp_path):
        assert holder(tmp_path) == os.getpid()


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(InvalidInput, match="chmod 700"):
        private_folder(tmp_path / "open")
    with pytest.raises(InvalidInput, match="not a folder of this user"):
        private_folder(tmp_path / "link")
    private_folder(tmp_path / "new")
    private_folder(tmp_path / "new")


def test_a_socket_path_that_is_too_long_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", f"/tmp/{'x' * 90}")
    with pytest.raises(InvalidInput, match="set TMPDIR"), Stack(settings, workers=0):
        pass


def test_a_server_on_path_comes_before_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "redis-server"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == mine
    mine.unlink()
    assert find_server().name == "valkey-server"


def test_without_any_server_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unreachable, match=r"torchrelay\[embedded\]"):
        find_server()
