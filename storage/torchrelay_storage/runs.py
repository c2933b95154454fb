"""Training runs as users see and steer them: submitted, listed, paused, with their metrics, logs and checkpoints.

Not here: what a run's own process writes (`run_writer`); cancel and retry, which are as for any job (`job_store`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Connection, Row, Text, bindparam, text
from sqlalchemy.exc import IntegrityError

from torchrelay_storage.aliases import check_alias
from torchrelay_storage.database import Database
from torchrelay_storage.enqueue import REDRAWS
from torchrelay_storage.errors import JobNotFound, KeyConflict
from torchrelay_storage.ids import LARGEST, Kind, draw, show
from torchrelay_storage.job_reader import JobRow, condition
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion, check_name
from torchrelay_storage.run_spec import RunSpec
from torchrelay_storage.run_writer import CheckpointRow, Point
from torchrelay_storage.settle import lock, slices
from torchrelay_storage.states import JobState
from torchrelay_storage.submission import NewJob, Submission, Submitted


@dataclass(frozen=True, slots=True)
class RunRow:
    """What is known of a run beside its job.

    Attributes:
        model: the name that its version is registered under.
        step, steps, epoch, epochs: how far it is, and of how many; 0 while that is not known.
        eta: seconds that it is likely to take yet, as of `updated_at`.
        deaths: how often its process was lost since its last checkpoint.
        best: the value of what decides which weights are the best, reached at `best_step`.
        split: how the examples were split.
        version: the number of the version that it registered.
    """

    job: int
    model: str
    recipe: str
    phase: str
    step: int
    steps: int
    epoch: int
    epochs: int
    examples_per_s: float | None
    eta: float | None
    paused: bool
    deaths: int
    best: float | None
    best_step: int | None
    split: Mapping[str, Any]
    dataset_sha256: str | None
    version: int | None
    created_at: float
    started_at: float | None
    updated_at: float | None

    @property
    def version_ref(self) -> str | None:
        """The version that it registered, as users write it: `digits@3`."""
        return f"{self.model}@{self.version}" if self.version is not None else None


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a run's log. `id` grows; `at` is when it was written, on its machine's clock."""

    id: int
    at: float
    line: str


_INSERT = text("INSERT INTO runs (job, model, recipe, created_at) VALUES (:job, :model, :recipe, :now)")

_SELECT = """SELECT r.job, r.model, r.recipe, r.phase, r.step, r.steps, r.epoch, r.epochs, r.examples_per_s, r.eta,
    r.paused AND j.state = 0 AS paused, r.deaths, r.best, r.best_step, r.split, r.dataset_sha256, r.version,
    r.created_at, r.started_at, r.updated_at
    FROM runs r JOIN jobs j ON j.id = r.job"""


class RunStore:
    """The users' side of runs."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._jobs = JobStore(database)

    # --- submit -------------------------------------------------------------------------------------------

    def submit(
        self, lane: ModelVersion, options: Options, job: NewJob, spec: RunSpec, connection: Connection | None = None
    ) -> Submitted | KeyConflict:
        """Store a run: its job, of the recipe's lane, and what is more to it, in one transaction.

        Args:
            job: whose input is the spec, encoded.
            connection: the caller's own; the run then exists if and only if the caller commits.

        Returns:
            Where it is; as with any job, the run that has its key already, or the KeyConflict that kept it out.

        Raises:
            InvalidInput: a name that no version can be registered under, or an alias that is none.
        """
        check_name(spec.model)
        if spec.promote is not None:
            check_alias(spec.promote)
        for attempt in range(REDRAWS):
            first = draw()
            try:
                if connection is not None:
                    return self._submit(connection, Submission(lane, options, [job], ids=first), spec)
                return self._submit_whole(Submission(lane, options, [job], ids=first), first, spec)
            except IntegrityError:  # an id that was drawn twice
                if attempt == REDRAWS - 1:
                    raise
        raise AssertionError("unreachable")

    def _submit_whole(self, submission: Submission, first: int, spec: RunSpec) -> Submitted | KeyConflict:
        stored = text("SELECT 1 FROM runs WHERE job = :job")
        return self._db.transact(
            lambda connection: self._submit(connection, submission, spec),
            lambda connection, _: connection.execute(stored, {"job": first}).first() is not None,
        )

    def _submit(self, connection: Connection, submission: Submission, spec: RunSpec) -> Submitted | KeyConflict:
        [[placed]] = self._jobs.submit([submission], connection)
        if isinstance(placed, Submitted) and not placed.existed:
            row = {"job": placed.job, "model": spec.model, "recipe": spec.recipe, "now": self._db.clock(connection)}
            connection.execute(_INSERT, row)
        return placed

    # --- look ---------------------------------------------------------------------------------------------

    def get(self, job: int) -> RunRow:
        """Return a run. Raises JobNotFound: there is no such job, or it is no training run."""
        found = self.find([job]).get(job)
        if found is None:
            shown = show(Kind.JOB, job)
            raise JobNotFound(
                f"no training run has the id {shown}; it never existed, was purged, or is no training run"
            )
        return found

    def find(self, jobs: Sequence[int]) -> dict[int, RunRow]:
        """Return those of these jobs that are training runs, by id."""
        statement = text(f"{_SELECT} WHERE r.job IN :jobs").bindparams(bindparam("jobs", expanding=True))

        def work(connection: Connection) -> dict[int, RunRow]:
            rows = (r for some in slices(list(jobs)) for r in connection.execute(statement, {"jobs": list(some)}))
            return {row.job: _run(row) for row in rows}

        return self._db.query(work)

    def page(
        self, *, model: str | None = None, states: tuple[JobState, ...] = (), limit: int = 50, before: int | None = None
    ) -> list[tuple[RunRow, JobRow]]:
        """Return the newest runs and their jobs, at most `limit`.

        Args:
            model: only those that train this one.
            states: only those in one of these; empty: all.
            before: the last id of the page before; the next page goes on below it.
        """
        scope = " AND r.model = :model" if model is not None else ""
        scope += f" AND ({condition(states)})" if states else ""
        statement = text(f"{_SELECT} JOIN chunks c ON c.id = j.chunk WHERE r.job < :before{scope} "
                         "ORDER BY r.job DESC LIMIT :limit")  # fmt: skip
        row = {"before": before if before is not None else LARGEST, "limit": limit, "model": model}
        found = [_run(r) for r in self._db.query(lambda connection: connection.execute(statement, row).all())]
        jobs = self._jobs.get([run.job for run in found], with_output=False)
        return [(run, jobs[run.job]) for run in found if run.job in jobs]

    def metrics(self, job: int, names: Sequence[str] | None = None, after: int | None = None) -> list[Point]:
        """Return what a run has measured, by step.

        Args:
            names: only these metrics.
            after: only what was measured beyond this step.
        """
        query = text(f"SELECT name, step, epoch, value FROM metrics WHERE job = :job AND step > :after "
                     f"{'AND name IN :names' if names is not None else ''} ORDER BY step, name")  # fmt: skip
        if names is not None:
            query = query.bindparams(bindparam("names", list(names), Text, expanding=True))
        row = {"job": job, "after": after if after is not None else -1}

        def work(connection: Connection) -> list[Point]:
            return [Point(*r) for r in connection.execute(query, row)]

        return self._db.query(work)

    def logs(self, job: int, *, after: int | None = None, limit: int = 1000) -> list[LogLine]:
        """Return lines of a run's log, oldest first; the next page goes on after the id of the last.

        Args:
            after: the id of the last line of the page before; None: from the first that is kept.
        """
        query = text("SELECT id, at, line FROM run_logs WHERE job = :job AND id > :after ORDER BY id LIMIT :limit")
        row = {"job": job, "after": after if after is not None else -1, "limit": limit}

        def work(connection: Connection) -> list[LogLine]:
            return [LogLine(*r) for r in connection.execute(query, row)]

        return self._db.query(work)

    def checkpoints(self, job: int) -> list[CheckpointRow]:
        """Return the checkpoints of a run that are kept, that written last first."""
        query = text("SELECT step, files, value, created_at FROM checkpoints WHERE job = :job "
                     "ORDER BY created_at DESC, step DESC")  # fmt: skip

        def work(connection: Connection) -> list[CheckpointRow]:
            return [
                CheckpointRow(r.step, orjson.loads(r.files), r.value, r.created_at)
                for r in connection.execute(query, {"job": job})
            ]

        return self._db.query(work)

    # --- steer --------------------------------------------------------------------------------------------

    def pause(self, job: int) -> bool:
        """Let a run write a checkpoint and wait until `resume`; one that waits is not started before.

        Returns:
            Whether it is paused now: False if it has ended.

        Raises:
            JobNotFound: there is no such run.
        """
        return self._set_paused(job, paused=True)

    def resume(self, job: int) -> bool:
        """End a pause.

        Returns:
            Whether the run goes on: False if it has ended.

        Raises:
            JobNotFound: there is no such run.
        """
        return self._set_paused(job, paused=False)

    def _set_paused(self, job: int, *, paused: bool) -> bool:
        statement = text("UPDATE runs SET paused = :paused WHERE job = :job AND EXISTS "
                         "(SELECT 1 FROM jobs j WHERE j.id = :job AND j.state = 0)")  # fmt: skip
        # Its message, if there is one, was thrown away by the worker that found it paused.
        recall = text("UPDATE chunks SET state = 0, announced_at = NULL WHERE id = :chunk AND state = 1")

        def work(connection: Connection) -> bool:
            chunk = connection.execute(text("SELECT chunk FROM jobs WHERE id = :job"), {"job": job}).scalar()
            lock(self._db, connection, [chunk] if chunk is not None else [])
            done = connection.execute(statement, {"job": job, "paused": paused}).rowcount == 1
            if done and not paused:
                connection.execute(recall, {"chunk": chunk})
            return done

        self.get(job)
        return self._db.transact(work)


def _run(row: Row[Any]) -> RunRow:
    return RunRow(**{**row._mapping, "paused": bool(row.paused), "split": orjson.loads(row.split)})
