"""Commands about jobs, and about runs and batches by their ids: submit, status, list, cancel, retry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from torchrelay.cli.arguments import (
    BackoffWords,
    Delay,
    ExpiresIn,
    Id,
    Key,
    MaxAttempts,
    Metadata,
    Model,
    NotBefore,
    Priority,
    Tenant,
    Timeout,
    Wait,
    WaitLimit,
    backoff_of,
    complete_model,
    kind_of,
    point_in_time,
    road_is_open,
)
from torchrelay.cli.results import show_result
from torchrelay.cli.session import Json, Session, core_of
from torchrelay_storage import ids
from torchrelay_storage.errors import (
    BatchNotFound,
    InvalidInput,
    JobNotFound,
    NotFound,
)
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.states import TERMINAL, JobState

if TYPE_CHECKING:
    from torchrelay.core import Core

PANEL = "Jobs"


def add(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(rich_help_panel=PANEL)(submit)
    app.command(rich_help_panel=PANEL)(status)
    app.command("list", rich_help_panel=PANEL)(list_)
    app.command(rich_help_panel=PANEL)(cancel)
    app.command(rich_help_panel=PANEL)(retry)


# --- submit ------------------------------------------------------------------------------------------------


def submit(
    ctx: typer.Context,
    model: Model,
    input_: Annotated[
        str,
        typer.Option("--input", "-i", metavar="JSON|@FILE|-", help="JSON; @file.json, .txt, .npy, .png …; - stdin."),
    ],
    *,
    priority: Priority = 5,
    key: Key = None,
    delay: Delay = None,
    not_before: NotBefore = None,
    expires_in: ExpiresIn = None,
    timeout: Timeout = None,
    max_attempts: MaxAttempts = 3,
    backoff: BackoffWords = None,
    metadata: Metadata = None,
    tenant: Tenant = "",
    wait: Wait = False,
    wait_limit: WaitLimit = None,
    _json: Json = False,
) -> None:
    """Submit one job and print its id; with --wait, its result."""
    from torchrelay.cli.inputs import read_object, read_value

    session = Session.of(ctx)
    screen = session.screen
    value, described, waits = read_value(input_), read_object(metadata, "--metadata"), backoff_of(backoff)
    with session.relay() as relay:
        core = core_of(relay)
        job = relay.submit(
            model, value, priority=priority, key=key, delay=delay, not_before=point_in_time(not_before),
            expires_in=expires_in, timeout=timeout, max_attempts=max_attempts, backoff=waits, metadata=described,
            tenant=tenant,
        )  # fmt: skip
        if not wait and wait_limit is None:
            document = {"id": job.id, "state": job.state.value, "model": job.model}
            screen.show(document | {"redis": road_is_open(core, screen)}, job.id)
            return
        screen.note(f"{job.id}: waiting for its result")
        road_is_open(core, screen)
        job.wait(wait_limit)
        show_result(screen, core, core.job(ids.read(Kind.JOB, job.id)), None)


# --- status and list ---------------------------------------------------------------------------------------


def status(ctx: typer.Context, id_: Id, _json: Json = False) -> None:
    """Show one job, training run or batch."""
    from torchrelay.cli import documents
    from torchrelay.cli.runs import show_run

    session = Session.of(ctx)
    with session.core() as core:
        if kind_of(id_) is Kind.JOB:
            row = core.job(ids.read(Kind.JOB, id_), with_output=False)
            if row.trains is not None:
                show_run(session, core, id_)
                return
            tries = core.jobs.attempts(row.id)
            document = documents.job_document(row) | {"attempts": [documents.attempt_document(a) for a in tries]}
            session.screen.show(document, documents.job_facts(row), *documents.attempts_shown(tries))
        else:
            number = ids.read(Kind.BATCH, id_)
            batch, counts = core.batches.get(number), core.batches.counts(number)
            session.screen.show(documents.batch_document(batch, counts), documents.batch_facts(batch, counts))


def list_(
    ctx: typer.Context,
    *,
    state: Annotated[list[JobState] | None, typer.Option(help="Only these; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.", autocompletion=complete_model)] = None,
    batch: Annotated[str | None, typer.Option(help="Only of this batch.", metavar="ID")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="How many at most.")] = 20,
    before: Annotated[
        str | None, typer.Option(help="The last id of the page before: show what is older.", metavar="ID")
    ] = None,
    batches: Annotated[bool, typer.Option("--batches", help="List batches instead (with --model).")] = False,
    runs: Annotated[bool, typer.Option("--runs", help="List training runs instead (with --model, --state).")] = False,
    _json: Json = False,
) -> None:
    """List jobs, the newest first; with --batches, batches; with --runs, training runs."""
    from torchrelay.cli import documents
    from torchrelay.cli.runs import list_runs

    session = Session.of(ctx)
    if runs:
        if batch or tenant or batches:
            raise InvalidInput("--runs goes with --model, --state, --limit and --before")
        list_runs(session, model, state or [], limit, before)
        return
    if batches:
        if state or batch or tenant:
            raise InvalidInput("--batches goes with --model, --limit and --before")
        _list_batches(session, model, limit, before)
        return
    with session.core() as core:
        rows = core.page(state=state or None, model=model, batch=batch, tenant=tenant, limit=limit, before=before)
        if session.as_json:
            session.screen.document([documents.job_document(row) for row in rows])
            return
        if not rows:
            session.screen.note("no job is like this")
            return
        session.screen.show(None, documents.jobs_table(rows, core.db.now()))
        if len(rows) == limit:
            session.screen.note(f"there may be more: --before {show(Kind.JOB, rows[-1].id)}")
        if state == [JobState.FAILED]:
            session.screen.note("`torchrelay retry --state failed` runs them again, `torchrelay retry j_…` one")


def _list_batches(session: Session, model: str | None, limit: int, before: str | None) -> None:
    from torchrelay.cli import documents

    last = ids.read(Kind.BATCH, before) if before is not None else None
    with session.core() as core:
        name = core.model(model).name if model is not None else None
        rows = core.batches.page(limit=limit, before=last, model=name)
        found = [(row, core.batches.counts(row.id)) for row in rows]
        if session.as_json:
            session.screen.document([documents.batch_document(row, counts) for row, counts in found])
        elif found:
            session.screen.show(None, documents.batches_table(found, core.db.now()))
            if len(rows) == limit:
                session.screen.note(f"there may be more: --before {show(Kind.BATCH, rows[-1].id)}")
        else:
            session.screen.note("there is no batch")


# --- cancel and retry --------------------------------------------------------------------------------------


def cancel(
    ctx: typer.Context,
    which: Annotated[list[str], typer.Argument(help="Ids of jobs or batches.", metavar="ID…")],
    _json: Json = False,
) -> None:
    """Cancel jobs, or all open jobs of batches.

    A job that runs goes on to its end, and its result is dropped. A training run ends within seconds; its last
    checkpoint is kept, and `retry` goes on from there.
    """
    session = Session.of(ctx)

    with session.core() as core:

        def one(number: int) -> int:
            return core.cancel([number])

        counts = _each(core, which, one, core.cancel_batch)
    total = sum(counts.values())
    session.screen.show({"cancelled": total, "by_id": counts}, f"{total:,} cancelled")
    for name in (name for name, count in counts.items() if count == 0):
        session.screen.note(f"{name} had nothing to cancel: it has ended")


def retry(
    ctx: typer.Context,
    which: Annotated[list[str] | None, typer.Argument(help="Ids of jobs or batches.", metavar="ID…")] = None,
    *,
    state: Annotated[
        list[JobState] | None,
        typer.Option(help="All in this state: failed (the default with the options below), cancelled, expired."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.", autocompletion=complete_model)] = None,
    batch: Annotated[str | None, typer.Option(help="Only of this batch.", metavar="ID")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    _json: Json = False,
) -> None:
    """Run jobs again that ended without success: by id, the failed ones of a batch, or all that the options name.

    They get all their attempts anew; `torchrelay status` goes on showing the earlier ones.
    """
    from torchrelay.retries import retry_where

    session = Session.of(ctx)
    wanted = bool(state or model or batch) or tenant is not None
    if which and wanted:
        raise InvalidInput("pass either ids, or options that say which jobs: --state, --model, --batch, --tenant")
    if not which and not wanted:
        raise InvalidInput("say which jobs: ids, or --state failed, which --model, --batch and --tenant narrow down")
    with session.core() as core:

        def one(number: int) -> int:
            return core.retry(number, core.job(number, with_output=False).model)

        def of_batch(number: int) -> int:
            return core.retry_failed(number, core.batches.get(number).model)

        if which:
            counts = _each(core, which, one, of_batch)
        else:
            counts = {
                word.value: retry_where(core, state=word, model=model, batch=batch, tenant=tenant)
                for word in dict.fromkeys(_retriable(state))
            }
        if any(counts.values()):
            road_is_open(core, session.screen)
    total = sum(counts.values())
    session.screen.show({"retried": total, "by_id" if which else "by_state": counts}, f"{total:,} will run again")
    if not total:
        session.screen.note(
            "nothing to retry: a job must have failed, expired or been cancelled; of a batch the failed"
        )
        session.screen.note("jobs are retried, and `--state cancelled --batch b_…` retries others")


def _each(core: Core, which: list[str], job: Callable[[int], int], batch: Callable[[int], int]) -> dict[str, int]:
    """Do it to each id, once all of them are known to exist; return how many jobs each id brought."""
    numbers = {text: ids.read(kind_of(text), text) for text in which}
    jobs = {text for text in which if kind_of(text) is Kind.JOB}
    found = core.jobs.get([numbers[text] for text in jobs], with_output=False)
    missing = [text for text in which if text in jobs and numbers[text] not in found]
    if missing:
        raise JobNotFound(f"no job has the id {', '.join(missing)}; nothing was done")
    for text in which:
        if text not in jobs:
            try:
                core.batches.get(numbers[text])
            except NotFound as error:
                raise BatchNotFound(f"{error}; nothing was done") from None
    return {text: job(numbers[text]) if text in jobs else batch(numbers[text]) for text in numbers}


def _retriable(states: list[JobState] | None) -> list[JobState]:
    """The states that are asked for, all of them checked before anything is done."""
    if bad := [word.value for word in states or () if word not in TERMINAL - {JobState.SUCCEEDED}]:
        raise InvalidInput(f"--state {bad[0]}: only failed, cancelled and expired jobs can be retried")
    return states or [JobState.FAILED]
