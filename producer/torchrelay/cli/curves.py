"""A run's metrics as curves: in the terminal (plotext) and as a PNG (matplotlib), and as the rows of a table.

Both libraries are imported when a curve is drawn. Not here: where the points come from, and which command shows them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrelay_storage.errors import InvalidInput

if TYPE_CHECKING:
    from torchrelay_storage.run_writer import Point

COLORS = ("blue+", "orange+", "green+", "magenta+", "cyan+", "red+")  # of plotext, in the order of the curves
FIRST = ("train_loss", "validation_loss")  # in this order, whatever else there is
RATE = "learning_rate"
LEGEND_ROWS = 4  # a chart that is lower has no room for the names of its curves
INCHES = (8.0, 3.2)  # of one panel of a PNG
DOTS = 120  # per inch

Curves = Mapping[str, Sequence["Point"]]
"""Points by the metric's name, those of each name by their steps."""


def curves_of(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Return the points by name, losses first, the learning rate last; what is not finite cannot be drawn."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.value is not None and math.isfinite(point.value):
            found.setdefault(point.name, []).append(point)
    return {name: sorted(found[name], key=lambda point: point.step) for name in sorted(found, key=rank)}


def rank(name: str) -> tuple[int, str]:
    """Return the place of a metric among others."""
    if name in FIRST:
        return FIRST.index(name), name
    if name == RATE:
        return 4, name
    return (2 if is_loss(name) else 3), name


def is_loss(name: str) -> bool:
    """Whether this metric is a loss, so that it is drawn with the others."""
    return name.endswith("loss")


def losses(curves: Curves) -> dict[str, Sequence[Point]]:
    """Return the curves of the losses only."""
    return {name: points for name, points in curves.items() if is_loss(name)}


def newest(curves: Curves) -> dict[str, float]:
    """Return the last value of each metric."""
    return {name: points[-1].value for name, points in curves.items()}


def rows(curves: Curves) -> list[tuple[int, int, dict[str, float]]]:
    """Return (step, epoch, values by name) for each validation, or for each step where nothing was validated.

    The training's own metrics are thinned, so a row has the newest of each name at its step.
    """
    validated = [name for name in curves if name not in ("train_loss", RATE)]
    steps = {point.step: point.epoch for name in validated or curves for point in curves[name]}
    found = []
    for step, epoch in sorted(steps.items()):
        values = {}
        for name, points in curves.items():
            if at := bisect_right(points, step, key=lambda point: point.step):
                values[name] = points[at - 1].value
        found.append((step, epoch, values))
    return found


# --- the terminal ------------------------------------------------------------------------------------------


def chart(curves: Curves, width: int, height: int) -> str | None:
    """Return the curves over their steps as text with ANSI colours, or None where there is no line to draw yet."""
    drawn = {name: points for name, points in curves.items() if len(points) > 1}
    if not drawn:
        return None
    import plotext

    plotext.clear_figure()  # plotext has one figure for all
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plot_size(max(width, 20), max(height, LEGEND_ROWS))
    for (name, points), color in zip(drawn.items(), _cycle(len(drawn)), strict=True):
        xs, ys = [point.step for point in points], [point.value for point in points]
        plotext.plot(xs, ys, label=name.replace("_", " "), color=color, marker="braille")
    first, last = (end(point.step for points in drawn.values() for point in points) for end in (min, max))
    plotext.xticks(sorted({round(first + part * (last - first) / 4) for part in range(5)}))
    plotext.xlabel("step")
    return str(plotext.build()).rstrip("\n")


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


# --- a picture ---------------------------------------------------------------------------------------------


def save(curves: Curves, path: Path, title: str) -> None:
    """Write the curves to a PNG: the losses in one panel, scores from 0 to 1 in another, each other metric in its own.

    Raises:
        InvalidInput: there is nothing to draw, matplotlib is not installed, or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise InvalidInput(f"--plot writes PNG pictures; name a file that ends with .png, not {path.name!r}")
    panels = _panels(curves)
    if not panels:
        raise InvalidInput("the run has no metrics yet, so there is nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidInput("--plot needs matplotlib: `pip install 'torchrelay[plot]'`") from None
    figure = Figure(figsize=(INCHES[0], INCHES[1] * len(panels)), dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, names in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _fill(axes, {name: curves[name] for name in names})
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror or error}") from error


def _fill(axes: Any, curves: Curves) -> None:
    for name, points in curves.items():
        xs, ys = [point.step for point in points], [point.value for point in points]
        marker = "o" if len(points) < 50 else ""
        axes.plot(xs, ys, label=name.replace("_", " "), marker=marker, markersize=3, linewidth=1.2)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()


def _panels(curves: Curves) -> list[list[str]]:
    together = [name for name in curves if is_loss(name)]
    scores = [name for name in curves if name not in together and name != RATE and _is_score(curves[name])]
    alone = [[name] for name in curves if name not in together and name not in scores]
    return [group for group in (together, scores, *alone) if group]


def _is_score(points: Sequence[Point]) -> bool:
    return all(0.0 <= point.value <= 1.0 for point in points)
