"""The command line in this process, on the settings of a test: its outputs apart, its exit code checked.

And a trainer, which writes what a worker and a run's process write, without training anything.
"""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from torchrelay import Relay
from torchrelay.cli.main import app
from torchrelay.recipes import READY
from torchrelay.settings import Settings
from torchrelay_storage import values
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_storage.run_spec import Dataset, RunSpec
from torchrelay_storage.run_writer import NewVersion, Point, Progress, RunHold, RunWriter
from torchrelay_storage.runs import RunStore
from torchrelay_storage.submission import NewJob, Submitted


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


STEPS, EPOCHS = 40, 4


class Trainer:
    """Submits runs of `image-classification`, claims them, and writes what their processes would write."""

    def __init__(self, settings: Settings) -> None:
        self.database = Database(settings.database_url)
        self.worker = Fleet(self.database).register("trainer", host="here", pid=1, device="cpu").id
        self.lane = Registry(self.database).lane(
            "image-classification", READY["image-classification"].model_json_schema()
        )

    def submit(self, model: str = "digits", *, promote: str | None = None, **options: Any) -> str:
        """Submit a run and return its id as users see it."""
        dataset = Dataset(uri="file:///pictures.npz", format="npz")
        spec = RunSpec(model=model, recipe="image-classification", dataset=dataset, promote=promote)
        job = NewJob(values.encode(spec.model_dump(mode="json")))
        placed = RunStore(self.database).submit(self.lane, Options(**options), job, spec)
        assert isinstance(placed, Submitted)
        return show(Kind.JOB, placed.job)

    def begin(self) -> RunWriter:
        """Claim the next run and write that it has begun."""
        [claimed] = ChunkStore(self.database).claim_next([self.lane.model], self.worker, 1)
        writer = RunWriter(self.database, RunHold(claimed.jobs[0].id, claimed.chunk, claimed.token, self.worker))
        writer.start(split={"train": 80, "validation": 20}, dataset_sha256="ab" * 32, steps=STEPS, epochs=EPOCHS)
        return writer

    def report(self, writer: RunWriter, step: int) -> None:
        """Write the progress of a run that stands at this step, and what it has measured there."""
        epoch = step * EPOCHS // STEPS
        points = [Point("train_loss", step, epoch, math.exp(-step / 10)), Point("learning_rate", step, epoch, 1e-3)]
        if step % (STEPS // EPOCHS) == 0:
            points += [Point("validation_loss", step, epoch, math.exp(-step / 12)),
                       Point("accuracy", step, epoch, 1 - math.exp(-step / 8))]  # fmt: skip
        writer.report(Progress("training", step, STEPS, epoch, EPOCHS, 1234.5, float(STEPS - step)), points,
                      best=(step, math.exp(-step / 12)))  # fmt: skip

    def finish(self, writer: RunWriter, *, promote: str | None = None, accuracy: float = 0.98) -> ModelVersion:
        """Write all that a run writes until its version is registered."""
        for step in range(5, STEPS + 1, 5):
            self.report(writer, step)
        version = NewVersion(
            "image-classification", "file:///weights.pt2", "cd" * 32, {"classes": ["0", "1"]},
            {"accuracy": accuracy, "validation_loss": 0.04, "train_loss": 0.02},
            {"dataset": {"sha256": "ab" * 32}, "hyperparameters": {"epochs": EPOCHS, "width": round(accuracy * 100)}},
            promote=promote,
        )  # fmt: skip
        registered = writer.complete(version, values.encode({"model": "digits", "metrics": {"accuracy": accuracy}}))
        assert registered is not None
        return registered

    def train(self, model: str = "digits", **options: Any) -> str:
        """Submit a run, take it through, and return its id."""
        name = self.submit(model)
        self.finish(self.begin(), **options)
        return name


@pytest.fixture
def trainer(sqlite_settings: Settings) -> Iterator[Trainer]:
    """A trainer on the test's own database."""
    trainer = Trainer(sqlite_settings)
    yield trainer
    trainer.database.dispose()


Terminal = Callable[..., str]


def on_a_terminal(
    settings: Settings, *arguments: str, seen: str | None = None, then: Callable[[], object] = lambda: None
) -> str:
    """Run a command with a pseudo terminal for its standard output, and return what it wrote there.

    Args:
        seen, then: once that was written, this is called.
    """
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "torchrelay", "--database", settings.database_url, "--broker",
               settings.broker_url, *arguments]  # fmt: skip
    size = {"TERM": "xterm", "COLUMNS": "150", "LINES": "40"}
    with subprocess.Popen(command, stdout=child, stderr=child, env=os.environ | size):
        os.close(child)
        written = b""
        while True:
            try:
                part = os.read(parent, 4096)
            except OSError:  # Linux says EIO at the end of a terminal
                part = b""
            if not part:
                break
            written += part
            if seen is not None and seen.encode() in written:
                seen = None
                then()
    os.close(parent)
    return written.decode()


@pytest.fixture
def terminal(sqlite_settings: Settings) -> Terminal:
    """`terminal("list", seen=None, then=…)`: what a command writes to a terminal, in a process of its own."""
    return partial(on_a_terminal, sqlite_settings)
