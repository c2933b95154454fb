"""Commands that run things and look at what runs: demo, up, worker, workers, doctor."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchrelay.cli.output import Screen, facts, moment, short, span, table
from torchrelay.cli.session import Json, Session, core_of
from torchrelay.settings import safe_url
from torchrelay_storage.errors import InvalidInput

if TYPE_CHECKING:
    from torchrelay.client import Relay
    from torchrelay.doctor import Finding
    from torchrelay.embedded import Happening
    from torchrelay.handles import Run
    from torchrelay_storage.fleet import WorkerRow

START, RUN = "Start here", "Run and operate"


def add_first(app: typer.Typer) -> None:
    """Add the commands with which people begin."""
    app.command(rich_help_panel=START)(demo)
    app.command(rich_help_panel=START)(up)


def add_last(app: typer.Typer) -> None:
    """Add the operator's commands."""
    app.command(
        rich_help_panel=RUN,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(worker)
    app.command(rich_help_panel=RUN)(workers)
    app.command(rich_help_panel=RUN)(doctor)


# --- up ----------------------------------------------------------------------------------------------------


def up(
    ctx: typer.Context,
    *,
    workers: Annotated[int, typer.Option("--workers", "-w", min=0, max=64, help="Worker processes to start.")] = 1,
    models: Annotated[str | None, typer.Option(help="Names of the models to serve, with commas; default all.")] = None,
    train: Annotated[str, typer.Option(help="Training runs: also (beside inference), only, or no.")] = "also",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    torch_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one forward pass on a CPU; default: the cores, shared out.")
    ] = None,
    _json: Json = False,
) -> None:
    """Run everything on this machine, in the foreground: Redis, SQLite and workers in one folder. Ctrl-C ends it."""
    from torchrelay.embedded import Stack

    session = Session.of(ctx)
    settings, screen = session.settings, session.screen
    if workers:
        need_torch()

    def tell(happening: Happening) -> None:
        if screen.as_json:
            screen.document({"event": happening.what, **happening.details})
        else:
            screen.line(_words(happening))

    if train not in ("also", "only", "no"):
        raise InvalidInput(f"--train must be also, only or no, not {train!r}")
    names = [name.strip() for name in (models or "").split(",") if name.strip()]
    stack = Stack(
        settings, workers=workers, models=names, train=train, device=device, torch_threads=torch_threads, tell=tell
    )
    with stop_signals() as stop, stack:
        stack.wait_ready(until=stop)
        ready = {
            "event": "ready", "home": str(settings.home), "database": safe_url(settings.database_url),
            "broker": safe_url(settings.broker_url), "workers": workers, "pid": os.getpid(),
        }  # fmt: skip
        if not stop.is_set():
            screen.show(ready, facts([
                ("", "torchrelay is up; Ctrl-C ends it"),
                ("folder", settings.home),
                ("database", safe_url(settings.database_url)),
                ("broker", safe_url(settings.broker_url)),
                ("logs", settings.home / "logs"),
                ("workers", str(workers)),
            ]))  # fmt: skip
        stack.run(until=stop)
        screen.note("ending: workers finish or hand back what they hold")
    screen.show({"event": "ended"}, "ended; nothing is left running")


def _words(happening: Happening) -> str:
    details = happening.details
    match happening.what:
        case "redis":
            return f"redis    {details['server']}"
        case "worker":
            return f"worker   {details['name']} on {details['device']}"
        case "lost":
            return f"{details['process']} ended with code {details['code']} and is started again; see {details['log']}"
        case _:
            return f"{happening.what}: {', '.join(str(v) for v in details.values())}"


@contextmanager
def stop_signals() -> Iterator[Event]:
    """Yield an event that SIGINT, SIGTERM or SIGHUP sets. A second one leaves at once; the keepers end the rest."""
    stop = Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    before: dict[int, Any] = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- worker ------------------------------------------------------------------------------------------------


def worker(ctx: typer.Context) -> None:
    """Run one worker on one device: --models a,b --train also --device auto … (its own --help has all)."""
    if not {"-h", "--help"} & set(ctx.args):
        need_torch()
    environment = os.environ | Session.of(ctx).settings.as_environment()
    sys.stdout.flush()
    # The worker takes this process's place: signals, exit code and process id are its own.
    os.execve(sys.executable, [sys.executable, "-m", "torchrelay_worker", *ctx.args], environment)


def need_torch() -> None:
    """Raise InvalidInput that says what to install, if a worker cannot run here. Imports nothing."""
    missing = [name for name in ("torch", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput(
            f"a worker needs {' and '.join(missing)}, which this Python lacks; install the torch build for this "
            "machine's device (the README says how), then `pip install 'torchrelay[worker]'`"
        )


def workers(
    ctx: typer.Context,
    every: Annotated[bool, typer.Option("--all", help="Also those that have ended, and how, or fell silent.")] = False,
    _json: Json = False,
) -> None:
    """List the workers that are alive, with what they serve."""
    from torchrelay_storage.fleet import Fleet

    session = Session.of(ctx)
    with session.database() as database:
        found = [w for w in Fleet(database).workers(session.settings.stale_after) if every or w.alive]
    rows = [
        [w.name, "alive" if w.alive else "ended" if w.stopped_at else "silent", w.device, f"{w.host}/{w.pid}",
         ", ".join(w.models) if w.models is not None else "all", span(w.beat_age), w.ended]
        for w in found
    ]  # fmt: skip
    columns = ["worker", "state", "device", "host/pid", "models", "last beat", "how it ended"]
    if not any(w.ended for w in found):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    if found or session.as_json:
        session.screen.show([worker_document(w) for w in found], table(columns, rows, numbers=("last beat",)))
    else:
        session.screen.note("no worker is alive; `torchrelay up` or `torchrelay worker` starts one")


def worker_document(row: WorkerRow) -> dict[str, Any]:
    """Return a worker as JSON shows it."""
    from torchrelay_storage import ids

    return {
        "id": ids.show(ids.Kind.WORKER, row.id), "name": row.name, "alive": row.alive, "device": row.device,
        "host": row.host, "pid": row.pid, "models": row.models, "started_at": moment(row.started_at),
        "beat_at": moment(row.beat_at), "stopped_at": moment(row.stopped_at), "ended": row.ended,
        "stats": dict(row.stats),
    }  # fmt: skip


# --- doctor ------------------------------------------------------------------------------------------------

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


def doctor(ctx: typer.Context, _json: Json = False) -> None:
    """Check each part and say what to fix. Exits with 0, 1 (a part fails) or 3 (a part does not answer)."""
    from torchrelay.doctor import examine, exit_code

    session = Session.of(ctx)
    screen, findings = session.screen, []
    for finding in examine(session.settings):
        findings.append(finding)
        if not session.as_json:
            _print_finding(screen, finding)
    code = exit_code(findings)
    if session.as_json:
        screen.document({"ok": code == 0, "checks": [_finding_document(f) for f in findings]})
    raise typer.Exit(code)


def _print_finding(screen: Screen, finding: Finding) -> None:
    from rich.markup import escape

    grade = finding.grade.value
    screen.out.print(f"[{_STYLES[grade]}]{grade:<8}[/] [bold]{finding.part:<10}[/] {escape(finding.says)}")
    if finding.fix and finding.grade.value in ("failed", "warning"):
        screen.out.print(f"{' ' * 20}[cyan]fix:[/] {escape(finding.fix)}")


def _finding_document(finding: Finding) -> dict[str, Any]:
    return {"part": finding.part, "grade": finding.grade.value, "says": finding.says, "fix": finding.fix,
            "details": finding.details}  # fmt: skip


# --- demo --------------------------------------------------------------------------------------------------


def demo(ctx: typer.Context, _json: Json = False) -> None:
    """See it work: train a small net on real digits as a job, and classify 1,797 pictures with it through the queue."""
    from torchrelay import demo as show

    session = Session.of(ctx)
    screen = session.screen
    need_torch()
    settings = show.embedded_settings(session.settings)
    with training_bar(screen) as training, screen.progress("pictures", None) as bar:
        report = show.run(settings, note=screen.note, training=training, progress=bar.at)
    counts = report.counts
    screen.show(
        report.document(),
        "",
        facts([
            ("model", f"{report.model}, trained by {report.run}"),
            ("jobs", ", ".join(f"{n:,} {state}" for state, n in counts.items() if n) or "none"),
            ("accuracy", f"{report.accuracy:.1%} on the {report.held_out} pictures that it was not trained on"),
            ("speed", f"{report.jobs_per_second:,.0f} jobs/s, {span(report.seconds)} from submit to last result"),
            ("rows", short(report.database, 200)),
            ("try next", "\n".join(report.commands)),
        ]),
    )  # fmt: skip
    raise typer.Exit(0 if report.succeeded else 1)


@contextmanager
def training_bar(screen: Screen) -> Iterator[Callable[[Relay, Run], None]]:
    """Yield what shows how far a run is, on standard error; its last view stays. Silent as `Screen.progress` is."""
    from rich.console import Console
    from rich.live import Live

    from torchrelay.cli.watch_runs import OneRun
    from torchrelay_storage import ids

    if screen.as_json or not sys.stderr.isatty():
        yield lambda relay, run: None
        return
    looks: dict[str, OneRun] = {}
    live = Live(console=Console(stderr=True, highlight=False), auto_refresh=False)

    def show(relay: Relay, run: Run) -> None:
        if run.id not in looks:
            looks[run.id] = OneRun(core_of(relay), ids.read(ids.Kind.JOB, run.id))
            live.start()
        view = looks[run.id]()
        live.update(view.table, refresh=True)
        if view.ended:
            live.stop()

    try:
        yield show
    finally:
        live.stop()
