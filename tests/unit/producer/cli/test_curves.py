"""Curves of a run's metrics: which points they have, what is drawn in a terminal and as a picture."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from torchrelay.cli import curves
from torchrelay_storage.errors import InvalidInput
from torchrelay_storage.run_writer import Point

NAN = float("nan")


def some_points() -> list[Point]:
    points = [Point("train_loss", step, step // 10, math.exp(-step / 10)) for step in range(1, 41)]
    points += [Point("learning_rate", step, step // 10, 1e-3) for step in range(1, 41)]
    for step in (10, 20, 30, 40):
        points += [Point("accuracy", step, step // 10, step / 50), Point("validation_loss", step, step // 10, 1 / step)]
    return points


def test_the_losses_come_first_and_the_rate_last() -> None:
    found = curves.curves_of(some_points())
    assert list(found) == ["train_loss", "validation_loss", "accuracy", "learning_rate"]
    assert list(curves.losses(found)) == ["train_loss", "validation_loss"]
    assert curves.newest(found)["accuracy"] == 0.8


def test_points_are_sorted_and_what_is_not_finite_is_left_out() -> None:
    found = curves.curves_of(
        [Point("x", 2, 0, 2.0), Point("x", 3, 0, NAN), Point("x", 1, 0, 1.0), Point("y", 1, 0, NAN)]
    )
    assert [(p.step, p.value) for p in found["x"]] == [(1, 1.0), (2, 2.0)]
    assert list(found) == ["x"]


def test_a_row_for_each_validation_has_the_newest_of_each_metric() -> None:
    thinned = [p for p in some_points() if p.name != "train_loss" or p.step % 8 == 0]
    rows = curves.rows(curves.curves_of(thinned))
    assert [(step, epoch) for step, epoch, _ in rows] == [(10, 1), (20, 2), (30, 3), (40, 4)]
    assert rows[0][2] == {"train_loss": math.exp(-0.8), "validation_loss": 0.1, "accuracy": 0.2, "learning_rate": 1e-3}


def test_without_a_validation_there_is_a_row_for_each_step() -> None:
    rows = curves.rows(curves.curves_of([Point("train_loss", step, 0, 1.0) for step in (1, 5)]))
    assert [step for step, *_ in rows] == [1, 5]


def test_a_chart_has_its_size_its_names_and_its_curves() -> None:
    drawn = curves.chart(curves.losses(curves.curves_of(some_points())), 60, 12)
    assert drawn is not None
    lines = drawn.splitlines()
    assert len(lines) == 12
    assert "train loss" in drawn
    assert "validation loss" in drawn
    assert "step" in lines[-1]
    assert lines[-2].replace("\x1b[0m", "").split() == ["1", "11", "20", "30", "40"]
    assert any("\u2800" < character < "\u2900" for character in drawn), "the curves are drawn in Braille"
    again = curves.chart({"x": [Point("x", 1, 0, 1.0), Point("x", 2, 0, 2.0)]}, 60, 12)
    assert again is not None
    assert "train loss" not in again, "a chart keeps nothing of the one before"


@pytest.mark.parametrize("points", [[], [Point("train_loss", 1, 0, 1.0)]])
def test_there_is_no_chart_without_a_line(points: list[Point]) -> None:
    assert curves.chart(curves.curves_of(points), 60, 12) is None


def test_a_picture(tmp_path: Path) -> None:
    curves.save(curves.curves_of([*some_points(), Point("rmse", 10, 1, 57.0)]), tmp_path / "run.png", "digits")
    data = (tmp_path / "run.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert width == 960
    assert height == 4 * 384, "losses, scores, the error, the rate"


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    found = curves.curves_of(some_points())
    with pytest.raises(InvalidInput, match="no metrics"):
        curves.save({}, tmp_path / "run.png", "")
    with pytest.raises(InvalidInput, match=r"ends with \.png"):
        curves.save(found, tmp_path / "run.pdf", "")
    with pytest.raises(InvalidInput, match="cannot be written"):
        curves.save(found, tmp_path / "missing" / "run.png", "")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidInput, match=r"pip install 'torchrelay\[plot\]'"):
        curves.save(curves.curves_of(some_points()), tmp_path / "run.png", "")


def test_both_libraries_are_imported_when_they_are_used() -> None:
    code = """if True:
        import sys
        from torchrelay.cli import curves, runs, train, watch_runs
        print(sorted({"plotext", "matplotlib", "numpy"} & {name.partition(".")[0] for name in sys.modules}))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
