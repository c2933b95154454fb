"""Relay: what an application submits with, polls, and reads results by. `async_client` has its asyncio twin.

Thread-safe: one Relay serves a whole process, and a forked child goes on with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from torchrelay import training
from torchrelay.batches import BatchWriter, write
from torchrelay.core import Core
from torchrelay.datasets import Source
from torchrelay.handles import Batch, Job, Run
from torchrelay.retries import BackoffLike, read_backoff, retry_where
from torchrelay.run_handles import handles
from torchrelay.settings import Settings
from torchrelay.training import Request, merged
from torchrelay_storage import ids
from torchrelay_storage.aliases import AliasMove
from torchrelay_storage.errors import RelayError
from torchrelay_storage.fleet import WorkerRow
from torchrelay_storage.ids import Kind
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelRow, ModelVersion
from torchrelay_storage.run_spec import DEFAULT_SPLIT

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session

R = TypeVar("R", bound="Relay")


class Relay:
    """The application's side.

    Args:
        database: `sqlite:///path` or `postgresql://user:password@host/name`.
        broker: `redis://host:6379/0`, `rediss://…` or `redis+socket:///path`.
        artifacts: `file:///folder`, `s3://bucket/prefix` or `memory://`.
        home: the folder of what is embedded, where the three above are not given.
        settings: all settings at once, in the place of the others.

    What is not passed comes from `torchrelay.toml`, else from `TORCHRELAY_*` variables, else it is the embedded
    default. Nothing is connected to before it is needed. Raises InvalidInput for a setting that is none.
    """

    def __init__(
        self,
        *,
        database: str | None = None,
        broker: str | None = None,
        artifacts: str | None = None,
        home: Path | str | None = None,
        settings: Settings | None = None,
    ) -> None:
        if settings is None:
            settings = Settings.load(database=database, broker=broker, artifacts=artifacts, home=home)
        self._core = self._make_core(settings)

    def _make_core(self, settings: Settings) -> Core:
        return Core(settings)

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._core.settings

    # --- submit -------------------------------------------------------------------------------------------

    def submit(
        self,
        model: str,
        input: object,
        *,
        priority: int = 5,
        key: str | None = None,
        delay: float | None = None,
        not_before: float | None = None,
        expires_in: float | None = None,
        timeout: float | None = None,
        max_attempts: int = 3,
        backoff: BackoffLike | None = None,
        metadata: Mapping[str, Any] | None = None,
        tenant: str = "",
        session: Session | scoped_session[Any] | None = None,
    ) -> Job:
        """Submit one job. Once this returns, the job is stored, whatever happens to Redis.

        Args:
            model: a registered model: `digits` for its newest version, `digits@3`, or `digits@champion` for the version
                that this alias stands for now.
            input: JSON values, bytes (also of a PNG or JPEG), NumPy arrays, torch tensors, and dicts and lists of them.
            priority: 0 to 9, 9 the most urgent.
            key: the same key and input give the same job, in whatever state it is.
            delay: seconds until it may start.
            not_before: the same as a point in time, seconds since 1970.
            expires_in: seconds within which it must have started.
            timeout: seconds that its device batch may take.
            max_attempts: how often it may fail.
            backoff: the wait between its tries: a Backoff, or a dict of its parts such as `{"seconds": 2}`; None: as
                its model says.
            metadata: JSON of the caller's own, kept with the job.
            tenant: who shares the workers fairly with other tenants; also the scope of `key`.
            session: a SQLAlchemy Session on the same database: the job exists if and only if that commits. With
                SQLite, commit soon: its transaction keeps all others from writing.

        Raises:
            InvalidInput: an option or the input is refused; nothing is stored.
            KeyConflict: the key belongs to another input.
            ModelNotFound: it names the models that come near.
            QueueFull: as many jobs wait as may, of the model or of all; its `retry_after` says in how many seconds to
                try again.
            Unreachable: the database does not answer. Redis may be away: the job goes out when it is back.
        """
        options = Options(priority, delay, not_before, expires_in, timeout, max_attempts, tenant, read_backoff(backoff))
        if session is not None:
            from torchrelay.sessions import submit_in, sync_session  # the ORM takes a fifth of a second to import

            plain_session = sync_session(session)
        submitted_at = -math.inf
        prepared = self._core.prepare(model, input, options, key=key, metadata=metadata)
        try:
            if session is not None:
                placed = submit_in(self._core, plain_session, prepared)
            else:
                placed = self._core.submit(prepared).result()
                submitted_at = time.monotonic()
        except RelayError:
            self._core.forget_input(prepared.job.input)
            raise
        if placed.existed:
            self._core.forget_input(prepared.job.input)
            return Job(self._core, self._core.job(placed.job))
        return Job(self._core, self._core.new_row(prepared, placed), submitted_at)

    def submit_batch(
        self,
        model: str,
        inputs: Iterable[object],
        *,
        priority: int = 5,
        key: str | None = None,
        delay: float | None = None,
        not_before: float | None = None,
        expires_in: float | None = None,
        timeout: float | None = None,
        max_attempts: int = 3,
        backoff: BackoffLike | None = None,
        metadata: Mapping[str, Any] | None = None,
        tenant: str = "",
    ) -> Batch:
        """Submit a job for each input, stored in slices of some thousands; what is stored runs at once.

        A list with an input that is refused is refused whole, before anything is stored. Of a generator, what comes
        before the refused input, or before an error that it raises, is stored and runs; the batch then stays open, as
        where this process dies. Submitting the same inputs again under the same `key` goes on after the last input
        stored, and gives back a batch that is whole already. One client at a time may submit under a key.

        Args:
            inputs: any iterable; a generator is consumed in constant memory.
            key: names the batch, for going on and for not submitting it twice.
            metadata: of the batch.
            model, priority, delay, not_before, expires_in, timeout, max_attempts, backoff, tenant: of each job, as in
                `submit`.

        Raises:
            InvalidInput: an option or an input is refused; the message has the input's index.
            KeyConflict: the batch with this key has other inputs (its first, or their number).
            QueueFull: as many jobs wait as may. Of a list nothing is stored; of a generator the error's `stored`
                inputs of its `batch` are, and run: go on by the `key` after `retry_after` seconds, or cancel the batch.
            ModelNotFound, Unreachable: as in `submit`.
        """
        options = Options(priority, delay, not_before, expires_in, timeout, max_attempts, tenant, read_backoff(backoff))
        writer = BatchWriter(self._core.ready(), model, options, key=key, metadata=metadata)
        return Batch(self._core, write(writer, inputs))

    # --- train --------------------------------------------------------------------------------------------

    def train(
        self,
        model: str,
        *,
        recipe: str,
        dataset: Source,
        validation: Source | None = None,
        split: float = DEFAULT_SPLIT,
        split_column: str | None = None,
        stratify: bool = True,
        seed: int = 0,
        devices: int = 1,
        precision: str = "fp32",
        deterministic: bool = True,
        checkpoint_steps: int | None = None,
        checkpoint_minutes: float | None = 5.0,
        keep_checkpoints: int = 2,
        promote: str | None = None,
        priority: int = 5,
        key: str | None = None,
        delay: float | None = None,
        not_before: float | None = None,
        expires_in: float | None = None,
        timeout: float | None = None,
        max_attempts: int = 3,
        backoff: BackoffLike | None = None,
        metadata: Mapping[str, Any] | None = None,
        tenant: str = "",
        session: Session | scoped_session[Any] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Run:
        """Submit a training run. It is a job: a worker that trains runs it, and registers the model's next version.

        Args:
            model: the name under which the version is registered, such as `digits`; it may be new.
            recipe: how it is trained, such as `tabular-classification`; `recipes` has them all.
            dataset: a file (.csv, .tsv, .jsonl, .parquet, .npz), a folder or .zip file of pictures (CLASS/NAME.png, or
                train/CLASS/NAME.png and validation/CLASS/NAME.png), columns (name -> array or list), or the URI of such
                a file. What is local is uploaded; the same content is uploaded once.
            validation: examples to validate with, in the place of a part of `dataset`.
            split: the part of the examples that is held out for validation.
            split_column: a column that says `train` or `validation` for each example, in the place of `split`.
            stratify: whether each class has the same share in both parts.
            seed: of the split, the first weights and the order of the examples.
            devices: how many devices of one machine train together.
            precision: `fp32`, or mixed with `bf16` or `fp16`.
            deterministic: let the same seed on the same machine give the same weights; False may be faster.
            checkpoint_steps, checkpoint_minutes: write a checkpoint after so many steps, or so many minutes.
            keep_checkpoints: how many are kept.
            promote: an alias, such as `champion`, that the version gets.
            priority, key, delay, not_before, expires_in, max_attempts, backoff, metadata, tenant, session: as in
                `submit`.
            timeout: seconds that it may run at a stretch; the last checkpoint is kept.
            hyperparameters, more: the recipe's own, such as `epochs=5`; the dict for those that are named as an
                argument above is.

        Raises:
            RecipeNotFound: it names the recipes that come near.
            InvalidHyperparameter: one is unknown, missing or out of its range.
            InvalidDataset: there is no such file, or it is none of these.
            InvalidInput: another argument is refused. Nothing is uploaded or stored where anything is refused.
            KeyConflict: the key belongs to another run.
            Unreachable: the database or the object store does not answer.
        """
        options = Options(priority, delay, not_before, expires_in, timeout, max_attempts, tenant, read_backoff(backoff))
        request = Request(
            model, recipe, dataset, validation, split, split_column, stratify, seed, devices, precision, deterministic,
            checkpoint_steps, checkpoint_minutes, keep_checkpoints, promote, merged(hyperparameters, more),
        )  # fmt: skip
        plain_session = None
        if session is not None:
            from torchrelay.sessions import sync_session  # the ORM takes a fifth of a second to import

            plain_session = sync_session(session)
        run = training.prepare(self._core, request, options, key=key, metadata=metadata)
        placed = training.place(self._core, run, plain_session)
        return Run(self._core, training.facts(self._core, placed))

    def run(self, id: str) -> Run:
        """Return the training run with this id. Raises JobNotFound, also for a job of another kind."""
        return Run(self._core, training.read(self._core, ids.read(Kind.JOB, id)))

    def runs(
        self,
        model: str | None = None,
        state: str | Iterable[str] | None = None,
        *,
        limit: int = 50,
        before: str | None = None,
    ) -> list[Run]:
        """Return the newest training runs, the newest first; `model` is a name, the others are as in `jobs`."""
        found = training.page(self._core, model=model, state=state, limit=limit, before=before)
        return [Run(self._core, facts) for facts in found]

    def recipes(self) -> dict[str, dict[str, Any]]:
        """Return the known recipes: name -> JSON Schema of the hyperparameters."""
        return training.recipes(self._core)

    # --- read ---------------------------------------------------------------------------------------------

    def job(self, id: str) -> Job:
        """Return the job with this id; a training run as a Run. Raises JobNotFound."""
        return handles(self._core, [self._core.job(ids.read(Kind.JOB, id))])[0]

    def batch(self, id: str) -> Batch:
        """Return the batch with this id. Raises BatchNotFound."""
        return Batch(self._core, self._core.ready().batches.get(ids.read(Kind.BATCH, id)))

    def jobs(
        self,
        *,
        state: str | Iterable[str] | None = None,
        model: str | None = None,
        batch: str | None = None,
        tenant: str | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[Job]:
        """Return the newest jobs, the newest first.

        Args:
            state: one of the states, or several.
            model, batch, tenant: which jobs; those of a model are inferences (`runs` has those that train it).
            limit: how many at most.
            before: the id of a page's last job; the next page goes on below it.
        """
        rows = self._core.page(state=state, model=model, batch=batch, tenant=tenant, limit=limit, before=before)
        return handles(self._core, rows)

    def retry(
        self,
        *,
        state: str | Iterable[str] | None = None,
        model: str | None = None,
        batch: str | None = None,
        tenant: str | None = None,
    ) -> int:
        """Let all jobs that pass the filters run again, with all their attempts; return how many those are.

        Each is met once, even if it fails anew meanwhile. For one job there is `job.retry`.

        Args:
            state: `failed` (where nothing is said), `expired` or `cancelled`, or several of them.
            model, batch, tenant: which jobs, as in `jobs`.

        Raises:
            InvalidInput: another state, or no filter at all.
            ModelNotFound, BatchNotFound, Unreachable.
        """
        return retry_where(self._core, state=state, model=model, batch=batch, tenant=tenant)

    def batches(self, *, model: str | None = None, limit: int = 50, before: str | None = None) -> list[Batch]:
        """Return the newest batches, the newest first; `before` as in `jobs`."""
        last = ids.read(Kind.BATCH, before) if before is not None else None
        rows = self._core.ready().batches.page(limit=limit, before=last, model=model)
        return [Batch(self._core, row) for row in rows]

    def models(self) -> list[ModelRow]:
        """Return the registered models: newest version, how many versions, how many jobs wait and run."""
        return self._core.models()

    def workers(self) -> list[WorkerRow]:
        """Return the workers on record, the newest first; `alive` says which of them work."""
        return self._core.workers()

    # --- models -------------------------------------------------------------------------------------------

    def register_model(
        self,
        name: str,
        *,
        handler: str,
        weights: Path | str | None = None,
        config: Mapping[str, Any] | None = None,
        chunk_size: int | None = None,
    ) -> ModelVersion:
        """Add the next version of a model; running workers pick it up.

        Args:
            handler: the name under which workers know the Python class (an entry point of the group
                `torchrelay.models`, or the setting `handlers`). Never an import path.
            weights: a local file; it is uploaded to the artifact store, and its sha256 is recorded.
            config: JSON for the handler.
            chunk_size: how many jobs travel together; a worker that has measured the model sets it better.
        """
        return self._core.register_model(name, handler, weights, config, chunk_size)

    def versions(self, model: str) -> list[ModelVersion]:
        """Return the versions of a model, the newest first, with metrics, lineage and aliases. Raises ModelNotFound."""
        return training.versions(self._core, model)

    def promote(self, version: str, *, alias: str = "champion", by: str = "") -> ModelVersion:
        """Let an alias stand for a version. Jobs submitted from now on as `digits@champion` are served by it.

        Args:
            version: such as `digits@3`.
            by: who did it, for the history.

        Raises:
            ModelNotFound, InvalidInput.
        """
        return training.promote(self._core, version, alias, by)

    def rollback(self, model: str, *, alias: str = "champion", by: str = "") -> ModelVersion:
        """Let an alias stand again for the version that it stood for before, and return that.

        Raises:
            ModelNotFound.
            InvalidInput: there is none before.
        """
        return training.rollback(self._core, model, alias, by)

    def aliases(self, model: str) -> dict[str, int]:
        """Return the aliases of a model and the number of the version that each stands for. Raises ModelNotFound."""
        return training.aliases(self._core, model)

    def alias_history(self, model: str, alias: str | None = None) -> list[AliasMove]:
        """Return which version was live when: each move of an alias, the newest first. Raises ModelNotFound."""
        return training.alias_history(self._core, model, alias)

    def limit_model(self, model: str, max_queued: int | None) -> None:
        """Let at most so many jobs of a model wait; a submit of more raises QueueFull. None: any number.

        Other clients follow within some seconds.

        Raises:
            InvalidInput: it is no whole number from 0 up.
            ModelNotFound: there is no such model.
        """
        self._core.limit_model(model, max_queued)

    def pause(self, model: str) -> None:
        """Let nothing of a model be started until `resume`; submits go on, and it survives every restart."""
        self._core.pause(model)

    def resume(self, model: str) -> None:
        """End a model's pause."""
        self._core.resume(model)

    # --- the end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go out what was submitted, then end the threads and close the connections."""
        self._core.close()

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core.db.safe_url} {self._core.broker.safe_url}>"
