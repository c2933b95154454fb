"""Attempts, retry policies, limits of queues, how workers ended, and which handler served a job. Expands only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from torchrelay_storage.postgresql import Postgresql
from torchrelay_storage.sqlite import Sqlite

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

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
    COALESCE(r.model, m.name) AS model, CASE WHEN m.training THEN r.version ELSE v.version END AS version,
    {state} AS state, c.priority AS priority, j.failures AS failures,
    c.max_attempts AS max_attempts, c.tenant AS tenant, k.key AS key, w.name AS worker,
    c.created_at AS created_at, c.not_before AS not_before, c.expires_at AS expires_at, j.finished_at AS finished_at,
    {json_text.format("j.input")} AS input, {json_text.format("j.output")} AS output,
    {json_text.format("j.error")} AS error, {json_text.format("j.metadata")} AS metadata,
    CASE WHEN m.training THEN 'training' ELSE 'inference' END AS kind,
    s.revision AS handler_revision
FROM jobs j
JOIN chunks c ON c.id = j.chunk
JOIN model_versions v ON v.id = c.version
JOIN models m ON m.id = c.model
LEFT JOIN runs r ON r.job = j.id
LEFT JOIN keys k ON k.job = j.id
LEFT JOIN workers w ON w.id = COALESCE(j.worker, c.worker)
LEFT JOIN served s ON s.worker = j.worker AND s.version = c.version"""


def upgrade() -> None:
    op.add_column("models", sa.Column("max_queued", sa.Integer(), nullable=True))
    op.add_column("chunks", sa.Column("backoff", sa.Text(), nullable=True))
    op.add_column("chunks", sa.Column("alone", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("workers", sa.Column("ended", sa.Text(), nullable=True))
    op.create_table(
        "attempts",
        sa.Column("job", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.BigInteger(), nullable=True),
        sa.Column("started_at", Real, nullable=True),
        sa.Column("ended_at", Real, nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("error", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("job", "id"),
    )
    op.create_table(
        "served",
        sa.Column("worker", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("at", Real, nullable=False),
        sa.PrimaryKeyConstraint("worker", "version"),
    )
    bind = op.get_bind()
    if bind.dialect.name == "sqlite":
        bind.exec_driver_sql("DROP VIEW job_status")
        bind.exec_driver_sql("CREATE VIEW job_status AS " + job_status(Sqlite.json_text))
    else:  # replaced in its place, so that views which an operator has built on it stay
        bind.exec_driver_sql("CREATE OR REPLACE VIEW job_status AS " + job_status(Postgresql.json_text))
