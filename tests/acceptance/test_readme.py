"""What the README, the examples and the documentation say is so: their code runs, their links lead somewhere.

The stack under the code is a newcomer's: `torchrelay demo` in an empty folder, then `torchrelay up` there. The markers
that make a block run are told in `documents`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from documents import Block, anchors, blocks, links
from servers import wait_until

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "bench/**/*.md", "deploy/**/*.md")
    for path in ROOT.glob(pattern)
)
RUN = [path for path in DOCUMENTS if any(block.name for block in blocks(path))]
LANGUAGES = {"python", "bash", "sh", "console"}
NOT_RUN = ("make ", "pip install ", "docker ")  # they set up what a test has already, or need what it has not
# What a block starts with `&` ends with it, as when a person closes the terminal.
END_JOBS = "trap 'jobs=$(jobs -p); [ -z \"$jobs\" ] || { kill $jobs; wait $jobs || true; }' EXIT\n"
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- without running anything ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in links(path):
        if re.match(r"[a-z]+:", target):
            continue  # another site: not ours to ask
        file, _, anchor = target.partition("#")
        aim = (path.parent / file).resolve() if file else path
        assert aim.exists(), f"{name_of(path)} links to {target}, which is not there"
        assert not anchor or aim.suffix != ".md" or anchor in anchors(aim), f"{target}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_are_python_and_toml_is_toml(path: Path) -> None:
    import tomllib

    for block in blocks(path):
        if block.language == "python":
            ast.parse(block.text, f"{name_of(path)}:{block.line}")
        elif block.language == "toml":
            tomllib.loads(block.text)


def test_the_readme_s_first_screen_has_the_two_commands_and_they_are_there() -> None:
    shells = [block for block in blocks(ROOT / "README.md") if block.language in LANGUAGES - {"python"}]
    commands = [line.split("#")[0].strip() for block in shells[:1] for line in block.commands.splitlines()]
    assert "make demo" in commands
    assert "make test" in commands
    for target, last in {"demo": ".venv/bin/torchrelay demo", "test": "pytest"}.items():
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert last in dry.stdout


def test_the_application_s_and_the_author_s_code_are_run() -> None:
    names = {block.name for block in blocks(ROOT / "README.md")}
    assert {"application", "model"} <= names, "the README's two examples must carry markers"


def test_every_example_has_a_readme_that_is_run() -> None:
    examples = [path for path in ROOT.glob("examples/*") if path.is_dir() and path.name != "__pycache__"]
    assert examples
    assert {path / "README.md" for path in examples} <= set(RUN)


# --- running what they say ------------------------------------------------------------------------------------------


class Newcomer:
    """A folder in which somebody follows a document, with the demo's stack running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, command: list[str]) -> str:
        """Run a command there and return what it printed; fails with all that it said."""
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with process:
            try:
                printed, said = process.communicate(timeout=180)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the group that we made for it
                printed, said = process.communicate()
        assert process.returncode == 0, f"{shlex.join(command)}: exit {process.returncode}\n{printed}\n{said}"
        return printed

    def follow(self, block: Block) -> str:
        """Run a block and return what it printed."""
        if block.language == "python":
            script = self.folder / f"{block.name}.py"
            script.write_text(block.text)
            return self.run([sys.executable, "-W", "error", str(script)])
        assert block.language in LANGUAGES, f"a block of {block.language} cannot be run"
        lines = [line for line in block.commands.splitlines(keepends=True) if not line.startswith(NOT_RUN)]
        return self.run(["bash", "-euo", "pipefail", "-c", END_JOBS + "".join(lines)])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the project's root, in which `torchrelay demo` has run."""
    folder = tmp_path_factory.mktemp("demo")
    report = json.loads(Newcomer(folder).run(["torchrelay", "demo", "--json"]))
    assert report["ok"]
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def newcomer(request: pytest.FixtureRequest, demo: Path, tmp_path: Path) -> Iterator[Newcomer]:
    """Somebody who follows the document of this test where the demo ran, with the document's own files.

    `torchrelay up` runs beside, unless the document says how to start it.
    """
    told = blocks(request.param)
    files = [demo / block.file for block in told if block.file]
    for path, text in zip(files, [block.text for block in told if block.file], strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    try:
        if any(block.name and "torchrelay up" in block.commands for block in told):
            yield Newcomer(demo)
        else:
            with torchrelay_up(Newcomer(demo), tmp_path / "up.log"):
                yield Newcomer(demo)
    finally:
        for path in files:
            path.unlink()


@contextmanager
def torchrelay_up(somebody: Newcomer, log_path: Path) -> Iterator[None]:
    """`torchrelay up` in somebody's folder, from when it says that it is up to Ctrl-C."""
    with log_path.open("wb") as log:
        up = subprocess.Popen(
            ["torchrelay", "up"],
            cwd=somebody.folder,
            env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def is_up() -> bool:
        assert up.poll() is None, log_path.read_text()
        return "torchrelay is up" in log_path.read_text()

    try:
        wait_until(is_up, 90, "torchrelay up")
        yield
        up.send_signal(signal.SIGINT)  # what Ctrl-C does
        assert up.wait(60) in (0, 130), log_path.read_text()
    finally:
        if up.poll() is None:
            os.killpg(up.pid, signal.SIGKILL)  # the group that we made for it
            up.wait()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("newcomer", "path"), [(path, path) for path in RUN], indirect=["newcomer"],
                         ids=[name_of(path) for path in RUN])  # fmt: skip
def test_the_code_runs_as_written(newcomer: Newcomer, path: Path) -> None:
    printed: dict[str, str] = {}
    for block in blocks(path):
        if block.name is None or block.file:
            continue
        if block.prints:
            assert printed[block.name].strip() == block.text.strip(), f"{name_of(path)}:{block.line}"
        else:
            printed[block.name] = newcomer.follow(block)
