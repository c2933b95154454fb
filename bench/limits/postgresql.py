"""The limit on PostgreSQL: what the bare driver needs for the same jobs, and nothing else.

The same tables and indexes (`torchrelay_storage.schema`), the same rows, a JSON encoded and decoded a job, the same
hooks of the model, fsync on. Submit: one COPY of the chunks and one of the jobs, in one transaction. Drain, in one
process and one thread, chunk by chunk: the chunk is claimed and committed; its jobs are read; the hooks run; one UPDATE
from arrays, the chunk's end, committed. No Redis, no fairness, no tokens checked, nobody waits, nothing is retried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import psycopg

CHUNK = 1_000  # jobs
FIRST, BATCH = 120_177_233_005_545_069, 120_177_233_005_540_000  # ids as large as those that we draw

Run = Callable[[list[Any]], list[Any]]  # the model's hooks: decoded inputs of a chunk -> what is encoded as outputs


@dataclass(frozen=True, slots=True)
class Limit:
    """Rates of one run of the loop."""

    submitted_per_s: float
    drained_per_s: float
    jobs: int


def measure(url: str, inputs: Iterable[object], run: Run, *, chunk: int = CHUNK) -> Limit:
    """Submit these inputs to empty tables, then drain them.

    Args:
        url: of a database with our tables.
        inputs: values that orjson writes; encoded within the time that counts.
    """
    with psycopg.connect(url) as connection:
        began = time.perf_counter()
        jobs = _submit(connection, inputs, chunk)
        submitted = time.perf_counter()
        drained = _drain(connection, run)
        ended = time.perf_counter()
    assert drained == jobs
    return Limit(jobs / (submitted - began), jobs / (ended - submitted), jobs)


def _submit(connection: psycopg.Connection[Any], inputs: Iterable[object], size: int) -> int:
    dumps = orjson.dumps
    jobs = 0
    with connection.cursor() as cursor:
        with cursor.copy(_COPY_JOBS) as copy:
            copy.set_types(["int8", "int8", "int8", "bytea"])
            for job, value in enumerate(inputs):
                copy.write_row((FIRST + job, FIRST + job - job % size, BATCH, dumps(value)))
                jobs = job + 1
        with cursor.copy(_COPY_CHUNKS) as copy:
            for row in chunks(jobs, size, time.time()):
                copy.write_row(row)
    connection.commit()
    return jobs


def chunks(jobs: int, size: int, now: float) -> Iterator[tuple[object, ...]]:
    """Yield the rows of the chunks of so many jobs."""
    for turn, start in enumerate(range(0, jobs, size)):
        n = min(size, jobs - start)
        yield FIRST + start, 1, 1, BATCH, BATCH, 5, turn, FIRST + start, FIRST + start + n - 1, n, 3, now


def _drain(connection: psycopg.Connection[Any], run: Run) -> int:
    loads, dumps = orjson.loads, orjson.dumps
    done = 0
    with connection.cursor(binary=True) as cursor:
        while True:
            claimed = cursor.execute(_CLAIM, {"now": time.time()}).fetchone()
            connection.commit()
            if claimed is None:
                return done
            chunk, first, last = claimed
            rows = cursor.execute(_READ, (first, last)).fetchall()
            outputs = run([loads(data) for _, data in rows])
            ids, now = [job for job, _ in rows], time.time()
            cursor.execute(_FINISH, (now, ids, [dumps(output) for output in outputs], first, last))
            cursor.execute(_END, (now, chunk))
            connection.commit()
            done += len(rows)


_COPY_JOBS = "COPY jobs (id, chunk, batch, input) FROM STDIN (FORMAT BINARY)"
_COPY_CHUNKS = """COPY chunks (id, model, version, batch, flow, priority, turn, first_id, last_id, size, max_attempts,
    created_at) FROM STDIN"""
_CLAIM = """
    UPDATE chunks SET state = 2, token = token + 1, worker = 1, claimed_at = %(now)s
    WHERE id = (SELECT id FROM chunks WHERE state = 0 AND due AND model = 1 ORDER BY priority DESC, turn, id LIMIT 1
                FOR UPDATE SKIP LOCKED)
    RETURNING id, first_id, last_id
"""
_READ = "SELECT id, input FROM jobs WHERE id BETWEEN %s AND %s AND state = 0"
_FINISH = """
    UPDATE jobs SET state = 1, output = u.output, worker = 1, finished_at = %s
    FROM unnest(%b::bigint[], %b::bytea[]) AS u(id, output)
    WHERE jobs.id = u.id AND jobs.id BETWEEN %s AND %s AND jobs.state = 0
"""
_END = "UPDATE chunks SET state = 3, succeeded = size, ended_at = %s WHERE id = %s"
