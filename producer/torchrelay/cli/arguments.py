"""Arguments and options that several commands share, and what their values mean. Not here: any command."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from torchrelay.cli.output import Screen
from torchrelay.cli.session import Session
from torchrelay_storage import ids
from torchrelay_storage.errors import InvalidInput, JobNotFound, RelayError
from torchrelay_storage.ids import Kind

if TYPE_CHECKING:
    from torchrelay.core import Core
    from torchrelay_storage.options import Backoff


def complete_model(incomplete: str) -> list[str]:
    """Return the names of models that begin so, for the shell; none where there is no database."""
    from torchrelay_storage.registry import Registry

    try:
        with Session().database() as database:
            return [m.newest.name for m in Registry(database).models() if m.newest.name.startswith(incomplete)]
    except RelayError:
        return []


def complete_version(incomplete: str) -> list[str]:
    """Return names, and behind an @ the aliases and numbers of that model's versions."""
    from torchrelay_storage.registry import Registry

    name, at, _ = incomplete.partition("@")
    if not at:
        return complete_model(incomplete)
    try:
        with Session().database() as database:
            versions = Registry(database).versions(name)
    except RelayError:
        return []
    refs = [*(f"{name}@{alias}" for v in versions for alias in v.aliases), *(v.ref for v in versions)]
    return [ref for ref in refs if ref.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Return the names of recipes that begin so: the ready ones, and those that workers have published."""
    from torchrelay.recipes import READY
    from torchrelay_storage.registry import Registry

    names = set(READY)
    try:
        with Session().database() as database:
            names |= {lane.handler for lane in Registry(database).lanes()}
    except RelayError:
        pass
    return sorted(name for name in names if name.startswith(incomplete))


Model = Annotated[
    str, typer.Argument(help="Name of a model, name@version or name@alias.", autocompletion=complete_version)
]
Id = Annotated[str, typer.Argument(help="Id of a job or training run (j_…), or of a batch (b_…).", metavar="ID")]

BACKOFF_EXAMPLE = "seconds=2,factor=3,longest=60,jitter=false"

# The options of a job, shared by submit and batch.
Priority = Annotated[int, typer.Option("--priority", "-p", help="0 to 9, 9 the most urgent.")]
Key = Annotated[str | None, typer.Option(help="The same key and input give the same job, in whatever state.")]
Delay = Annotated[float | None, typer.Option(help="Seconds until it may start.", metavar="SECONDS")]
NotBefore = Annotated[
    str | None, typer.Option(help="When it may start: ISO 8601, or seconds since 1970.", metavar="TIME")
]
ExpiresIn = Annotated[float | None, typer.Option(help="Seconds within which it must have started.", metavar="SECONDS")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that its device batch may take.", metavar="SECONDS")]
MaxAttempts = Annotated[int, typer.Option(help="How often it may fail.")]
BackoffWords = Annotated[
    str | None,
    typer.Option(
        "--backoff",
        help=f"The wait between its tries, such as {BACKOFF_EXAMPLE}; default: the model's.",
        metavar="NAME=VALUE,…",
    ),
]
Metadata = Annotated[str | None, typer.Option(help="A JSON object of your own, or @file.json.", metavar="JSON")]
Tenant = Annotated[str, typer.Option(help="Who shares the workers fairly with other tenants.")]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Wait until it has ended.")]
WaitLimit = Annotated[float | None, typer.Option(help="Seconds to wait at most; then exit 1.", metavar="SECONDS")]


def kind_of(text: str) -> Kind:
    """Return whether this is the id of a job or of a batch. Raises JobNotFound where it is neither."""
    try:
        kind = ids.kind_of(text)
    except InvalidInput as error:
        raise JobNotFound(str(error)) from None
    if kind not in (Kind.JOB, Kind.BATCH):
        raise JobNotFound(f"{text} is the id of a {kind.noun}; pass that of a job or a batch")
    return kind


def point_in_time(text: str | None) -> float | None:
    """Return a time as seconds since 1970; one without a zone is local. Raises InvalidInput."""
    if text is None:
        return None
    with suppress(ValueError):
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise InvalidInput(
            f"--not-before must be a time such as 2026-05-17T08:30, or seconds since 1970, not {text!r}"
        ) from None


def backoff_of(text: str | None) -> Backoff | None:
    """Return the backoff that is written as NAME=VALUE,…; the submit checks its values. Raises InvalidInput."""
    if text is None:
        return None
    from torchrelay.retries import PARTS
    from torchrelay_storage.options import Backoff

    found: dict[str, float | bool] = {}
    for word in text.split(","):
        name, given, value = (part.strip() for part in word.partition("="))
        if not given or name not in PARTS:
            raise InvalidInput(f"--backoff is written as {BACKOFF_EXAMPLE}, or some of it, not {text!r}")
        if name in found:
            raise InvalidInput(f"--backoff has {name} twice: {text!r}")
        found[name] = _true_or_false(value) if name == "jitter" else _number(name, value)
    return Backoff(**found)  # type: ignore[arg-type]  # a bool is jitter's


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise InvalidInput(f"--backoff: jitter is true or false, not {text!r}")
    return text.lower() == "true"


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInput(f"--backoff: {name} must be a number, not {text!r}") from None


def road_is_open(core: Core, screen: Screen) -> bool:
    """Return whether Redis answers, and say so where it does not: what was stored waits in SQL until it does."""
    from torchrelay.embedded import holder

    if core.broker.is_up():
        return True
    if core.settings.is_embedded and holder(core.settings.home) is None:
        screen.note(f"stored; nothing runs in {core.settings.home} now: `torchrelay up` runs it")
    else:
        screen.note(f"stored; {core.broker.safe_url} does not answer: workers find it in the database")
    return False
