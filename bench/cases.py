"""A case: one subject of a measure as a round runs it. What a measure is made of, and what the harness interleaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from record import Sample

SOME_ROUNDS = 3  # of the usual five, for what no goal hangs on


@dataclass(frozen=True, slots=True)
class Case:
    """One subject of a measure.

    Attributes:
        measure, subject, variant: for who watches, and of the sample that says why it failed, should it raise.
        run: given the round's number, yields its samples.
        rounds: how many rounds it takes part in where not in all: what no goal asks for, or hardly varies.
        quick: whether it is among the few that a quick run does.
    """

    measure: str
    subject: str
    variant: str
    run: Callable[[int], Iterable[Sample]]
    rounds: int | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        """For who watches."""
        return ", ".join(part for part in (f"{self.measure}: {self.subject}", self.variant) if part)
