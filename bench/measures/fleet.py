"""(f) Towards 1,000 workers on one PostgreSQL: what a simulation measures, and what is computed from it.

Measured: virtual workers (`virtual_workers`: real stores, no Celery, no device) in two processes, more of them step by
step: which part of their devices' time they work, the processor time that PostgreSQL takes, its transactions, how long
a claim and a finish take. They share this machine's cores with PostgreSQL.

Computed, and marked so: PostgreSQL's processor time as a + b N + c N², fitted to the steps at which nobody waited. A
part grows with the square, for each worker reads the rows of all workers once a second. From it: how many workers the
cores of this machine would serve if PostgreSQL had them to itself, and how many cores 1,000 workers need.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
import virtual_workers
from cases import SOME_ROUNDS, Case
from ground import Ground
from measures.ours import SUBJECT, about, open_relay
from producers import producer, said
from record import Sample, machine
from virtual_workers import BATCH, CHUNK, MODEL, RATE, SECONDS

from torchrelay_storage.registry import Registry

MEASURES = (
    "virtual workers: efficiency", "virtual workers: PostgreSQL's cores", "virtual workers: transactions",
    "virtual workers: served by this machine's cores", "virtual workers: cores for 1,000",
)  # fmt: skip

STEPS = (10, 25, 50, 100, 200)
QUICK_STEPS = (10, 40)
PROCESSES = 2
SETTLE_SECONDS = 1.5
SPARE_SECONDS = 20.0  # of work: each process has a window of its own, and may hold back what the other has run out of
WORKING = 0.95  # of the devices' time, from which on nobody waits
TARGET = 1_000  # workers


def cases(ground: Ground) -> list[Case]:
    """One: its steps belong together."""
    return [Case("virtual workers: efficiency", SUBJECT, "postgresql, simulated", partial(_steps, ground), SOME_ROUNDS)]


def _steps(ground: Ground, round_: int) -> Iterator[Sample]:
    settings = f"{RATE:g} jobs/s each: {SECONDS:g} s a device batch of {BATCH}, chunks of {CHUNK}"
    idle: list[tuple[int, float]] = []
    transactions = 0.0
    for n in QUICK_STEPS if ground.quick else STEPS:
        figures = _step(ground, n, max(2 * ground.seconds, 3.0))
        variant = f"postgresql, {n} simulated"
        more = about(settings, **figures)
        if figures["errors"]:
            raise RuntimeError(str(figures["errors"]))
        yield Sample(MEASURES[0], SUBJECT, variant, round_, figures["efficiency"], "", more)
        yield Sample(MEASURES[1], SUBJECT, variant, round_, figures["postgres_cores"], "cores", more)
        yield Sample(MEASURES[2], SUBJECT, variant, round_, figures["transactions_per_s"], "/s", more)
        if figures["efficiency"] >= WORKING:
            idle.append((n, figures["postgres_cores"]))
            transactions = figures["transactions_per_s"] / n
    if len(idle) < 2:
        raise RuntimeError("the machine is too busy: fewer than two steps at which nobody waited")
    law = fit(idle)
    more = about(settings, computed=True, law=list(law), from_steps=[n for n, _ in idle],
                 transactions_per_s=round(transactions * TARGET), cpus=machine()["cpus"])  # fmt: skip
    yield Sample(MEASURES[3], SUBJECT, "computed", round_, workers_on(law, machine()["cpus"]), "workers", more)
    yield Sample(MEASURES[4], SUBJECT, "computed", round_, cores_for(law, TARGET), "cores", more)


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Return a, b and c, none negative, of cores = a + b N + c N²; c is 0 where there are fewer than three points."""
    n, cores = np.array([p[0] for p in points], float), np.array([p[1] for p in points], float)
    free = [0, 1, 2] if len(points) > 2 else [0, 1]
    while True:
        columns = np.stack([n**power for power in free], axis=1)
        found = np.linalg.lstsq(columns, cores, rcond=None)[0]
        if len(free) == 1 or (found >= 0).all():
            law = np.zeros(3)
            law[free] = np.maximum(found, 0.0)
            return float(law[0]), float(law[1]), float(law[2])
        free.pop(int(np.argmin(found)))


def cores_for(law: tuple[float, float, float], n: float) -> float:
    """Return the cores that n workers take."""
    return law[0] + law[1] * n + law[2] * n * n


def workers_on(law: tuple[float, float, float], cores: float) -> float:
    """Return how many workers so many cores serve."""
    low, high = 0.0, 1e6
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (middle, high) if cores_for(law, middle) <= cores else (low, middle)
    return low


def _step(ground: Ground, n: int, seconds: float) -> dict[str, Any]:
    with ground.fresh("postgresql") as settings, ExitStack() as stack:
        with open_relay(settings) as relay:
            registry = Registry(relay._core.db)
            registry.register(MODEL, handler="noop", chunk_size=CHUNK)
            registry.pause(MODEL)  # so that nothing is announced to Redis
            jobs = int(n * RATE * (seconds + SETTLE_SECONDS + SPARE_SECONDS))
            relay.submit_batch(MODEL, ({"x": i} for i in range(jobs)))
            registry.resume(MODEL)
        url = settings.database_url
        shares = [n // PROCESSES + (i < n % PROCESSES) for i in range(PROCESSES)]
        started = [
            stack.enter_context(producer(settings, url, "--workers", str(share), script=Path(virtual_workers.__file__)))
            for share in shares
        ]
        for process in started:
            said(process)
        time.sleep(SETTLE_SECONDS)
        with psycopg.connect(url, autocommit=True) as watcher:
            before = _look(ground, watcher, [process.pid for process in started])
            time.sleep(seconds)
            after = _look(ground, watcher, [process.pid for process in started])
        lasted = after["at"] - before["at"]
        for process in started:
            assert process.stdin is not None
            process.stdin.close()
        told = [said(process) for process in started]
    return {
        "workers": n,
        "efficiency": (after["jobs"] - before["jobs"]) / lasted / (n * RATE),
        "postgres_cores": (after["postgres"] - before["postgres"]) / lasted,
        "client_cores": (after["clients"] - before["clients"]) / lasted,
        "transactions_per_s": (after["transactions"] - before["transactions"]) / lasted,
        "errors": [error for one in told for error in one["errors"]],
        **{name: max(one[name] for one in told) for name in told[0] if name != "errors"},
    }


def _look(ground: Ground, watcher: psycopg.Connection[Any], clients: Sequence[int]) -> dict[str, float]:
    server = psutil.Process(ground.postgres.pid)
    jobs = watcher.execute("SELECT coalesce(sum(succeeded), 0) FROM chunks").fetchone()
    statement = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
    transactions = watcher.execute(statement).fetchone()
    assert jobs is not None
    assert transactions is not None
    return {
        "at": time.monotonic(),
        "jobs": float(jobs[0]),
        "transactions": float(transactions[0]),
        "postgres": sum(_processor(one) for one in (server, *server.children(recursive=True))),
        "clients": sum(_processor(psutil.Process(pid)) for pid in clients),
    }


def _processor(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
