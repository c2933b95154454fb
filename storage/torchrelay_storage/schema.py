"""The tables: one page that explains the product.

`jobs` is cold: a row is written when it is submitted, and once more when it ends. `chunks` is hot and small: what moves
through Redis and who holds it. Times are seconds since 1970 on the database's clock. The view `job_status` (made by the
migrations, documented in docs/operations.md) shows both together, with the states and ids that users see. A training
run is a job like any other, of a hidden model named after its recipe; what is more to it stands in `runs`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from torchrelay_storage.states import ChunkState

REVISION = "0003"  # of the newest migration, after which there are just these tables

metadata = MetaData()

# SQLite numbers rows only in a column of type INTEGER; PostgreSQL needs 64 bits for the same.
Id = BigInteger().with_variant(Integer, "sqlite")
Real: Double[float] = Double()

models = Table(
    "models",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("created_at", Real, nullable=False),
    Column("training", Boolean, nullable=False, server_default=text("false")),  # the hidden lane of a recipe's runs
    Column("max_queued", Integer),  # jobs that may wait; NULL: any number
)

# What a name stood for at a time: a handler (a name that the operator's workers know) and pinned weights.
model_versions = Table(
    "model_versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("model", Integer, ForeignKey("models.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("handler", Text, nullable=False),
    Column("weights", Text),  # URI in the artifact store
    Column("sha256", Text),  # of the weights, checked at each load
    Column("config", Text, nullable=False, server_default=text("'{}'")),  # JSON, the handler's own
    Column("chunk_size", Integer, nullable=False),  # jobs that travel together
    Column("created_at", Real, nullable=False),
    Column("metrics", Text, nullable=False, server_default=text("'{}'")),  # JSON: name -> number, where it was trained
    Column("lineage", Text, nullable=False, server_default=text("'{}'")),  # JSON: data, code and settings it came from
    Column("run", BigInteger),  # the job that trained it, which retention may have purged
    UniqueConstraint("model", "version"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("model", Integer, ForeignKey("models.id"), nullable=False),
    Column("version", Integer, ForeignKey("model_versions.id"), nullable=False),
    Column("tenant", Text, nullable=False, server_default=text("''")),
    Column("key", Text),
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("closed", Boolean, nullable=False, server_default=text("false")),  # its end is written
    Column("priority", SmallInteger, nullable=False),
    Column("metadata", Text, nullable=False, server_default=text("'{}'")),
    Column("created_at", Real, nullable=False),
)
Index("ix_batches_key", batches.c.tenant, batches.c.model, batches.c.key, unique=True,
      postgresql_where=batches.c.key.is_not(None), sqlite_where=batches.c.key.is_not(None))  # fmt: skip

# What travels: a run of jobs of one model version, batch and set of options.
chunks = Table(
    "chunks",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("model", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("batch", BigInteger),
    Column("tenant", Text, nullable=False, server_default=text("''")),
    Column("flow", BigInteger, nullable=False),  # who shares fairly with whom: Submission.flow
    Column("priority", SmallInteger, nullable=False),  # 0 to 9, 9 the most urgent
    Column("turn", BigInteger, nullable=False),  # start-time fair queueing (Goyal, Vin, Cheng 1996) in one integer
    Column("first_id", BigInteger, nullable=False),
    Column("last_id", BigInteger, nullable=False),
    Column("size", Integer, nullable=False),  # how many jobs name this chunk
    Column("succeeded", Integer, nullable=False, server_default=text("0")),
    Column("failed", Integer, nullable=False, server_default=text("0")),
    Column("cancelled", Integer, nullable=False, server_default=text("0")),
    Column("expired", Integer, nullable=False, server_default=text("0")),
    Column("state", SmallInteger, nullable=False, server_default=text("0")),  # states.ChunkState
    Column("due", Boolean, nullable=False, server_default=text("true")),  # its time has come
    Column("suspect", Boolean, nullable=False, server_default=text("false")),  # was held by a process that died
    Column("retrying", Boolean, nullable=False, server_default=text("false")),  # its jobs have failed before
    Column("token", Integer, nullable=False, server_default=text("0")),  # the claim's number, which fences late writes
    Column("worker", BigInteger),
    Column("timeout", Real),
    Column("max_attempts", SmallInteger, nullable=False),
    Column("not_before", Real),
    Column("expires_at", Real),
    Column("created_at", Real, nullable=False),
    Column("announced_at", Real),
    Column("claimed_at", Real),
    Column("ended_at", Real),
    Column("backoff", Text),  # options.Backoff; NULL: the model's
    Column("alone", Boolean, nullable=False, server_default=text("false")),  # a suspect, and nothing runs beside it
    CheckConstraint("first_id <= last_id", name="ck_chunks_range"),
    postgresql_with={"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.02"},
)
_c = chunks.c


def _partial(name: str, *columns: ColumnElement[Any], where: str) -> None:
    Index(name, *columns, postgresql_where=text(where), sqlite_where=text(where))


Index("ix_chunks_batch", _c.batch)
Index("ix_chunks_last", _c.last_id)
_partial(
    "ix_chunks_next", _c.model, _c.priority.desc(), _c.turn, _c.id, where=f"state = {ChunkState.WAITING:d} AND due"
)
_partial("ix_chunks_flow", _c.model, _c.priority, _c.flow, _c.turn, where=f"state = {ChunkState.WAITING:d}")
_partial("ix_chunks_not_before", _c.not_before, where=f"state = {ChunkState.WAITING:d} AND NOT due")
_partial("ix_chunks_announced", _c.model, _c.announced_at, where=f"state = {ChunkState.ANNOUNCED:d}")
_partial("ix_chunks_claimed", _c.worker, where=f"state = {ChunkState.CLAIMED:d}")
_partial("ix_chunks_expires", _c.expires_at, where=f"state < {ChunkState.CLAIMED:d} AND expires_at IS NOT NULL")
_partial("ix_chunks_open", _c.last_id, where=f"state < {ChunkState.DONE:d}")
_partial("ix_chunks_ended", _c.ended_at, where=f"state = {ChunkState.DONE:d}")
_partial("ix_chunks_failed", _c.last_id, where="failed > 0")
_partial("ix_chunks_cancelled", _c.last_id, where="cancelled > 0")
_partial("ix_chunks_expired", _c.last_id, where="expired > 0")

# No index but the primary key: an index on what the finish writes would make each finish a third slower.
jobs = Table(
    "jobs",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("chunk", BigInteger, nullable=False),
    Column("batch", BigInteger),
    Column("state", SmallInteger, nullable=False, server_default=text("0")),  # states.End
    Column("failures", SmallInteger, nullable=False, server_default=text("0")),
    Column("input", LargeBinary, nullable=False),  # as in values.py
    Column("output", LargeBinary),
    Column("error", LargeBinary),  # JSON: type, message, traceback
    Column("metadata", LargeBinary),  # JSON
    Column("worker", BigInteger),  # which recorded the end
    Column("finished_at", Real),
    postgresql_with={"fillfactor": "50"},
)

# A try that did not succeed; the one that did is the job's own row.
attempts = Table(
    "attempts",
    metadata,
    Column("job", BigInteger, nullable=False),
    Column("id", BigInteger, nullable=False),  # in the order of the tries
    Column("worker", BigInteger),
    Column("started_at", Real),
    Column("ended_at", Real, nullable=False),
    Column("outcome", Text, nullable=False),  # attempts.Recorded
    Column("error", LargeBinary),  # as jobs.error
    PrimaryKeyConstraint("job", "id"),
)

# A training run: a job, its chunk of one, and this row. Lean, for its process writes it about once a second.
runs = Table(
    "runs",
    metadata,
    Column("job", Id, primary_key=True, autoincrement=False),
    Column("model", Text, nullable=False),  # the name that its version is registered under; may not exist before
    Column("recipe", Text, nullable=False),
    Column("phase", Text, nullable=False, server_default=text("''")),
    Column("step", Integer, nullable=False, server_default=text("0")),
    Column("steps", Integer, nullable=False, server_default=text("0")),  # 0: not known yet
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("epochs", Integer, nullable=False, server_default=text("0")),
    Column("examples_per_s", Real),
    Column("eta", Real),  # seconds
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("deaths", SmallInteger, nullable=False, server_default=text("0")),  # of its process since a checkpoint
    Column("best", Real),  # value of what decides which weights are the best
    Column("best_step", Integer),
    Column("split", Text, nullable=False, server_default=text("'{}'")),  # JSON: how the examples were split
    Column("dataset_sha256", Text),
    Column("version", Integer),  # the number of the version that it registered
    Column("created_at", Real, nullable=False),
    Column("started_at", Real),
    Column("updated_at", Real),
)
Index("ix_runs_model", runs.c.model)

metrics = Table(
    "metrics",
    metadata,
    Column("job", BigInteger, nullable=False),
    Column("name", Text, nullable=False),  # such as train_loss
    Column("step", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("value", Real, nullable=False),
    Column("at", Real, nullable=False),
    PrimaryKeyConstraint("job", "name", "step"),
)

run_logs = Table(
    "run_logs",
    metadata,
    Column("job", BigInteger, nullable=False),
    Column("id", BigInteger, nullable=False),  # in the order of the lines
    Column("at", Real, nullable=False),
    Column("line", Text, nullable=False),
    PrimaryKeyConstraint("job", "id"),
)

# The checkpoints that are kept.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job", BigInteger, nullable=False),
    Column("step", Integer, nullable=False),
    Column("files", Text, nullable=False),  # JSON: name -> URI in the artifact store
    Column("value", Real),  # of what decides which weights are the best
    Column("created_at", Real, nullable=False),
    PrimaryKeyConstraint("job", "step"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("model", Integer, nullable=False),
    Column("alias", Text, nullable=False),
    Column("version", Integer, nullable=False),  # the number, as in digits@3
    PrimaryKeyConstraint("model", "alias"),
    ForeignKeyConstraint(["model", "version"], ["model_versions.model", "model_versions.version"]),
)

# Which version was live when. Only grows.
alias_moves = Table(
    "alias_moves",
    metadata,
    Column("id", Id, primary_key=True),
    Column("model", Integer, ForeignKey("models.id"), nullable=False),
    Column("alias", Text, nullable=False),
    Column("version", Integer),  # NULL: the alias was removed
    Column("rollback", Boolean, nullable=False, server_default=text("false")),  # back to what was live before
    Column("at", Real, nullable=False),
    Column("by", Text, nullable=False, server_default=text("''")),
)
Index("ix_alias_moves_model", alias_moves.c.model, alias_moves.c.alias)

keys = Table(
    "keys",
    metadata,
    Column("tenant", Text, nullable=False),
    Column("model", Integer, nullable=False),
    Column("key", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),  # sha256 of the input as encoded
    Column("job", BigInteger, nullable=False, index=True),
    PrimaryKeyConstraint("tenant", "model", "key"),
)

# The turn announced last: what "now" is to a model and priority.
turns = Table(
    "turns",
    metadata,
    Column("model", Integer, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("present", BigInteger, nullable=False),
    PrimaryKeyConstraint("model", "priority"),
)

# A row is an incarnation: a process that restarts under its old name is another row.
workers = Table(
    "workers",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", Text, nullable=False),
    Column("models", Text),  # JSON list of names, or NULL: all
    Column("stats", Text, nullable=False, server_default=text("'{}'")),  # JSON: rates by model and the like
    Column("started_at", Real, nullable=False),
    Column("beat_at", Real, nullable=False),
    Column("stopped_at", Real),
    Column("ended", Text),  # how it ended, where that is known
)

# Which revision of a version's handler a worker runs. With jobs.worker it tells what computed a result.
served = Table(
    "served",
    metadata,
    Column("worker", BigInteger, nullable=False),
    Column("version", Integer, nullable=False),
    Column("revision", Text, nullable=False),
    Column("at", Real, nullable=False),
    PrimaryKeyConstraint("worker", "version"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", BigInteger, nullable=False),
    Column("expires_at", Real, nullable=False),
)

# One row. A database upgraded by a later release still serves this code if `oldest` is a revision that it knows:
# migrations expand first, and only contract a release later.
compatibility = Table(
    "compatibility",
    metadata,
    Column("oldest", Text, primary_key=True),
)
