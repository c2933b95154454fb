"""What the process of a training run and the worker that holds it write about it: progress, checkpoints, its end.

Every call is one transaction, fenced by the hold: once the run was cancelled, rescued or claimed by another, nothing is
written any more. Not here: what users ask and do about runs (`runs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import orjson
from sqlalchemy import Connection, Row, bindparam, text

from torchrelay_storage.aliases import AliasStore, check_alias
from torchrelay_storage.attempts import Try, record_attempts
from torchrelay_storage.blame import Lost, count_death, end_run
from torchrelay_storage.database import Database
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_error import JobError, encode_error
from torchrelay_storage.registry import ModelVersion, Registry, add_version, json_text
from torchrelay_storage.run_log import append_lines
from torchrelay_storage.settle import settle

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunHold:
    """A run as a worker holds it, by the token of its claim."""

    job: int
    chunk: int
    token: int
    worker: int


class Order(StrEnum):
    """What a run's process is to do next."""

    GO = "go"
    PAUSE = "pause"  # write a checkpoint, hand the run back, end
    LOST = "lost"  # cancelled, rescued, or held by another: write nothing more, end


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. `eta`: seconds that it is likely to take yet."""

    phase: str
    step: int
    steps: int
    epoch: int
    epochs: int
    examples_per_s: float | None = None
    eta: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric, such as `train_loss` at step 120."""

    name: str
    step: int
    epoch: int
    value: float


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A checkpoint that is kept. `files`: name -> URI. `value`: of what decides which weights are the best."""

    step: int
    files: Mapping[str, str]
    value: float | None
    created_at: float


@dataclass(frozen=True, slots=True)
class NewVersion:
    """The version that a finished run registers.

    Attributes:
        weights: URI in the artifact store.
        promote: an alias that the version gets.
    """

    handler: str
    weights: str
    sha256: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    promote: str | None = None


_FENCE = """
    SELECT c.max_attempts, j.failures, r.model, r.paused
    FROM chunks c JOIN jobs j ON j.id = c.first_id AND j.chunk = c.id JOIN runs r ON r.job = j.id
    WHERE c.id = :chunk AND c.state = 2 AND c.token = :token AND c.worker = :worker AND j.id = :job AND j.state = 0
"""

# A completion whose confirmation got lost on the way: the claim is this one still, and the run has ended by it.
_COMPLETED = text("""
    SELECT v.id FROM chunks c JOIN jobs j ON j.id = c.first_id AND j.chunk = c.id JOIN model_versions v ON v.run = j.id
    WHERE c.id = :chunk AND c.state = 3 AND c.token = :token AND c.worker = :worker AND j.id = :job AND j.state = 1
""")

# What was started in time does not expire while it is paused.
_STARTED = text("UPDATE chunks SET expires_at = NULL WHERE id = :chunk AND expires_at IS NOT NULL")
_START = text("""
    UPDATE runs SET split = :split, dataset_sha256 = :sha256, steps = :steps, epochs = :epochs, updated_at = :now,
        started_at = COALESCE(started_at, :now)
    WHERE job = :job
""")

_REPORT = text("""
    UPDATE runs SET phase = :phase, step = :step, steps = :steps, epoch = :epoch, epochs = :epochs,
        examples_per_s = :examples_per_s, eta = :eta, updated_at = :now,
        best = COALESCE(CAST(:best AS FLOAT), best), best_step = COALESCE(CAST(:best_step AS INTEGER), best_step)
    WHERE job = :job
""")
_POINT = text("""
    INSERT INTO metrics (job, name, step, epoch, value, at) VALUES (:job, :name, :step, :epoch, :value, :now)
    ON CONFLICT (job, name, step) DO UPDATE SET epoch = excluded.epoch, value = excluded.value, at = excluded.at
""")

_FORGET_POINTS = text("DELETE FROM metrics WHERE job = :job AND step > :step")
_REWIND = text("""
    UPDATE runs SET step = :step, updated_at = :now, best = CASE WHEN best_step > :step THEN NULL ELSE best END,
        best_step = CASE WHEN best_step > :step THEN NULL ELSE best_step END
    WHERE job = :job
""")

_CHECKPOINTS = text("""
    SELECT step, files, created_at FROM checkpoints WHERE job = :job ORDER BY created_at DESC, step DESC
""")
_CHECKPOINT = text("""
    INSERT INTO checkpoints (job, step, files, value, created_at) VALUES (:job, :step, :files, :value, :at)
    ON CONFLICT (job, step) DO UPDATE SET files = excluded.files, value = excluded.value,
        created_at = excluded.created_at
""")
_PRUNE = text("DELETE FROM checkpoints WHERE job = :job AND step IN :steps").bindparams(
    bindparam("steps", expanding=True)
)
_ALIVE = text("UPDATE runs SET deaths = 0, updated_at = :now WHERE job = :job")

_WAIT = text("""
    UPDATE chunks SET state = 0, token = token + 1, worker = NULL, claimed_at = NULL, announced_at = NULL,
        retrying = retrying OR CAST(:retrying AS BOOLEAN), due = CAST(:due AS BOOLEAN),
        not_before = COALESCE(CAST(:not_before AS FLOAT), not_before)
    WHERE id = :chunk
""")
_REST = text("UPDATE runs SET phase = '', eta = NULL, updated_at = :now WHERE job = :job")
_FAILED_ONCE = text("UPDATE jobs SET failures = failures + 1, error = :error WHERE id = :job AND state = 0")

_SUCCEED = text("""
    UPDATE jobs SET state = 1, output = :output, error = NULL, worker = :worker, finished_at = :now
    WHERE id = :job AND state = 0
""")
_REGISTERED = text("""
    UPDATE runs SET version = :version, phase = '', eta = NULL, deaths = 0, updated_at = :now WHERE job = :job
""")


class RunWriter:
    """The writes of one run, by who holds it. Thread-safe."""

    def __init__(self, database: Database, hold: RunHold) -> None:
        self._db = database
        self.hold = hold
        self._scope = {"job": hold.job, "chunk": hold.chunk, "token": hold.token, "worker": hold.worker}
        self._fence = text(f"{_FENCE} {database.dialect.lock}")
        self._look = text(_FENCE)

    # --- on the way ---------------------------------------------------------------------------------------

    def start(self, *, split: Mapping[str, Any], dataset_sha256: str, steps: int, epochs: int) -> Order:
        """Record what the run is about to do, each time that it starts or goes on."""
        row = {"split": json_text(split, "the split"), "sha256": dataset_sha256, "steps": steps, "epochs": epochs}

        def work(connection: Connection, run: Row[Any], now: float) -> Order:
            connection.execute(_STARTED, self._scope)
            connection.execute(_START, self._scope | row | {"now": now})
            return _order(run)

        return self._fenced(work, lambda _: Order.LOST)

    def report(self, progress: Progress, points: Sequence[Point] = (), best: tuple[int, float] | None = None) -> Order:
        """Record how far the run is.

        Args:
            points: of the metrics; one that is there already is written over, one that is not finite is left out.
            best: the step of the best validation so far and its value, where that has changed.
        """
        row = {
            "phase": progress.phase, "step": progress.step, "steps": progress.steps, "epoch": progress.epoch,
            "epochs": progress.epochs, "examples_per_s": _finite(progress.examples_per_s), "eta": _finite(progress.eta),
            "best_step": best[0] if best is not None and math.isfinite(best[1]) else None,
            "best": _finite(best[1]) if best is not None else None,
        }  # fmt: skip
        values = [
            {"job": self.hold.job, "name": p.name, "step": p.step, "epoch": p.epoch, "value": float(p.value)}
            for p in points
            if math.isfinite(p.value)
        ]

        def work(connection: Connection, run: Row[Any], now: float) -> Order:
            connection.execute(_REPORT, self._scope | row | {"now": now})
            if values:
                connection.execute(_POINT, [value | {"now": now} for value in values])
            return _order(run)

        return self._fenced(work, lambda _: Order.LOST)

    def rewind(self, step: int) -> Order:
        """Forget what was measured beyond a step: the run goes on from a checkpoint of that step."""

        def work(connection: Connection, run: Row[Any], now: float) -> Order:
            connection.execute(_FORGET_POINTS, {"job": self.hold.job, "step": step})
            connection.execute(_REWIND, {"job": self.hold.job, "step": step, "now": now})
            return _order(run)

        return self._fenced(work, lambda _: Order.LOST)

    def checkpoint(
        self, step: int, files: Mapping[str, str], value: float | None, keep: int
    ) -> tuple[Order, tuple[str, ...]]:
        """Record a checkpoint whose files are stored; the run's deaths so far are forgiven.

        Args:
            files: name -> URI.
            value: of what decides which weights are the best.
            keep: how many checkpoints are kept: those written last. The rows of the others are deleted.

        Returns:
            What to do next, and the URIs that no kept checkpoint names any more, for the caller to delete.
        """
        names = json_text(files, "the files of the checkpoint")
        row = {"job": self.hold.job, "step": step, "files": names, "value": _finite(value)}

        def work(connection: Connection, run: Row[Any], now: float) -> tuple[Order, tuple[str, ...]]:
            before = connection.execute(_CHECKPOINTS, self._scope).all()
            # The order is that of writing, and must hold where a clock was set back: 1 µs more than the last.
            at = max([now, *(b.created_at + 1e-6 for b in before[:1])])
            connection.execute(_CHECKPOINT, row | {"at": at})
            connection.execute(_ALIVE, self._scope | {"now": now})
            older = [b for b in before if b.step != step]
            kept, pruned = older[: keep - 1], older[keep - 1 :]
            if pruned:
                connection.execute(_PRUNE, {"job": self.hold.job, "steps": [p.step for p in pruned]})
            named = {*files.values(), *(uri for k in kept for uri in orjson.loads(k.files).values())}
            gone = dict.fromkeys(uri for b in before for uri in orjson.loads(b.files).values() if uri not in named)
            return _order(run), tuple(gone)

        return self._fenced(work, lambda _: (Order.LOST, ()))

    # --- its end ------------------------------------------------------------------------------------------

    def hand_back(self, delay: float = 0.0) -> bool:
        """Let the run wait again, for at least `delay` seconds: it was paused, or its worker ends. Spends no attempt.

        Returns:
            Whether it was held still.
        """

        def work(connection: Connection, run: Row[Any], now: float) -> bool:
            self._wait(connection, now, delay)
            return True

        return self._fenced(work, lambda _: False)

    def complete(self, version: NewVersion, output: bytes | Callable[[ModelVersion], bytes]) -> ModelVersion | None:
        """Register what was trained as the model's next version and end the run, in one transaction.

        So a run registers one version, whatever dies; asked again by the same hold, it returns the same.

        Args:
            output: the job's, encoded as in `values`; or what makes it of the version, which has its number only now.

        Returns:
            The version; None: the run was not held any more, and nothing was written.

        Raises:
            InvalidInput: an alias that is none, or a document that is not JSON.
        """
        if version.promote is not None:
            check_alias(version.promote)
        numbers = {name: float(value) for name, value in version.metrics.items() if math.isfinite(value)}
        config = json_text(version.config, "the config of the new version")
        metrics = json_text(numbers, "what the new version measured")
        lineage = json_text(version.lineage, "the lineage of the new version")
        registry, aliases = Registry(self._db), AliasStore(self._db)

        def work(connection: Connection, run: Row[Any], now: float) -> ModelVersion | None:
            number, model, count = add_version(
                self._db, connection, run.model, version.handler, weights=version.weights, sha256=version.sha256,
                run=self.hold.job, config=config, metrics=metrics, lineage=lineage,
            )  # fmt: skip
            if version.promote is not None:
                aliases.move(connection, model, version.promote, count, by=show(Kind.JOB, self.hold.job))
            registered = registry.read(connection, number)
            data = output(registered) if callable(output) else output
            connection.execute(_REGISTERED, {"job": self.hold.job, "version": count, "now": now})
            connection.execute(_SUCCEED, self._scope | {"output": data, "now": now})
            settle(connection, [self.hold.chunk], now)
            return registered

        def lost(connection: Connection) -> ModelVersion | None:
            number = connection.execute(_COMPLETED, self._scope).scalar()
            return registry.read(connection, number) if number is not None else None

        return self._fenced(work, lost)

    def fail(self, error: JobError, *, retry_in: float | None) -> bool:
        """Record that the run failed. Its checkpoints and logs stay.

        Args:
            retry_in: seconds after which it is tried again if it has attempts left; None: it failed for good.

        Returns:
            Whether it was held still.
        """

        def work(connection: Connection, run: Row[Any], now: float) -> bool:
            if retry_in is None or run.failures + 1 >= run.max_attempts:
                end_run(connection, self._lost(run), now, error)
                settle(connection, [self.hold.chunk], now)
            else:
                stored = encode_error(error)
                record_attempts(
                    connection, [Try(self.hold.job, self.hold.chunk, stored)], "failed", self.hold.worker, now
                )
                connection.execute(_FAILED_ONCE, self._scope | {"error": stored})
                self._wait(connection, now, retry_in, retrying=True)
            return True

        return self._fenced(work, lambda _: False)

    def died(self, error: JobError, *, retry_in: float) -> bool:
        """Record that the run's process was lost. At `max_attempts` deaths without a checkpoint in between it fails.

        A death before that spends none of the attempts: the run goes on after `retry_in` seconds.

        Returns:
            Whether it was held still.
        """

        def work(connection: Connection, run: Row[Any], now: float) -> bool:
            if count_death(connection, self._lost(run), now, error):
                self._wait(connection, now, retry_in, retrying=True)
            else:
                settle(connection, [self.hold.chunk], now)
            return True

        return self._fenced(work, lambda _: False)

    # --- beside it ----------------------------------------------------------------------------------------

    def log(self, lines: Sequence[tuple[float, str]]) -> None:
        """Add (time, line) pairs to the run's log. Not fenced: the last words of a lost process are worth having."""
        append_lines(self._db, self.hold.job, lines)

    def is_held(self) -> bool:
        """Whether the run is held still: neither cancelled, nor rescued, nor ended."""
        return self._db.query(lambda connection: connection.execute(self._look, self._scope).first()) is not None

    # --- the fence ----------------------------------------------------------------------------------------

    def _fenced(self, work: Callable[[Connection, Row[Any], float], T], lost: Callable[[Connection], T]) -> T:
        """Do `work` in a transaction that holds the locks of the run's rows; `lost` if the run is not held any more."""

        def attempt(connection: Connection) -> T:
            run = connection.execute(self._fence, self._scope).first()
            return work(connection, run, self._db.clock(connection)) if run is not None else lost(connection)

        return self._db.transact(attempt)

    def _lost(self, run: Row[Any]) -> Lost:
        return Lost(self.hold.chunk, self.hold.job, self.hold.worker, run.max_attempts)

    def _wait(self, connection: Connection, now: float, delay: float, *, retrying: bool = False) -> None:
        later = now + delay if delay > 0 else None
        row = {"due": later is None, "not_before": later, "retrying": retrying}
        connection.execute(_WAIT, self._scope | row)
        connection.execute(_REST, self._scope | {"now": now})


def _order(run: Row[Any]) -> Order:
    return Order.PAUSE if run.paused else Order.GO


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
