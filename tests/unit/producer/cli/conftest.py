"""The command line in this process, on the settings of a test: its outputs apart, its exit code checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from torchrelay import Relay
from torchrelay.cli.main import app
from torchrelay.settings import Settings


@dataclass(frozen=True)
class Answer:
    """What a command printed."""

    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, as the one JSON document that it is."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """Standard output, as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        """Standard error, as the one JSON error that it is."""
        error = json.loads(self.err)["error"]
        assert isinstance(error, dict)
        return error


Cli = Callable[..., Answer]


def invoke(arguments: list[str], code: int, stdin: str | bytes | None = None) -> Answer:
    """Run a command line; fail where its exit code is another."""
    before = structlog.get_config()
    try:
        result = CliRunner().invoke(app, arguments, input=stdin)
    finally:
        structlog.configure(**before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.stdout}\n{result.stderr}"
    return Answer(result.stdout, result.stderr)


@pytest.fixture
def cli(sqlite_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("list", "--json", code=0, stdin=None)`, on the test's own database, Redis and artifacts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    s = sqlite_settings
    options = ["--home", str(s.home), "--database", s.database_url, "--broker", s.broker_url,
               "--artifacts", s.artifacts_url]  # fmt: skip

    def run(*arguments: str, code: int = 0, stdin: str | bytes | None = None) -> Answer:
        return invoke([*options, *arguments], code, stdin)

    return run


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The same in an empty folder, without any option."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments, code=0, stdin=None: invoke(list(arguments), code, stdin)


@pytest.fixture
def double(relay: Relay) -> Relay:
    """A relay; the model `double` is registered."""
    return relay
