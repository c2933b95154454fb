"""The limit on SQLite: as `limits.postgresql`, with `executemany` for both the submit and the ends.

The journal as torchrelay has it: WAL, `synchronous` NORMAL. One connection, one thread.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing

import orjson
from limits.postgresql import BATCH, CHUNK, FIRST, Limit, Run, chunks


def measure(path: str, inputs: Iterable[object], run: Run, *, chunk: int = CHUNK) -> Limit:
    """Submit these inputs to the empty tables of this file, then drain them."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "cache_size=-65536", "temp_store=MEMORY"):
            connection.execute(f"PRAGMA {pragma}").close()
        began = time.perf_counter()
        jobs = _submit(connection, inputs, chunk)
        submitted = time.perf_counter()
        drained = _drain(connection, run)
        ended = time.perf_counter()
    assert drained == jobs
    return Limit(jobs / (submitted - began), jobs / (ended - submitted), jobs)


def _submit(connection: sqlite3.Connection, inputs: Iterable[object], size: int) -> int:
    dumps = orjson.dumps
    rows = ((FIRST + job, FIRST + job - job % size, BATCH, dumps(value)) for job, value in enumerate(inputs))
    connection.execute("BEGIN IMMEDIATE")
    jobs = connection.executemany("INSERT INTO jobs (id, chunk, batch, input) VALUES (?, ?, ?, ?)", rows).rowcount
    connection.executemany(_CHUNK, chunks(jobs, size, time.time()))
    connection.execute("COMMIT")
    return jobs


def _drain(connection: sqlite3.Connection, run: Run) -> int:
    loads, dumps = orjson.loads, orjson.dumps
    done = 0
    while True:
        claimed = connection.execute(_CLAIM, (time.time(),)).fetchall()
        if not claimed:
            return done
        chunk, first, last = claimed[0]
        rows = connection.execute(_READ, (first, last)).fetchall()
        outputs = run([loads(data) for _, data in rows])
        now = time.time()
        ends = [(dumps(output), now, job) for (job, _), output in zip(rows, outputs, strict=True)]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(_FINISH, ends)
        connection.execute(_END, (now, chunk))
        connection.execute("COMMIT")
        done += len(rows)


_CHUNK = """INSERT INTO chunks (id, model, version, batch, flow, priority, turn, first_id, last_id, size, max_attempts,
    created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_CLAIM = """
    UPDATE chunks SET state = 2, token = token + 1, worker = 1, claimed_at = ?
    WHERE id = (SELECT id FROM chunks WHERE state = 0 AND due AND model = 1 ORDER BY priority DESC, turn, id LIMIT 1)
    RETURNING id, first_id, last_id
"""
_READ = "SELECT id, input FROM jobs WHERE id BETWEEN ? AND ? AND state = 0"
_FINISH = "UPDATE jobs SET state = 1, output = ?, worker = 1, finished_at = ? WHERE id = ? AND state = 0"
_END = "UPDATE chunks SET state = 3, succeeded = size, ended_at = ? WHERE id = ?"
