"""What Relay and AsyncRelay share: the stores, the threads, checking what is submitted, and every call that reads or
writes. All of it blocks; AsyncRelay runs it on threads. Not here: handles, batches' slices (`batches`), sessions.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrelay.admission import Admission, Place
from torchrelay.announcer import Announcer, AnnouncerThread
from torchrelay.broker import Broker, connect
from torchrelay.checks import check_key, check_limit, read_states
from torchrelay.completions import Completions
from torchrelay.settings import Settings
from torchrelay.submitter import Submitter
from torchrelay_storage import ids, values
from torchrelay_storage.aliases import AliasStore
from torchrelay_storage.artifacts import Artifacts, file_sha256, job_path, load_large, model_path, store_large
from torchrelay_storage.batch_store import BatchStore
from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.errors import (
    InvalidInput,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    RelayError,
    WaitTimeout,
)
from torchrelay_storage.events import get_logger
from torchrelay_storage.fleet import Fleet, WorkerRow
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobFilter, JobRow
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelRow, ModelVersion, Registry
from torchrelay_storage.runs import RunStore
from torchrelay_storage.settle import Moved
from torchrelay_storage.states import JobState
from torchrelay_storage.submission import NewJob, Submitted
from torchrelay_storage.tensors import Tensors

log = get_logger("torchrelay.client")

MODEL_SECONDS = 3.0  # for which a resolved model is used again; a newer version takes over after that
FLUSH_SECONDS = 1.0  # that a closing relay waits for what it submitted to be announced


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that was checked and encoded, and is not stored yet."""

    version: ModelVersion
    options: Options
    job: NewJob
    metadata: dict[str, Any]


class Core:
    """One application's connection to torchrelay. Thread-safe; what it starts, `close` ends."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.db = self._open_database()
        self.broker = Broker(settings)
        self.artifacts = Artifacts(settings.artifacts_url)
        self.jobs = JobStore(self.db)
        self.chunks = ChunkStore(self.db)
        self.batches = BatchStore(self.db)
        self.registry = Registry(self.db)
        self.runs = RunStore(self.db)
        self.aliases = AliasStore(self.db)
        self.fleet = Fleet(self.db)
        self.announcer = AnnouncerThread(Announcer(self.db, self.broker))
        self.admission = Admission(self.jobs, self.registry, settings.max_queued)
        self.submitter = Submitter(self.jobs, self.announcer.send_many, self.admission, self.announcer.window)
        self.completions = Completions(self.jobs.get, self._subscribe)
        self.closed = False
        self._models: dict[str, tuple[float, ModelVersion]] = {}
        self._checked = False
        self._check_lock = threading.Lock()
        _open.add(self)

    def _open_database(self) -> Database:
        return Database(self.settings.database_url)

    def _subscribe(self) -> Any:
        # The reading thread gives each read its own limit; a limit on the socket would end a quiet subscription.
        client: Any = connect(self.settings, timeout=None, health_check_interval=0)
        return client.pubsub()

    def ready(self) -> Core:
        """Check once that the database's schema fits; the embedded one is brought up to date.

        Raises:
            SchemaMismatch: the message says which side to upgrade.
            Unreachable: the database does not answer.
            RelayError: the relay is closed.
        """
        if self.closed:
            raise RelayError("the relay is closed; make another one")
        if not self._checked:
            with self._check_lock:
                if not self._checked:
                    self._check_schema()
                    self._checked = True
        return self

    def _check_schema(self) -> None:
        if self.settings.database is None:
            current, head = self.db.revision()
            if current is None or current != head:
                self.db.upgrade()
        self.db.check()

    def close(self) -> None:
        """Let go out what was submitted, then end the threads and close the connections. Twice is harmless."""
        if self.closed:
            return
        self.closed = True
        self.submitter.close()
        self.announcer.close(FLUSH_SECONDS)
        self.completions.close()
        self.broker.close()
        self.db.dispose()

    # --- submit -------------------------------------------------------------------------------------------

    def model(self, ref: str) -> ModelVersion:
        """Return the version that a model's name stands for. Raises ModelNotFound, InvalidInput."""
        if not isinstance(ref, str) or not ref:
            raise InvalidInput(f"a model is named by a string such as 'digits' or 'digits@3', not by {ref!r}")
        found = self._models.get(ref)
        if found is not None and time.monotonic() - found[0] < MODEL_SECONDS:
            return found[1]
        version = self.ready().registry.resolve(ref)
        self._models[ref] = (time.monotonic(), version)
        return version

    def knows_model(self, ref: str) -> bool:
        """Whether `model` would answer without asking the database."""
        found = self._models.get(ref) if isinstance(ref, str) else None
        return found is not None and time.monotonic() - found[0] < MODEL_SECONDS

    def fresh_model(self, ref: str) -> ModelVersion:
        """As `model`, asking the database anew."""
        self.forget_models()
        return self.model(ref)

    def forget_models(self) -> None:
        """A name or an alias stands for another version now: ask the database anew."""
        self._models.clear()

    def prepare(
        self,
        model: str,
        input: object,
        options: Options,
        *,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """Check and encode a job; nothing is stored yet but a large input's artifact.

        Raises:
            InvalidInput: an option, the key, the metadata or the input is refused; the message says which and why.
            ModelNotFound: it names the models that come near.
            QueueFull: there is no room for a job whose input would have to be uploaded.
        """
        options.validate()
        check_key(key)
        described = self.encode_metadata(metadata)
        version = self.model(model)
        encoded = self.check_size(values.encode(input))
        digest = values.digest(encoded) if key is not None else None
        if len(encoded) > self.settings.inline_limit:  # refused before it is uploaded
            self.admission.admit_job(version, options.tenant, key).close()
        job = NewJob(self.store_input(encoded), key, digest, described)
        return Prepared(version, options, job, dict(metadata or {}))

    def check_size(self, encoded: bytes) -> bytes:
        """Return the encoded input. Raises InvalidInput where it is over the limit."""
        if len(encoded) > self.settings.max_input_bytes:
            raise InvalidInput(
                f"the input has {len(encoded):,} bytes as encoded, the limit is {self.settings.max_input_bytes:,} "
                "(setting max_input_bytes); pass a smaller one, or raise the limit"
            )
        return encoded

    def store_input(self, encoded: bytes) -> bytes:
        """Return what goes into the row: a large input lies in the object store."""
        if len(encoded) <= self.settings.inline_limit:
            return encoded
        # Group commit gives the job its id later; one drawn for the path alone keeps the input's path its own.
        return store_large(self.artifacts, encoded, job_path(ids.draw(), "input"), self.settings.inline_limit)

    def encode_metadata(self, metadata: Mapping[str, Any] | None) -> bytes | None:
        """Return a job's metadata as JSON. Raises InvalidInput."""
        if not metadata:
            return None
        if not isinstance(metadata, Mapping) or not all(isinstance(name, str) for name in metadata):
            raise InvalidInput("metadata must be a dict with string keys")
        try:
            data = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"metadata must be JSON: {error}") from None
        if len(data) > self.settings.max_metadata_bytes:
            raise InvalidInput(
                f"metadata has {len(data):,} bytes as JSON, the limit is {self.settings.max_metadata_bytes:,} "
                "(setting max_metadata_bytes)"
            )
        return data

    def admit(self, prepared: Prepared) -> Place:
        """Take room for a job. Raises QueueFull."""
        return self.ready().admission.admit_job(prepared.version, prepared.options.tenant, prepared.job.key)

    def submit(self, prepared: Prepared) -> Future[Submitted]:
        """Store a job together with those that others submit meanwhile; the future is done once it is committed."""
        return self.ready().submitter.submit(prepared.version, prepared.options, prepared.job)

    def new_row(self, prepared: Prepared, placed: Submitted) -> JobRow:
        """Return the row of a job that was just stored, without reading it."""
        version, options = prepared.version, prepared.options
        waits = bool(options.delay) or options.not_before is not None
        return JobRow(
            id=placed.job,
            chunk=placed.chunk,
            batch=None,
            model=version.name,
            version=version.version,
            state=JobState.SCHEDULED if waits else JobState.QUEUED,
            priority=options.priority,
            failures=0,
            max_attempts=options.max_attempts,
            timeout=options.timeout,
            tenant=options.tenant,
            key=prepared.job.key,
            metadata=prepared.metadata,
            error=None,
            worker=None,
            created_at=(ids.EPOCH_MS + (placed.job >> ids.RANDOM_BITS)) / 1000,
            not_before=options.not_before,
            expires_at=None,
            finished_at=None,
        )

    def forget_input(self, stored: bytes) -> None:
        """Delete a large input's artifact after all: its job exists already, or was refused."""
        reference = values.as_reference(stored)
        if reference is not None:
            with suppress(RelayError):
                self.artifacts.delete([reference.uri])

    def wake(self, model: str) -> None:
        """Something of this model may be announced."""
        self.announcer.wake(model)

    def wake_many(self, models: Iterable[str]) -> None:
        """The same of several."""
        for model in models:
            self.wake(model)

    # --- read ---------------------------------------------------------------------------------------------

    def job(self, number: int, *, with_input: bool = False, with_output: bool = True) -> JobRow:
        """Return a job's row. Raises JobNotFound."""
        rows = self.ready().jobs.get([number], with_input=with_input, with_output=with_output)
        if number not in rows:
            raise JobNotFound(
                f"no job has the id {show(Kind.JOB, number)}; it never existed, or retention has purged it"
            )
        return rows[number]

    def page(
        self,
        *,
        state: str | Iterable[str] | None,
        model: str | None,
        batch: str | None,
        tenant: str | None,
        limit: int,
        before: str | None,
    ) -> list[JobRow]:
        """Return the newest jobs that pass the filters, without their outputs. Raises InvalidInput, NotFound."""
        check_limit(limit)
        wanted = JobFilter(
            states=read_states(state),
            model=self.model(model).name if model is not None else None,
            batch=ids.read(Kind.BATCH, batch) if batch is not None else None,
            tenant=tenant,
        )
        last = ids.read(Kind.JOB, before) if before is not None else None
        return self.ready().jobs.page(wanted, limit=limit, before=last)

    def outcome(self, row: JobRow, tensors: Tensors | None = None) -> Any:
        """Return an ended job's result, decoded.

        Raises:
            JobFailed, JobCancelled, JobExpired: how it ended instead.
        """
        name = show(Kind.JOB, row.id)
        match row.state:
            case JobState.SUCCEEDED:
                if row.output is None:
                    row = self.job(row.id)
                return self.decode(row.output, tensors)
            case JobState.FAILED:
                if row.error is None:
                    raise JobFailed(name, "UnknownError", "no error was recorded")
                raise JobFailed(name, row.error.type, row.error.message, row.error.traceback)
            case JobState.CANCELLED:
                raise JobCancelled(name)
            case JobState.EXPIRED:
                raise JobExpired(name)
        raise WaitTimeout(f"job {name} is {row.state}; it has no result yet")

    def decode(self, data: bytes | None, tensors: Tensors | None = None) -> Any:
        """Return the value behind a row's bytes, from wherever it lies."""
        return values.decode(load_large(self.artifacts, data), tensors=tensors) if data is not None else None

    def models(self) -> list[ModelRow]:
        """Return all models with their load."""
        return self.ready().registry.models()

    def workers(self) -> list[WorkerRow]:
        """Return all workers on record."""
        return self.ready().fleet.workers(self.settings.stale_after)

    # --- move ---------------------------------------------------------------------------------------------

    def cancel(self, jobs: Sequence[int]) -> int:
        """Cancel those that are open; return how many."""
        return self.tell(self.ready().jobs.cancel(jobs))

    def cancel_batch(self, batch: int) -> int:
        """Cancel what is open of a batch; return how many jobs that were."""
        return self.tell(self.ready().jobs.cancel_batch(batch))

    def retry(self, job: int, model: str) -> int:
        """Let a job run again that ended without success; return 1, or 0 where there was nothing to retry."""
        count = self.tell(self.ready().jobs.retry([job]))
        self.wake(model)
        return count

    def retry_failed(self, batch: int, model: str) -> int:
        """Let a batch's failed jobs run again; return how many."""
        count = self.tell(self.ready().jobs.retry_batch(batch))
        self.wake(model)
        return count

    def tell(self, moved: Moved) -> int:
        """Wake who waits, here and elsewhere, for what was moved; return how many jobs that were."""
        if moved.count:
            self.completions.hit(moved.chunks, moved.batches)
            self.broker.publish_ended(moved.chunks, moved.batches)
        return moved.count

    def pause(self, model: str) -> None:
        """Let nothing of a model be claimed until `resume`."""
        self.ready().registry.pause(self.model(model).name)
        self._models.clear()

    def resume(self, model: str) -> None:
        """End a model's pause."""
        name = self.model(model).name
        self.ready().registry.resume(name)
        self._models.clear()
        self.wake(name)

    def limit_model(self, model: str, max_queued: int | None) -> None:
        """Set how many jobs of a model may be queued. Raises InvalidInput, ModelNotFound."""
        self.ready().registry.limit(self.model(model).name, max_queued)
        self.forget_models()
        self.admission.forget()

    def pause_batch(self, batch: int) -> None:
        """Let nothing of a batch be claimed until it is resumed."""
        self.ready().batches.pause(batch)

    def resume_batch(self, batch: int, model: str) -> None:
        """End a batch's pause."""
        self.ready().batches.resume(batch)
        self.wake(model)

    def register_model(
        self,
        name: str,
        handler: str,
        weights: Path | str | None,
        config: Mapping[str, Any] | None,
        chunk_size: int | None,
    ) -> ModelVersion:
        """Upload a model's weights and add its next version. Raises InvalidInput, Unreachable."""
        uri = sha256 = None
        if weights is not None:
            path = Path(weights)
            if not path.is_file():
                raise InvalidInput(f"there is no file of weights at {path}")
            uri, sha256 = self.artifacts.put_file(model_path(name, file_sha256(path)[:16], path.name), path)
        self._models.clear()
        return self.ready().registry.register(
            name, handler, weights=uri, sha256=sha256, config=config, chunk_size=chunk_size
        )


_open: weakref.WeakSet[Core] = weakref.WeakSet()


@atexit.register
def _flush() -> None:
    # A short script ends without closing its relay: what it submitted goes out now, not at the next maintenance.
    for core in list(_open):
        if not core.closed:
            core.announcer.flush(FLUSH_SECONDS)
