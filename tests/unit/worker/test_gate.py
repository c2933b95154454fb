"""The gate between inference and a run on one device: free it costs nothing, held it delays the run, never stops it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from forking import run_in_child
from torchrelay_worker.training import gate as module
from torchrelay_worker.training.gate import Gate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gates" / "7"


def test_a_new_gate_is_free_and_a_run_does_not_wait(path: Path) -> None:
    with Gate.make(path) as gate:
        assert not gate.is_held
        assert Gate.open(path).wait() == 0.0


def test_both_sides_see_the_same_byte_in_different_processes(path: Path) -> None:
    with Gate.make(path) as worker:
        worker.hold()

        def run() -> None:
            mine = Gate.open(path)
            assert mine.is_held
            mine.close()

        run_in_child(run)
        assert worker.is_held, "the run's end must not free what the worker holds"
        worker.free()
        run_in_child(lambda: pytest.fail("held") if Gate.open(path).is_held else None)


def test_a_held_gate_delays_a_step_for_the_limit_and_no_longer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with Gate.make(path) as gate:
        gate.set(True)
        assert gate.wait(0.5) == pytest.approx(0.5, abs=0.002)
        assert gate.wait(0.5) == pytest.approx(0.5, abs=0.002), "the next step stands back anew"
        gate.set(False)
        assert gate.wait(0.5) == 0.0


def test_a_run_that_waits_goes_on_as_soon_as_the_gate_is_free(path: Path) -> None:
    with Gate.make(path) as gate:
        gate.hold()
        waiting = threading.Thread(target=Gate.open(path).wait, args=(60.0,))
        waiting.start()
        gate.free()
        waiting.join(30.0)
        assert not waiting.is_alive()


def test_the_worker_s_side_removes_the_file_and_leaves_the_run_free(path: Path) -> None:
    gate = Gate.make(path)
    run = Gate.open(path)
    gate.hold()
    gate.close()
    gate.close()
    assert not path.exists()
    assert not run.is_held
    with pytest.raises(FileNotFoundError):
        Gate.open(path)


def test_a_gate_that_a_killed_worker_left_held_is_made_anew_free(path: Path) -> None:
    Gate.make(path).hold()
    assert not Gate.make(path).is_held
