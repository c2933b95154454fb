"""Views that keep themselves up to date: a table on a terminal, else a line for each change, or JSON lines.

Not here: what is looked at (`watch`, `watch_runs`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.live import Live

from torchrelay.cli.output import ExitCode, Screen
from torchrelay_storage.errors import WaitTimeout


@dataclass(frozen=True, slots=True)
class View:
    """What is seen at a moment: as JSON, as a line, as a table; and whether that was the end, with which exit code."""

    document: dict[str, Any]
    line: str
    table: Any
    ended: bool = False
    code: int = ExitCode.DONE


def follow(screen: Screen, look: Callable[[], View], every: float, limit: float | None = None) -> View:
    """Show one view after the other and return the last, which is the end.

    Args:
        every: seconds between two looks.
        limit: seconds after which it is given up; None: never.

    Raises:
        WaitTimeout: the limit is over; what was looked at goes on.
    """
    until = time.monotonic() + limit if limit is not None else None
    view = look()
    if screen.as_json or not sys.stdout.isatty():
        shown: object = None
        while True:
            # The age of things is no news.
            if (seen := view.document if screen.as_json else view.line) != shown:
                screen.document(view.document) if screen.as_json else screen.line(view.line)
                shown = seen
            if view.ended:
                return view
            _sleep(every, until)
            view = look()
    with Live(view.table, console=screen.out, auto_refresh=False) as live:
        while not view.ended:
            _sleep(every, until)
            view = look()
            live.update(view.table, refresh=True)
    return view


def _sleep(seconds: float, until: float | None) -> None:
    if until is not None:
        left = until - time.monotonic()
        if left <= 0:
            raise WaitTimeout("the time to watch is over; what was watched goes on")
        seconds = min(seconds, left)
    time.sleep(seconds)
