"""How things look: on a screen, as JSON, and as an exit code. Every command prints through a `Screen`.

What a command gives is on standard output: one JSON document, or JSON lines for streams, with `--json`. Notes, progress
and errors are on standard error, so that a pipe gets the result and nothing else. Not here: what is printed.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

import orjson
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from torchrelay_storage.errors import (
    BatchNotFound,
    Corrupt,
    InvalidInput,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    ModelNotFound,
    NotFound,
    QueueFull,
    RelayError,
    SchemaMismatch,
    Unreachable,
    WaitTimeout,
)


class ExitCode(IntEnum):
    """What a command's end says to a script."""

    DONE = 0
    FAILED = 1  # a job did not succeed, or not in time
    USAGE = 2  # what was asked cannot be done: a bad value, an unknown name or id
    UNREACHABLE = 3  # a part does not answer, or cannot be used as it is: later, the same command may succeed


_CODES: tuple[tuple[type[RelayError], ExitCode], ...] = (
    (JobFailed, ExitCode.FAILED),
    (JobCancelled, ExitCode.FAILED),
    (JobExpired, ExitCode.FAILED),
    (WaitTimeout, ExitCode.FAILED),
    (Corrupt, ExitCode.FAILED),
    (InvalidInput, ExitCode.USAGE),
    (NotFound, ExitCode.USAGE),
    (Unreachable, ExitCode.UNREACHABLE),
    (SchemaMismatch, ExitCode.UNREACHABLE),
    (QueueFull, ExitCode.UNREACHABLE),
)

# What to do next, where the message does not say it itself.
_NEXT: tuple[tuple[type[RelayError], str], ...] = (
    (JobNotFound, "torchrelay list shows the jobs there are"),
    (BatchNotFound, "torchrelay list shows the jobs there are, with their batches"),
    (ModelNotFound, "torchrelay models shows the models there are"),
    (JobFailed, "torchrelay status {job} has the traceback, torchrelay retry {job} runs it again"),
    (JobCancelled, "torchrelay retry {job} runs it after all"),
    (WaitTimeout, "torchrelay watch shows what goes on"),
    (Unreachable, "torchrelay doctor says which part it is, and how to mend it"),
)

PIPE_WIDTH = 500  # columns

STATE_STYLES = {
    "scheduled": "cyan", "queued": "blue", "running": "yellow", "retrying": "magenta",
    "succeeded": "green", "failed": "red", "cancelled": "dim", "expired": "dim red",
    "pausing": "cyan", "paused": "cyan",
}  # fmt: skip


def exit_code(error: RelayError) -> ExitCode:
    """Return the exit code that stands for this error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILED)


def next_step(error: RelayError) -> str | None:
    """Return what to do about this error, or None where its message says it."""
    for kind, words in _NEXT:
        if isinstance(error, kind):
            return words.format(job=getattr(error, "job", ""))
    return None


@dataclass(frozen=True, slots=True)
class Screen:
    """Where a command prints. `as_json`: documents instead of tables, no notes, no progress."""

    as_json: bool = False

    @property
    def out(self) -> Console:
        """Standard output, as it is now."""
        return Console(file=sys.stdout, highlight=False)

    @property
    def err(self) -> Console:
        """Standard error, as it is now."""
        return Console(file=sys.stderr, highlight=False, soft_wrap=True)

    def document(self, document: object) -> None:
        """Print one JSON document, or a line of a stream of them."""
        sys.stdout.write(to_json(document) + "\n")
        sys.stdout.flush()

    def show(self, document: object, *renderables: object) -> None:
        """Print the document with `--json`, else the renderables."""
        if self.as_json:
            self.document(document)
            return
        for renderable in renderables:
            self._print(renderable)

    def _print(self, renderable: object) -> None:
        if sys.stdout.isatty():
            self.out.print(renderable)
            return
        # Whoever reads a pipe wants lines that are not folded at 80 columns, without blanks at their ends.
        console = Console(file=io.StringIO(), highlight=False, width=PIPE_WIDTH)
        console.print(renderable)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.splitlines()))
        sys.stdout.flush()

    def line(self, words: str) -> None:
        """Print a line of plain text (no markup), unless JSON is wanted."""
        if not self.as_json:
            sys.stdout.write(words + "\n")
            sys.stdout.flush()

    def note(self, words: str) -> None:
        """Print something beside the result on standard error, unless JSON is wanted."""
        if not self.as_json:
            self.err.print(words, style="dim", markup=False)

    def error(self, error: RelayError) -> None:
        """Say what went wrong and what to do."""
        hint = next_step(error)
        if self.as_json:
            report = {"type": type(error).__name__, "message": str(error)}
            for name in ("job", "kind", "key", "retry_after", "batch", "stored"):
                if (value := getattr(error, name, None)) is not None:
                    report[name] = value
            if hint:
                report["next"] = hint
            sys.stderr.write(to_json({"error": report}) + "\n")
            return
        self.err.print(f"[bold red]error:[/] {escape(str(error))}")
        if hint:
            self.err.print(f"[dim]next:[/] {escape(hint)}")

    def progress(self, words: str, total: int | None) -> AbstractContextManager[Bar]:
        """Return a progress bar on standard error; silent with JSON or without a terminal."""
        return Bar(words, total, self.err, quiet=self.as_json or not sys.stderr.isatty())


class Bar(AbstractContextManager["Bar"]):
    """A progress bar. It appears, and its clock starts, with the first progress."""

    def __init__(self, words: str, total: int | None, console: Console, *, quiet: bool) -> None:
        self._words = words
        self._total = total
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=quiet,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, n: int = 1) -> None:
        """Go on by n."""
        self._progress.advance(self._begun(), n)

    def at(self, completed: int, total: int | None = None) -> None:
        """Stand at `completed`, of `total` where that changed."""
        self._progress.update(self._begun(), completed=completed, total=total)

    def _begun(self) -> TaskID:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(self._words, total=self._total)
        return self._task


# --- pieces ------------------------------------------------------------------------------------------------


def to_json(document: object) -> str:
    """Return JSON text. What is not JSON is shown as: bytes {"$bytes": base64}, arrays {"$array": ..}, the rest str."""
    options = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATETIME
    try:
        return orjson.dumps(document, default=_not_json, option=options).decode()
    except TypeError:  # an int beyond 64 bits
        return json.dumps(document, default=_not_json)


def _not_json(value: Any) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$bytes": base64.b64encode(value).decode()}
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return {"$array": {"dtype": str(value.dtype), "shape": list(value.shape), "data": value.tolist()}}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Iterable):
        return list(value)
    return str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Iterable[str] = ()) -> Table:
    """Return a table without lines; `numbers` are the columns set to the right."""
    shown = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        right = column in set(numbers)
        # An id that is cut short is of no use; other columns may fold.
        whole = column in ("id", "batch", "job")
        shown.add_column(column, justify="right" if right else "left", no_wrap=whole or right, overflow="fold")
    for row in rows:
        shown.add_row(*(cell(value) for value in row))
    return shown


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Return a list of named facts; those that are None or empty are left out."""
    shown = Table(box=None, pad_edge=False, show_header=False, show_edge=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows:
        if value is not None and value not in ("", {}, ()):
            shown.add_row(name, cell(value))
    return shown


def cell(value: object) -> str:
    """Return a value as a table shows it, with what looks like markup escaped."""
    if value is None:
        return "-"
    text = str(value)
    style = STATE_STYLES.get(text)
    return f"[{style}]{text}[/]" if style else escape(text)


def moment(seconds: float | None) -> str | None:
    """Return seconds since 1970 as ISO 8601 in UTC, to the millisecond."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def span(seconds: float | None) -> str:
    """Return a length of time for people: 0.42 s, 12 s, 3 min, 5 h, 2 d."""
    if seconds is None:
        return "-"
    seconds = max(seconds, 0.0)
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def short(text: str, width: int = 60) -> str:
    """Return the first line of a text, cut to the width."""
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= width else line[: width - 1] + "…"
