"""`torchrelay batch`: a file of inputs, streamed into one batch. What there is, `status`, `result` and `watch` show."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from torchrelay.cli.arguments import (
    BackoffWords,
    Delay,
    ExpiresIn,
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
    point_in_time,
    road_is_open,
)
from torchrelay.cli.output import Bar, ExitCode
from torchrelay.cli.session import Json, Session, core_of
from torchrelay_storage.errors import InvalidInput


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Jobs")(batch)


def batch(
    ctx: typer.Context,
    model: Model,
    file: Annotated[str, typer.Argument(help="JSON Lines: one input a line; - for standard input.", metavar="FILE|-")],
    *,
    priority: Priority = 5,
    key: Annotated[str | None, typer.Option(help="Names the batch: the same again goes on where it stopped.")] = None,
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
    """Submit a batch, a job for each line, and print its id; with --wait, what became of it.

    Where the queue is full it stops, and exits with 3: what is stored by then runs, and the same again with the same
    --key goes on there.
    """
    from torchrelay.cli.documents import counts_document
    from torchrelay.cli.inputs import lines, read_object

    session = Session.of(ctx)
    screen = session.screen
    described, waits = read_object(metadata, "--metadata"), backoff_of(backoff)
    with session.relay() as relay:
        with lines(file) as (values, total), screen.progress("stored", total) as bar:
            stream = _Stream(values, bar)
            try:
                submitted = relay.submit_batch(
                    model, stream, priority=priority, key=key, delay=delay, not_before=point_in_time(not_before),
                    expires_in=expires_in, timeout=timeout, max_attempts=max_attempts, backoff=waits,
                    metadata=described, tenant=tenant,
                )  # fmt: skip
            except InvalidInput:
                if stream.taken:
                    screen.note(
                        "what came before is stored and runs, as a batch without an end; the same stream, mended,"
                    )
                    screen.note("goes on after it where it was submitted with a --key")
                raise
        counts = submitted.counts()
        document: dict[str, Any] = {"id": submitted.id, "model": submitted.model, "total": counts.total}
        if not wait and wait_limit is None:
            screen.show(document | {"redis": road_is_open(core_of(relay), screen)}, submitted.id)
            screen.note(f"{counts.total:,} jobs; `torchrelay watch {submitted.id}` follows them")
            return
        road_is_open(core_of(relay), screen)
        counts = submitted.wait(wait_limit, progress=not session.as_json and sys.stderr.isatty())
    states = counts_document(counts)
    words = ", ".join(f"{n:,} {state}" for state, n in states.items() if n) or "no jobs"
    screen.show(document | {"counts": states}, f"{submitted.id}: {words}")
    if counts.succeeded != counts.total:
        raise typer.Exit(ExitCode.FAILED)


class _Stream:
    """The inputs on their way, counted."""

    def __init__(self, values: Iterator[Any], bar: Bar) -> None:
        self.taken = 0
        self._values = values
        self._bar = bar

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self.taken += 1
            yield value
            self._bar.advance()
