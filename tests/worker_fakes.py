"""Stand-ins for what surrounds the worker's pipeline, for its unit tests: stores, a registry, a clock, small models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchrelay_storage import values
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.chunk_store import Claimed, ClaimedJob, Held
from torchrelay_storage.errors import ModelNotFound
from torchrelay_storage.options import Backoff
from torchrelay_storage.outcomes import Finished, Outcome, Successes
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.states import End
from torchrelay_worker import Model
from torchrelay_worker.blackbox import scratch
from torchrelay_worker.models.residency import Resident, limits_of
from torchrelay_worker.pipeline.batcher import Batcher
from torchrelay_worker.pipeline.device import Device
from torchrelay_worker.pipeline.ledger import Hold, Ledger, Work
from torchrelay_worker.pipeline.preparer import Preparer
from torchrelay_worker.pipeline.recorder import Recorder
from torchrelay_worker.pipeline.watch import Watch

CPU = torch.device("cpu")


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Plus(Model):
    """A number in, that number plus one out. Overridden by tests through `trouble`."""

    max_batch_size = 8

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.trouble: Callable[[torch.Tensor], None] = lambda batch: None

    def preprocess(self, input: Any) -> torch.Tensor:
        return torch.tensor(float(input))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.batches.append(batch.tolist())
        self.trouble(batch)
        return batch + 1


def version(number: int = 1, *, name: str = "m", handler: str = "h", **changes: Any) -> ModelVersion:
    """Return a registered version; a model's id is ten times its first version's."""
    fields: dict[str, Any] = {
        "id": number, "model": 10 * number, "name": name, "version": 1, "handler": handler, "weights": None,
        "sha256": None, "config": {}, "chunk_size": 256, "paused": False, "created_at": 0.0,
    }  # fmt: skip
    return ModelVersion(**{**fields, **changes})


def chunk(
    number: int,
    inputs: Sequence[Any],
    *,
    token: int = 1,
    timeout: float | None = None,
    max_attempts: int = 3,
    failures: int = 0,
    version: int = 1,
    priority: int = 5,
    suspect: bool = False,
    backoff: Backoff | None = None,
) -> Claimed:
    """Return a claimed chunk; its jobs are numbered from 100 times its own number."""
    jobs = tuple(ClaimedJob(100 * number + i, values.encode(x), failures) for i, x in enumerate(inputs))
    return Claimed(number, token, 10 * version, version, None, priority, timeout, max_attempts, jobs, suspect, backoff)


class Store:
    """What the worker asks of the job and chunk stores, in memory."""

    def __init__(self, chunks: Sequence[Claimed] = ()) -> None:
        self.waiting = {c.chunk: c for c in chunks}
        self.outcomes: dict[int, Outcome] = {}
        self.transactions: list[int] = []
        self.refused: set[int] = set()
        self.faults: list[BaseException] = []
        self.held_now: list[Held] = []
        self.open: set[int] = set()
        self.handed_back: list[tuple[int, int]] = []
        self.alone: list[int] = []
        self.changed = threading.Condition()

    def claim(self, chunks: Sequence[int], worker: int) -> list[Claimed]:
        self._fail()
        return [self.waiting.pop(c) for c in chunks if c in self.waiting]

    def claim_next(self, models: Sequence[int], worker: int, limit: int) -> list[Claimed]:
        self._fail()
        return self.claim([c.chunk for c in self.waiting.values() if c.model in models][:limit], worker)

    def run_alone(self, chunk: int, token: int, worker: int) -> bool:
        self._fail()
        self.alone.append(chunk)
        return chunk not in self.refused

    def finish(self, outcomes: Sequence[Outcome], worker: int, successes: Sequence[Successes] = ()) -> Finished:
        self._fail()
        outcomes = [
            *outcomes,
            *(
                Outcome(job, one.chunk, one.token, End.SUCCEEDED, output)
                for one in successes
                for job, output in zip(one.jobs, one.outputs, strict=True)
            ),
        ]
        kept = [o for o in outcomes if o.chunk not in self.refused]
        with self.changed:
            self.transactions.append(len(outcomes))
            self.outcomes.update({o.job: o for o in kept})
            self.changed.notify_all()
        dropped = frozenset(o.chunk for o in outcomes if o.chunk in self.refused)
        return Finished(len(kept), dropped, tuple({o.chunk for o in kept}), ())

    def held(self, worker: int) -> list[Held]:
        self._fail()
        return self.held_now

    def open_jobs(self, chunks: Sequence[int]) -> set[int]:
        return self.open

    def hand_back(self, holds: Sequence[tuple[int, int]], worker: int) -> int:
        self.handed_back.extend(holds)
        return len(holds)

    def _fail(self) -> None:
        if self.faults:
            raise self.faults.pop(0)

    def wait_for(self, n: int, seconds: float = 20.0) -> dict[int, Outcome]:
        """Wait until n jobs have an outcome, and return all."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.outcomes) >= n, seconds), self.outcomes
            return dict(self.outcomes)


class Versions:
    """What is asked of the registry."""

    def __init__(self, *versions: ModelVersion) -> None:
        self.all = list(versions)
        self.chunk_sizes: dict[int, int] = {}

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        return [v for v in self.all if name in (None, v.name)]

    def version(self, number: int) -> ModelVersion:
        for v in self.all:
            if v.id == number:
                return v
        raise ModelNotFound(f"no model version has the id {number}")

    def set_chunk_size(self, version: int, chunk_size: int) -> None:
        self.chunk_sizes[version] = chunk_size


class Loaded:
    """A residency in which everything is loaded."""

    device = CPU

    def __init__(self, models: Mapping[int, Model]) -> None:
        self.all = {n: Resident(version(n), model, limits_of(model)) for n, model in models.items()}
        self.pins = dict.fromkeys(models, 0)
        self.is_waited_for = False

    def load_timeout(self, number: int) -> float:
        return 60.0

    def resident(self) -> frozenset[int]:
        return frozenset(self.all)

    def pin(self, number: int) -> Resident | None:
        if number in self.all:
            self.pins[number] += 1
        return self.all.get(number)

    def acquire(self, number: int) -> Resident:
        raise AssertionError("nothing is to be loaded")

    def release(self, number: int, pins: int = 1) -> None:
        self.pins[number] -= pins

    def close(self) -> None:
        pass


class Line:
    """Preparer, batcher, device and recorder around a fake store, with their threads."""

    def __init__(self, model: Model, store: Store | None = None, *, inline_limit: int = 65_536) -> None:
        self.model = model
        self.store = store or Store()
        self.ledger = Ledger()
        self.batcher: Batcher[Work] = Batcher()
        self.watch = Watch()
        self.box = scratch()
        self.artifacts = Artifacts("memory://")
        self.residency = Loaded({1: model})
        self.fatal: list[BaseException] = []
        self.lost = threading.Event()
        self.published: list[tuple[Sequence[int], Sequence[int]]] = []
        self.recorder = Recorder(
            self.store,
            self.ledger,
            self.artifacts,
            lambda chunks, batches: self.published.append((chunks, batches)),
            worker=7,
            inline_limit=inline_limit,
            fatal=self._fatal,
            longest_wait=0.05,
            box=self.box,
            watch=self.watch,
        )
        residency: Any = self.residency
        self.device = Device(
            self.batcher, self.recorder, self.ledger, residency, self.watch, fatal=self._fatal, box=self.box
        )
        self.preparer = Preparer(
            self.batcher, self.recorder, self.ledger, self.artifacts, self.watch,
            threads=2, fatal=self._fatal, box=self.box,
        )  # fmt: skip

    def _fatal(self, error: BaseException) -> None:
        self.fatal.append(error)
        self.lost.set()

    def __enter__(self) -> Line:
        self.recorder.start()
        self.device.start()
        self.preparer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.preparer.stop(10)
        self.device.stop(10)
        self.recorder.stop(10)

    def put(self, claimed: Claimed) -> Hold:
        """Send a claimed chunk down the line."""
        [hold] = self.ledger.claim([claimed])
        hold.resident = self.residency.pin(claimed.version)
        self.preparer.put(hold)
        return hold

    def run(self, *chunks: Claimed) -> dict[int, Outcome]:
        """Run chunks and return the outcomes of their jobs."""
        for claimed in chunks:
            self.put(claimed)
        return self.store.wait_for(sum(len(c.jobs) for c in chunks))
