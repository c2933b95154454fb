"""What the benchmark makes of its samples: medians, ratios, goals met or missed, the page. Nothing is timed here."""

from __future__ import annotations

from pathlib import Path

import pytest
import record
import report
from goals import CELERY_SQL, GOALS, IN_ORDER, Goal, Which
from record import Sample
from verdicts import Spread, Verdict, fallen, groups, judge, ratio

ROOT = Path(__file__).parents[3]
PG1 = "postgresql, 1 worker"


def sample(measure: str, subject: str, variant: str, value: float, unit: str = "jobs/s", **more: object) -> Sample:
    return Sample(measure, subject, variant, 1, value, unit, more)


def rounds(
    measure: str, subject: str, variant: str, *values: float, unit: str = "jobs/s", **more: object
) -> list[Sample]:
    return [Sample(measure, subject, variant, i + 1, value, unit, more) for i, value in enumerate(values)]


def goal(name: str) -> Goal:
    return next(one for one in GOALS if one.name == name)


def verdict(samples: list[Sample], name: str) -> Verdict:
    (found,) = judge(samples, [goal(name)])
    return found


# --- medians and ratios ---------------------------------------------------------------------------------------------


def test_a_spread_is_the_median_with_the_least_and_the_most() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_a_group_has_the_figure_of_each_round() -> None:
    samples = [
        *rounds("batch drain", "torchrelay", PG1, 10, 20, 30),
        sample("batch drain", "torchrelay", "sqlite, 1 worker", 99),
        record.failed("batch drain", "torchrelay", PG1, 4, "it crashed"),
        Sample("batch drain", "torchrelay", PG1, 3, 40, "jobs/s"),  # done once more
    ]
    first, second = groups(samples)
    assert (first.rounds, second.rounds) == ({1: 10, 2: 20, 3: 40}, {1: 99})
    assert first.spread == Spread(20, 10, 40, 3)
    assert first.errors == ["it crashed"]


def test_a_ratio_is_taken_round_by_round() -> None:
    # Twice as fast in each round, on a machine that was ten times slower in the second.
    assert ratio({1: 200, 2: 20, 3: 240}, {1: 100, 2: 10, 3: 120}) == Spread(2, 2, 2, 3)
    assert ratio({1: 200, 2: 300}, {2: 100, 3: 100}) == Spread(3, 3, 3, 1)
    assert ratio({1: 200, 2: 400}, {3: 100}) == Spread(3, 3, 3, 0)  # no round in common


# --- goals -----------------------------------------------------------------------------------------------------------


def test_goals_have_names_of_their_own() -> None:
    assert len({one.name for one in GOALS}) == len(GOALS)


def test_what_is_faster_than_its_bound_meets_it() -> None:
    ours = rounds("batch drain", "torchrelay", PG1, 80, 60, 100)
    assert verdict(
        [*ours, *rounds("batch drain", "pgqueuer", "batch 100", 40, 20, 50)], "drain-postgresql-pgqueuer"
    ).met
    missed = verdict([*ours, *rounds("batch drain", "bare loop", "postgresql", 200, 200, 200)], "drain-postgresql-bare")
    assert not missed.met
    assert missed.ratio == Spread(0.4, 0.3, 0.5, 3)


def test_the_best_variant_of_the_best_peer_counts_and_is_chosen_once() -> None:
    samples = [
        *rounds("batch drain", "torchrelay", PG1, 100, 100, 100),
        *rounds("batch drain", "pgqueuer", "batch size 10", 10, 90, 10),  # the fastest of one round
        *rounds("batch drain", "pgqueuer", "batch size 100", 50, 50, 50),
        *rounds("batch drain", CELERY_SQL, "redis", 70, 70, 70),
    ]
    found = verdict(samples, "drain-postgresql-pgqueuer")
    assert found.theirs is not None
    assert found.theirs.variant == "batch size 100"
    assert found.ratio == Spread(2, 2, 2, 3)
    assert found.met


def test_less_is_better_for_times() -> None:
    samples = [
        *rounds("latency idle p50", "torchrelay", PG1, 4, 5, 6, unit="ms"),
        *rounds("latency idle p99", "torchrelay", PG1, 12, 10, 9, unit="ms"),
        *rounds("latency idle p50", "Celery, Redis results", "redis", 5, 5, 5, unit="ms"),
    ]
    assert verdict(samples, "latency-p50").met
    spread = verdict(samples, "latency-spread")
    assert spread.ratio == Spread(2, 1.5, 3, 3)
    assert spread.met


def test_a_bound_of_its_own_needs_nobody_else() -> None:
    found = verdict(rounds("idle worker: queries", "torchrelay", "postgresql", 1.5, 2.5, unit="/s"), "idle-queries")
    assert (found.theirs, found.ratio.median, found.met) == (None, 2.0, True)


def test_the_slower_of_two_limits_counts_and_only_where_both_are_known() -> None:
    ours = rounds("digits", "torchrelay", "postgresql, 1 worker", 45, unit="pictures/s")
    torch = rounds("digits", "bare loop", "batch 64", 100, unit="pictures/s")
    slower = rounds("digits", "bare loop", "batch 1", 10, unit="pictures/s")  # not its best
    database = rounds("digits", "bare database loop", "postgresql", 50, unit="pictures/s")
    assert judge([*ours, *torch, *slower], [goal("digits-postgresql")]) == []
    found = verdict([*ours, *torch, *slower, *database], "digits-postgresql")
    assert found.theirs is not None
    assert found.theirs.subject == "bare database loop"
    assert found.met


def test_samples_are_found_by_what_they_say() -> None:
    samples = [
        sample("minilm", "LitServe", "batch 32", 16, batches="in order of arrival"),
        sample("minilm", "LitServe", "batch 1", 43),
        record.failed("minilm", "mosec", "batch 32", 1, "it does not install"),
    ]
    assert [s.value for s in Which("minilm", ("LitServe", "mosec"), more=IN_ORDER).of(samples)] == [16]
    assert [s.value for s in Which("minilm", (), "batch 1").of(samples)] == [43]


def test_what_was_not_measured_is_no_verdict() -> None:
    assert judge([]) == []
    assert judge(rounds("batch drain", "torchrelay", PG1, 1)) == []


def both(ours: float, theirs: float, queries: float = 1.0) -> list[Verdict]:
    return judge(
        [
            sample("batch drain", "torchrelay", PG1, ours),
            sample("batch drain", "pgqueuer", "batch 100", theirs),
            sample("latency idle p50", "torchrelay", PG1, theirs, unit="ms"),
            sample("latency idle p50", "Celery, Redis results", "redis", ours, unit="ms"),
            sample("idle worker: queries", "torchrelay", "postgresql", queries, unit="/s"),
        ]
    )


def test_only_a_ratio_that_fell_by_more_than_half_is_a_regression() -> None:
    before = both(300, 100)
    assert fallen(before, both(160, 100)) == []
    assert fallen(before, both(30, 10)) == []  # a slower machine
    assert fallen(before, both(300, 100, queries=50)) == []  # no ratio
    fell = fallen(before, both(140, 100))
    assert [line.partition(":")[0] for line in fell] == ["drain-postgresql-pgqueuer", "latency-p50"]
    assert "was 3 and is 1.4" in fell[0]
    assert fallen([], both(1, 100)) == []


# --- the page --------------------------------------------------------------------------------------------------------


def test_numbers_have_no_digits_that_noise_made() -> None:
    assert [report.figure(x) for x in (123_456, 1_234, 123.4, 12.34, 0.01234, 0)] == [
        "123,000", "1,230", "123", "12.3", "0.0123", "0",
    ]  # fmt: skip
    assert report.spread(Spread(2, 1, 3, 3)) == "2 (1 – 3)"
    assert report.spread(Spread(2, 2, 2, 1)) == "2"


def test_the_tables_say_who_did_what() -> None:
    samples = [
        *rounds(
            "batch drain", "pgqueuer", "postgresql", 20_000, 22_000, keeps="a log", version="1.6", settings="batch 100"
        ),
        *rounds("batch drain", "torchrelay", PG1, 70_000, 71_000, keeps="everything", version="1", settings="chunks"),
        record.failed("batch drain", "Huey", "redis", 1, "no such|module\nline"),
    ]
    table = report.figures(samples)
    assert table.startswith("### Batches of no-op jobs\n\n| measure | subject |")
    lines = table.splitlines()
    assert lines[4] == (
        "| batch drain | **torchrelay** | postgresql, 1 worker | 70,500 (70,000 – 71,000) | jobs/s | everything |"
    )
    assert "did not run: no such\\|module line" in lines[6]
    assert report.settings(samples).splitlines()[2:] == [
        "| torchrelay | 1 | chunks | batch drain |",
        "| pgqueuer | 1.6 | batch 100 | batch drain |",
    ]
    goals = report.goals(judge(samples))
    assert "| ≥ 2 × pgqueuer at its best batch size |" in goals
    assert "| 3.36 (3.23 – 3.5) | met |" in goals
    assert "met" in report.in_short(samples)
    assert report.in_short([]) == "no goal was measured whole"


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    text = "# Title\n<!-- bench: goals -->\nold\n<!-- /bench: goals -->\nby hand\n"
    once = report.fill(text, {"goals": "| a \\1 |"})
    assert once == "# Title\n<!-- bench: goals -->\n\n| a \\1 |\n\n<!-- /bench: goals -->\nby hand\n"
    assert report.fill(once, {"goals": ""}) == "# Title\n<!-- bench: goals -->\n\n<!-- /bench: goals -->\nby hand\n"
    with pytest.raises(ValueError, match="figures"):
        report.fill(text, {"figures": ""})


def test_the_page_takes_every_part(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(report.PAGE.read_text())
    samples = [
        *rounds("batch drain", "torchrelay", PG1, 70_000, 71_000),
        *rounds("batch drain", "bare loop", "postgresql", 80_000, 81_000),
        *rounds("workers", "torchrelay", PG1, 600),
        *rounds("status p99", "torchrelay", "postgresql, 1,000 rows", 1, unit="ms", rows=1_000),
        *rounds("status p99", "torchrelay", "postgresql, 5,000,000 rows", 2, unit="ms", rows=5_000_000),
    ]
    where = {"cpus": 2, "memory_gib": 8.0, "system": "Linux x86_64", "python": "3.11"}
    report.write(samples, {"written": "2026-01-01", "machine": where, "rounds": 2, "seconds": 1.0}, page)
    text = page.read_text()
    assert "2 cores" in text
    assert "70,500" in text
    for name in ("rates", "rows", "workers"):
        assert f"(performance/{name}.png)" in text
        assert (tmp_path / "performance" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "latency.png" not in text


def test_samples_survive_a_file(tmp_path: Path) -> None:
    samples = [*rounds("a", "b", "c", 1.5, 2.5, keeps="nothing"), record.failed("a", "d", "", 1, "why")]
    file = tmp_path / "results" / "a.json"
    record.save(file, samples, rounds=2)
    assert record.load(file, tmp_path / "none.json") == samples
    assert record.about([file])["rounds"] == 2
    assert record.about([]) == {}
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]
