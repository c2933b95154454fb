"""The fast part: a small run on each database, as `make chaos` does a large one."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.run import Plan, run
from chaos.schedule import DATABASE_KINDS

# What costs least to make and to get over; the long run makes every kind.
FEW = ("kill worker", "kill inner process", "at claimed", "at forwarded", "at recording", "at committed",
       "kill client", "flush redis", "lose a queue", "kill redis")  # fmt: skip


@pytest.mark.timeout(200)
@pytest.mark.parametrize("database", DATABASE_KINDS)
def test_a_small_run_loses_nothing(database: str, tmp_path: Path) -> None:
    only = (*FEW, *({"postgresql": ["kill database", "cut database"], "sqlite": ["lock database"]}[database]))
    plan = Plan(17, database, jobs=300, faults=10, span=18.0, only=only)
    lines: list[str] = []
    report = run(plan, tmp_path, lines.append)
    assert report.passed, "\n".join([*lines, str(report)])
    assert report.counts["jobs"] >= 300
    assert report.counts["rolled back"] > 0
