"""What the clients of a chaos run wrote down: what they were about to do, and what they know of how it went.

A journal is a file of JSON lines, each written in one write before or after the step that it tells of; so it survives
the client's own SIGKILL. Not here: whether the database agrees (`checker`).
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUCCEEDED, FAILED, CANCELLED, EXPIRED = "succeeded", "failed", "cancelled", "expired"

# What a job's input may ask of the model, and the error that it must then end with.
ERRORS = {"raise": "ValueError", "invalid": "InvalidInput", "segfault": "WorkerLost", "exit": "WorkerLost",
          "hang": "Timeout"}  # fmt: skip


def answer(n: int) -> int:
    """Return what the model must make of an input: anybody can compute it anew."""
    return (n * 2_654_435_761 + 12_345) % 2_147_483_647


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known of one job from outside the database.

    Attributes:
        n: the unique number in its input.
        op: the operation that submitted it.
        exists: None: nobody knows, because the client died or lost its connection before it was told.
        ends: the states that it may end in.
        error: the type of error, where it fails.
        retries: how often it was asked to run again, at most.
    """

    n: int
    op: str
    exists: bool | None
    ends: frozenset[str]
    error: str | None = None
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A state or a result that a client was shown."""

    n: int
    state: str
    value: Any = None


@dataclass(frozen=True, slots=True)
class History:
    """All journals together.

    Attributes:
        atomic: operations whose jobs exist all or none.
        batches: operation -> number of jobs of a batch that was stored whole.
    """

    jobs: Mapping[int, Expected]
    seen: tuple[Seen, ...] = ()
    atomic: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    batches: Mapping[str, int] = field(default_factory=dict)


class Journal:
    """One client's journal, appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, **fields: Any) -> None:
        """Write a line: all of it or nothing."""
        os.write(self._file, json.dumps({**fields, "at": time.time()}).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what a journal holds."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)


def read(paths: Iterable[Path]) -> History:
    """Put the journals together."""
    asked: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, str] = {}
    stored: set[int] = set()  # of operations of which only a part is known
    cancelled: set[int] = set()
    retried: dict[int, int] = defaultdict(int)
    seen: list[Seen] = []
    for path in paths:
        for line in lines(path):
            if "asked" in line:
                asked[line["asked"]] = line
            elif "outcome" in line:
                outcomes[line["op"]] = line["outcome"]
                stored.update(line.get("stored", ()))
            elif "cancel" in line:
                cancelled.update(line["cancel"])
            elif "retry" in line:
                for n in line["retry"]:
                    retried[n] += 1
            elif "seen" in line:
                seen.append(Seen(line["n"], line["seen"], line.get("value")))
    jobs: dict[int, Expected] = {}
    for op, line in asked.items():
        outcome = outcomes.get(op, "unknown")
        exists = {"committed": True, "rolled back": False, "refused": False}.get(outcome)
        for n in line["jobs"]:
            do = line.get("do", {}).get(str(n), "")
            ends = {FAILED if do in ERRORS else SUCCEEDED}
            if line.get("expires"):
                ends.add(EXPIRED)
            if n in cancelled:
                ends.add(CANCELLED)
            jobs[n] = Expected(n, op, True if n in stored else exists, frozenset(ends), ERRORS.get(do), retried[n])
    return History(
        jobs,
        tuple(seen),
        {op: tuple(line["jobs"]) for op, line in asked.items() if line["what"] == "session"},
        {op: len(line["jobs"]) for op, line in asked.items()
         if line["what"] == "batch" and outcomes.get(op) == "committed"},
    )  # fmt: skip
