"""From samples to verdicts: medians with their spread over the rounds, ratios round by round, goals met or missed.

Pure: nothing here is measured or written. Rounds are compared with themselves, for a machine that was slower in one
of them was slower for all.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from goals import GOALS, Goal, Which
from record import FAILED, Sample

Rounds: TypeAlias = dict[int, float]  # a round's number -> the figure

FELL = 0.5  # a ratio below this part of what it was is a regression; noise is large


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over the rounds, and the least and the most."""

    median: float
    least: float
    most: float
    rounds: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Return the spread of one value or more."""
        ordered = sorted(values)
        return Spread(statistics.median(ordered), ordered[0], ordered[-1], len(ordered))


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one measure, subject and variant."""

    measure: str
    subject: str
    variant: str
    samples: tuple[Sample, ...]

    @property
    def name(self) -> str:
        """Subject and variant."""
        return f"{self.subject}, {self.variant}" if self.variant else self.subject

    @property
    def rounds(self) -> Rounds:
        """The figure of each round; the last one where a round was done twice."""
        return {sample.round: sample.value for sample in self.samples if sample.unit != FAILED}

    @property
    def spread(self) -> Spread | None:
        """None where it failed in every round."""
        rounds = self.rounds
        return Spread.of(rounds.values()) if rounds else None

    @property
    def last(self) -> Sample:
        """The newest sample, for its unit and what it says of its subject; one that did not fail, if there is any."""
        return next((s for s in reversed(self.samples) if s.unit != FAILED), self.samples[-1])

    @property
    def errors(self) -> list[str]:
        """Why it failed, each reason once."""
        return list(dict.fromkeys(str(s.more.get("error", "")) for s in self.samples if s.unit == FAILED))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a goal. `ratio` is ours against theirs; of a goal without theirs, our own figure."""

    goal: Goal
    ours: Group
    theirs: Group | None
    ratio: Spread

    @property
    def met(self) -> bool:
        """Whether the median is where it should be."""
        if self.goal.relation == ">=":
            return self.ratio.median >= self.goal.bound
        return self.ratio.median <= self.goal.bound


def groups(samples: Sequence[Sample]) -> list[Group]:
    """Return samples together that differ in their round only, in the order in which they first come."""
    found: dict[tuple[str, str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.measure, sample.subject, sample.variant].append(sample)
    return [Group(*key, tuple(some)) for key, some in found.items()]


def judge(samples: Sequence[Sample], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Return what is known of the goals; those are left out of which either side was not measured."""
    return [verdict for goal in goals if (verdict := _judge(samples, goal)) is not None]


def _judge(samples: Sequence[Sample], goal: Goal) -> Verdict | None:
    ours = _best(samples, goal.ours, goal.lower)
    if ours is None:
        return None
    if not goal.theirs:
        return Verdict(goal, ours, None, Spread.of(ours.rounds.values()))
    candidates = [_best(samples, which, goal.lower) for which in goal.theirs]
    found = [group for group in candidates if group is not None]
    if not found or (goal.against == "worst" and len(found) < len(candidates)):
        return None  # the slower of two is known only where both are
    theirs = _extreme(found, lowest=goal.lower is (goal.against == "best"))
    return Verdict(goal, ours, theirs, ratio(ours.rounds, theirs.rounds))


def _best(samples: Sequence[Sample], which: Which, lower: bool) -> Group | None:
    found = groups(which.of(samples))
    return _extreme(found, lowest=lower) if found else None


def _extreme(found: Sequence[Group], *, lowest: bool) -> Group:
    """Return the group with the least or the greatest median: chosen once; anew each round would flatter it."""
    medians = [statistics.median(group.rounds.values()) for group in found]
    return found[medians.index(min(medians) if lowest else max(medians))]


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread:
    """Return ours against theirs in each round that both have; where they share none, of the medians."""
    shared = [ours[i] / theirs[i] for i in sorted(ours.keys() & theirs.keys()) if theirs[i]]
    if shared:
        return Spread.of(shared)
    base = statistics.median(theirs.values())
    one = statistics.median(ours.values()) / base if base else float("inf")
    return Spread(one, one, one, 0)


def fallen(before: Sequence[Verdict], now: Sequence[Verdict]) -> list[str]:
    """Say which goals' ratios are worse than they were by more than half; those that waver by nature are left alone."""
    was = {verdict.goal.name: verdict for verdict in before}
    found = []
    for verdict in now:
        old = was.get(verdict.goal.name)
        if old is None or not is_steady(verdict.goal) or old.ratio.median <= 0 or verdict.ratio.median <= 0:
            continue
        kept = verdict.ratio.median / old.ratio.median
        if (1 / kept if verdict.goal.lower else kept) < FELL:
            found.append(f"{verdict.goal.name}: {verdict.goal.measure} ({verdict.goal.words}): the ratio was "
                         f"{old.ratio.median:.3g} and is {verdict.ratio.median:.3g}")  # fmt: skip
    return found


def is_steady(goal: Goal) -> bool:
    """Whether it is a ratio of ours to something in the same run, and so more or less the same on every machine.

    A p99 of a short run is hardly more than its worst call, which is anybody's.
    """
    is_ratio = bool(goal.theirs) or goal.ours.measure.endswith("efficiency")
    return is_ratio and not goal.ours.measure.endswith("p99")
