"""The doctor: each part well, and each part ill."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from servers import RedisServer
from torchrelay import Relay, doctor
from torchrelay.doctor import Finding, Grade, Patient, examine, exit_code
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet


@pytest.fixture(autouse=True)
def quick_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that does not import the real one, which takes seconds; a test of its own does."""
    monkeypatch.setattr(doctor, "_TORCH", 'print(\'{"version": "1", "cuda": ["H100"], "mps": false}\')')


@pytest.fixture
def alive(sqlite_settings: Settings) -> Iterator[Callable[..., None]]:
    """`alive(models=None)` adds a worker that beats."""
    database = Database(sqlite_settings.database_url)

    def add(models: list[str] | None = None) -> None:
        Fleet(database).register("w", host="here", pid=1, device="cpu", models=models)

    yield add
    database.dispose()


def findings(settings: Settings) -> dict[str, Finding]:
    return {finding.part: finding for finding in examine(settings)}


def test_all_is_well(relay: Relay, sqlite_settings: Settings, alive: Callable[..., None]) -> None:
    relay.register_model("digits", handler="digits")
    settings = Settings.load(**sqlite_settings.model_dump() | {"handlers": {"double": "m:C"}})
    alive()
    found = findings(settings)
    grades = {part: finding.grade for part, finding in found.items()}
    assert grades.pop("up") is Grade.SKIPPED
    assert set(grades.values()) == {Grade.OK}, found
    assert exit_code(list(found.values())) == 0
    assert found["torch"].says == "1, devices: cuda:0 (H100), cpu"
    assert found["redis"].details["version"]


def test_a_redis_that_evicts_fails(sqlite_settings: Settings) -> None:
    with RedisServer(**{"maxmemory-policy": "allkeys-lru", "maxmemory": "100mb"}) as server:
        found = findings(Settings.load(**sqlite_settings.model_dump() | {"broker": server.url}))
    assert found["eviction"].grade is Grade.FAILED
    assert "maxmemory-policy noeviction" in str(found["eviction"].fix)
    assert exit_code(list(found.values())) == 1
    assert "of 100.0 MB" in found["memory"].says or "of 104.9 MB" in found["memory"].says


def test_a_redis_that_is_nearly_full_is_told(sqlite_settings: Settings) -> None:
    patient = Patient(sqlite_settings)
    patient.redis = {"used_memory": 90, "maxmemory": 100}
    assert doctor.check_memory(patient).grade is Grade.WARNING


def test_an_old_redis_is_told(sqlite_settings: Settings) -> None:
    patient = Patient(sqlite_settings)
    patient.redis = {"redis_version": "5.0.14"}
    assert doctor.check_redis(patient).grade is Grade.WARNING
    patient.redis = {"redis_version": "7.2.4", "valkey_version": "9.1.2"}
    assert doctor.check_redis(patient).says.startswith("Valkey 9.1.2")


def test_a_redis_that_is_away(sqlite_settings: Settings) -> None:
    found = findings(Settings.load(**sqlite_settings.model_dump() | {"broker": "redis://:secret@127.0.0.1:1/0"}))
    assert found["redis"].unreachable
    assert "secret" not in str(found)
    assert found["eviction"].grade is found["memory"].grade is Grade.SKIPPED
    assert exit_code(list(found.values())) == 3


def test_an_empty_folder(tmp_path: Path) -> None:
    found = findings(Settings.load(home=tmp_path / "home"))
    assert found["database"].grade is Grade.FAILED
    assert "torchrelay up" in str(found["database"].fix)
    assert found["workers"].grade is found["models"].grade is found["clock"].grade is Grade.SKIPPED
    assert found["artifacts"].grade is Grade.SKIPPED
    assert found["redis"].grade is Grade.WARNING
    assert "torchrelay up" in str(found["redis"].fix)
    assert exit_code(list(found.values())) == 3
    assert not (tmp_path / "home").exists()


def test_an_embedded_stack_that_nobody_has_started_is_not_ill(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path / "home")
    database = Database(settings.database_url)
    database.upgrade()
    database.dispose()
    found = findings(settings)
    assert found["redis"].grade is Grade.WARNING
    assert exit_code(list(found.values())) == 0


def test_a_schema_that_is_missing(tmp_path: Path, sqlite_settings: Settings) -> None:
    settings = Settings.load(**sqlite_settings.model_dump() | {"database": f"sqlite:///{tmp_path / 'empty.db'}"})
    found = findings(settings)["database"]
    assert found.grade is Grade.FAILED
    assert "torchrelay db upgrade" in found.says
    assert exit_code([found]) == 1


def test_artifacts_that_cannot_be_written(tmp_path: Path, sqlite_settings: Settings) -> None:
    (tmp_path / "file").write_text("not a folder")
    settings = Settings.load(**sqlite_settings.model_dump() | {"artifacts": f"file://{tmp_path / 'file' / 'x'}"})
    found = findings(settings)["artifacts"]
    assert found.grade is Grade.FAILED
    assert "TORCHRELAY_ARTIFACTS" in str(found.fix)


def test_no_worker_matters_when_jobs_wait(relay: Relay, sqlite_settings: Settings) -> None:
    assert findings(sqlite_settings)["workers"].grade is Grade.WARNING
    relay.submit("double", 1)
    found = findings(sqlite_settings)["workers"]
    assert found.grade is Grade.FAILED
    assert "torchrelay worker" in str(found.fix)


def test_models_that_nobody_can_serve(relay: Relay, sqlite_settings: Settings, alive: Callable[..., None]) -> None:
    assert "handler 'double' is not installed" in findings(sqlite_settings)["models"].says
    settings = Settings.load(**sqlite_settings.model_dump() | {"handlers": {"double": "m:C"}})
    alive(models=["other"])
    assert "no worker that is alive serves it" in findings(settings)["models"].says
    alive()
    relay.pause("double")
    assert "is paused" in findings(settings)["models"].says


def test_no_model_at_all(sqlite_settings: Settings) -> None:
    assert findings(sqlite_settings)["models"].says == "none is registered yet"


def test_clocks_that_differ(sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Database, "now", lambda _self: 1e9)
    found = findings(sqlite_settings)["clock"]
    assert found.grade is Grade.WARNING
    assert "NTP" in str(found.fix)


def test_a_torch_that_does_not_import(sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TORCH", "raise ImportError('libcudart.so.12')")
    found = findings(sqlite_settings)["torch"]
    assert found.grade is Grade.FAILED
    assert "libcudart.so.12" in found.says


def test_a_torch_that_takes_too_long(sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("x", 1)

    monkeypatch.setattr("torchrelay.doctor.subprocess.run", run)
    assert findings(sqlite_settings)["torch"].grade is Grade.FAILED


def test_no_torch_is_fine(sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrelay.doctor.importlib.util.find_spec", lambda _: None)
    assert findings(sqlite_settings)["torch"].grade is Grade.SKIPPED


def test_what_nobody_expected_is_a_finding(sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(_patient: Patient) -> Finding:
        raise ZeroDivisionError("a surprise")

    monkeypatch.setattr(doctor, "CHECKS", (("redis", break_down),))
    [found] = examine(sqlite_settings)
    assert (found.grade, found.says) == (Grade.FAILED, "ZeroDivisionError: a surprise")
