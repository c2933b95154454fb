"""When which fault comes: drawn from the seed alone, so that a run can be replayed.

What a fault meets depends on the machine; what is done, to whom and when does not. Not here: how (`faults`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

WORKERS = ("w0", "w1", "w2")
CLIENTS = (1, 2, 3, 4)

# Kind -> how often, of some hundred. To replace a worker's process costs seconds of a processor: of what does that,
# there are as many as two cores can stand.
WORKER_KINDS = {
    "kill worker": 4,  # all of its processes, as a machine that loses its power
    "kill inner process": 3,
    "kill supervisor": 3,
    "kill leader": 3,
    "stop worker": 3,  # SIGSTOP, longer than it may be silent, then SIGCONT
    "stop leader": 3,
    "stop inner process": 2,  # not as long
    "end worker": 2,  # SIGTERM, as in a rolling restart
    "clock jump": 4,
}
# At named points of the code, by SIGKILL.
POINT_KINDS = {
    "at popped": 2, "at claimed": 2, "at forwarded": 2, "at recording": 2, "at recorded": 2, "at acknowledging": 2,
    "at announced": 2, "at rescuing": 2, "at committed": 4,
}  # fmt: skip
CLIENT_KINDS = {"kill client": 6}
REDIS_KINDS = {
    "kill redis": 4,
    "stop redis": 3,
    "flush redis": 7,
    "lose a queue": 6,
    "lose a message": 6,
    "roll redis back": 3,  # to what it held five seconds ago
    "cut redis": 4,
    "swallow redis": 3,
    "slow redis": 3,
}
DATABASE_KINDS = {
    "postgresql": {"kill database": 4, "stop database": 2, "cut database": 5, "swallow database": 3,
                   "slow database": 3, "refuse database": 3},
    "sqlite": {"lock database": 8, "kill writer": 6},
}  # fmt: skip
POISON_KINDS = {"segfault": 2, "exit": 1, "hang": 2}  # jobs that take their worker down

# The longest that a fault lasts, and the least, in seconds.
LASTS = {
    "stop worker": (5.0, 8.0), "stop leader": (5.0, 8.0), "stop inner process": (1.0, 3.0), "clock jump": (3.0, 8.0),
    "kill redis": (0.2, 3.0), "stop redis": (1.0, 4.0), "roll redis back": (5.0, 5.0), "swallow redis": (1.0, 5.0),
    "slow redis": (1.0, 5.0), "kill database": (0.2, 2.0), "stop database": (1.0, 3.0),
    "swallow database": (1.0, 5.0), "slow database": (1.0, 4.0), "refuse database": (1.0, 3.0),
    "lock database": (0.5, 3.0), "kill writer": (0.2, 1.0),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `at` and `lasts` are seconds; `target` is a worker's or a client's number in its list."""

    number: int
    at: float
    kind: str
    target: int
    lasts: float = 0.0
    size: float = 0.0  # of a clock's jump, in seconds

    def __str__(self) -> str:
        size = f" {self.size:+.0f} s" if self.size else ""
        lasts = f", for {self.lasts:.1f} s" if self.lasts else ""
        return f"{self.at:6.1f} s  {self.kind}{size}, target {self.target}{lasts}"


def kinds(database: str) -> dict[str, int]:
    """Return the kinds of faults for a kind of database, and how often each comes."""
    return WORKER_KINDS | POINT_KINDS | CLIENT_KINDS | REDIS_KINDS | DATABASE_KINDS[database] | POISON_KINDS


def schedule(seed: int, database: str, faults: int, span: float, only: Sequence[str] = ()) -> list[Fault]:
    """Return the faults of a run, in the order in which they come.

    Args:
        span: seconds in which they come, evenly but for chance.
        only: these kinds alone.
    """
    random = Random(f"{seed}/{database}/faults")
    weights = {kind: n for kind, n in kinds(database).items() if not only or kind in only}
    chosen = list(weights) if faults >= len(weights) else []  # each at least once, where there is room
    chosen += random.choices(list(weights), list(weights.values()), k=faults - len(chosen))
    random.shuffle(chosen)
    found = []
    for number, kind in enumerate(chosen):
        at = span * (number + random.uniform(0.1, 0.9)) / faults
        shortest, longest = LASTS.get(kind, (0.0, 0.0))
        size = random.choice((-3600.0, -90.0, 30.0, 90.0, 3600.0)) if kind == "clock jump" else 0.0
        found.append(
            Fault(number, round(at, 2), kind, random.randrange(12), round(random.uniform(shortest, longest), 2), size)
        )
    return found
