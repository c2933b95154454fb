"""A lane, a worker that beats and runs of one model: what the tests of training runs begin with."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.registry import Registry
from torchrelay_storage.run_spec import Dataset, RunSpec
from torchrelay_storage.run_writer import NewVersion, Progress, RunHold, RunWriter
from torchrelay_storage.runs import RunStore
from torchrelay_storage.schema import metadata
from torchrelay_storage.submission import NewJob, Submitted

ROOM = dict.fromkeys(range(10), 10)
VERSION = NewVersion("images", "file:///w", "ab", {"classes": 2}, {"accuracy": 0.5}, {"seed": 0}, "champion")


def progress(step: int = 1, **changes: Any) -> Progress:
    """How far a run of ten steps is."""
    return Progress(**({"phase": "training", "step": step, "steps": 10, "epoch": 0, "epochs": 1} | changes))


def spec(model: str = "digits", **changes: Any) -> RunSpec:
    """A run that trains this model."""
    return RunSpec(model=model, recipe="images", dataset=Dataset(uri="file:///d", format="csv"), **changes)


class Scene:
    """The stores, a lane, and a worker."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.chunks, self.jobs, self.runs = ChunkStore(database), JobStore(database), RunStore(database)
        self.fleet, self.registry = Fleet(database), Registry(database)
        self.lane = self.registry.lane("images", {"type": "object"})
        self.worker = self.hire()

    def hire(self) -> int:
        return self.fleet.register("w", host="h", pid=1, device="cpu").id

    def submit(self, model: str = "digits", **options: Any) -> int:
        """Submit a run and return its job."""
        placed = self.runs.submit(self.lane, Options(**options), NewJob(b"{}"), spec(model))
        assert isinstance(placed, Submitted)
        return placed.job

    def hold(self, job: int, worker: int | None = None) -> RunHold:
        """Claim a run."""
        worker = worker or self.worker
        [claimed] = self.chunks.claim([self.row(job).chunk], worker)
        return RunHold(job, claimed.chunk, claimed.token, worker)

    def writer(self, job: int) -> RunWriter:
        """Claim a run to write."""
        return RunWriter(self.database, self.hold(job))

    def started(self, **options: Any) -> tuple[int, RunWriter]:
        """Submit a run and claim it."""
        job = self.submit(**options)
        return job, self.writer(job)

    def row(self, job: int) -> JobRow:
        return self.jobs.get([job])[job]

    def age(self) -> None:
        """Let whatever waits for its time have come to it."""
        with self.database.write() as connection:
            connection.execute(text("UPDATE chunks SET not_before = 1 WHERE not_before IS NOT NULL"))

    def put_chunk(self, **columns: object) -> None:
        """Write straight into all chunks."""
        with self.database.write() as connection:
            connection.execute(text(f"UPDATE chunks SET {', '.join(f'{c} = :{c}' for c in columns)}"), columns)

    def everything(self) -> dict[str, list[Any]]:
        """Return all rows of all tables, to see that nothing was written."""
        with self.database.read() as connection:
            return {
                table.name: sorted(map(tuple, connection.execute(table.select())), key=repr)
                for table in metadata.sorted_tables
            }
