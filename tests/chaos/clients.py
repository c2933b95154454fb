"""A client process of a chaos run: `python -m chaos.clients --client 1 --seed 7 ...`. It may be killed at any time.

It writes into its journal what it is about to do and what it was told; started again, it goes on from there. What it
submits under a key it submits again until it was told that it is stored.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from chaos.journal import SUCCEEDED, Journal, lines
from chaos.operations import Operation, operations
from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.errors import InvalidInput, QueueFull, RelayError

RETRY_SECONDS = 0.3
LOOK_SECONDS = 4.0
GIVE_UP_SECONDS = 60.0  # with which a keyed submit is tried again


@dataclass(slots=True)
class Done:
    """What a client remembers of an operation."""

    numbers: Sequence[int]
    model: str = ""
    jobs: list[str] = field(default_factory=list)  # shown ids, in the order of the numbers
    batch: str | None = None


class Client:
    """One client: a relay, a journal, and an engine of its own for its own transactions."""

    def __init__(self, seed: int, client: int, jobs: int, until: float, folder: Path) -> None:
        self.plan = list(operations(seed, client, jobs))
        self.until = until  # when the last operation is due, on the wall clock
        self.journal = Journal(folder / f"client-{client}.jsonl")
        self.done: dict[str, Done] = {}
        self.ended: dict[int, str] = {}  # number -> state, of jobs that this client saw end
        self.settings = Settings.load()
        self.relay = Relay(settings=self.settings)
        self.engine = self._engine()

    def _engine(self) -> Engine:
        url = self.settings.database_url
        if url.startswith("sqlite"):
            return create_engine(url, connect_args={"timeout": 10})
        url = url.replace("postgresql://", "postgresql+psycopg://")
        return create_engine(url, connect_args={"connect_timeout": 5}, pool_pre_ping=True)

    # --- the life of a client -------------------------------------------------------------------------------

    def run(self) -> None:
        """Go on where the journal ends, and do the rest."""
        start, again = self._recall()
        begun = time.time()
        for index in range(start, len(self.plan)):
            step = self.plan[index]
            if index > start or not again:
                self._tell(step)
            self._do(step)
            share = (index + 1 - start) / max(1, len(self.plan) - start)
            due = begun + share * (self.until - begun)
            time.sleep(min(max(0.0, due - time.time()), 5.0))
        self.relay.close()

    def _recall(self) -> tuple[int, bool]:
        """Read the journal. Returns the operation to go on with, and whether it was asked for before."""
        last, asked, told, paused = -1, {}, set(), {}
        for line in lines(self.journal.path):
            if "began" in line:
                last = line["began"]
            elif "asked" in line:
                asked[line["asked"]] = line
            elif "outcome" in line:
                told.add(line["op"])
                if line["outcome"] == "committed":
                    numbers, model = asked[line["op"]]["jobs"], asked[line["op"]]["model"]
                    self.done[line["op"]] = Done(numbers, model, line.get("ids", []), line.get("batch"))
            elif "seen" in line:
                self.ended[line["n"]] = line["seen"]
            elif "paused" in line:
                paused[line["paused"]] = line["on"]
        for what in [what for what, on in paused.items() if on]:
            self._pause(what, on=False)  # it died before it could
        if last < 0:
            return 0, False
        step = self.plan[last]
        if step.name in asked and step.name not in told and step.options.get("key"):
            return last, True
        return last + 1, False

    def _tell(self, step: Operation) -> None:
        self.journal.write(began=self.plan.index(step))
        if step.numbers:
            self.journal.write(
                asked=step.name, what=step.what, model=step.model, jobs=step.numbers,
                do={str(n): do for n, do in step.do.items()}, expires="expires_in" in step.options,
            )  # fmt: skip

    def _do(self, step: Operation) -> None:
        if step.numbers:
            until = time.time() + GIVE_UP_SECONDS
            while True:
                outcome, more = getattr(self, f"_{step.what}")(step)
                if outcome != "unknown" or not step.options.get("key") or time.time() > until:
                    break
                time.sleep(RETRY_SECONDS)
            self.journal.write(op=step.name, outcome=outcome, **more)
            if outcome == "committed":
                self.done[step.name] = Done(step.numbers, step.model, more.get("ids", []), more.get("batch"))
        elif self.done:
            earlier = list(self.done.values())
            if step.what in {"cancel", "pause"}:
                earlier = earlier[-2:]  # what was submitted long ago has ended
            with suppress(RelayError):  # nothing was promised
                getattr(self, f"_{step.what}")(step, earlier[int(step.pick * len(earlier))])

    # --- submits: each returns what became of it ------------------------------------------------------------

    def _single(self, step: Operation) -> tuple[str, dict[str, Any]]:
        return _told(lambda: {"ids": [self.relay.submit(step.model, step.inputs()[0], **step.options).id]})

    def _burst(self, step: Operation) -> tuple[str, dict[str, Any]]:
        def submit(input: object) -> tuple[str, dict[str, Any]]:
            return _told(lambda: {"ids": [self.relay.submit(step.model, input, **step.options).id]})

        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(submit, step.inputs()))
        outcomes = {outcome for outcome, _ in told}
        if outcomes == {"committed"}:
            return "committed", {"ids": [more["ids"][0] for _, more in told]}
        stored = [n for n, (outcome, _) in zip(step.numbers, told, strict=True) if outcome == "committed"]
        return ("refused" if outcomes == {"refused"} else "unknown"), {"stored": stored}

    def _batch(self, step: Operation) -> tuple[str, dict[str, Any]]:
        def submit() -> dict[str, Any]:
            inputs = step.inputs() if step.pick < 0.5 else iter(step.inputs())
            return {"batch": self.relay.submit_batch(step.model, inputs, **step.options).id}

        return _told(submit)

    def _session(self, step: Operation) -> tuple[str, dict[str, Any]]:
        ids = []
        committing = False
        try:
            with Session(self.engine) as session:
                for input in step.inputs():
                    ids.append(self.relay.submit(step.model, input, session=session, **step.options).id)
                session.execute(text("INSERT INTO chaos_orders (op) VALUES (:op)"), {"op": step.name})
                if not step.commits:
                    session.rollback()
                    return "rolled back", {}
                committing = True
                session.commit()
        except (RelayError, SQLAlchemyError) as error:
            return "unknown" if committing else "rolled back", {"reason": repr(error)[:200]}
        return "committed", {"ids": ids}

    # --- the rest -------------------------------------------------------------------------------------------

    def _look(self, step: Operation, at: Done) -> None:
        if at.batch is not None:
            self.relay.batch(at.batch).counts()
            return
        index = int(step.pick * len(at.jobs))
        self._see(at.numbers[index], at.jobs[index])

    def _see(self, n: int, id: str) -> None:
        job = self.relay.job(id)
        with suppress(TimeoutError):
            job.wait(timeout=LOOK_SECONDS)
        if job.done:
            value = job.result(timeout=5) if job.state == SUCCEEDED else None
            self.journal.write(n=n, seen=str(job.state), value=value)
            self.ended[n] = str(job.state)

    def _cancel(self, step: Operation, at: Done) -> None:
        self.journal.write(cancel=list(at.numbers))
        if at.batch is not None:
            self.relay.batch(at.batch).cancel()
        for id in at.jobs:
            self.relay.job(id).cancel()

    def _retry(self, step: Operation, at: Done) -> None:
        failed = [n for n, state in self.ended.items() if state != SUCCEEDED]
        known = {n: id for done in self.done.values() for n, id in zip(done.numbers, done.jobs, strict=False)}
        for n in [n for n in failed if n in known][:1]:
            self.journal.write(retry=[n])
            self.relay.job(known[n]).retry()
            del self.ended[n]
            return
        for n, id in list(known.items())[int(step.pick * len(known)) :][:3]:  # look for one that failed
            self._see(n, id)

    def _pause(self, what: str | Operation, at: Done | None = None, *, on: bool = True) -> None:
        name = what if isinstance(what, str) else at.batch if at is not None and at.batch else what.model
        for state in (True, False) if on else (False,):
            self.journal.write(paused=name, on=state)
            until = time.time() + GIVE_UP_SECONDS
            while time.time() < until:
                try:
                    self._switch(name, state)
                    break
                except RelayError:
                    time.sleep(RETRY_SECONDS)
            time.sleep(0.5 if state else 0)

    def _switch(self, name: str, paused: bool) -> None:
        if name.startswith("b_"):
            batch = self.relay.batch(name)
            (batch.pause if paused else batch.resume)()
        else:
            (self.relay.pause if paused else self.relay.resume)(name)


def _told(submit: Callable[[], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    try:
        return "committed", submit()
    except (InvalidInput, QueueFull) as error:
        return "refused", {"reason": repr(error)[:200]}
    except RelayError as error:
        return "unknown", {"reason": repr(error)[:200]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a client to its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("CHAOS_FOLDER", ".")))
    found = parser.parse_args(argv)
    Client(found.seed, found.client, found.jobs, found.until, found.folder).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
