"""The demo as a newcomer runs it: from an empty folder, twice, with what it says to try next."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAM = str(Path(sys.executable).parent / "torchrelay")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=200)


def left_running(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["pid", "cwd", "cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(folder) in f"{process.info['cwd']}/":
            found.append(shlex.join(process.info["cmdline"] or []))
    return found


@pytest.mark.timeout(450)  # two demos, each of which starts Python with torch three times
def test_the_demo(tmp_path: Path) -> None:
    first = run(tmp_path, PROGRAM, "demo", "--json")
    assert first.returncode == 0, first.stderr
    report: dict[str, Any] = json.loads(first.stdout)
    assert report["ok"] is True
    assert report["states"] == dict.fromkeys(report["states"], 0) | {"succeeded": 1797}
    assert report["held_out"] > 300
    assert report["accuracy"] > 0.97
    assert abs(report["accuracy"] - report["trained_accuracy"]) < 0.01, "the queue gives what the bare net gives"
    assert report["jobs_per_second"] > 0
    assert Path(report["database"]) == tmp_path / ".torchrelay" / "torchrelay.db"
    assert first.stderr == ""
    assert left_running(tmp_path) == []

    # What it says to try next works with nothing running.
    shown = {}
    for command in report["commands"]:
        done = run(tmp_path, *shlex.split(command), "--json")
        assert done.returncode == 0, done.stderr
        shown[shlex.split(command)[1]] = json.loads(done.stdout)
    assert len(shown["list"]) == 20
    assert shown["status"]["counts"]["succeeded"] == 1797
    losses = [p["value"] for p in shown["metrics"]["points"] if p["name"] == "validation_loss"]
    assert losses[-1] < losses[0]
    assert set(shown["result"]["result"]) == {"label", "probability"}
    trained = json.loads(run(tmp_path, PROGRAM, "status", report["run"], "--json").stdout)
    assert (trained["kind"], trained["state"], trained["model"]) == ("training", "succeeded", report["model"])
    assert trained["split"]["validation"] == report["held_out"]
    assert left_running(tmp_path) == []

    # Once more in the same folder, for people.
    again = run(tmp_path, PROGRAM, "demo")
    assert again.returncode == 0, again.stderr
    for word in ("1,797 succeeded", "accuracy", "jobs/s", ".torchrelay/torchrelay.db", " list", " status b_",
                 " result j_", " metrics j_", "digits@2, trained by j_"):  # fmt: skip
        assert word in again.stdout
    [model] = json.loads(run(tmp_path, PROGRAM, "models", "--json").stdout)
    assert (model["ref"], model["versions"], model["aliases"]) == ("digits@2", 2, ["champion"])
    assert json.loads(run(tmp_path, PROGRAM, "status", report["run"], "--json").stdout)["model"] == "digits@1"
    assert left_running(tmp_path) == []


def test_the_demo_beside_another_configuration(tmp_path: Path) -> None:
    """The commands to try next name the demo's database where the environment names another."""
    code = (
        "from pathlib import Path; from torchrelay.demo import commands, embedded_settings;"
        "from torchrelay.settings import Settings;"
        "print(*commands(embedded_settings(Settings.load()), 'j_0', 'b_1', 'j_1'), sep='\\n')"
    )
    environment = os.environ | {"TORCHRELAY_DATABASE": "postgresql://u@h/d", "TORCHRELAY_BROKER": "redis://h"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          check=True)  # fmt: skip
    database = f"sqlite:///{tmp_path}/.torchrelay/torchrelay.db"
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [
        ["--database", database, "list"],
        ["--database", database, "status", "b_1"],
        ["--database", database, "result", "j_1"],
        ["--database", database, "metrics", "j_0"],
    ]
