"""The container health check answers by exit code alone."""

from __future__ import annotations

import os
import socket

import pytest

from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_worker import health


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.as_environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("environment")
def test_alive_is_what_beats_on_this_host(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main([]) == health.NONE_ALIVE
    assert "0 were seen" in capsys.readouterr().err
    fleet = Fleet(database)
    fleet.register("elsewhere", host="another-host", pid=1, device="cpu")
    assert health.main([]) == health.NONE_ALIVE
    assert health.main(["--name", "elsewhere"]) == health.ALIVE
    mine = fleet.register("mine", host=socket.gethostname(), pid=os.getpid(), device="cpu")
    capsys.readouterr()
    assert health.main([]) == health.ALIVE
    assert capsys.readouterr().out == "mine is alive\n"
    fleet.stop(mine.id)
    assert health.main([]) == health.NONE_ALIVE
    assert "1 were seen" in capsys.readouterr().err


def test_a_bad_setting_and_a_database_out_of_reach_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], empty_database_url: str
) -> None:
    monkeypatch.setenv("TORCHRELAY_DATABASE", "mysql://nobody@nowhere/none")
    assert health.main([]) == health.USAGE
    monkeypatch.setenv("TORCHRELAY_DATABASE", empty_database_url)
    assert health.main([]) == health.UNREACHABLE
    assert "torchrelay db upgrade" in capsys.readouterr().err
