"""Training runs: their progress, metrics, logs and checkpoints; versions with a lineage; aliases. Expands only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from torchrelay_storage.postgresql import Postgresql
from torchrelay_storage.sqlite import Sqlite

revision = "0002"
down_revision = "0001"
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
    COALESCE(r.model, m.name) AS model, CASE WHEN m.training THEN r.version ELSE v.version END AS version,
    {state} AS state, c.priority AS priority, j.failures AS failures,
    c.max_attempts AS max_attempts, c.tenant AS tenant, k.key AS key, w.name AS worker,
    c.created_at AS created_at, c.not_before AS not_before, c.expires_at AS expires_at, j.finished_at AS finished_at,
    {json_text.format("j.input")} AS input, {json_text.format("j.output")} AS output,
    {json_text.format("j.error")} AS error, {json_text.format("j.metadata")} AS metadata,
    CASE WHEN m.training THEN 'training' ELSE 'inference' END AS kind
FROM jobs j
JOIN chunks c ON c.id = j.chunk
JOIN model_versions v ON v.id = c.version
JOIN models m ON m.id = c.model
LEFT JOIN runs r ON r.job = j.id
LEFT JOIN keys k ON k.job = j.id
LEFT JOIN workers w ON w.id = COALESCE(j.worker, c.worker)"""


def upgrade() -> None:
    false, none, empty = sa.text("false"), sa.text("''"), sa.text("'{}'")
    zero = sa.text("0")
    op.add_column("models", sa.Column("training", sa.Boolean(), server_default=false, nullable=False))
    op.add_column("model_versions", sa.Column("metrics", sa.Text(), server_default=empty, nullable=False))
    op.add_column("model_versions", sa.Column("lineage", sa.Text(), server_default=empty, nullable=False))
    op.add_column("model_versions", sa.Column("run", sa.BigInteger(), nullable=True))
    op.create_table(
        "runs",
        sa.Column("job", Id, autoincrement=False, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("phase", sa.Text(), server_default=none, nullable=False),
        sa.Column("step", sa.Integer(), server_default=zero, nullable=False),
        sa.Column("steps", sa.Integer(), server_default=zero, nullable=False),
        sa.Column("epoch", sa.Integer(), server_default=zero, nullable=False),
        sa.Column("epochs", sa.Integer(), server_default=zero, nullable=False),
        sa.Column("examples_per_s", Real, nullable=True),
        sa.Column("eta", Real, nullable=True),
        sa.Column("paused", sa.Boolean(), server_default=false, nullable=False),
        sa.Column("deaths", sa.SmallInteger(), server_default=zero, nullable=False),
        sa.Column("best", Real, nullable=True),
        sa.Column("best_step", sa.Integer(), nullable=True),
        sa.Column("split", sa.Text(), server_default=empty, nullable=False),
        sa.Column("dataset_sha256", sa.Text(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("created_at", Real, nullable=False),
        sa.Column("started_at", Real, nullable=True),
        sa.Column("updated_at", Real, nullable=True),
        sa.PrimaryKeyConstraint("job"),
    )
    op.create_index("ix_runs_model", "runs", ["model"], unique=False)
    op.create_table(
        "metrics",
        sa.Column("job", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("value", Real, nullable=False),
        sa.Column("at", Real, nullable=False),
        sa.PrimaryKeyConstraint("job", "name", "step"),
    )
    op.create_table(
        "run_logs",
        sa.Column("job", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("at", Real, nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("job", "id"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("job", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("files", sa.Text(), nullable=False),
        sa.Column("value", Real, nullable=True),
        sa.Column("created_at", Real, nullable=False),
        sa.PrimaryKeyConstraint("job", "step"),
    )
    op.create_table(
        "aliases",
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("model", "alias"),
        sa.ForeignKeyConstraint(["model", "version"], ["model_versions.model", "model_versions.version"]),
    )
    op.create_table(
        "alias_moves",
        sa.Column("id", Id, nullable=False),
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("rollback", sa.Boolean(), server_default=false, nullable=False),
        sa.Column("at", Real, nullable=False),
        sa.Column("by", sa.Text(), server_default=none, nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_alias_moves_model", "alias_moves", ["model", "alias"], unique=False)
    bind = op.get_bind()
    if bind.dialect.name == "sqlite":
        bind.exec_driver_sql("DROP VIEW job_status")
        bind.exec_driver_sql("CREATE VIEW job_status AS " + job_status(Sqlite.json_text))
    else:  # replaced in its place, so that views which an operator has built on it stay
        bind.exec_driver_sql("CREATE OR REPLACE VIEW job_status AS " + job_status(Postgresql.json_text))
