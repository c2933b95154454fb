"""The independent checker: reads the database with plain SQL after a run, and says what it found wrong, with counts.

It shares no code with the product: no store, no codec, no table of states. What ought to be there comes from the
clients' journals, what happened from the audit trail.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from chaos.journal import FAILED, SUCCEEDED, Expected, History, answer

OPEN = "open"
STATES = {0: OPEN, 1: SUCCEEDED, 2: FAILED, 3: "cancelled", 4: "expired"}
WAITING, ANNOUNCED, CLAIMED, DONE = range(4)

# From a state to a state, as the design says; a chunk that is done stays so: a retry makes another one.
CHUNK_MOVES = {
    (None, WAITING), (None, ANNOUNCED), (WAITING, ANNOUNCED), (WAITING, CLAIMED), (ANNOUNCED, CLAIMED),
    (ANNOUNCED, WAITING), (CLAIMED, WAITING), (WAITING, DONE), (ANNOUNCED, DONE), (CLAIMED, DONE),
}  # fmt: skip
JOB_MOVES = {(None, OPEN), (OPEN, OPEN), *((OPEN, end) for end in STATES.values() if end != OPEN)}
RETRIES = {(end, OPEN) for end in ("failed", "cancelled", "expired")}

# What a check is called, and what it finds.
CHECKS = {
    "lost": "committed jobs that are not there",
    "phantom": "jobs that were rolled back or refused, or that nobody submitted, and are there",
    "torn": "transactions of which a part is there",
    "open": "jobs in no terminal state",
    "wrong": "jobs that ended in another way or with another result than they must",
    "twice": "jobs or results recorded more than once",
    "counts": "chunks or batches whose counts are not those of their rows",
    "backwards": "moves that no state may make",
    "attempts": "jobs that failed more often than allowed, or whose history says otherwise",
    "stuck": "chunks that are not done",
    "messages": "queues in Redis that hold messages",
    "seen": "answers to clients that the database does not bear out",
    "training": "training runs that did not end in the weights of an undisturbed one",
    "trail": "gaps in the audit trail",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check of a whole run found.

    Attributes:
        found: name of a check -> what it found, in words; empty where all is well.
        counts: how much was looked at.
    """

    found: Mapping[str, Sequence[str]]
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not any(self.found.values())

    def n(self, check: str) -> int:
        """How often a check found something."""
        return len(self.found.get(check, ()))

    def __str__(self) -> str:
        rows = []
        for check, what in CHECKS.items():
            rows.append(f"  {check:10} {self.n(check):5}  {what}")
            rows += [f"             - {line}" for line in self.found.get(check, ())[:10]]
        return "\n".join(rows)


Row = tuple[Any, ...]


def rows(url: str, statement: str) -> list[Row]:
    """Run a SELECT by the database's own driver."""
    if url.startswith("sqlite:///"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30)) as connection:
            return connection.execute(statement).fetchall()
    with psycopg.connect(url, connect_timeout=10) as connection:
        return connection.execute(statement).fetchall()


@contextmanager
def snapshot(url: str) -> Iterator[Callable[[str], list[Row]]]:
    """One view of the database for many SELECTs: what moves meanwhile does not look like a fault."""
    if url.startswith("sqlite:///"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30, isolation_level=None)) as file:
            file.execute("BEGIN")
            yield lambda statement: file.execute(statement).fetchall()
        return
    with psycopg.connect(url, connect_timeout=10) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        yield lambda statement: connection.execute(statement).fetchall()


def check(
    url: str, history: History, *, messages: Mapping[str, int] | None = None, runs: Mapping[str, str] | None = None
) -> Verdict:
    """Check a run.

    Args:
        url: the database's.
        history: what the clients know.
        messages: Redis's key of a queue -> how many messages it holds.
        runs: model that was trained -> model whose weights its must equal.
    """
    with snapshot(url) as rows:
        check = _Check(rows, history)
        check.jobs_are_as_submitted()
        check.ends_are_right()
        check.counts_are_right()
        check.nothing_is_stuck()
        check.trail_is_forward()
        check.attempts_are_kept()
        check.clients_saw_the_truth()
        check.runs_are_undisturbed(runs or {})
    for key, n in (messages or {}).items():
        if n:
            check.say("messages", f"{key!r} holds {n}")
    return Verdict(check.found, check.counts)


@dataclass(frozen=True, slots=True)
class _Job:
    id: int
    chunk: int
    batch: int | None
    state: str
    failures: int
    n: int
    output: Any
    error: Mapping[str, Any]


class _Check:
    def __init__(self, rows: Callable[[str], list[Row]], history: History) -> None:
        self.rows = rows
        self.history = history
        self.found: dict[str, list[str]] = defaultdict(list)
        self.jobs = [
            _Job(id, chunk, batch, STATES[state], failures, _json(input)["n"], _json(output), _json(error) or {})
            for id, chunk, batch, state, failures, input, output, error in self.rows(
                "SELECT j.id, j.chunk, j.batch, j.state, j.failures, j.input, j.output, j.error FROM jobs j "
                "WHERE j.id NOT IN (SELECT job FROM runs)",
            )
        ]
        self.by_n: dict[int, list[_Job]] = defaultdict(list)
        for job in self.jobs:
            self.by_n[job.n].append(job)
        self.counts = Counter({"jobs": len(self.jobs), "expected": len(history.jobs)})
        self.counts.update(job.state for job in self.jobs)

    def say(self, check: str, what: str) -> None:
        assert check in CHECKS
        self.found[check].append(what)

    # --- the jobs -------------------------------------------------------------------------------------------

    def jobs_are_as_submitted(self) -> None:
        for n, expected in self.history.jobs.items():
            here = self.by_n.get(n, ())
            self.counts[{True: "committed", False: "rolled back", None: "unknown"}[expected.exists]] += 1
            if expected.exists and not here:
                self.say("lost", f"{expected.op}: the job of input {n}")
            if expected.exists is False and here:
                self.say("phantom", f"{expected.op}: input {n} was rolled back and is job {here[0].id}")
            if len(here) > 1:
                self.say("twice", f"{expected.op}: input {n} is {len(here)} jobs")
        for n in self.by_n.keys() - self.history.jobs.keys():
            self.say("phantom", f"input {n} was submitted by nobody")
        for op, ns in self.history.atomic.items():
            there = sum(n in self.by_n for n in ns)
            if 0 < there < len(ns):
                self.say("torn", f"{op}: {there} of {len(ns)} jobs")
        orders = {op for (op,) in self.rows("SELECT op FROM chaos_orders")}
        for op, ns in self.history.atomic.items():  # what the client wrote in the same transaction
            if (op in orders) != any(n in self.by_n for n in ns):
                self.say("torn", f"{op}: the client's own row is {'' if op in orders else 'not '}there")
        for op, size in self.history.batches.items():
            members = [e.n for e in self.history.jobs.values() if e.op == op]
            batches = {job.batch for n in members for job in self.by_n.get(n, ())}
            if len(batches) != 1 or None in batches:
                self.say("counts", f"{op}: its {size} jobs are in the batches {sorted(map(str, batches))}")

    def ends_are_right(self) -> None:
        for job in self.jobs:
            expected = self.history.jobs.get(job.n)
            if job.state == OPEN:
                self.say("open", f"job {job.id} of input {job.n}, failures {job.failures}")
            elif expected is not None and (what := _wrong(job, expected)):
                self.say("wrong", f"{expected.op}: job {job.id} of input {job.n} {what}")

    def clients_saw_the_truth(self) -> None:
        for seen in self.history.seen:
            self.counts["seen"] += 1
            expected, here = self.history.jobs.get(seen.n), self.by_n.get(seen.n, ())
            if not here:
                self.say("seen", f"input {seen.n} was {seen.state} and is not there")
            elif here[0].state != seen.state and not (expected and expected.retries):
                self.say("seen", f"job {here[0].id} was {seen.state} and is {here[0].state}")
            elif seen.state == SUCCEEDED and seen.value != answer(seen.n):
                self.say("seen", f"job {here[0].id} showed {seen.value!r}")

    # --- the chunks -----------------------------------------------------------------------------------------

    def counts_are_right(self) -> None:
        real: dict[int, Counter[str]] = defaultdict(Counter)
        batches: dict[int, int | None] = {}
        ranges: dict[int, tuple[int, int]] = {}
        lanes = {id for (id,) in self.rows("SELECT id FROM models WHERE training")}
        stored = self.rows("SELECT id, model, batch, first_id, last_id, size, succeeded, failed, cancelled, "
                                "expired FROM chunks")  # fmt: skip
        for id, model, batch, first, last, *_ in stored:
            if model not in lanes:
                batches[id], ranges[id] = batch, (first, last)
        for job in self.jobs:
            real[job.chunk][job.state] += 1
            if job.chunk not in ranges:
                self.say("counts", f"job {job.id} is in chunk {job.chunk}, which is not there")
            elif not ranges[job.chunk][0] <= job.id <= ranges[job.chunk][1]:
                self.say("counts", f"job {job.id} is outside the range of its chunk {job.chunk}")
            elif job.batch != batches[job.chunk]:
                self.say("counts", f"job {job.id} is in batch {job.batch}, its chunk {job.chunk} in another")
        for id, model, _, _, _, size, *ends in stored:
            if model in lanes:
                continue
            self.counts["chunks"] += 1
            counted = [real[id][state] for state in STATES.values() if state != OPEN]
            if [size, *ends] != [real[id].total(), *counted]:
                self.say("counts", f"chunk {id} says {[size, *ends]}, its jobs {[real[id].total(), *counted]}")

    def nothing_is_stuck(self) -> None:
        names = {WAITING: "waiting", ANNOUNCED: "announced", CLAIMED: "claimed"}
        for id, state, worker, due in self.rows("SELECT id, state, worker, due FROM chunks WHERE state <> 3"):
            self.say("stuck", f"chunk {id} is {names.get(state, state)}, worker {worker}, due {bool(due)}")

    # --- the trail ------------------------------------------------------------------------------------------

    def trail_is_forward(self) -> None:
        by_id = {job.id: job for job in self.jobs}
        state: dict[int, str] = {}
        failures: dict[int, int] = {}
        ended: Counter[int] = Counter()
        retried: Counter[int] = Counter()
        statement = "SELECT job, was, became, failed, fails FROM audit_jobs ORDER BY seq"
        for id, was, became, failed, fails in self.rows(statement):
            self.counts["moves of jobs"] += 1
            move = (_state(was), _state(became))
            if id in state and state[id] != move[0]:
                self.say("trail", f"job {id} left {move[0]}, but was {state[id]}")
            if became is None:
                self.say("lost", f"job {id} was deleted while {move[0]}")
                continue
            assert move[1] is not None
            state[id], failures[id] = move[1], fails
            if move in RETRIES:
                retried[id] += 1
                continue
            if move not in JOB_MOVES:
                if move[0] not in (None, OPEN) and move[1] != OPEN:
                    self.say("twice", f"job {id} was recorded again: {move[0]} -> {move[1]}")
                else:
                    self.say("backwards", f"job {id} went {move[0]} -> {move[1]}")
            elif move[0] == OPEN and move[1] != OPEN:
                ended[id] += 1
            if failed is not None and fails < failed:
                self.say("backwards", f"job {id} had {failed} failures, then {fails}")
        for id, job in by_id.items():
            expected = self.history.jobs.get(job.n)
            allowed = expected.retries if expected else 0
            if id not in state:
                self.say("trail", f"job {id} is in no trail")
            elif (state[id], failures[id]) != (job.state, job.failures):
                self.say("trail", f"job {id} is {job.state} by its row and {state[id]} by the trail")
            if retried[id] > allowed:
                self.say("backwards", f"job {id} was opened again {retried[id]} times, asked for {allowed} times")
            if ended[id] > retried[id] + 1:
                self.say("twice", f"job {id} ended {ended[id]} times")
        self._chunk_trail()

    def _chunk_trail(self) -> None:
        current: dict[int, tuple[int, int]] = {}
        statement = "SELECT chunk, was, became, old_token, token FROM audit_chunks ORDER BY seq"
        for id, was, became, old_token, token in self.rows(statement):
            self.counts["moves of chunks"] += 1
            if id in current and current[id] != (was, old_token):
                self.say("trail", f"chunk {id} left state {was}, but was in {current[id][0]}")
            current[id] = (became, token)
            if was != became and (was, became) not in CHUNK_MOVES:
                self.say("backwards", f"chunk {id} went {was} -> {became}")
            if old_token is not None and token < old_token:
                self.say("backwards", f"the token of chunk {id} went from {old_token} to {token}")
            if CLAIMED in {was, became} and became not in {DONE, was} and token == old_token:
                self.say("backwards", f"chunk {id} went {was} -> {became} under the same token")
        for id, state, token in self.rows("SELECT id, state, token FROM chunks"):
            if current.get(id) != (state, token):
                self.say("trail", f"chunk {id} is {state}, token {token} by its row, {current.get(id)} by the trail")

    def attempts_are_kept(self) -> None:
        most: dict[int, int] = dict(self.rows("SELECT id, max_attempts FROM chunks"))
        tries: dict[int, int] = dict(
            self.rows("SELECT job, count(*) FROM attempts WHERE outcome = 'failed' GROUP BY job")
        )
        for job in self.jobs:
            if job.failures > most.get(job.chunk, 0):
                self.say("attempts", f"job {job.id} failed {job.failures} of {most.get(job.chunk)} times")
            expected = self.history.jobs.get(job.n)
            kept, retried = tries.get(job.id, 0), expected is not None and expected.retries > 0
            if kept < job.failures or (kept > job.failures and not retried):
                self.say("attempts", f"job {job.id} failed {job.failures} times, {kept} tries are kept")

    def runs_are_undisturbed(self, pairs: Mapping[str, str]) -> None:
        ends = self.rows("SELECT r.model, j.state, j.error FROM runs r JOIN jobs j ON j.id = r.job")
        statement = (
            "SELECT m.name, v.sha256 FROM model_versions v JOIN models m ON m.id = v.model WHERE v.run IS NOT NULL"
        )
        versions: dict[str, list[str]] = defaultdict(list)
        for name, sha256 in self.rows(statement):
            versions[name].append(sha256)
        for model, state, error in ends:
            self.counts["runs"] += 1
            if STATES[state] != SUCCEEDED:
                self.say("training", f"the run of {model} is {STATES[state]}: {_json(error)}")
        for disturbed, quiet in pairs.items():
            if len(versions[disturbed]) != 1:
                self.say("training", f"{len(versions[disturbed])} versions of {disturbed} were registered by runs")
            if not versions[quiet] or set(versions[disturbed]) - set(versions[quiet]):
                self.say("training", f"the weights of {disturbed} are not those of {quiet}")


def _wrong(job: _Job, expected: Expected) -> str | None:
    if job.state not in expected.ends:
        kind = job.error.get("type", "")
        return f"is {job.state} {kind}: {job.error.get('message', '')}, not {' or '.join(sorted(expected.ends))}"
    if job.state == SUCCEEDED and job.output != answer(job.n):
        return f"has the result {job.output!r}, not {answer(job.n)}"
    if job.state == FAILED and job.error.get("type") != expected.error:
        return f"failed with {job.error.get('type')}: {job.error.get('message')}, not {expected.error}"
    if job.state != SUCCEEDED and job.output is not None:
        return f"is {job.state} and has a result"
    return None


def _state(number: int | None) -> str | None:
    return None if number is None else STATES[number]


def _json(stored: bytes | memoryview | None) -> Any:
    return None if stored is None else json.loads(bytes(stored))


def summary(verdicts: Iterable[Verdict]) -> Counter[str]:
    """Return what all of them found, by check."""
    return Counter({name: sum(v.n(name) for v in verdicts) for name in CHECKS})
