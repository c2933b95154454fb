"""What a chaos run came to: counts, findings, and how long each kind of fault was felt. As a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chaos.checker import CHECKS


@dataclass(frozen=True, slots=True)
class Report:
    """One run.

    Attributes:
        faults: kind -> how often it was made.
        missed: kind -> how often it met nothing.
        recovery: kind -> seconds until all that each had hit had moved on, of those that hit anything.
        resumed: kind -> seconds until work went on after each.
        counts: what was looked at.
        found: name of a check -> what it found.
        ran: forward passes of inputs; more than the jobs, because a killed worker's are run again.
    """

    seed: int
    database: str
    seconds: float
    settled: float  # seconds from the end of the last fault until all was done
    faults: Mapping[str, int]
    missed: Mapping[str, int]
    recovery: Mapping[str, Sequence[float]]
    counts: Mapping[str, int]
    found: Mapping[str, Sequence[str]]
    restarts: int = 0
    ran: int = 0
    wanted: int = 0  # faults
    notes: Sequence[str] = field(default_factory=tuple)
    resumed: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def made(self) -> int:
        """How many faults were made."""
        return sum(self.faults.values())

    @property
    def passed(self) -> bool:
        """Whether the checker found nothing, and enough was done to find it in."""
        return not any(self.found.values()) and self.made >= self.wanted

    def n(self, check: str) -> int:
        """How often a check found something."""
        return len(self.found.get(check, ()))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Report:
        """Read what `save` wrote."""
        return Report(**json.loads(path.read_text()))

    def __str__(self) -> str:
        counts = self.counts
        ends = ", ".join(f"{counts.get(end, 0)} {end}" for end in ("succeeded", "failed", "cancelled", "expired"))
        lines = [
            f"seed {self.seed} on {self.database}: {'passed' if self.passed else 'FAILED'} in {self.seconds:.0f} s",
            f"  {counts.get('jobs', 0)} jobs: {ends}",
            f"  {counts.get('committed', 0)} known to be committed, {counts.get('rolled back', 0)} rolled back, "
            f"{counts.get('unknown', 0)} of which the client was not told",
            f"  {counts.get('moves of jobs', 0)} moves of jobs and {counts.get('moves of chunks', 0)} of "
            f"{counts.get('chunks', 0)} chunks in the trail; {counts.get('seen', 0)} answers to clients",
            f"  {self.ran} inputs were run; workers were started anew {self.restarts} times",
            f"  {self.made} of {self.wanted} faults; all was done {self.settled:.1f} s after the last",
            "",
            f"  {'':20} {'':13}  {'work went on after':>18} {'all that was hit had moved on after':>38}",
            f"  {'fault':20} {'made':>5} {'missed':>7} {'median s':>9} {'worst s':>8} {'felt':>5} {'median s':>9} "
            f"{'worst s':>8}",
        ]
        for kind in sorted({*self.faults, *self.missed}):
            felt = self.recovery.get(kind, ())
            made, missed = self.faults.get(kind, 0), self.missed.get(kind, 0)
            times = f"{_times(self.resumed.get(kind, ()))} {len(felt):5} {_times(felt)}".rstrip()
            lines.append(f"  {kind:20} {made:5} {missed:7} {times}")
        lines += ["", *(f"  {note}" for note in self.notes)]
        for check, what in CHECKS.items():
            lines.append(f"  {check:10} {self.n(check):5}  {what}")
            lines += [f"             - {line}" for line in self.found.get(check, ())[:10]]
        return "\n".join(lines)


def _times(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):9.2f} {max(seconds):8.2f}" if seconds else f"{'':18}"
