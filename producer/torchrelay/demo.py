"""The demo: a net trained on real digits as a job, then one batch of pictures through it, on the embedded stack.

Everything stays in the data folder, so that the commands it ends with work when nothing runs any more. Not here: how
the training and the outcome look (`cli.stack`).
"""

from __future__ import annotations

import importlib.util
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrelay.client import Relay
from torchrelay.embedded import Stack, find_server
from torchrelay.handles import Batch, Run
from torchrelay.settings import Settings
from torchrelay_storage.batch_store import Counts
from torchrelay_storage.errors import InvalidInput, WaitTimeout
from torchrelay_storage.states import JobState

MODEL = "digits"
RECIPE = "image-classification"
SEED = 7
NEEDS = {"scikit-learn": "sklearn", "numpy": "numpy", "accelerate": "accelerate", "tensorboardX": "tensorboardX"}
HELD_OUT = 0.2  # of the pictures, none of which is trained on
TRAINING_LIMIT = 300.0  # seconds; it takes a few on one core, most of them to start
FIRST_LIMIT = 120.0
BATCH_LIMIT = 300.0
HEARTBEAT = 0.5  # seconds: the worker is seen to be ready at a beat
LOOK = 0.1  # seconds between two looks at how far the run or the batch is

Note = Callable[[str], None]
Training = Callable[[Relay, Run], None]
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What the demo shows at its end."""

    counts: dict[str, int]  # jobs by state
    accuracy: float  # of the results that came through the queue, on the held-out pictures
    trained_accuracy: float  # of the same net, as its training measured it on these
    held_out: int
    seconds: float  # from the submit of the batch to its last result
    run: str
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
            "run": self.run,
            "batch": self.batch,
            "job": self.job,
            "model": self.model,
            "database": self.database,
            "commands": list(self.commands),
        }


def embedded_settings(settings: Settings) -> Settings:
    """Return the same settings with the embedded database, broker and artifacts, whatever is configured."""
    return Settings.load(home=settings.home, database="", broker="", artifacts="", heartbeat=HEARTBEAT)


def run(settings: Settings, *, note: Note, training: Training, progress: Progress) -> Report:
    """Run the demo and leave nothing running.

    Args:
        note: told in words what goes on.
        training: called again and again while the net is trained, and once after.
        progress: told how many pictures are done, of how many.

    Raises:
        InvalidInput: something is not installed, or the folder's stack runs already.
        JobFailed: the training did.
        WaitTimeout: the training or the batch did not end.
        RelayError: a part did not start; the message says which and why.
    """
    missing = [name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InvalidInput(f"the demo needs {' and '.join(missing)}; `pip install 'torchrelay[demo]'` brings them")
    find_server()
    images, labels = pictures()
    held_out = draw(labels)
    inputs = [{"pixels": image.reshape(-1).tolist()} for image in images]
    with Stack(settings, workers=1, device="cpu", torch_threads=1) as stack, Relay(settings=settings) as relay:
        note("training a small convolutional net on scikit-learn's digits, as a job ...")
        trained = _train(stack, relay, dataset(images, labels, held_out), training)
        result = trained.result()
        seconds = (trained.finished_at or 0.0) - (trained.started_at or trained.created_at)
        note(f"trained in {seconds:.1f} s and registered as {result['model']}; loading it ...")
        started = time.monotonic()
        relay.submit(result["model"], inputs[0]).result(timeout=FIRST_LIMIT)
        first = time.monotonic() - started
        note(f"the first picture took {first:.1f} s, with the loading of the model; submitting all {len(inputs):,} ...")
        started = time.monotonic()
        batch = relay.submit_batch(result["model"], inputs)
        counts = _follow(stack, batch, progress)
        seconds = time.monotonic() - started
        results = list(batch.results(return_exceptions=True))
        right = sum(_label(results[i]) == labels[i] for i in held_out)
        [newest] = relay.jobs(batch=batch.id, limit=1)
        return Report(
            counts={state: getattr(counts, state) for state in JobState},
            accuracy=right / len(held_out),
            trained_accuracy=result["metrics"]["accuracy"],
            held_out=len(held_out),
            seconds=seconds,
            run=trained.id,
            batch=batch.id,
            job=newest.id,
            model=result["model"],
            database=settings.database_url.removeprefix("sqlite:///"),
            commands=commands(settings, trained.id, batch.id, newest.id),
        )


def _train(stack: Stack, relay: Relay, columns: Mapping[str, Any], training: Training) -> Run:
    """Train as a job, tell how far it is, and see to it that the stack stays up."""
    run = relay.train(MODEL, recipe=RECIPE, dataset=columns, split_column="split", seed=SEED, promote="champion")
    deadline = time.monotonic() + TRAINING_LIMIT
    while not run.refresh().done:
        training(relay, run)
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{run.id} did not end within {TRAINING_LIMIT:.0f} s; the logs are in {stack.logs}")
        stack.look()
        with suppress(WaitTimeout):
            run.wait(LOOK)
    training(relay, run)
    return run


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


def pictures() -> tuple[Any, list[int]]:
    """Return all 1,797 pictures, uint8 [n, 8, 8] of brightnesses from 0 to 16, and the digits that they show."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype("uint8"), digits.target.tolist()


def draw(labels: Sequence[int]) -> tuple[int, ...]:
    """Return the indices of the pictures that are held out: the same share of each digit, always the same ones."""
    chance = random.Random(SEED)
    by_label: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    held_out = [i for _, of_label in sorted(by_label.items())
                for i in chance.sample(of_label, round(len(of_label) * HELD_OUT))]  # fmt: skip
    return tuple(sorted(held_out))


def dataset(images: Any, labels: Sequence[int], held_out: Sequence[int]) -> dict[str, Any]:
    """Return what is trained on, as columns; one says which pictures are only validated on."""
    import numpy

    split = numpy.full(len(labels), "train", dtype="<U10")
    split[list(held_out)] = "validation"
    return {"image": images, "label": numpy.asarray(labels), "split": split}


def commands(settings: Settings, run: str, batch: str, job: str) -> tuple[str, ...]:
    """Return the commands to try next, as they work in this folder, in this shell."""
    words = [_program()]
    configured = Settings.load()
    if configured.home != settings.home:
        words += ["--home", _relative(settings.home)]
    if configured.database is not None:
        words += ["--database", settings.database_url]
    rests = (["list"], ["status", batch], ["result", job], ["metrics", run])
    return tuple(shlex.join([*words, *rest]) for rest in rests)


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
