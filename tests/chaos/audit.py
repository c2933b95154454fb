"""The audit trail of a chaos run: triggers that write down every move of a job or a chunk, in the move's transaction.

Kept in the test's database only. What was rolled back leaves no line; so the trail says what really happened, in the
order in which it happened to each row. Not here: what the trail may not hold (`checker`).
"""

from __future__ import annotations

from sqlalchemy import text

from torchrelay_storage.database import Database

_SQLITE_NOW = "(julianday('now') - 2440587.5) * 86400.0"

_SQLITE = (
    "CREATE TABLE audit_jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, job INTEGER NOT NULL, "
    "was INTEGER, became INTEGER, failed INTEGER, fails INTEGER, worker INTEGER)",
    "CREATE TABLE audit_chunks (seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, chunk INTEGER NOT NULL, "
    "was INTEGER, became INTEGER, old_token INTEGER, token INTEGER, worker INTEGER)",
    f"""CREATE TRIGGER audit_job_new AFTER INSERT ON jobs BEGIN
        INSERT INTO audit_jobs (at, job, became, fails, worker)
        VALUES ({_SQLITE_NOW}, new.id, new.state, new.failures, new.worker); END""",
    f"""CREATE TRIGGER audit_job_moved AFTER UPDATE OF state, failures, output, finished_at ON jobs
        WHEN new.state <> old.state OR new.failures <> old.failures OR new.output IS NOT old.output
            OR new.finished_at IS NOT old.finished_at BEGIN
        INSERT INTO audit_jobs (at, job, was, became, failed, fails, worker)
        VALUES ({_SQLITE_NOW}, new.id, old.state, new.state, old.failures, new.failures, new.worker); END""",
    f"""CREATE TRIGGER audit_job_gone AFTER DELETE ON jobs BEGIN
        INSERT INTO audit_jobs (at, job, was, failed)
        VALUES ({_SQLITE_NOW}, old.id, old.state, old.failures); END""",
    f"""CREATE TRIGGER audit_chunk_new AFTER INSERT ON chunks BEGIN
        INSERT INTO audit_chunks (at, chunk, became, token, worker)
        VALUES ({_SQLITE_NOW}, new.id, new.state, new.token, new.worker); END""",
    f"""CREATE TRIGGER audit_chunk_moved AFTER UPDATE OF state, token ON chunks
        WHEN new.state <> old.state OR new.token <> old.token BEGIN
        INSERT INTO audit_chunks (at, chunk, was, became, old_token, token, worker)
        VALUES ({_SQLITE_NOW}, new.id, old.state, new.state, old.token, new.token,
                COALESCE(new.worker, old.worker)); END""",
)

_POSTGRESQL = (
    "CREATE TABLE audit_jobs (seq BIGSERIAL PRIMARY KEY, at DOUBLE PRECISION NOT NULL, job BIGINT NOT NULL, "
    "was INTEGER, became INTEGER, failed INTEGER, fails INTEGER, worker BIGINT)",
    "CREATE TABLE audit_chunks (seq BIGSERIAL PRIMARY KEY, at DOUBLE PRECISION NOT NULL, chunk BIGINT NOT NULL, "
    "was INTEGER, became INTEGER, old_token INTEGER, token INTEGER, worker BIGINT)",
    """CREATE FUNCTION audit_job() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE at DOUBLE PRECISION := EXTRACT(EPOCH FROM clock_timestamp());
    BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO audit_jobs (at, job, became, fails, worker)
            VALUES (at, NEW.id, NEW.state, NEW.failures, NEW.worker);
        ELSIF TG_OP = 'DELETE' THEN
            INSERT INTO audit_jobs (at, job, was, failed) VALUES (at, OLD.id, OLD.state, OLD.failures);
        ELSE
            INSERT INTO audit_jobs (at, job, was, became, failed, fails, worker)
            VALUES (at, NEW.id, OLD.state, NEW.state, OLD.failures, NEW.failures, NEW.worker);
        END IF;
        RETURN NULL;
    END $$""",
    """CREATE FUNCTION audit_chunk() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE at DOUBLE PRECISION := EXTRACT(EPOCH FROM clock_timestamp());
    BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO audit_chunks (at, chunk, became, token, worker)
            VALUES (at, NEW.id, NEW.state, NEW.token, NEW.worker);
        ELSE
            INSERT INTO audit_chunks (at, chunk, was, became, old_token, token, worker)
            VALUES (at, NEW.id, OLD.state, NEW.state, OLD.token, NEW.token, COALESCE(NEW.worker, OLD.worker));
        END IF;
        RETURN NULL;
    END $$""",
    "CREATE TRIGGER audit_job_new AFTER INSERT OR DELETE ON jobs FOR EACH ROW EXECUTE FUNCTION audit_job()",
    """CREATE TRIGGER audit_job_moved AFTER UPDATE ON jobs FOR EACH ROW
        WHEN (NEW.state <> OLD.state OR NEW.failures <> OLD.failures OR NEW.output IS DISTINCT FROM OLD.output
            OR NEW.finished_at IS DISTINCT FROM OLD.finished_at)
        EXECUTE FUNCTION audit_job()""",
    "CREATE TRIGGER audit_chunk_new AFTER INSERT ON chunks FOR EACH ROW EXECUTE FUNCTION audit_chunk()",
    """CREATE TRIGGER audit_chunk_moved AFTER UPDATE ON chunks FOR EACH ROW
        WHEN (NEW.state <> OLD.state OR NEW.token <> OLD.token) EXECUTE FUNCTION audit_chunk()""",
)


# What clients write in the transactions that their jobs are part of.
_ORDERS = "CREATE TABLE chaos_orders (op TEXT PRIMARY KEY)"


def keep(database: Database) -> None:
    """Let the database keep the trail from now on."""
    statements = (_ORDERS, *(_SQLITE if database.dialect.name == "sqlite" else _POSTGRESQL))

    def work(connection: object) -> None:
        for statement in statements:
            connection.exec_driver_sql(statement)  # type: ignore[attr-defined]

    database.transact(work)


def mark(database: Database) -> float:
    """Return the time of the clock that the trail is written by."""
    now = _SQLITE_NOW if database.dialect.name == "sqlite" else "EXTRACT(EPOCH FROM clock_timestamp())"
    return float(database.query(lambda connection: connection.execute(text(f"SELECT {now}")).scalar_one()))
