"""Commands about models, workers and the schema, over SQLite."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchrelay import Relay
from torchrelay.cli.arguments import complete_model
from torchrelay.settings import Settings
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet

Cli = Callable[..., Any]


def test_register_uploads_the_weights(cli: Cli, tmp_path: Path, sqlite_settings: Settings) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    arguments = ["models", "register", "digits", "--handler", "digits", "--weights", "w.safetensors",
                 "--config", '{"width": 8}', "--chunk-size", "32"]  # fmt: skip
    first = cli(*arguments, "--json").json
    assert (first["ref"], first["config"]) == ("digits@1", {"width": 8})
    assert first["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert Artifacts(sqlite_settings.artifacts_url).get(first["weights"]) == b"weights"
    assert cli(*arguments).out == "registered digits@2\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Digits!", "--handler", "h"], "a model's name has"),
        (["digits", "--handler", "h", "--weights", "missing"], "missing"),
        (["digits", "--handler", "h", "--config", "[]"], "--config must be a JSON object"),
        (["digits"], "Missing option '--handler'"),
    ],
)
def test_what_register_refuses(cli: Cli, arguments: list[str], words: str) -> None:
    assert words in cli("models", "register", *arguments, "--json", code=2).error["message"]


def test_models_shows_what_waits_and_who_serves(cli: Cli, relay: Relay, sqlite_settings: Settings) -> None:
    relay.submit("double", 1)
    database = Database(sqlite_settings.database_url)
    for name, models in (("all", None), ("mine", ["double"]), ("other", ["x"])):
        Fleet(database).register(name, host="here", pid=7, device="cpu", models=models)
    gone = Fleet(database).register("gone", host="here", pid=8, device="cuda:1")
    Fleet(database).stop(gone.id)
    database.dispose()
    [shown] = cli("models", "--json").json
    assert (shown["ref"], shown["waiting"], shown["running"]) == ("double@1", 1, 0)
    assert sorted(shown["workers"]) == ["all", "mine"]
    assert "double@1" in cli("models").out
    assert sorted(w["name"] for w in cli("workers", "--json").json) == ["all", "mine", "other"]
    everyone = cli("workers", "--all")
    assert "gone" in everyone.out
    assert "ended" in everyone.out
    assert "cuda:1" in everyone.out


def test_where_there_is_none_it_says_how_to_get_one(cli: Cli) -> None:
    answer = cli("models")
    assert answer.out == ""
    assert "torchrelay models register" in answer.err
    assert "torchrelay up" in cli("workers").err
    assert cli("models", "--json").json == cli("workers", "--json").json == []


def test_pause_and_resume(cli: Cli, relay: Relay) -> None:
    assert cli("pause", "double", "--json").json == {"model": "double", "paused": True}
    assert "paused" in cli("models").out
    batch = relay.submit_batch("double", [1])
    assert cli("pause", batch.id).out == f"batch {batch.id} is paused\n"
    assert cli("status", batch.id, "--json").json["state"] == "paused"
    cli("resume", batch.id)
    assert cli("status", batch.id, "--json").json["state"] == "running"
    assert cli("resume", "double").out == "model double is resumed\n"
    assert cli("models", "--json").json[0]["paused"] is False
    assert "did you mean double" in cli("pause", "doubel", code=2).err
    assert cli("pause", "b_0000000000000", "--json", code=2).error["type"] == "BatchNotFound"


def test_names_are_completed(
    relay: Relay, sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    relay.register_model("dowel", handler="h")
    monkeypatch.setenv("TORCHRELAY_DATABASE", sqlite_settings.database_url)
    assert sorted(complete_model("do")) == ["double", "dowel"]
    assert complete_model("dou") == ["double"]
    monkeypatch.setenv("TORCHRELAY_DATABASE", "")
    monkeypatch.setenv("TORCHRELAY_HOME", str(tmp_path / "nothing"))
    assert complete_model("") == []
    assert not (tmp_path / "nothing").exists()


class Ran:
    """Stands for subprocess.run."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.command: list[str] = []
        self.options: dict[str, Any] = {}

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        self.command, self.options = command, options
        return subprocess.CompletedProcess(command, self.code)


@pytest.mark.parametrize(("code", "shown"), [(0, 0), (1, 1), (2, 2), (3, 3), (-11, 1)])
def test_check_runs_in_a_process_of_its_own(
    cli: Cli, relay: Relay, sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch, *, code: int, shown: int
) -> None:
    ran = Ran(code)
    monkeypatch.setattr("torchrelay.cli.models.subprocess.run", ran)
    cli("models", "check", "double", "--input", '{"a": 1}', "--json", code=shown)
    assert ran.command[1:] == [
        "-m", "torchrelay_worker.check", "double", "--input", "-", "--device", "auto", "--json"
    ]  # fmt: skip
    assert ran.options["input"] == b'{"a": 1}'
    assert ran.options["env"]["TORCHRELAY_DATABASE"] == sqlite_settings.database_url


def test_check_of_a_file(cli: Cli, relay: Relay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = Ran(0)
    monkeypatch.setattr("torchrelay.cli.models.subprocess.run", ran)
    (tmp_path / "x.png").write_bytes(b"picture")
    cli("models", "check", "double", "--input", "@x.png", "--device", "cpu")
    assert ran.command[4:] == ["--input", "x.png", "--device", "cpu"]
    assert ran.options["input"] is None
    assert "cannot be read" in cli("models", "check", "double", "--input", "@y.png", code=2).err
    assert "did you mean double" in cli("models", "check", "doubel", "--input", "1", code=2).err


# --- db ----------------------------------------------------------------------------------------------------


def test_the_schema_is_upgraded_shown_and_checked(bare: Cli, tmp_path: Path) -> None:
    options = ["--database", f"sqlite:///{tmp_path / 'new.db'}"]
    assert bare(*options, "db", "current", "--json").json["current"] is None
    error = bare(*options, "db", "check", "--json", code=3).error
    assert error["type"] == "SchemaMismatch"
    assert "torchrelay db upgrade" in error["message"]
    upgraded = bare(*options, "db", "upgrade", "--json").json
    assert upgraded["before"] is None
    assert "was at" in bare(*options, "db", "upgrade").out
    assert bare(*options, "db", "check").out == "ok\n"
    current = bare(*options, "db", "current", "--json").json
    assert current["current"] == current["code"] == upgraded["after"]
    assert current["code"] in bare(*options, "db", "current").out


def test_a_database_of_a_newer_release(bare: Cli, tmp_path: Path) -> None:
    options = ["--database", f"sqlite:///{tmp_path / 'new.db'}"]
    bare(*options, "db", "upgrade")
    database = Database(f"sqlite:///{tmp_path / 'new.db'}")
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("UPDATE compatibility SET oldest = '9998'")
    database.dispose()
    for command in (["db", "check"], ["db", "upgrade"], ["list"]):
        assert "upgrade torchrelay on this machine" in bare(*options, *command, code=3).err
