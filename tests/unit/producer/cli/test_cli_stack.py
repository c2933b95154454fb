"""The command line itself: errors, exit codes, options, and the commands that start processes (with none started)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from torchrelay import Relay
from torchrelay.cli import output
from torchrelay.cli.main import app
from torchrelay.settings import Settings
from torchrelay_storage import errors
from torchrelay_storage.errors import RelayError

Cli = Callable[..., Any]

WORDS = {"up", "worker", "submit", "batch", "status", "list", "watch", "result", "cancel", "retry", "pause", "resume",
         "models", "workers", "db", "doctor", "demo", "train", "metrics", "logs"}  # fmt: skip

MODELS = [["models", word] for word in ("register", "check", "show", "compare", "promote", "rollback", "history",
                                        "recipes")]  # fmt: skip


def test_the_commands_are_those_of_the_contract() -> None:
    assert set(get_command(app).commands) == WORDS  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [[], *([word] for word in sorted(WORDS - {"worker"})), *MODELS])
def test_every_command_has_help_and_nearly_all_json(bare: Cli, command: list[str]) -> None:
    words = bare(*command, "--help").out
    assert "Usage" in words
    assert "--json" in words or command == ["db"]


def test_looking_around_leaves_no_folder_behind(bare: Cli, tmp_path: Path) -> None:
    for command in (["list"], ["models"], ["workers"], ["status", "j_0000000000000"], ["watch"], ["db", "check"],
                    ["submit", "m", "-i", "1"], ["cancel", "j_0000000000000"]):  # fmt: skip
        error = bare(*command, "--json", code=3).error
        assert error["type"] == "Unreachable"
        assert "torchrelay demo" in error["message"]
    bare("doctor", code=3)
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_message_with_a_next_step(bare: Cli) -> None:
    words = bare("list", code=3).err
    assert words.startswith("error: ")
    assert "next: torchrelay doctor" in words
    assert "Traceback" not in words


@pytest.mark.parametrize("command", [["nonsense"], ["list", "--limit", "many"], ["submit"], ["list", "--nope"]])
def test_errors_of_usage(bare: Cli, command: list[str]) -> None:
    assert "Usage" in bare(*command, code=2).err
    answer = bare(*command, "--json", code=2)
    assert answer.error["type"] == "Usage"
    assert answer.out == ""


def test_a_bad_setting(bare: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "redis://" in bare("--broker", "amqp://x", "list", code=2).err
    monkeypatch.setenv("TORCHRELAY_STALE_AFTER", "soon")
    assert "TORCHRELAY_STALE_AFTER" in bare("list", code=2).err


def test_a_database_that_does_not_answer(bare: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrelay_storage.database.RETRY_SECONDS", 0.1)
    error = bare("--database", "postgresql://u:secret@127.0.0.1:1/x", "list", "--json", code=3).error
    assert error["type"] == "Unreachable"
    assert "secret" not in json.dumps(error)


def test_every_error_has_an_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RelayError)]
    known = tuple(kind for kind, _ in output._CODES)
    assert [kind for kind in kinds if not issubclass(kind, known) and not known_base(kind)] == []


def known_base(kind: type[RelayError]) -> bool:
    return any(issubclass(other, kind) for other, _ in output._CODES)


def test_version(bare: Cli) -> None:
    assert bare("--version").out.startswith("torchrelay ")


def test_completion_offers_commands(tmp_path: Path) -> None:
    environment = os.environ | {
        "_TORCHRELAY_COMPLETE": "complete_bash", "COMP_WORDS": "torchrelay re", "COMP_CWORD": "1",
    }  # fmt: skip
    script = Path(sys.executable).parent / "torchrelay"
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(done.stdout.split()) == {"result", "retry", "resume"}


def test_the_command_line_imports_neither_torch_nor_the_worker() -> None:
    code = """if True:
        import sys, torchrelay.cli.main, torchrelay.demo, torchrelay.doctor, torchrelay.embedded
        heavy = {"torch", "torchrelay_worker", "sklearn", "numpy", "plotext", "matplotlib"}
        print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- worker and up, as far as they go without starting anything ---------------------------------------------


def test_worker_takes_this_processs_place(cli: Cli, sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr("torchrelay.cli.stack.os.execve", lambda *call: calls.append(call))
    cli("worker", "--models", "a,b", "--device", "cuda:1", "--anything", "new")
    [(program, arguments, environment)] = calls
    assert program == arguments[0] == sys.executable
    assert arguments[1:] == ["-m", "torchrelay_worker", "--models", "a,b", "--device", "cuda:1", "--anything", "new"]
    assert environment["TORCHRELAY_BROKER"] == sqlite_settings.broker_url
    cli("worker", "--help")
    assert calls[1][1][1:] == ["-m", "torchrelay_worker", "--help"]


def test_up_refuses_what_is_no_kind_of_training(bare: Cli, tmp_path: Path) -> None:
    assert "--train must be also, only or no" in bare("up", "--train", "maybe", code=2).err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["worker"], ["up"], ["demo"], ["models", "check", "m", "--input", "1"]])
def test_without_torch_it_says_what_to_install(bare: Cli, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr("torchrelay.cli.stack.importlib.util.find_spec", lambda _name: None)
    error = bare(*command, "--json", code=2).error
    assert "torchrelay[worker]" in error["message"]


# --- on a terminal -----------------------------------------------------------------------------------------


def test_watch_draws_a_table_on_a_terminal(
    relay: Relay, terminal: Callable[..., str], work: Callable[..., Any]
) -> None:
    batch = relay.submit_batch("double", [1, 2, 3])
    with work(lambda value: value * 2):
        shown = terminal("watch", batch.id, "--every", "0.1")
    assert "3 of 3 ended" in shown
    assert "\x1b[" in shown


def test_a_list_fits_the_terminal(relay: Relay, terminal: Callable[..., str]) -> None:
    job = relay.submit("double", 1)
    assert job.id in terminal("list")


# --- output ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0.0042, "4 ms"), (0.42, "0.42 s"), (3.21, "3.2 s"), (59.6, "60 s"), (180, "3 min"),
     (7300, "2 h"), (200_000, "2 d"), (-1, "0 ms")],
)  # fmt: skip
def test_spans(seconds: float | None, words: str) -> None:
    assert output.span(seconds) == words


def test_json_of_what_is_not_json() -> None:
    assert json.loads(output.to_json({"big": 2**70, "bytes": b"\0"})) == {"big": 2**70, "bytes": {"$bytes": "AA=="}}


def test_markup_in_a_users_words_is_shown_as_it_is(cli: Cli, relay: Relay) -> None:
    name = relay.submit("double", 1, key="[bold]k[/]").id
    assert "[bold]k[/]" in cli("status", name).out
