"""`python -m chaos.table reports/*.json`: the table of docs/reliability.md, from the reports of runs."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from chaos.report import Report


def runs(reports: Iterable[Report]) -> str:
    """Return a line of Markdown for each run."""
    lines = [
        "| database | seed | jobs | faults | lost | wrong | recorded twice | other findings | all done after | run |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in reports:
        lost = one.n("lost") + one.n("open") + one.n("stuck")
        wrong = one.n("wrong") + one.n("seen") + one.n("training")
        rest = sum(len(what) for what in one.found.values()) - lost - wrong - one.n("twice")
        lines.append(
            f"| {one.database} | {one.seed} | {one.counts.get('jobs', 0):,} | {one.made} | {lost} | {wrong} | "
            f"{one.n('twice')} | {rest} | {one.settled:.1f} s | {one.seconds:.0f} s |"
        )
    return "\n".join(lines)


def faults(reports: Iterable[Report]) -> str:
    """Return a line of Markdown for each kind of fault."""
    made: dict[str, int] = defaultdict(int)
    felt: dict[str, list[float]] = defaultdict(list)
    resumed: dict[str, list[float]] = defaultdict(list)
    for one in reports:
        for kind, n in one.faults.items():
            made[kind] += n
        for kind, seconds in one.recovery.items():
            felt[kind] += seconds
        for kind, seconds in one.resumed.items():
            resumed[kind] += seconds
    lines = [
        "| fault | made | work went on after: median | worst | hit something | that had moved on: median | worst |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, n in sorted(made.items()):
        times = felt.get(kind, [])
        lines.append(f"| {kind} | {n} | {_ends(resumed.get(kind, []))} | {len(times)} | {_ends(times)} |")
    return "\n".join(lines)


def _ends(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.1f} s | {max(times):.1f} s" if times else "- | -"


def main(paths: Sequence[str]) -> int:
    """Print both tables; 1 where a run failed."""
    reports = sorted((Report.load(Path(path)) for path in paths), key=lambda one: (one.database, one.seed))
    print(runs(reports), faults(reports), sep="\n\n")
    return 0 if all(one.passed for one in reports) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
