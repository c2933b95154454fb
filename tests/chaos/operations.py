"""What a client of a chaos run does, drawn from the seed: the same seed, client and number give the same operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

MODELS = ("quick", "steady")
ROOM = 1_000  # numbers that an operation may use for its inputs
ATTEMPTS = 8  # of a job that must succeed: whatever is killed beside it, it is not to blame for long

# What clients do, and how often. The others than the first four submit nothing.
WEIGHTS = {"single": 34, "burst": 12, "batch": 16, "session": 18, "look": 8, "cancel": 3, "pause": 4, "retry": 3}
SUBMITS = ("single", "burst", "batch", "session")


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a client.

    Attributes:
        name: such as `c1/17`.
        numbers: of the inputs of the jobs that it submits.
        do: number -> the trouble that its input asks for.
        options: of the submit.
        commits: whether the client commits its own transaction; only of a session.
        pick: a number that chooses among what the client has done before.
    """

    name: str
    what: str
    model: str
    numbers: tuple[int, ...] = ()
    do: dict[int, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    commits: bool = True
    pick: float = 0.0

    def inputs(self) -> list[dict[str, Any]]:
        """Return the inputs of its jobs."""
        return [{"n": n, "do": self.do.get(n, "")} for n in self.numbers]


def operation(seed: int, client: int, index: int) -> Operation:
    """Return the operation with this number."""
    random = Random(f"{seed}/{client}/{index}")
    what = random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0] if index else "batch"
    model, pick = random.choice(MODELS), random.random()
    name = f"c{client}/{index}"
    if what not in SUBMITS:
        return Operation(name, what, model, pick=pick)
    size = {"single": 1, "burst": random.randint(3, 12), "batch": random.randint(8, 110),
            "session": random.randint(1, 5)}[what]  # fmt: skip
    first = (client * 10_000 + index) * ROOM
    numbers = tuple(range(first, first + size))
    options: dict[str, Any] = {"priority": random.choice((5, 5, 5, random.randint(0, 9))), "max_attempts": ATTEMPTS}
    do = {}
    for n in numbers:
        if random.random() < 0.01:
            do[n] = random.choice(("raise", "raise", "invalid"))
    if do:
        options["max_attempts"] = 2
    if random.random() < 0.15:
        options["delay"] = round(random.uniform(0.2, 3.0), 2)
    elif what != "batch" and random.random() < 0.06:
        options["expires_in"] = round(random.uniform(0.3, 3.0), 2)
    if what in ("single", "batch") and random.random() < 0.5:
        options["key"] = name
    if random.random() < 0.2:
        options["tenant"] = random.choice(("red", "blue"))
    return Operation(name, what, model, numbers, do, options, commits=random.random() < 0.5, pick=pick)


def operations(seed: int, client: int, jobs: int) -> Iterator[Operation]:
    """Yield the operations of a client until they have submitted so many jobs."""
    index = submitted = 0
    while submitted < jobs:
        step = operation(seed, client, index)
        submitted += len(step.numbers) if step.commits or step.what != "session" else 0
        index += 1
        yield step
