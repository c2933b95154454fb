"""A small recipe with every kind of trouble, and runs of it by real processes, for the tests of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from torchrelay import recipes
from torchrelay.settings import Settings
from torchrelay_storage import values
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_storage.run_spec import Dataset, RunSpec
from torchrelay_storage.run_writer import Point, RunHold
from torchrelay_storage.runs import RunRow, RunStore
from torchrelay_storage.submission import NewJob, Submitted
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.recipe import Batch, Exported, Recipe
from zygote import Forked, Zygote

TESTS = Path(__file__).parent
RECIPES = {"tiny": "training_runs:Tiny"}


# --- the recipe -----------------------------------------------------------------------------------------------------


class TinyHyperparameters(recipes.Hyperparameters):
    """What `Tiny` takes."""

    epochs: int = Field(4, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(0.05, ge=0)
    dropout: float = 0.0
    momentum: float = 0.0  # above 0: SGD, else AdamW
    augment: float = 0.0  # noise added to the inputs
    tied: bool = False  # two layers that share their weights
    numpy_noise: bool = False  # drawn from NumPy's and Python's global generators
    trouble: str = ""  # what goes wrong
    at: int = 5  # in which training step of this process
    seconds: float = 0.0  # that a step takes


class Net(nn.Module):
    """x [n, 8] -> logits [n, 3]."""

    def __init__(self, dropout: float, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16) if dropout else nn.Identity()
        self.middle = nn.Linear(16, 16)
        self.again = self.middle if tied else nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        hidden = self.dropout(torch.relu(self.middle(hidden)))
        return self.last(torch.relu(self.again(hidden)))


@dataclass
class Examples:
    """x float32 [n, 8], y int64 [n]."""

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)


class Tiny(Recipe):
    """A perceptron on eight numbers, three classes."""

    Hyperparameters = TinyHyperparameters
    metric = "accuracy"
    greater_is_better = True
    parameters: TinyHyperparameters

    def __init__(self, parameters: recipes.Hyperparameters) -> None:
        super().__init__(parameters)
        self.made = 0  # training steps of this process

    def read(self, table: Table) -> Examples:
        x, y = table.column("x"), table.classes("y")
        return Examples(torch.as_tensor(np.asarray(x), dtype=torch.float32), torch.as_tensor(np.asarray(y)).long())

    def labels(self, examples: Examples) -> Sequence[int]:  # type: ignore[override]
        return examples.y.tolist()

    def fit(self, examples: Examples, indices: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
        x = examples.x[indices]
        return {"mean": x.mean(0).tolist(), "std": x.std(0).tolist()}

    def batch(self, examples: Examples, indices: torch.Tensor, generator: torch.Generator | None) -> Batch:  # type: ignore[override]
        x = (examples.x[indices] - torch.tensor(self.preprocessing["mean"])) / torch.tensor(self.preprocessing["std"])
        if generator is not None and self.parameters.augment:
            x = x + self.parameters.augment * torch.randn(x.shape, generator=generator)
        return {"x": x, "y": examples.y[indices]}

    def build(self) -> nn.Module:
        return Net(self.parameters.dropout, self.parameters.tied)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        if not self.parameters.momentum:
            return super().optimizer(module)
        return torch.optim.SGD(module.parameters(), self.parameters.learning_rate, momentum=self.parameters.momentum)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, Any]:
        x = batch["x"]
        if module.training:
            self.made += 1
            if self.parameters.seconds:
                time.sleep(self.parameters.seconds)
            if self.parameters.numpy_noise:
                x = x + 0.1 * torch.from_numpy(np.random.standard_normal(x.shape)).to(x)
            if self.parameters.trouble and self.made == self.parameters.at:
                x = x * self.have_trouble()
        logits = module(x)
        return functional.cross_entropy(logits, batch["y"]), logits

    def have_trouble(self) -> float:
        match self.parameters.trouble:
            case "nan":
                return float("nan")
            case "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            case "error":
                raise KeyError("a bug of the author's")
            case "exit":
                os._exit(7)
            case "hang":
                time.sleep(600)
            case "rank 1" if os.environ.get("RANK") == "1":
                raise ValueError("only the second process fails")
        return 1.0

    def statistics(self, outputs: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return {"correct": (outputs.argmax(1) == batch["y"]).sum(), "count": torch.tensor(len(batch["y"]))}

    def summarize(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {"accuracy": float(sums["correct"] / sums["count"])}

    def export(self, module: nn.Module, folder: Path) -> Exported:
        file = folder / "weights.safetensors"
        save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, file)
        return Exported("tiny", file, {"mean": self.preprocessing["mean"]})


def examples(n: int = 120, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Return the columns of a dataset that can be learned, but not perfectly."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, 8)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] + 0.5 * generator.standard_normal(n) > 0).astype(np.int64) + (x[:, 2] > 1)
    return {"x": x, "y": y}


# --- runs by real processes -----------------------------------------------------------------------------------------


class Scene:
    """A database, an artifact store and a dataset; runs are submitted, claimed and processed as a worker does it."""

    def __init__(self, settings: Settings, database: Database, zygote: Zygote) -> None:
        self.zygote = zygote
        self.settings = Settings.load(**{**settings.model_dump(exclude_none=True), "recipes": RECIPES})
        self.database = database
        self.artifacts = Artifacts(settings.artifacts_url)
        self.runs = RunStore(database)
        self.lane = Registry(database).lane("tiny", {})
        self.worker = Fleet(database).register("trainer", host="here", pid=1, device="cpu").id
        path = settings.home / "data.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **examples())  # type: ignore[arg-type]
        uri, sha256 = self.artifacts.put_file("datasets/data.npz", path)
        self.dataset = Dataset(uri=uri, format="npz", sha256=sha256)

    def submit(self, *, attempts: int = 3, **fields: Any) -> int:
        """Submit a run of `tiny`, and return its job. What is no field of a spec is a hyperparameter."""
        known = {name: fields.pop(name) for name in list(fields) if name in RunSpec.model_fields}
        document = {"model": "m", "recipe": "tiny", "dataset": self.dataset, "hyperparameters": fields} | known
        spec = RunSpec.model_validate(document)
        new = NewJob(values.encode(spec.model_dump(mode="json")))
        placed = self.runs.submit(self.lane, Options(max_attempts=attempts), new, spec)
        assert isinstance(placed, Submitted)
        return placed.job

    def claim(self, job: int) -> RunHold:
        """Claim a run, also one that is to wait a little until its next try."""
        store, row = ChunkStore(self.database), JobStore(self.database).get([job])[job]
        claimed = store.claim([row.chunk], self.worker)
        until = time.monotonic() + 30
        while not claimed:
            assert time.monotonic() < until, "the run could not be claimed"
            time.sleep(0.02)
            claimed = store.claim_next([self.lane.model], self.worker, 1)  # which looks whose time has come
        assert claimed[0].chunk == row.chunk
        return RunHold(job, row.chunk, claimed[0].token, self.worker)

    def start(self, hold: RunHold, *, fresh: bool = False, **options: Any) -> RunProcess:
        """Start the process of a claimed run.

        Args:
            fresh: by its command line, as a worker starts it, instead of forked off.
            options: `devices`, `script` (Python that runs first in the process), and flags of the command line.
        """
        return RunProcess(self.settings, hold, None if fresh else self.zygote, **options)

    def train(self, job: int, **options: Any) -> str:
        """Claim a run, let its process end, and return its log."""
        with self.start(self.claim(job), **options) as process:
            assert process.wait() == 0, process.log
            return process.log

    # --- what became of it ----------------------------------------------------------------------------------------

    def job(self, job: int) -> JobRow:
        return JobStore(self.database).get([job])[job]

    def row(self, job: int) -> RunRow:
        return self.runs.get(job)

    def result(self, job: int) -> dict[str, Any]:
        output = self.job(job).output
        assert output is not None, self.job(job)
        return dict(values.decode(output))

    def version(self, job: int) -> ModelVersion:
        return Registry(self.database).resolve(self.result(job)["model"])

    def weights(self, job: int) -> dict[str, torch.Tensor]:
        """The weights of the version that a run has registered, as they were exported."""
        version = self.version(job)
        assert version.weights is not None
        path = self.artifacts.fetch(version.weights, self.settings.home / f"{job}.safetensors", version.sha256)
        return dict(load_file(path))

    def points(self, job: int) -> list[Point]:
        return sorted(self.runs.metrics(job), key=lambda point: (point.name, point.step))

    def files(self, job: int) -> list[str]:
        """All artifacts of a run's checkpoints."""
        return [uri for uri in self.artifacts.under("runs") if show(Kind.JOB, job) in uri]


class RunProcess:
    """A run's process of a test, on a leash as the worker's launcher holds it."""

    def __init__(
        self,
        settings: Settings,
        hold: RunHold,
        zygote: Zygote | None,
        *,
        devices: int = 1,
        rank: int | None = None,
        environment: Mapping[str, str] | None = None,
        script: str = "",
        **flags: Any,
    ) -> None:
        arguments = [f"--{name}={getattr(hold, name)}" for name in ("job", "chunk", "token", "worker")]
        arguments += [f"--{name}={value}" for name, value in {"threads": 1, **flags}.items()]
        self.path = settings.home / f"{hold.job}-{hold.token}-{rank or 0}.log"
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        variables = {**os.environ, **settings.as_environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        variables |= environment or {}
        self.process: subprocess.Popen[bytes] | Forked
        with self.path.open("wb") as log:
            if zygote is not None:
                self.process = zygote.start(arguments, variables, log, script)
                return
            elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
            command = [sys.executable, *(elastic if devices > 1 else []), "-m", "torchrelay_worker.training.process"]
            self.process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.PIPE, stdout=log, stderr=log, env=variables, process_group=0
            )

    @property
    def log(self) -> str:
        return self.path.read_text(errors="replace")

    def wait(self, seconds: float = 60.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"the run's process did not end within {seconds:g} s:\n{self.log[-8000:]}") from None

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def drop(self) -> None:
        """Let go of the leash, as a launcher does that dies."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def __enter__(self) -> RunProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self.drop()
