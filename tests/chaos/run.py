"""One chaos run from its start to its verdict."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos import checker, journal
from chaos.faults import Injected, Injector
from chaos.operations import MODELS
from chaos.recovery import recoveries, resumptions
from chaos.report import Report
from chaos.schedule import Fault, schedule
from chaos.system import LOUD, QUIET, System
from servers import wait_until
from torchrelay_storage.errors import RelayError

SPARE = 0.08  # more faults than are wanted, because some meet nothing
SECONDS_PER_FAULT = 1.9
CLIENTS_SECONDS = 90.0  # beyond the faults, in which the clients come to their end
SETTLE_SECONDS = 120.0  # in which all must then be done
STEP_SECONDS = 0.1  # of the training run that is disturbed


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is to be."""

    seed: int
    database: str  # sqlite or postgresql
    jobs: int = 5000
    faults: int = 100
    span: float | None = None  # seconds of faults; None: by their number
    training: bool = True
    only: Sequence[str] = field(default_factory=tuple)  # kinds of faults; empty: all

    def schedule(self) -> list[Fault]:
        """Return the faults, some more than are wanted."""
        span = self.span if self.span is not None else SECONDS_PER_FAULT * self.faults
        return schedule(self.seed, self.database, self.faults + math.ceil(SPARE * self.faults), span, self.only)


def run(plan: Plan, folder: Path, say: Callable[[str], None] = print) -> Report:
    """Do a run in a folder of its own, and return what it came to."""
    began = time.monotonic()
    faults = plan.schedule()
    for fault in faults:
        say(str(fault))
    with System(plan.seed, plan.database, folder, training=plan.training) as system:
        injector = Injector(system)
        if plan.training:
            wait_until(lambda: "tiny" in system.relay.recipes(), 90, "the recipe of the training runs")
            system.relay.run(system.train(QUIET, seconds=0.0)).wait(timeout=120)
            system.train(LOUD, seconds=STEP_SECONDS)
        say(f"the system is up after {time.monotonic() - began:.1f} s")
        span = faults[-1].at if faults else 1.0
        system.start_clients(plan.jobs, time.time() + span)
        made, missed = _inject(injector, faults, say)
        notes = _finish(system, injector)
        last = time.monotonic()
        settled = system.settle(SETTLE_SECONDS)
        seconds = time.monotonic() - last
        if not settled:
            notes.append(f"not all was done after {SETTLE_SECONDS:.0f} s")
            say(system.logs())
        if ahead := system.ahead():
            notes.append(f"messages popped by a process whose clock was ahead, which come back by that clock: {ahead}")
        url = system.direct_database
        verdict = checker.check(
            url,
            journal.read(system.journals()),
            messages=system.messages(),
            runs={LOUD: QUIET} if plan.training else {},
        )
        path = folder / "runs.txt"
        return Report(
            seed=plan.seed, database=plan.database, seconds=round(time.monotonic() - began, 1),
            settled=round(seconds, 1), faults=dict(Counter(one.fault.kind for one in made)),
            missed=dict(Counter(fault.kind for fault in missed)), recovery=recoveries(url, made),
            counts=dict(verdict.counts), found={name: list(what) for name, what in verdict.found.items()},
            restarts=system.restarts, ran=path.read_text().count("\n") if path.exists() else 0,
            wanted=plan.faults, notes=notes, resumed=resumptions(url, made),
        )  # fmt: skip


def _inject(
    injector: Injector, faults: Sequence[Fault], say: Callable[[str], None]
) -> tuple[list[Injected], list[Fault]]:
    made: list[Injected] = []
    missed: list[Fault] = []
    began = time.monotonic()

    def make(fault: Fault) -> None:
        try:
            injected = injector.make(fault)
        except Exception as error:  # the fault's own means failed it: say so, and count it as not made
            say(f"{fault} could not be made: {error!r}")
            injected = None
        if injected is None:
            missed.append(fault)
        else:
            made.append(injected)

    threads = []
    for fault in faults:
        time.sleep(max(0.0, began + fault.at - time.monotonic()))
        thread = threading.Thread(target=make, args=(fault,), name=f"fault-{fault.number}", daemon=True)
        threads.append(thread)
        thread.start()
    for thread in threads:
        thread.join(60)
    return made, missed


def _finish(system: System, injector: Injector) -> list[str]:
    """Let the clients come to their end, and undo what would keep jobs from theirs."""
    injector.stop()
    notes = []
    until = time.monotonic() + CLIENTS_SECONDS
    while system.clients_left and time.monotonic() < until:
        time.sleep(0.1)
    if system.clients_left:
        notes.append("a client did not come to its end")
    for name in MODELS:
        try:
            system.relay.resume(name)
        except RelayError as error:
            notes.append(f"{name} could not be resumed: {error}")
    return notes
