"""AsyncRelay: Relay for asyncio. The same methods, awaitable, over the same core; what they mean stands in `client`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from torchrelay import training
from torchrelay.async_core import AsyncCore
from torchrelay.batches import BatchWriter, refuse_no_iterable, write
from torchrelay.client import Relay
from torchrelay.core import Core, Prepared
from torchrelay.datasets import Source
from torchrelay.handles import AsyncBatch, AsyncJob, AsyncRun
from torchrelay.retries import BackoffLike, read_backoff, retry_where
from torchrelay.run_handles import async_handles
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
from torchrelay_storage.submission import Submitted

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

R = TypeVar("R", bound="AsyncRelay")


class AsyncRelay:
    """The application's side for asyncio; arguments as `Relay`'s."""

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
        self._shared = AsyncCore(self._core)
        self._plain = Relay.__new__(Relay)  # the same core: what only reads is written once
        self._plain._core = self._core

    def _make_core(self, settings: Settings) -> Core:
        return Core(settings)

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._core.settings

    async def submit(
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
        session: AsyncSession | async_scoped_session[Any] | None = None,
    ) -> AsyncJob:
        """As `Relay.submit`; `session` is a SQLAlchemy AsyncSession."""
        options = Options(priority, delay, not_before, expires_in, timeout, max_attempts, tenant, read_backoff(backoff))
        prepared = await self._prepare(model, input, options, key, metadata)
        try:
            placed = await self._place(prepared, session)
            submitted_at = time.monotonic() if session is None else -math.inf
        except RelayError:
            await self._forget_input(prepared)
            raise
        if placed.existed:
            await self._forget_input(prepared)
            return AsyncJob(self._shared, await self._shared.call(self._core.job, placed.job))
        return AsyncJob(self._shared, self._core.new_row(prepared, placed), submitted_at)

    async def _prepare(
        self, model: str, input: object, options: Options, key: str | None, metadata: Mapping[str, Any] | None
    ) -> Prepared:
        if self._core.knows_model(model) and _is_small(input):  # some microseconds, and nothing that blocks
            return self._core.prepare(model, input, options, key=key, metadata=metadata)
        return await self._shared.call(self._core.prepare, model, input, options, key=key, metadata=metadata)

    async def _place(self, prepared: Prepared, session: AsyncSession | async_scoped_session[Any] | None) -> Submitted:
        if session is not None:
            from torchrelay.sessions import async_session, submit_in  # the ORM takes a fifth of a second to import

            place = await self._shared.call(self._core.admit, prepared)
            return await async_session(session).run_sync(lambda plain: submit_in(self._core, plain, prepared, place))
        return await asyncio.wrap_future(self._core.submit(prepared))

    async def _forget_input(self, prepared: Prepared) -> None:
        await self._shared.call(self._core.forget_input, prepared.job.input)

    async def submit_batch(
        self,
        model: str,
        inputs: Iterable[object] | AsyncIterable[object],
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
    ) -> AsyncBatch:
        """As `Relay.submit_batch`; `inputs` may also be an async iterable. A plain one is iterated on a thread."""
        options = Options(priority, delay, not_before, expires_in, timeout, max_attempts, tenant, read_backoff(backoff))
        refuse_no_iterable(inputs)

        def make() -> BatchWriter:
            return BatchWriter(self._core.ready(), model, options, key=key, metadata=metadata)

        writer = await self._shared.call(make)
        if not isinstance(inputs, AsyncIterable):
            return AsyncBatch(self._shared, await self._shared.call(write, writer, inputs))
        await self._shared.call(writer.open)
        source = aiter(inputs)
        ended = False
        while not ended:
            group: list[object] = []
            try:
                while len(group) < writer.group:
                    group.append(await anext(source))
            except StopAsyncIteration:
                ended = True
            except Exception:
                await self._shared.call(writer.add, group)  # as `batches.write`: what came before the error is stored
                await self._shared.call(writer.flush)
                raise
            await self._shared.call(writer.add, group)
        return AsyncBatch(self._shared, await self._shared.call(writer.close))

    async def train(
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
        session: AsyncSession | async_scoped_session[Any] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> AsyncRun:
        """As `Relay.train`; `session` is a SQLAlchemy AsyncSession."""
        options = Options(priority, delay, not_before, expires_in, timeout, max_attempts, tenant, read_backoff(backoff))
        request = Request(
            model, recipe, dataset, validation, split, split_column, stratify, seed, devices, precision, deterministic,
            checkpoint_steps, checkpoint_minutes, keep_checkpoints, promote, merged(hyperparameters, more),
        )  # fmt: skip
        plain_session = None
        if session is not None:
            from torchrelay.sessions import async_session  # the ORM takes a fifth of a second to import

            plain_session = async_session(session)
        run = await self._shared.call(training.prepare, self._core, request, options, key=key, metadata=metadata)
        if plain_session is None:
            placed = await self._shared.call(training.place, self._core, run)
        else:
            placed = await plain_session.run_sync(lambda plain: training.place(self._core, run, plain))
        return AsyncRun(self._shared, await self._shared.call(training.facts, self._core, placed))

    async def run(self, id: str) -> AsyncRun:
        """As `Relay.run`."""
        return AsyncRun(self._shared, await self._shared.call(training.read, self._core, ids.read(Kind.JOB, id)))

    async def runs(
        self,
        model: str | None = None,
        state: str | Iterable[str] | None = None,
        *,
        limit: int = 50,
        before: str | None = None,
    ) -> list[AsyncRun]:
        """As `Relay.runs`."""
        found = await self._shared.call(training.page, self._core, model=model, state=state, limit=limit, before=before)
        return [AsyncRun(self._shared, facts) for facts in found]

    async def recipes(self) -> dict[str, dict[str, Any]]:
        """As `Relay.recipes`."""
        return await self._shared.call(training.recipes, self._core)

    async def job(self, id: str) -> AsyncJob:
        """As `Relay.job`."""
        row = await self._shared.call(self._core.job, ids.read(Kind.JOB, id))
        return (await async_handles(self._shared, [row]))[0]

    async def batch(self, id: str) -> AsyncBatch:
        """As `Relay.batch`."""
        return AsyncBatch(self._shared, (await self._shared.call(self._plain.batch, id))._row)

    async def jobs(
        self,
        *,
        state: str | Iterable[str] | None = None,
        model: str | None = None,
        batch: str | None = None,
        tenant: str | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[AsyncJob]:
        """As `Relay.jobs`."""
        rows = await self._shared.call(
            self._core.page, state=state, model=model, batch=batch, tenant=tenant, limit=limit, before=before
        )
        return await async_handles(self._shared, rows)

    async def retry(
        self,
        *,
        state: str | Iterable[str] | None = None,
        model: str | None = None,
        batch: str | None = None,
        tenant: str | None = None,
    ) -> int:
        """As `Relay.retry`."""
        return await self._shared.call(retry_where, self._core, state=state, model=model, batch=batch, tenant=tenant)

    async def batches(
        self, *, model: str | None = None, limit: int = 50, before: str | None = None
    ) -> list[AsyncBatch]:
        """As `Relay.batches`."""
        found = await self._shared.call(self._plain.batches, model=model, limit=limit, before=before)
        return [AsyncBatch(self._shared, batch._row) for batch in found]

    async def models(self) -> list[ModelRow]:
        """As `Relay.models`."""
        return await self._shared.call(self._core.models)

    async def workers(self) -> list[WorkerRow]:
        """As `Relay.workers`."""
        return await self._shared.call(self._core.workers)

    async def register_model(
        self,
        name: str,
        *,
        handler: str,
        weights: Path | str | None = None,
        config: Mapping[str, Any] | None = None,
        chunk_size: int | None = None,
    ) -> ModelVersion:
        """As `Relay.register_model`."""
        return await self._shared.call(self._core.register_model, name, handler, weights, config, chunk_size)

    async def versions(self, model: str) -> list[ModelVersion]:
        """As `Relay.versions`."""
        return await self._shared.call(training.versions, self._core, model)

    async def promote(self, version: str, *, alias: str = "champion", by: str = "") -> ModelVersion:
        """As `Relay.promote`."""
        return await self._shared.call(training.promote, self._core, version, alias, by)

    async def rollback(self, model: str, *, alias: str = "champion", by: str = "") -> ModelVersion:
        """As `Relay.rollback`."""
        return await self._shared.call(training.rollback, self._core, model, alias, by)

    async def aliases(self, model: str) -> dict[str, int]:
        """As `Relay.aliases`."""
        return await self._shared.call(training.aliases, self._core, model)

    async def alias_history(self, model: str, alias: str | None = None) -> list[AliasMove]:
        """As `Relay.alias_history`."""
        return await self._shared.call(training.alias_history, self._core, model, alias)

    async def limit_model(self, model: str, max_queued: int | None) -> None:
        """Let at most so many jobs of a model wait; a submit of more raises QueueFull. None: any number.

        Other clients follow within some seconds.

        Raises:
            InvalidInput: it is no whole number from 0 up.
            ModelNotFound: there is no such model.
        """
        await self._shared.call(self._core.limit_model, model, max_queued)

    async def pause(self, model: str) -> None:
        """As `Relay.pause`."""
        await self._shared.call(self._core.pause, model)

    async def resume(self, model: str) -> None:
        """As `Relay.resume`."""
        await self._shared.call(self._core.resume, model)

    async def close(self) -> None:
        """As `Relay.close`."""
        await self._shared.close()

    async def __aenter__(self: R) -> R:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core.db.safe_url} {self._core.broker.safe_url}>"


def _is_small(value: object) -> bool:
    """Whether a value is encoded in no time and stays in its row: a guess that errs on the safe side."""
    if isinstance(value, str | bytes):
        return len(value) < 16_384
    if isinstance(value, dict):
        return len(value) < 64 and all(_is_small(item) for item in value.values())
    if isinstance(value, list | tuple):
        return len(value) < 1_024 and all(isinstance(item, int | float) for item in value)
    return value is None or isinstance(value, bool | int | float)
