"""The demo: real digits, a net trained in a process of its own, one batch through the embedded stack, and its outcome.

Everything stays in the data folder, so that the commands it ends with work when nothing runs any more. Not here: the
training (`torchrelay_worker.demo`, which has torch), and how the outcome looks (`cli.stack`).
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrelay.client import Relay
from torchrelay.embedded import Stack, find_server
from torchrelay.handles import Batch
from torchrelay.keeper import Kept
from torchrelay.settings import Settings
from torchrelay_storage.batch_store import Counts
from torchrelay_storage.errors import InvalidInput, RelayError, WaitTimeout
from torchrelay_storage.states import JobState

MODEL = "digits"
TRAINING_LIMIT = 300.0  # seconds; it takes a few on one core
FIRST_LIMIT = 120.0
BATCH_LIMIT = 300.0
HEARTBEAT = 0.5  # seconds: the worker is seen to be ready at a beat
LOOK = 0.1  # seconds between two looks at how far the batch is

Note = Callable[[str], None]
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class Training:
    """What the training process reports."""

    weights: Path
    held_out: tuple[int, ...]  # indexes of the pictures that the net was not trained on
    accuracy: float  # on these, as measured right after training
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What the demo shows at its end."""

    counts: dict[str, int]  # jobs by state
    accuracy: float  # of the results that came through the queue, on the held-out pictures
    trained_accuracy: float  # of the same net, right after its training
    held_out: int
    seconds: float  # from the submit to the last result
    batch: str
    job: str
    model: str
    database: str
    commands: tuple[str, ...]

    @property
    def jobs(self) -> int:
        """How many jobs there were."""
        return sum(self.counts.values())

    @property
    def jobs_per_second(self) -> float:
        """Jobs per second, the submit included."""
        return self.jobs / self.seconds

    @property
    def succeeded(self) -> bool:
        """Whether every job did."""
        return self.jobs > 0 and self.counts["succeeded"] == self.jobs

    def document(self) -> dict[str, Any]:
        """Return it as JSON shows it."""
        return {
            "ok": self.succeeded,
            "jobs": self.jobs,
            "states": self.counts,
            "accuracy": round(self.accuracy, 4),
            "trained_accuracy": round(self.trained_accuracy, 4),
            "held_out": self.held_out,
            "seconds": round(self.seconds, 3),
            "jobs_per_second": round(self.jobs_per_second, 1),
            "batch": self.batch,
            "job": self.job,
            "model": self.model,
            "database": self.database,
            "commands": list(self.commands),
        }


def embedded_settings(settings: Settings) -> Settings:
    """Return the same settings with the embedded database, broker and artifacts, whatever is configured."""
    return Settings.load(home=settings.home, database="", broker="", artifacts="", heartbeat=HEARTBEAT)


def run(settings: Settings, *, note: Note, progress: Progress) -> Report:
    """Run the demo and leave nothing running.

    Raises:
        InvalidInput: something is not installed, or the folder's stack runs already.
        WaitTimeout: the batch did not end.
        RelayError: a part did not start; the message says which and why.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise InvalidInput("the demo needs scikit-learn for its pictures; `pip install 'torchrelay[demo]'`")
    find_server()  # before the training, which takes longer
    inputs, labels = pictures()
    with (
        Stack(settings, workers=1, models=(MODEL,), device="cpu", torch_threads=1) as stack,
        Relay(settings=settings) as relay,
    ):
        note("training a small convolutional net on scikit-learn's digits ...")
        training = train(settings.home / "demo")
        note(f"trained in {training.seconds:.1f} s; registering it, waiting for the worker ...")
        version = relay.register_model(MODEL, handler=MODEL, weights=training.weights)
        stack.wait_ready()
        started = time.monotonic()
        relay.submit(version.ref, inputs[0]).result(timeout=FIRST_LIMIT)
        first = time.monotonic() - started
        note(f"the first picture took {first:.1f} s, with the loading of the model; submitting all {len(inputs):,} ...")
        started = time.monotonic()
        batch = relay.submit_batch(version.ref, inputs)
        counts = _follow(stack, batch, progress)
        seconds = time.monotonic() - started
        results = list(batch.results(return_exceptions=True))
        right = sum(_label(results[i]) == labels[i] for i in training.held_out)
        [newest] = relay.jobs(batch=batch.id, limit=1)
        return Report(
            counts={state: getattr(counts, state) for state in JobState},
            accuracy=right / len(training.held_out),
            trained_accuracy=training.accuracy,
            held_out=len(training.held_out),
            seconds=seconds,
            batch=batch.id,
            job=newest.id,
            model=version.ref,
            database=settings.database_url.removeprefix("sqlite:///"),
            commands=commands(settings, batch.id, newest.id),
        )


def _follow(stack: Stack, batch: Batch, progress: Progress) -> Counts:
    """Wait for the batch, tell how far it is, and see to it that the stack stays up."""
    deadline = time.monotonic() + BATCH_LIMIT
    while True:
        counts = batch.counts()
        progress(counts.ended, counts.total)
        if counts.done:
            return counts
        if time.monotonic() > deadline:
            raise WaitTimeout(f"batch {batch.id} did not end within {BATCH_LIMIT:.0f} s; the logs are in {stack.logs}")
        stack.look()
        with suppress(WaitTimeout):
            batch.wait(LOOK)


def _label(result: Any) -> int | None:
    return result.get("label") if isinstance(result, dict) else None


def pictures() -> tuple[list[dict[str, list[int]]], list[int]]:
    """Return all 1,797 pictures as inputs (64 brightnesses from 0 to 16, row by row), and the digits that they show."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return [{"pixels": row} for row in digits.data.astype(int).tolist()], digits.target.tolist()


def train(folder: Path) -> Training:
    """Train in a process of its own, which has torch, and return what it reports. Raises RelayError if it fails.

    On one thread: the net is too small for more, and threads that wait for a busy core spin, ten times as long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "digits.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torchrelay_worker.demo", "--out", str(folder)]
    training = Kept.start("training", command, log=folder / "training.log", environment={"OMP_NUM_THREADS": "1"})
    try:
        code = training.wait(TRAINING_LIMIT)
        if code is None:
            raise WaitTimeout(f"the demo's training did not end within {TRAINING_LIMIT:.0f} s")
        if code != 0:
            raise RelayError(f"the demo's training failed; it says, in {training.log}:\n{training.said()}")
    finally:
        training.stop()
    said = json.loads(report.read_bytes())
    return Training(
        weights=Path(said["weights"]), held_out=tuple(said["held_out"]), accuracy=said["accuracy"],
        seconds=said["seconds"],
    )  # fmt: skip


def commands(settings: Settings, batch: str, job: str) -> tuple[str, ...]:
    """Return the three commands to try next, as they work in this folder, in this shell."""
    words = [_program()]
    configured = Settings.load()
    if configured.home != settings.home:
        words += ["--home", _relative(settings.home)]
    if configured.database is not None:
        words += ["--database", settings.database_url]
    return tuple(shlex.join([*words, *rest]) for rest in (["list"], ["status", batch], ["result", job]))


def _program() -> str:
    """The command as it can be typed: by its name where PATH finds this very one."""
    mine = Path(sys.executable).parent / "torchrelay"
    found = shutil.which("torchrelay")
    if found is not None and Path(found).absolute() == mine.absolute():
        return "torchrelay"
    return _relative(mine) if mine.exists() else "torchrelay"


def _relative(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
