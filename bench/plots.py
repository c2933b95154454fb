"""Pictures of what was measured: rates and latencies of all subjects, and what more workers and rows do.

Where subjects differ by orders of magnitude the scale is a logarithm's, which says so; else it begins at zero.

Colours say who it is: ours, a limit, a peer. Whiskers are the least and the most over the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from goals import OURS
from matplotlib.axes import Axes
from record import Sample
from verdicts import Group, groups

COLOURS = {"ours": "#1f5f99", "limit": "#d08a1d", "peer": "#9aa3ad"}
DPI = 110


def draw(samples: Sequence[Sample], folder: Path) -> dict[str, Path]:
    """Draw what there are samples for; return each picture's title and file."""
    found = groups([sample for sample in samples if sample.value > 0])
    pictures: dict[str, tuple[str, Callable[[Sequence[Group]], Any]]] = {
        "Jobs per second, on a log scale": ("rates.png", _rates),
        "Milliseconds from submit to result, on a log scale": ("latency.png", _latency),
        "Real inference": ("inference.png", _inference),
        "More rows": ("rows.png", _rows),
        "More workers": ("workers.png", _workers),
    }
    drawn = {}
    for title, (name, picture) in pictures.items():
        if (made := picture(found)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            made.savefig(folder / name, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
            plt.close(made)
            drawn[title] = folder / name
    return drawn


def _rates(found: Sequence[Group]) -> Any:
    return _bars(found, ("batch submit", "batch drain", "single submit", "single drain"), "jobs/s", columns=2)


def _latency(found: Sequence[Group]) -> Any:
    return _bars(found, ("latency idle p50", "latency idle p99"), "ms", columns=2)


def _inference(found: Sequence[Group]) -> Any:
    return _bars(found, ("minilm", "digits", "efficientnet"), "a second", columns=1, scale="linear")


def _bars(found: Sequence[Group], measures: Sequence[str], unit: str, *, columns: int, scale: str = "log") -> Any:
    """One panel a measure, a bar a subject and variant, the best on top."""
    panels = [(measure, [g for g in found if g.measure == measure and g.spread]) for measure in measures]
    panels = [(measure, some) for measure, some in panels if some]
    if not panels:
        return None
    lines = -(-len(panels) // columns)
    height = sum(max(len(some) for _, some in panels[i * columns : (i + 1) * columns]) for i in range(lines))
    picture, axes = plt.subplots(lines, columns, figsize=(7 * columns, 0.32 * height + 1.1 * lines), squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, (measure, some) in zip(axes.flat, panels, strict=False):
        some.sort(key=_median, reverse=unit == "ms")
        medians = [_median(group) for group in some]
        least = [m - group.spread.least for m, group in zip(medians, some, strict=True) if group.spread]
        most = [group.spread.most - m for m, group in zip(medians, some, strict=True) if group.spread]
        place.barh(
            range(len(some)), medians, xerr=[least, most], color=[COLOURS[_role(g)] for g in some],
            error_kw={"ecolor": "#333333", "elinewidth": 1},
        )  # fmt: skip
        place.set_yticks(range(len(some)), [group.name for group in some], fontsize=8)
        for i, (median, up) in enumerate(zip(medians, most, strict=True)):
            shown = f" {median:,.3g}" if median < 1000 else f" {median:,.0f}"
            place.annotate(shown, (median + up, i), va="center", fontsize=7)
        place.set_xscale(scale)
        place.margins(x=0.15)
        if scale == "linear":
            place.set_xlim(left=0.0)
        place.set_title(f"{measure} ({some[0].last.unit})", fontsize=10)
        place.spines[["top", "right"]].set_visible(False)
    picture.tight_layout()
    return picture


def _rows(found: Sequence[Group]) -> Any:
    """p99 of each question against the number of rows."""
    series = _series(found, lambda g: g.measure.endswith("p99") and "rows" in g.last.more, "rows")
    if not series:
        return None
    picture, place = plt.subplots(figsize=(7, 4))
    for (measure, kind), points in series.items():
        style = "-o" if kind == "postgresql" else "--s"
        place.plot(*zip(*points, strict=True), style, label=f"{measure}, {kind}", markersize=4)
    place.set(xscale="log", yscale="log", xlabel="jobs in the tables", ylabel="ms")
    place.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    place.grid(alpha=0.3)
    return picture


def _workers(found: Sequence[Group]) -> Any:
    """Left: real workers against so many times one. Right: PostgreSQL's cores, measured and computed."""
    real = sorted((int(g.variant.split()[1]), _median(g)) for g in found if g.measure == "workers")
    cores = sorted((int(g.last.more["workers"]), _median(g)) for g in found if g.measure.endswith("PostgreSQL's cores"))
    laws = [g.last.more["law"] for g in found if g.measure.endswith("cores for 1,000")]
    if not real and not cores:
        return None
    picture, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    if real:
        left.plot(*zip(*real, strict=True), "-o", color=COLOURS["ours"], label="measured")
        first, rate = real[0]
        ideal = [(n, n * rate / first) for n, _ in real]
        left.plot(*zip(*ideal, strict=True), ":", color="#333333", label="ideal")
        left.set(xlabel="workers that sleep like a GPU", ylabel="jobs/s")
    if cores:
        right.plot(*zip(*cores, strict=True), "o", color=COLOURS["ours"], label="measured, simulated workers")
        right.set(xscale="log", yscale="log", xlabel="workers", ylabel="cores of PostgreSQL")
    for a, b, c in laws[:1]:
        computed = [(n, a + b * n + c * n * n) for n in (10 * 1.2**i for i in range(26))]
        right.plot(*zip(*computed, strict=True), ":", color="#333333", label="computed")
    _legends(left, right)
    return picture


def _legends(*places: Axes) -> None:
    for place in places:
        place.grid(alpha=0.3)
        if place.get_legend_handles_labels()[1]:
            place.legend(fontsize=8)


def _series(
    found: Sequence[Group], wanted: Callable[[Group], bool], along: str
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for group in filter(wanted, found):
        key = group.measure, group.variant.partition(",")[0]
        series.setdefault(key, []).append((float(group.last.more[along]), _median(group)))
    return {key: sorted(points) for key, points in series.items() if len(points) > 1}


def _median(group: Group) -> float:
    return group.spread.median if group.spread is not None else 0.0


def _role(group: Group) -> str:
    return "ours" if group.subject == OURS else "limit" if group.subject.startswith("bare") else "peer"
