"""Fixtures for the client: a relay on a fresh SQLite file and the tests' Redis, and a worker that is a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from torchrelay import Relay
from torchrelay.broker import Broker
from torchrelay.recipes import READY
from torchrelay.settings import Settings
from torchrelay_storage import values
from torchrelay_storage.artifacts import Artifacts, job_path, load_large, store_large
from torchrelay_storage.chunk_store import ChunkStore, Claimed
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_error import JobError, encode_error
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_storage.run_writer import NewVersion, Order, Point, Progress, RunHold, RunWriter
from torchrelay_storage.states import End


class ThreadWorker:
    """Claims from SQL, runs a function a job, records a claim's jobs at once, and tells Redis. A context manager."""

    def __init__(self, settings: Settings, run: Callable[[Any], Any], *, tell: bool = True) -> None:
        self.database = Database(settings.database_url)
        self.artifacts = Artifacts(settings.artifacts_url)
        self.broker = Broker(settings)
        self.run = run
        self.tell = tell
        self.settings = settings
        self.starts: list[int] = []  # job ids, in the order of their start
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="thread-worker")

    def _work(self) -> None:
        worker = Fleet(self.database).register("thread", host="here", pid=1, device="cpu").id
        chunks, jobs, registry = ChunkStore(self.database), JobStore(self.database), Registry(self.database)
        while not self._stop.is_set():
            models = [row.newest.model for row in registry.models()]
            claims = chunks.claim_next(models, worker, 1)
            for claim in claims:
                outcomes = []
                for job in claim.jobs:
                    self.starts.append(job.id)
                    try:
                        output = values.encode(self.run(values.decode(load_large(self.artifacts, job.input))))
                        limit = self.settings.inline_limit
                        stored = store_large(self.artifacts, output, job_path(job.id, "output"), limit)
                        outcomes.append(Outcome(job.id, claim.chunk, claim.token, End.SUCCEEDED, output=stored))
                    except Exception as error:
                        told = orjson.dumps({"type": type(error).__name__, "message": str(error), "traceback": "tb"})
                        end = End.FAILED if job.failures + 1 >= claim.max_attempts else End.OPEN
                        outcomes.append(Outcome(job.id, claim.chunk, claim.token, end, error=told))
                finished = jobs.finish(outcomes, worker)
                if self.tell:
                    self.broker.publish_ended(finished.chunks, finished.batches)
            if not claims:
                self._stop.wait(0.01)

    def __enter__(self) -> ThreadWorker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.broker.close()
        self.database.dispose()


class HandWorker:
    """A worker by hand: takes the next chunk of any model, and records what it is told of its jobs."""

    def __init__(self, settings: Settings) -> None:
        self.database = Database(settings.database_url)
        self.fleet = Fleet(self.database)
        self.worker = self.fleet.register("w1", host="here", pid=1, device="cpu").id
        self.chunks, self.jobs, self.registry = (
            ChunkStore(self.database), JobStore(self.database), Registry(self.database),
        )  # fmt: skip

    def take(self) -> Claimed:
        """Claim the next chunk."""
        lanes = [lane.model for lane in self.registry.lanes()]
        models = [row.newest.model for row in self.registry.models()]
        for _ in range(200):  # the relay's announcer may hold the chunk's lock for a moment
            if claims := self.chunks.claim_next(models + lanes, self.worker, 1):
                return claims[0]
            time.sleep(0.02)
        raise AssertionError("there is nothing to claim")

    def end(self, claim: Claimed, end: End, words: str = "no luck") -> None:
        """Record how the jobs of a chunk ended."""
        error = encode_error(JobError("ValueError", words, "tb")) if end is not End.SUCCEEDED else None
        output = values.encode(1) if end is End.SUCCEEDED else None
        outcomes = [Outcome(job.id, claim.chunk, claim.token, end, output, error) for job in claim.jobs]
        assert self.jobs.finish(outcomes, self.worker).recorded == len(claim.jobs)

    def run(self, *ends: End, words: str = "no luck") -> None:
        """Take as many chunks, and let the jobs of each end so. OPEN: to be tried again at once."""
        for end in ends:
            self.end(self.take(), end, words)


class Trainer:
    """Claims training runs of one recipe and hands out what a run's process writes with; trains nothing itself."""

    def __init__(self, settings: Settings, recipe: str = "image-classification") -> None:
        self.database = Database(settings.database_url)
        self.broker = Broker(settings)
        self.worker = Fleet(self.database).register("trainer", host="here", pid=1, device="cpu").id
        ready = READY.get(recipe)
        schema = ready.model_json_schema() if ready is not None else {"type": "object"}
        self.lane = Registry(self.database).lane(recipe, schema)

    def claims(self) -> list[Claimed]:
        """Claim the next run, if there is one."""
        return ChunkStore(self.database).claim_next([self.lane.model], self.worker, 1)

    def begin(self) -> RunWriter:
        """Claim the next run and write that it has begun."""
        [claimed] = self.claims()
        writer = RunWriter(self.database, RunHold(claimed.jobs[0].id, claimed.chunk, claimed.token, self.worker))
        writer.start(split={"train": 80, "validation": 20}, dataset_sha256="ab" * 32, steps=40, epochs=4)
        return writer

    def report(self, writer: RunWriter, step: int) -> Order:
        """Write that a run stands at this step, and its metrics there."""
        points = [Point("train_loss", step, step // 10, 1 / step), Point("accuracy", step, step // 10, 1 - 1 / step)]
        progress = Progress("train", step, 40, step // 10, 4, 123.0, 40.0 - step)
        return writer.report(progress, points, best=(step, 1 / step))

    def finish(self, writer: RunWriter, *, promote: str | None = None) -> ModelVersion:
        """Register what a run has trained, and tell who waits."""
        new = NewVersion("image-classification", "file:///w.pt2", "cd" * 32, metrics={"accuracy": 0.9}, promote=promote)
        done = writer.complete(new, lambda version: values.encode({"model": version.ref, "metrics": {"accuracy": 0.9}}))
        assert done is not None
        self.broker.publish_ended([writer.hold.chunk], [])
        return done

    def close(self) -> None:
        """Close the connections."""
        self.broker.close()
        self.database.dispose()


@pytest.fixture
def sqlite_settings(_sqlite_template: Path, redis_url: str, tmp_path: Path) -> Settings:
    """Settings of a system of its own on SQLite."""
    path = tmp_path / "own.db"
    path.write_bytes(_sqlite_template.read_bytes())
    return Settings.load(
        home=tmp_path / "home",
        database=f"sqlite:///{path}",
        broker=redis_url,
        artifacts=f"file://{tmp_path / 'artifacts'}",
    )


@pytest.fixture
def relay(sqlite_settings: Settings) -> Iterator[Relay]:
    """A relay with the model `double` registered."""
    with Relay(settings=sqlite_settings) as relay:
        relay.register_model("double", handler="double", chunk_size=4)
        yield relay


@pytest.fixture
def work(sqlite_settings: Settings) -> Callable[..., ThreadWorker]:
    """`work(function)` returns a worker to be entered by `with`."""
    return lambda run, **options: ThreadWorker(sqlite_settings, run, **options)


@pytest.fixture
def hands() -> Iterator[Callable[[Settings], HandWorker]]:
    """`hands(settings)` returns a worker by hand on that system."""
    made: list[HandWorker] = []

    def make(settings: Settings) -> HandWorker:
        made.append(HandWorker(settings))
        return made[-1]

    yield make
    for hand in made:
        hand.database.dispose()


@pytest.fixture
def hand(sqlite_settings: Settings, hands: Callable[[Settings], HandWorker]) -> HandWorker:
    """A worker by hand on the same system as `relay`."""
    return hands(sqlite_settings)


@pytest.fixture
def runs_trainer(sqlite_settings: Settings) -> Iterator[Trainer]:
    """A trainer of `image-classification` on the same system as `relay`."""
    trainer = Trainer(sqlite_settings)
    yield trainer
    trainer.close()
