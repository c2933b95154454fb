"""Many workers in one process, as the database sees them: real stores and announcers, no Celery, no torch, no device.

python bench/virtual_workers.py DATABASE --workers N

Each claims chunks, sleeps for each device batch and records it, announces what follows, beats, asks for the lease, and
looks at its models and at what it holds, as often as a worker does. A device goes on while its last batch is recorded:
it is idle only where the database is late by more than a device batch. Messages go through a list in this process in
the place of Redis. Prints {"ready": true}, works until its input ends, then prints what it has seen as JSON.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from torchrelay.announcer import Announcer
from torchrelay.broker import Broker
from torchrelay.settings import Settings
from torchrelay_storage.chunk_store import ChunkStore, Claimed
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.outcomes import Successes
from torchrelay_storage.registry import Registry

MODEL = "virtual"
BATCH, SECONDS = 16, 0.25  # jobs of a device batch, and how long it takes
CHUNK = 64  # jobs: a second of work, as a worker would have it
RATE = BATCH / SECONDS  # jobs/s of one worker at best
OUTPUT = b'{"y":1}'
CONNECTIONS = 24  # of a process, shared by its workers as behind a pooler

# How often a worker does the rest; see supervisor.py, leader.py, pipeline.py and warden.py.
DUTIES = {"beat": 2.0, "lease": 3.0, "models": 2.0, "held": 0.5}


class Messages:
    """What an announcer needs of a Broker: a list in memory."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.chunks: queue.SimpleQueue[int] = queue.SimpleQueue()

    def depths(self, _: str) -> dict[int, int]:
        """As `Broker.depths`."""
        return {5: self.chunks.qsize()}

    def send(self, chunks: Iterable[tuple[str, int, int]]) -> int:
        """As `Broker.send`."""
        sent = [chunk for _, _, chunk in chunks]
        for chunk in sent:
            self.chunks.put(chunk)
        return len(sent)


@dataclass(slots=True)
class Seen:
    """What happened, in seconds. Appended to by many threads, which a list takes."""

    claims: list[float] = field(default_factory=list)
    finishes: list[float] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)  # from the one before
    errors: list[str] = field(default_factory=list)


class Worker:
    """One virtual worker: a thread that computes and a thread that keeps it alive."""

    def __init__(self, name: str, database: Database, messages: Messages, seen: Seen, closing: threading.Event) -> None:
        self._chunks, self._jobs = ChunkStore(database), JobStore(database)
        self._fleet, self._registry = Fleet(database), Registry(database)
        self._announcer = Announcer(database, cast(Broker, messages))
        self._messages, self._seen, self._closing = messages, seen, closing
        self.id = self._fleet.register(name, host="here", pid=1, device="virtual").id
        self.threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in (self._compute, self._keep)
        ]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._seen.errors.append(f"{type(error).__name__}: {error}")
            self._closing.set()

    def _compute(self) -> None:
        ends = time.monotonic()  # when the device is free
        while not self._closing.is_set():
            try:
                chunk = self._messages.chunks.get(timeout=0.25)
            except queue.Empty:
                continue
            began = time.monotonic()
            claimed = self._chunks.claim([chunk], self.id)
            self._seen.claims.append(time.monotonic() - began)
            self._announcer.announce(MODEL)
            for one in claimed:
                ends = self._run(one, ends)

    def _run(self, claimed: Claimed, ends: float) -> float:
        for start in range(0, len(claimed.jobs), BATCH):
            ends = max(ends, time.monotonic() - SECONDS) + SECONDS
            if self._closing.wait(max(0.0, ends - time.monotonic())):
                return ends
            jobs = [job.id for job in claimed.jobs[start : start + BATCH]]
            done = Successes(claimed.chunk, claimed.token, jobs, [OUTPUT] * len(jobs))
            began = time.monotonic()
            self._jobs.finish([], self.id, [done])
            self._seen.finishes.append(time.monotonic() - began)
        return ends

    def _keep(self) -> None:
        duties = {
            "beat": lambda: self._fleet.beat(self.id, {"rates": {MODEL: RATE / CHUNK}}),
            "lease": lambda: self._fleet.acquire("maintenance", self.id, 10.0),
            "models": self._registry.versions,
            "held": lambda: self._chunks.held(self.id),
        }
        due = dict.fromkeys(duties, time.monotonic())
        beaten = time.monotonic()
        while not self._closing.wait(max(0.0, min(due.values()) - time.monotonic())):
            name = min(due, key=lambda one: due[one])
            cast(Callable[[], object], duties[name])()
            due[name] = max(due[name] + DUTIES[name], time.monotonic())
            if name == "beat":
                self._seen.beats.append(time.monotonic() - beaten)
                beaten = time.monotonic()


def lead(announcer: Announcer, closing: threading.Event) -> None:
    """Announce once a second, as the maintenance leader does, whoever else does."""
    announcer.announce(MODEL)
    while not closing.wait(1.0):
        announcer.announce(MODEL)


def percentile(seconds: list[float], part: int) -> float:
    """Return a percentile in milliseconds; 0 where there is nothing."""
    return statistics.quantiles(seconds, n=100, method="inclusive")[part - 1] * 1000 if len(seconds) > 1 else 0.0


def run(url: str, n: int) -> dict[str, Any]:
    """Let n workers work until the input ends."""
    database = Database(url, pool_size=CONNECTIONS)
    settings = Settings.load(database=url)
    closing, seen = threading.Event(), Seen()
    messages = Messages(settings)
    workers = [Worker(f"virtual-{i}", database, messages, seen, closing) for i in range(n)]
    leader = threading.Thread(target=lead, args=(Announcer(database, cast(Broker, messages)), closing), daemon=True)
    leader.start()
    for i, thread in enumerate(thread for worker in workers for thread in worker.threads):
        thread.start()
        time.sleep(SECONDS / (4 * n) if i % 2 else 0.0)  # real workers do not work in step either
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.read()
    closing.set()
    for worker in workers:
        for thread in worker.threads:
            thread.join(5.0)
    with suppress(Exception):
        database.dispose()
    return {
        "claim_p50_ms": percentile(seen.claims, 50),
        "claim_p99_ms": percentile(seen.claims, 99),
        "finish_p50_ms": percentile(seen.finishes, 50),
        "finish_p99_ms": percentile(seen.finishes, 99),
        "longest_beat_s": max(seen.beats, default=0.0),
        "errors": seen.errors[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database")
    parser.add_argument("--workers", type=int, default=10)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.database, arguments.workers)), flush=True)


if __name__ == "__main__":
    main()
