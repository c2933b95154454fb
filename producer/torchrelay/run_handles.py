"""Run and its asyncio twin over one base: a training run is a job, and these are the handles on it.

Not here: what is read (`training`, `torchrelay_storage.runs`), and the bar (`progress`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchrelay import training
from torchrelay.job_handles import AsyncJob, Job, _JobBase
from torchrelay.progress import RunProgress
from torchrelay_storage.errors import Unreachable
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.run_spec import RunSpec, read_spec
from torchrelay_storage.run_writer import CheckpointRow, Point, Progress
from torchrelay_storage.runs import LogLine

if TYPE_CHECKING:
    from torchrelay.async_core import AsyncCore
    from torchrelay.core import Core
    from torchrelay.training import Facts

LOG_PAGE = 2_000  # lines read at once


class _RunBase(_JobBase):
    """What both kinds of run know without waiting. All but `id` and `spec` is as of the last `refresh` or `wait`."""

    def __init__(self, core: Core, facts: Facts) -> None:
        _JobBase.__init__(self, core, facts[0])
        self._run = facts[1]
        self._spec: RunSpec | None = None

    @property
    def model(self) -> str:
        """The model that it trains: `digits`, and `digits@3` once it has registered that version."""
        return self._run.version_ref or self._run.model

    @property
    def recipe(self) -> str:
        """The recipe that trains it."""
        return self._run.recipe

    @property
    def spec(self) -> RunSpec:
        """All that it was asked to do, the recipe's defaults filled in. Raises Corrupt."""
        if self._spec is None:
            self._spec = read_spec(self._core.decode(self._row.input))
        return self._spec

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """The recipe's hyperparameters, its defaults filled in."""
        return self.spec.hyperparameters

    @property
    def paused(self) -> bool:
        """Whether it was told to pause; its state is `running` until it has written a checkpoint, then `queued`."""
        return self._run.paused

    @property
    def progress(self) -> Progress:
        """How far it is: phase, step of steps, epoch of epochs, examples per second, eta in seconds."""
        run = self._run
        return Progress(run.phase, run.step, run.steps, run.epoch, run.epochs, run.examples_per_s, run.eta)

    @property
    def best(self) -> float | None:
        """The best value so far of the metric that decides which weights are kept."""
        return self._run.best

    @property
    def best_step(self) -> int | None:
        """The step at which that was reached."""
        return self._run.best_step

    @property
    def split(self) -> Mapping[str, Any]:
        """How the examples were split; empty before it was begun."""
        return self._run.split

    @property
    def started_at(self) -> float | None:
        """When it was first begun: seconds since 1970 on the database's clock."""
        return self._run.started_at

    def as_dict(self) -> dict[str, Any]:
        """Return what is known as plain JSON values."""
        run = self._run
        return super().as_dict() | {
            "recipe": run.recipe,
            "paused": run.paused,
            "phase": run.phase,
            "step": run.step,
            "steps": run.steps,
            "epoch": run.epoch,
            "epochs": run.epochs,
            "examples_per_s": run.examples_per_s,
            "eta": run.eta,
            "best": run.best,
            "best_step": run.best_step,
            "started_at": run.started_at,
        }

    def _take(self, facts: Facts) -> None:
        row, run = facts
        if run.version != self._run.version:
            self._core.forget_models()  # what `digits` stands for has just changed
        self._row = replace(row, input=row.input or self._row.input)
        self._run = run

    def _bar(self, wanted: bool) -> AbstractContextManager[RunProgress | None]:
        return RunProgress(self._run.model) if wanted else nullcontext()


class Run(_RunBase, Job):
    """A training run as a handle."""

    def refresh(self) -> Run:
        """Read the run's present state and return self. Raises JobNotFound."""
        self._take(training.read(self._core, self._row.id))
        return self

    def wait(self, timeout: float | None = None, *, progress: bool = False) -> Run:
        """Wait until the run has ended, however it ended, and return self.

        Args:
            timeout: seconds; None: as long as it takes, which is for ever while it is paused.
            progress: show a bar on the standard error.

        Raises:
            WaitTimeout: it has not ended by then; it goes on.
        """
        if not self.done:
            with self._bar(progress) as bar:
                self._ended(timeout, self._look(bar) if bar is not None else None)
                self.refresh()
                if bar is not None:
                    bar.show(self._run)
        return self

    def metrics(self, names: Sequence[str] | None = None, *, after: int | None = None) -> list[Point]:
        """Return the metrics so far, in the order of their steps: name, step, epoch, value.

        Args:
            names: which, such as `validation_loss`; None: all.
            after: only those of later steps.
        """
        return self._core.ready().runs.metrics(self._row.id, names, after)

    def logs(self) -> list[str]:
        """Return the lines of the run's log."""
        found: list[str] = []
        after: int | None = None
        while page := self.log_lines(after=after, limit=LOG_PAGE):
            found += [line.line for line in page]
            after = page[-1].id
        return found

    def log_lines(self, *, after: int | None = None, limit: int = 1_000) -> list[LogLine]:
        """Return lines of the log with their ids and times, the oldest first; `after` is the last id seen."""
        return self._core.ready().runs.logs(self._row.id, after=after, limit=limit)

    def checkpoints(self) -> list[CheckpointRow]:
        """Return the checkpoints that are kept, the newest first."""
        return self._core.ready().runs.checkpoints(self._row.id)

    def pause(self) -> bool:
        """Let it write a checkpoint and give its device free; it goes on from there at `resume`. False: it has ended.

        A pause survives every restart.
        """
        paused = self._core.ready().runs.pause(self._row.id)
        self.refresh()
        return paused

    def resume(self) -> bool:
        """End a pause. False: it has ended."""
        resumed = self._core.ready().runs.resume(self._row.id)
        self._core.wake(self._row.model)
        self.refresh()
        return resumed

    def _look(self, bar: RunProgress) -> Callable[[], None]:
        def look() -> None:
            try:
                self.refresh()
            except Unreachable:  # the bar stands still; whether that is an error, the wait itself decides
                return
            bar.show(self._run)

        return look


class AsyncRun(_RunBase, AsyncJob):
    """A training run as a handle for asyncio: `Run`'s methods, awaitable."""

    def __init__(self, shared: AsyncCore, facts: Facts) -> None:
        super().__init__(shared.core, facts)
        self._shared = shared
        self._plain = Run(shared.core, facts)

    async def refresh(self) -> AsyncRun:
        """As `Run.refresh`."""
        self._take(await self._shared.call(training.read, self._core, self._row.id))
        return self

    async def wait(self, timeout: float | None = None, *, progress: bool = False) -> AsyncRun:
        """As `Run.wait`."""
        if not self.done:
            with self._bar(progress) as bar:
                await self._ended(timeout, self._look(bar) if bar is not None else None)
                await self.refresh()
                if bar is not None:
                    bar.show(self._run)
        return self

    async def metrics(self, names: Sequence[str] | None = None, *, after: int | None = None) -> list[Point]:
        """As `Run.metrics`."""
        return await self._shared.call(self._plain.metrics, names, after=after)

    async def logs(self) -> list[str]:
        """As `Run.logs`."""
        return await self._shared.call(self._plain.logs)

    async def log_lines(self, *, after: int | None = None, limit: int = 1_000) -> list[LogLine]:
        """As `Run.log_lines`."""
        return await self._shared.call(self._plain.log_lines, after=after, limit=limit)

    async def checkpoints(self) -> list[CheckpointRow]:
        """As `Run.checkpoints`."""
        return await self._shared.call(self._plain.checkpoints)

    async def pause(self) -> bool:
        """As `Run.pause`."""
        paused = await self._shared.call(self._plain.pause)
        await self.refresh()
        return paused

    async def resume(self) -> bool:
        """As `Run.resume`."""
        resumed = await self._shared.call(self._plain.resume)
        await self.refresh()
        return resumed

    def _look(self, bar: RunProgress) -> Callable[[], Awaitable[None]]:
        async def look() -> None:
            try:
                await self.refresh()
            except Unreachable:  # the bar stands still; whether that is an error, the wait itself decides
                return
            bar.show(self._run)

        return look


def handles(core: Core, rows: Sequence[JobRow]) -> list[Job]:
    """Return a handle on each job; on a training run, a Run."""
    runs = training.runs_among(core, rows)
    return [Run(core, runs[row.id]) if row.id in runs else Job(core, row) for row in rows]


async def async_handles(shared: AsyncCore, rows: Sequence[JobRow]) -> list[AsyncJob]:
    """As `handles`."""
    if all(row.trains is None for row in rows):
        return [AsyncJob(shared, row) for row in rows]
    runs = await shared.call(training.runs_among, shared.core, rows)
    return [AsyncRun(shared, runs[row.id]) if row.id in runs else AsyncJob(shared, row) for row in rows]
