"""For an application's own tests: InlineRelay runs jobs where they are submitted, without Redis and without a worker.

Everything else is the real thing: the checks, the codec, the stores on a SQLite file of its own, states, keys.
Not here: tests of a model (`torchrelay models check` runs one).
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
import struct
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import Connection, event

from torchrelay.admission import Admission
from torchrelay.async_client import AsyncRelay
from torchrelay.client import Relay
from torchrelay.completions import Completions, Delivery, JobWait
from torchrelay.core import Core, Prepared
from torchrelay.handles import Job
from torchrelay.recipes import READY
from torchrelay.settings import Settings
from torchrelay_storage import values
from torchrelay_storage.artifacts import job_path, model_path, store_large
from torchrelay_storage.chunk_store import Claimed, ClaimedJob
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, KeyConflict, WaitTimeout
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_error import JobError
from torchrelay_storage.job_reader import JobFilter, JobRow
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.run_spec import RunSpec, read_spec
from torchrelay_storage.run_writer import NewVersion, Point, Progress, RunHold, RunWriter
from torchrelay_storage.states import TERMINAL, End
from torchrelay_storage.submission import Submission, Submitted

Handler = Callable[[Any], Any]  # one input, decoded -> one output: JSON, bytes, array or tensor
Trainer = Callable[[RunSpec], Mapping[str, float]]  # what a run is asked to do -> the metrics of what it trained

_NO_WEIGHTS = struct.pack("<Q", 2) + b"{}"  # a safetensors file without tensors

_NOT_RUN = (
    "{0} has not ended, and nothing else will run in an InlineRelay: it is paused (`resume` it), its time has not come "
    "(`relay.advance(seconds)` moves the clock), or its model or recipe has no function (`relay.add_model`, "
    "`relay.add_recipe`)"
)


class _Inline:
    """What InlineRelay adds to Relay, and AsyncInlineRelay to AsyncRelay."""

    _core: InlineCore

    def add_model(self, name: str, handler: Handler) -> None:
        """Register a model that is a plain function: one input -> one output. What it raises fails the job."""
        self._core.add_model(name, handler)

    def add_recipe(self, name: str, train: Trainer) -> None:
        """Let a plain function do the runs of a recipe: a run's spec -> its metrics. What it raises fails the run.

        Each run registers a version of its model, which `add_model` gives a function to serve it with. A ready recipe
        keeps its checks; one of another name takes any hyperparameters.
        """
        self._core.add_recipe(name, train)

    def run_due(self) -> int:
        """Run what is due and was not run at its submit; return how many jobs that were."""
        return self._core.run()

    def advance(self, seconds: float) -> int:
        """Move the clock forward, expire what is too late, run what has become due; return how many jobs ran."""
        return self._core.advance(seconds)


class InlineRelay(_Inline, Relay):
    """A Relay for tests. Each has an empty database of its own.

    Args:
        models: name -> function of one input (decoded) that returns one output.

    A job runs at its submit, in the thread that submits; one that fails is tried again at once, up to `max_attempts`
    times, unless it raised InvalidInput. With a `backoff` it waits for its next try until the clock has moved on
    (`advance`), always as long as it may: nothing is drawn in a test. So does a training run whose recipe has a
    function (`add_recipe`); without one it stays queued. A wait for a job that nothing will run raises WaitTimeout at
    once.
    """

    _core: InlineCore

    def __init__(self, models: Mapping[str, Handler] | None = None) -> None:
        super().__init__(settings=_settings())
        for name, handler in (models or {}).items():
            self.add_model(name, handler)

    def _make_core(self, settings: Settings) -> Core:
        return InlineCore(settings)


class AsyncInlineRelay(_Inline, AsyncRelay):
    """An AsyncRelay for tests; as InlineRelay."""

    _core: InlineCore

    def __init__(self, models: Mapping[str, Handler] | None = None) -> None:
        super().__init__(settings=_settings())
        for name, handler in (models or {}).items():
            self.add_model(name, handler)

    def _make_core(self, settings: Settings) -> Core:
        return InlineCore(settings)


_ANY = object()


def assert_submitted(
    relay: InlineRelay | AsyncInlineRelay, model: str, *, input: object = _ANY, count: int | None = None, **options: Any
) -> list[Job]:
    """Assert that jobs were submitted, and return them, the oldest first.

    Args:
        model: the model's name.
        input: only jobs with this input, compared as stored (so arrays compare too).
        count: exactly so many; None: at least one.
        options: only jobs with these, such as `priority=9`, `key="order-17"`, `metadata={...}`, `tenant="a"`.

    Raises:
        AssertionError: it lists what was submitted instead.
    """
    core = relay._core
    rows = core.all_jobs(model)
    wanted = values.digest(values.encode(input)) if input is not _ANY else None
    found = [
        row
        for row in rows
        if (wanted is None or core.input_digest(row) == wanted)
        and all(getattr(Job(core, row), name) == value for name, value in options.items())
    ]
    if len(found) == count or (count is None and found):
        return [Job(core, row) for row in found]
    what = ", ".join(
        [f"input={input!r:.200}"] * (input is not _ANY) + [f"{name}={value!r:.200}" for name, value in options.items()]
    )
    shown = "\n".join(f"  {row.key or show(Kind.JOB, row.id)}: {core.decode(row.input)!r:.200}" for row in rows[:20])
    raise AssertionError(
        f"{len(found)} jobs of {model!r} were submitted{f' with {what}' if what else ''}, "
        f"expected {'at least 1' if count is None else count}; submitted of this model:\n{shown or '  nothing'}"
    )


class InlineCore(Core):
    """A Core without Redis whose jobs run where they are submitted."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.completions.close()
        self.completions = _InlineCompletions(self)
        self.admission = Admission(self.jobs, self.registry, settings.max_queued, seconds=0)  # jobs run in no time
        self._handlers: dict[str, Handler] = {}
        self._numbers: dict[int, str] = {}  # of models -> their names
        self._trainers: dict[int, Trainer] = {}  # by the lane's number
        self._lock = threading.RLock()
        self._running = False
        self._worker = self.fleet.register("inline", host="", pid=os.getpid(), device="none").id

    def _open_database(self) -> Database:
        self._folder = tempfile.TemporaryDirectory(prefix="torchrelay-inline-", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / "torchrelay.db"
        path.write_bytes(_empty_database())
        self.settings = self.settings.model_copy(update={"database": f"sqlite:///{path}"})
        self._clock = _Clock(self.settings.database_url)
        return self._clock

    def _check_schema(self) -> None:
        """The file is a copy of one that was just made."""

    def submit(self, prepared: Prepared) -> Future[Submitted]:
        """Store the job and run it."""
        future: Future[Submitted] = Future()
        submission = Submission(prepared.version, prepared.options, [prepared.job])
        with self.admit(prepared) as place:
            [[placed]] = self.jobs.submit([submission])
            if isinstance(placed, KeyConflict):
                raise placed
            place.stored(0 if placed.existed else 1)
        place.close()
        future.set_result(placed)
        self.wake(prepared.version.name)
        return future

    def new_row(self, prepared: Prepared, placed: Submitted) -> JobRow:
        """The job has run by now, unless a session's transaction still holds it."""
        found = self.jobs.get([placed.job])
        return found.get(placed.job) or super().new_row(prepared, placed)

    def wake(self, model: str) -> None:
        """There may be something to run."""
        self.run()

    def close(self) -> None:
        """Close the database and delete it."""
        super().close()
        self._folder.cleanup()

    def add_model(self, name: str, handler: Handler) -> None:
        """Register a function as a model."""
        self._handlers[name] = handler
        there = [row.newest for row in self.models() if row.newest.name == name]
        version = there[0] if there else self.register_model(name, "inline", None, None, None)
        self._numbers[version.model] = name
        self.run()

    def add_recipe(self, name: str, train: Trainer) -> None:
        """Register a function as a recipe."""
        schema = READY[name].model_json_schema() if name in READY else {"type": "object"}
        self._trainers[self.registry.lane(name, schema).model] = train
        self.run()

    def run(self) -> int:
        """Run all jobs that are due. A handler that submits has its jobs run after its own."""
        with self._lock:
            if self._running:
                return 0
            self._running = True
            try:
                return self._run()
            finally:
                self._running = False

    def _run(self) -> int:
        count = 0
        while claims := self.chunks.claim_next([*self._numbers, *self._trainers], self._worker, 1):
            for claim in claims:
                if claim.model in self._trainers:
                    count += sum(self._train(claim, job) for job in claim.jobs)
                    continue
                outcomes = [self._outcome(claim, job) for job in claim.jobs]
                finished = self.jobs.finish(outcomes, self._worker)
                count += finished.recorded
        return count

    def _outcome(self, claim: Claimed, job: ClaimedJob) -> Outcome:
        try:
            output = values.encode(self._handlers[self._numbers[claim.model]](self.decode(job.input)))
        except Exception as error:
            last = isinstance(error, InvalidInput) or job.failures + 1 >= claim.max_attempts
            text = "".join(traceback.format_exception(error))
            told = orjson.dumps({"type": type(error).__name__, "message": str(error), "traceback": text})
            end, wait = (End.FAILED, 0.0) if last else (End.OPEN, _wait(claim, job))
            return Outcome(job.id, claim.chunk, claim.token, end, error=told, retry_in=wait)
        stored = store_large(self.artifacts, output, job_path(job.id, "output"), self.settings.inline_limit)
        return Outcome(job.id, claim.chunk, claim.token, End.SUCCEEDED, output=stored)

    def _train(self, claim: Claimed, job: ClaimedJob) -> bool:
        writer = RunWriter(self.db, RunHold(job.id, claim.chunk, claim.token, self._worker))
        try:
            spec = read_spec(self.decode(job.input))
            epochs = spec.hyperparameters.get("epochs", 1)
            writer.start(split={}, dataset_sha256=spec.dataset.sha256 or "", steps=epochs, epochs=epochs)
            metrics = {name: float(value) for name, value in self._trainers[claim.model](spec).items()}
            points = [Point(name, epochs, epochs, value) for name, value in metrics.items()]
            writer.report(Progress("done", epochs, epochs, epochs, epochs), points)
            uri = self.artifacts.put(model_path(spec.model, show(Kind.JOB, job.id), "weights.safetensors"), _NO_WEIGHTS)
            lineage = {"run": show(Kind.JOB, job.id), "recipe": spec.recipe, "dataset_sha256": spec.dataset.sha256,
                       "hyperparameters": spec.hyperparameters, "seed": spec.seed}  # fmt: skip
            sha256 = hashlib.sha256(_NO_WEIGHTS).hexdigest()
            new = NewVersion("inline", uri, sha256, metrics=metrics, lineage=lineage, promote=spec.promote)
            told = {"metrics": metrics, "steps": epochs, "epochs": epochs, "best_step": epochs, "tensorboard": None}
            done = writer.complete(new, lambda version: values.encode({"model": version.ref, **told})) is not None
        except Exception as error:
            wait = None if isinstance(error, InvalidInput) else _wait(claim, job)
            text = "".join(traceback.format_exception(error))
            writer.fail(JobError(type(error).__name__, str(error), text), retry_in=wait)
            return True
        self.forget_models()
        return done

    def advance(self, seconds: float) -> int:
        """Move the clock."""
        self._clock.ahead += seconds
        while self.chunks.expire().count:
            pass
        return self.run()

    def all_jobs(self, model: str) -> list[JobRow]:
        """All jobs of a model with their inputs, the oldest first."""
        rows = self.ready().jobs.page(JobFilter(model=model), limit=1_000_000)
        found = self.jobs.get([row.id for row in rows], with_input=True)
        return [found[number] for number in sorted(found)]

    def input_digest(self, row: JobRow) -> bytes:
        """What `values.digest` says of a job's input."""
        return values.digest(values.encode(self.decode(row.input)))


def _wait(claim: Claimed, job: ClaimedJob) -> float:
    return claim.backoff.wait(job.failures, lambda _, longest: longest) if claim.backoff is not None else 0.0


class _InlineCompletions(Completions):
    """Nothing is waited for: what has not ended by now never does."""

    def __init__(self, core: InlineCore) -> None:
        super().__init__(core.jobs.get, lambda: None)  # type: ignore[arg-type, return-value]  # nobody subscribes
        self._core = core

    def wait_for(
        self, job: int, chunk: int, deliver: Callable[[Delivery], None], submitted_at: float = -math.inf
    ) -> JobWait:
        self._core.run()
        row = self._core.job(job)
        ended = row.state in TERMINAL
        deliver(row if ended else WaitTimeout(_NOT_RUN.format(f"job {show(Kind.JOB, job)}, {row.state},")))
        return JobWait(job, chunk, deliver)

    def watch(self, batch: int, wake: Callable[[], None]) -> None:
        self._core.run()

    def unwatch(self, batch: int, wake: Callable[[], None]) -> None:
        pass

    @property
    def poll_seconds(self) -> float:
        raise WaitTimeout(_NOT_RUN.format("some job of the batch"))


class _Clock(Database):
    """A database whose clock can be moved."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.ahead = 0.0
        self._true = self.dialect.now

        @event.listens_for(self.engine, "connect")
        def on_connect(connection: sqlite3.Connection, _record: object) -> None:
            connection.execute("PRAGMA synchronous=OFF").close()  # no test outlives a power cut
            connection.create_function("torchrelay_ahead", 0, lambda: self.ahead)

        self.dialect.now = f"({self._true} + torchrelay_ahead())"

    def clock(self, connection: Connection) -> float:
        # Perhaps on a connection of an application's own, which does not know that function.
        return float(connection.exec_driver_sql(f"SELECT {self._true}").scalar_one()) + self.ahead


_template: bytes | None = None
_template_lock = threading.Lock()


def _empty_database() -> bytes:
    """A SQLite file with the schema, made once a process: migrations take longer than most tests."""
    global _template
    with _template_lock:
        if _template is None:
            with tempfile.TemporaryDirectory(prefix="torchrelay-inline-") as folder:
                path = Path(folder) / "template.db"
                database = Database(f"sqlite:///{path}")
                database.upgrade()
                database.dispose()  # the last connection that closes empties the log into the file
                _template = path.read_bytes()
        return _template


def _settings() -> Settings:
    """Settings of its own: neither a variable nor a file of the developer's machine reaches a test."""
    return Settings.model_construct(
        **{
            **{name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()},
            "broker": "redis://inline.invalid",
            "artifacts": "memory://",
        }
    )
