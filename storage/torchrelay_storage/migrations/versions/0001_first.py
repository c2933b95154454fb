"""The first schema: jobs, chunks, batches, models, workers, leases, and the view job_status."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from torchrelay_storage.postgresql import Postgresql
from torchrelay_storage.sqlite import Sqlite

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Real: sa.Double[float] = sa.Double()


def shown_id(kind: str, column: str) -> str:
    """The SQL for an id as `ids.show` shows it."""
    digits = (f"substr('0123456789abcdefghjkmnpqrstvwxyz', CAST((({column} >> {5 * i}) & 31) AS INTEGER) + 1, 1)"
              for i in reversed(range(13)))  # fmt: skip
    return f"'{kind}_' || " + " || ".join(digits)


def job_status(json_text: str) -> str:
    """Return the view's SELECT. `json_text` is the dialect's pattern to read a stored value as JSON text."""
    state = """CASE j.state
        WHEN 1 THEN 'succeeded' WHEN 2 THEN 'failed'
        WHEN 3 THEN 'cancelled' WHEN 4 THEN 'expired'
        ELSE CASE WHEN c.state = 2 THEN 'running' WHEN c.retrying THEN 'retrying'
                  WHEN c.due THEN 'queued' ELSE 'scheduled' END
    END"""
    return f"""SELECT j.id AS id, {shown_id("j", "j.id")} AS job,
    CASE WHEN j.batch IS NULL THEN NULL ELSE {shown_id("b", "j.batch")} END AS batch,
    m.name AS model, v.version AS version, {state} AS state, c.priority AS priority, j.failures AS failures,
    c.max_attempts AS max_attempts, c.tenant AS tenant, k.key AS key, w.name AS worker,
    c.created_at AS created_at, c.not_before AS not_before, c.expires_at AS expires_at, j.finished_at AS finished_at,
    {json_text.format("j.input")} AS input, {json_text.format("j.output")} AS output,
    {json_text.format("j.error")} AS error, {json_text.format("j.metadata")} AS metadata
FROM jobs j
JOIN chunks c ON c.id = j.chunk
JOIN model_versions v ON v.id = c.version
JOIN models m ON m.id = c.model
LEFT JOIN keys k ON k.job = j.id
LEFT JOIN workers w ON w.id = COALESCE(j.worker, c.worker)"""


def upgrade() -> None:
    op.create_table(
        "chunks",
        sa.Column("id", Id, autoincrement=False, nullable=False),
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("batch", sa.BigInteger(), nullable=True),
        sa.Column("tenant", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("flow", sa.BigInteger(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.Column("first_id", sa.BigInteger(), nullable=False),
        sa.Column("last_id", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("succeeded", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("failed", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("cancelled", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("expired", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("due", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("suspect", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("retrying", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("token", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("worker", sa.BigInteger(), nullable=True),
        sa.Column("timeout", Real, nullable=True),
        sa.Column("max_attempts", sa.SmallInteger(), nullable=False),
        sa.Column("not_before", Real, nullable=True),
        sa.Column("expires_at", Real, nullable=True),
        sa.Column("created_at", Real, nullable=False),
        sa.Column("announced_at", Real, nullable=True),
        sa.Column("claimed_at", Real, nullable=True),
        sa.Column("ended_at", Real, nullable=True),
        sa.CheckConstraint("first_id <= last_id", name="ck_chunks_range"),
        sa.PrimaryKeyConstraint("id"),
        postgresql_with={"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.02"},
    )
    op.create_index(
        "ix_chunks_announced",
        "chunks",
        ["model", "announced_at"],
        unique=False,
        postgresql_where=sa.text("state = 1"),
        sqlite_where=sa.text("state = 1"),
    )
    op.create_index("ix_chunks_batch", "chunks", ["batch"], unique=False)
    op.create_index(
        "ix_chunks_cancelled",
        "chunks",
        ["last_id"],
        unique=False,
        postgresql_where=sa.text("cancelled > 0"),
        sqlite_where=sa.text("cancelled > 0"),
    )
    op.create_index(
        "ix_chunks_claimed",
        "chunks",
        ["worker"],
        unique=False,
        postgresql_where=sa.text("state = 2"),
        sqlite_where=sa.text("state = 2"),
    )
    op.create_index(
        "ix_chunks_ended",
        "chunks",
        ["ended_at"],
        unique=False,
        postgresql_where=sa.text("state = 3"),
        sqlite_where=sa.text("state = 3"),
    )
    op.create_index(
        "ix_chunks_expired",
        "chunks",
        ["last_id"],
        unique=False,
        postgresql_where=sa.text("expired > 0"),
        sqlite_where=sa.text("expired > 0"),
    )
    op.create_index(
        "ix_chunks_expires",
        "chunks",
        ["expires_at"],
        unique=False,
        postgresql_where=sa.text("state < 2 AND expires_at IS NOT NULL"),
        sqlite_where=sa.text("state < 2 AND expires_at IS NOT NULL"),
    )
    op.create_index(
        "ix_chunks_failed",
        "chunks",
        ["last_id"],
        unique=False,
        postgresql_where=sa.text("failed > 0"),
        sqlite_where=sa.text("failed > 0"),
    )
    op.create_index(
        "ix_chunks_flow",
        "chunks",
        ["model", "priority", "flow", "turn"],
        unique=False,
        postgresql_where=sa.text("state = 0"),
        sqlite_where=sa.text("state = 0"),
    )
    op.create_index("ix_chunks_last", "chunks", ["last_id"], unique=False)
    op.create_index(
        "ix_chunks_next",
        "chunks",
        ["model", sa.text("priority DESC"), "turn", "id"],
        unique=False,
        postgresql_where=sa.text("state = 0 AND due"),
        sqlite_where=sa.text("state = 0 AND due"),
    )
    op.create_index(
        "ix_chunks_not_before",
        "chunks",
        ["not_before"],
        unique=False,
        postgresql_where=sa.text("state = 0 AND NOT due"),
        sqlite_where=sa.text("state = 0 AND NOT due"),
    )
    op.create_index(
        "ix_chunks_open",
        "chunks",
        ["last_id"],
        unique=False,
        postgresql_where=sa.text("state < 3"),
        sqlite_where=sa.text("state < 3"),
    )
    op.create_table("compatibility", sa.Column("oldest", sa.Text(), nullable=False), sa.PrimaryKeyConstraint("oldest"))
    op.create_table(
        "jobs",
        sa.Column("id", Id, autoincrement=False, nullable=False),
        sa.Column("chunk", sa.BigInteger(), nullable=False),
        sa.Column("batch", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("input", sa.LargeBinary(), nullable=False),
        sa.Column("output", sa.LargeBinary(), nullable=True),
        sa.Column("error", sa.LargeBinary(), nullable=True),
        sa.Column("metadata", sa.LargeBinary(), nullable=True),
        sa.Column("worker", sa.BigInteger(), nullable=True),
        sa.Column("finished_at", Real, nullable=True),
        sa.PrimaryKeyConstraint("id"),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_table(
        "keys",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("job", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "model", "key"),
    )
    op.create_index(op.f("ix_keys_job"), "keys", ["job"], unique=False)
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", Real, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", Real, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "turns",
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("present", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", "priority"),
    )
    op.create_table(
        "workers",
        sa.Column("id", Id, autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("models", sa.Text(), nullable=True),
        sa.Column("stats", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("started_at", Real, nullable=False),
        sa.Column("beat_at", Real, nullable=False),
        sa.Column("stopped_at", Real, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "model_versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("handler", sa.Text(), nullable=False),
        sa.Column("weights", sa.Text(), nullable=True),
        sa.Column("sha256", sa.Text(), nullable=True),
        sa.Column("config", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("chunk_size", sa.Integer(), nullable=False),
        sa.Column("created_at", Real, nullable=False),
        sa.ForeignKeyConstraint(
            ["model"],
            ["models.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("model", "version"),
    )
    op.create_table(
        "batches",
        sa.Column("id", Id, autoincrement=False, nullable=False),
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("closed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("metadata", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("created_at", Real, nullable=False),
        sa.ForeignKeyConstraint(
            ["model"],
            ["models.id"],
        ),
        sa.ForeignKeyConstraint(
            ["version"],
            ["model_versions.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_batches_key",
        "batches",
        ["tenant", "model", "key"],
        unique=True,
        postgresql_where=sa.text("key IS NOT NULL"),
        sqlite_where=sa.text("key IS NOT NULL"),
    )
    op.execute("INSERT INTO compatibility (oldest) VALUES ('0001')")
    json_text = (Sqlite if op.get_bind().dialect.name == "sqlite" else Postgresql).json_text
    op.get_bind().exec_driver_sql("CREATE VIEW job_status AS " + job_status(json_text))
