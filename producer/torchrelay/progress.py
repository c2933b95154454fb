"""A bar on the standard error for a batch that is waited for. Nothing else is shown anywhere by the client."""

from __future__ import annotations

from types import TracebackType

from torchrelay_storage.batch_store import Counts


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
