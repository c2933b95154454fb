"""Retries as a client asks for them: how long to wait between tries, and jobs that run again by a filter.

Not here: the tries of a job (`torchrelay_storage.attempts`), and the waits themselves, which are the worker's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeAlias

from torchrelay.checks import read_states
from torchrelay_storage import ids
from torchrelay_storage.errors import InvalidInput
from torchrelay_storage.ids import Kind
from torchrelay_storage.job_reader import JobFilter
from torchrelay_storage.options import Backoff
from torchrelay_storage.retries import RETRIABLE
from torchrelay_storage.states import JobState

if TYPE_CHECKING:
    from torchrelay.core import Core

BackoffLike: TypeAlias = Backoff | Mapping[str, Any]

PARTS = tuple(part.name for part in fields(Backoff))


def read_backoff(given: BackoffLike | None) -> Backoff | None:
    """Return the backoff that a caller has passed, whole or as a dict of its parts; the submit checks their values.

    Raises:
        InvalidInput: it is neither, or has a part that there is not.
    """
    if given is None or isinstance(given, Backoff):
        return given
    if not isinstance(given, Mapping):
        raise InvalidInput(f"backoff must be a Backoff, or a dict such as {{'seconds': 2}}, not {given!r:.80}")
    for name in given:
        if name not in PARTS:
            raise InvalidInput(f"a backoff has no {name!r:.80}; it is made of {', '.join(PARTS)}")
    return Backoff(**given)


def retry_where(
    core: Core,
    *,
    state: str | Iterable[str] | None,
    model: str | None,
    batch: str | None,
    tenant: str | None,
) -> int:
    """Let all jobs that pass the filters run again; return how many. Each is met once, even if it fails anew meanwhile.

    Raises:
        InvalidInput: a state that cannot be retried, or no filter at all.
        ModelNotFound, BatchNotFound, Unreachable.
    """
    if state is None and model is None and batch is None and tenant is None:
        raise InvalidInput("say which jobs are to run again: state, model, batch or tenant; state='failed' is them all")
    states = read_states(state) if state is not None else (JobState.FAILED,)
    if bad := [word.value for word in states if word not in RETRIABLE]:
        raise InvalidInput(
            f"jobs that are {bad[0]} cannot be retried; those can that failed, expired or were cancelled"
        )
    if not states:
        raise InvalidInput("state names no state; pass failed, cancelled or expired, or several of them")
    core.ready()
    name = core.model(model).name if model is not None else None
    row = core.batches.get(ids.read(Kind.BATCH, batch)) if batch is not None else None
    wanted = JobFilter(states=states, model=name, batch=row.id if row is not None else None, tenant=tenant)
    count = core.tell(core.jobs.retry_where(wanted))
    if count:
        core.wake_many([name] if name is not None else [row.model] if row is not None else _all_models(core))
    return count


def _all_models(core: Core) -> list[str]:
    """The names of all models, and of the lanes of training runs."""
    return list(dict.fromkeys(version.name for version in [*core.registry.versions(), *core.registry.lanes()]))
