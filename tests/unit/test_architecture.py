"""The shape of the house: who may import whom, what is never loaded, how rooms are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [ROOT / "storage/torchrelay_storage", ROOT / "producer/torchrelay", ROOT / "worker/torchrelay_worker"]
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))


def loaded_by(program: str) -> set[str]:
    """Return the top names of all modules that a fresh interpreter has loaded after `program`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sorted(sys.modules), sep='\\n')"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {line.partition(".")[0] for line in done.stdout.splitlines()}


def import_all(package: Path) -> str:
    """Return a program that imports every module of a package, but for its `__main__`."""
    names = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in package.rglob("*.py")
        if path.stem not in ("__main__", "env") and "versions" not in path.parts
    ]
    return "\n".join(f"import {name}" for name in sorted(names))


@pytest.mark.parametrize("package", PACKAGES[:2], ids=lambda path: path.name)
def test_the_application_s_side_never_loads_torch(package: Path) -> None:
    assert not {"torch", "torchvision", "transformers"} & loaded_by(import_all(package))


def test_a_first_look_is_cheap() -> None:
    """`import torchrelay` in an application loads no NumPy and no test tool either."""
    assert not {"torch", "numpy", "pytest", "sklearn", "hypothesis"} & loaded_by("import torchrelay")


@pytest.mark.parametrize("name", ["supervisor", "__main__", "health"])
def test_the_supervisor_never_loads_torch(name: str) -> None:
    assert "torch" not in loaded_by(f"import torchrelay_worker.{name}")


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KEPT" in done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_has_a_name_a_purpose_and_a_size(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc", "shared", "base"}
    text = path.read_text()
    assert len(text.splitlines()) <= 500, "a module that long is two"
    if text and "versions" not in path.parts:
        assert text.startswith('"""'), "a module says first what it is for"
    for word in ("TO" + "DO", "FIX" + "ME", "import pickle", "from pickle"):
        assert word not in text


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_package_tells_its_types(package: Path) -> None:
    assert (package / "py.typed").is_file()
