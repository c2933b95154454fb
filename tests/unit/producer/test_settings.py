"""Settings: who wins, what is refused, and that no secret shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchrelay.settings import Settings, safe_url
from torchrelay_storage.errors import InvalidInput


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "torchrelay.toml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def test_defaults_are_the_embedded_stack_in_a_folder() -> None:
    settings = Settings.load()
    home = Path.cwd() / ".torchrelay"
    assert settings.is_embedded
    assert settings.database_url == f"sqlite:///{home / 'torchrelay.db'}"
    assert settings.artifacts_url == f"file://{home / 'artifacts'}"
    assert settings.broker_url == f"redis+socket://{settings.socket}"
    assert len(os.fsencode(settings.socket)) < 100


def test_the_socket_is_the_folders_own_and_the_same_in_every_process(tmp_path: Path) -> None:
    assert Settings.load(home=tmp_path / "a").socket != Settings.load(home=tmp_path / "b").socket
    assert Settings.load(home="a").socket == Settings.load(home=Path.cwd() / "a").socket


def test_arguments_win_over_the_file_and_the_file_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEARTBEAT", "STALE_AFTER", "INLINE_LIMIT"):
        monkeypatch.setenv(f"TORCHRELAY_{name}", {"HEARTBEAT": "1", "STALE_AFTER": "11"}.get(name, "2000"))
    write("stale_after = 12\ninline_limit = 3000")
    settings = Settings.load(inline_limit=4000)
    assert (settings.heartbeat, settings.stale_after, settings.inline_limit) == (1, 12, 4000)


def test_an_argument_that_is_none_was_not_passed() -> None:
    write('database = "sqlite:///there.db"')
    assert Settings.load(database=None).database == "sqlite:///there.db"


def test_handlers_of_file_and_environment_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHRELAY_HANDLERS", '{"a": "m:A"}')
    write('[handlers]\nb = "m:B"')
    assert Settings.load().handlers == {"a": "m:A", "b": "m:B"}


def test_what_training_needs_comes_by_file_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings.load().recipes, Settings.load().datasets) == ({}, [])
    monkeypatch.setenv("TORCHRELAY_RECIPES", '{"a": "m:A"}')
    monkeypatch.setenv("TORCHRELAY_DATASETS", '["s3://bucket/sets", "file:///data"]')
    write('[recipes]\nb = "m:B"')
    settings = Settings.load()
    assert settings.recipes == {"a": "m:A", "b": "m:B"}
    assert settings.datasets == ["s3://bucket/sets", "file:///data"]


def test_another_file_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    write("heartbeat = 3")
    other = write("heartbeat = 4", "other.toml")
    monkeypatch.setenv("TORCHRELAY_CONFIG", str(other))
    assert Settings.load().heartbeat == 4
    monkeypatch.setenv("TORCHRELAY_CONFIG", "")
    assert Settings.load().heartbeat == 2
    monkeypatch.setenv("TORCHRELAY_CONFIG", "missing.toml")
    with pytest.raises(InvalidInput, match=r"missing\.toml cannot be read"):
        Settings.load()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("databse = 'x'", r"unknown setting 'databse' \(torchrelay\.toml\); did you mean 'database'"),
        ("zzz = 1", r"unknown setting 'zzz' .*known are home, database"),
        ("heartbeat = 'often'", r"setting 'heartbeat' \(torchrelay\.toml\): Input should be a valid number"),
        ("heartbeat = ", "torchrelay.toml is not TOML"),
        ("heartbeat = 9\nstale_after = 10", "at least twice the heartbeat"),
        ("broker = 'amqp://u:secret@h'", "must begin with redis://"),
        ("datasets = ['/data']", "setting 'datasets' .*each must be file:///a/folder, s3://bucket"),
        ("datasets = ['file://host/data']", "each must be file:///a/folder"),
        ("datasets = ['s3://']", "each must be file:///a/folder"),
        ("datasets = ['s3://b?secret=1']", "each must be file:///a/folder"),
        ("datasets = 's3://b'", "setting 'datasets' .*valid list"),
        ("recipes = {a = 1}", "setting 'recipes'"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(text: str, says: str) -> None:
    write(text)
    with pytest.raises(InvalidInput, match=says) as caught:
        Settings.load()
    assert "secret" not in str(caught.value)


def test_what_is_wrong_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"unknown setting 'brokr' \(an argument\)"):
        Settings.load(brokr="x")
    monkeypatch.setenv("TORCHRELAY_INLINE_LIMIT", "many")
    with pytest.raises(InvalidInput, match=r"'inline_limit' \(TORCHRELAY_INLINE_LIMIT\)"):
        Settings.load()
    monkeypatch.setenv("TORCHRELAY_INLINE_LIMIT", "4096")
    monkeypatch.setenv("TORCHRELAY_HANDLERS", "not json")
    with pytest.raises(InvalidInput, match="TORCHRELAY_"):
        Settings.load()


def test_another_process_gets_the_same_settings_by_the_environment() -> None:
    settings = Settings.load(
        home="here", broker="redis://h:1/0", handlers={"a": "m:A"}, recipes={"r": "m:R"}, datasets=["s3://b"]
    )
    write("heartbeat = 4")  # which the other process must not read
    code = "from torchrelay.settings import Settings; print(Settings.load().model_dump_json())"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TORCHRELAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain | settings.as_environment(), check=True, capture_output=True, text=True
    )
    assert Settings.model_validate_json(done.stdout) == settings


def test_no_secret_in_a_repr() -> None:
    settings = Settings.load(database="postgresql://u:geheim@h/d", broker="redis://:geheim@h", artifacts="s3://b")
    assert "geheim" not in repr(settings)
    assert "geheim" not in str(settings)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:pw@host:6379/0", "redis://:***@host:6379/0"),
        ("postgresql://user:p%40w@host/name", "postgresql://user:***@host/name"),
        ("postgresql://host/name?password=x&sslmode=require", "postgresql://host/name?password=***&sslmode=require"),
        ("redis+socket:///tmp/r.sock?virtual_host=1", "redis+socket:///tmp/r.sock?virtual_host=1"),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
        ("s3://bucket/prefix?access_key_id=A", "s3://bucket/prefix?access_key_id=***"),
        ("redis://[::1", "***"),
    ],
)
def test_safe_url(url: str, shown: str) -> None:
    assert safe_url(url) == shown
