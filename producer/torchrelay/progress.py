"""A bar on the standard error for a batch or a run that is waited for. Nothing else is shown by the client."""

from __future__ import annotations

from types import TracebackType

from torchrelay_storage.batch_store import Counts
from torchrelay_storage.runs import RunRow


class Progress:
    """A context manager; `show` as often as one likes."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[others]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(title, total=None, others="")

    def show(self, counts: Counts) -> None:
        """Draw the bar for these counts."""
        others = [
            f"{n} {name}"
            for name, n in (
                ("failed", counts.failed),
                ("cancelled", counts.cancelled),
                ("expired", counts.expired),
                ("retrying", counts.retrying),
            )
            if n
        ]
        self._bar.update(
            self._task, completed=counts.ended, total=counts.total if counts.closed else None, others=", ".join(others)
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()


class RunProgress:
    """The same of a training run."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[how]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(title, total=None, how="waits for a worker that trains")

    def show(self, run: RunRow) -> None:
        """Draw the bar for a run as it is now."""
        how = ["paused"] if run.paused else [run.phase] if run.phase else []
        if run.epochs:
            how.append(f"epoch {run.epoch}/{run.epochs}")
        if run.examples_per_s:
            how.append(f"{run.examples_per_s:,.0f} examples/s")
        if run.eta is not None and not run.paused:
            how.append(f"{_span(run.eta)} left")
        if how:
            self._bar.update(self._task, how=", ".join(how))
        self._bar.update(self._task, completed=run.step, total=run.steps or None)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()


def _span(seconds: float) -> str:
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
