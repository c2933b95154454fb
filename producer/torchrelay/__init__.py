"""torchrelay: inference jobs that survive. An application submits, polls, and reads results; see `Relay`.

    from torchrelay import Relay

    with Relay() as relay:
        print(relay.submit("digits", {"pixels": [...]}).result(timeout=30))

What an application needs is here; the model author's side is the package `torchrelay_worker`. Names are imported when
they are first used: pytest loads this package with its plugin, and most of its runs need nothing of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrelay.async_client import AsyncRelay
    from torchrelay.client import Relay
    from torchrelay.handles import AsyncBatch, AsyncJob, AsyncRun, Batch, Job, Run
    from torchrelay.settings import Settings
    from torchrelay_storage.attempts import Attempt
    from torchrelay_storage.batch_store import Counts
    from torchrelay_storage.errors import (
        BatchNotFound,
        Corrupt,
        InvalidDataset,
        InvalidHyperparameter,
        InvalidInput,
        JobCancelled,
        JobExpired,
        JobFailed,
        JobNotFound,
        KeyConflict,
        ModelNotFound,
        NotFound,
        QueueFull,
        RecipeNotFound,
        RelayError,
        SchemaMismatch,
        StorageFull,
        Unreachable,
        WaitTimeout,
    )
    from torchrelay_storage.options import Backoff
    from torchrelay_storage.states import JobState

__all__ = [
    "AsyncBatch",
    "AsyncJob",
    "AsyncRelay",
    "AsyncRun",
    "Attempt",
    "Backoff",
    "Batch",
    "BatchNotFound",
    "Corrupt",
    "Counts",
    "InvalidDataset",
    "InvalidHyperparameter",
    "InvalidInput",
    "Job",
    "JobCancelled",
    "JobExpired",
    "JobFailed",
    "JobNotFound",
    "JobState",
    "KeyConflict",
    "ModelNotFound",
    "NotFound",
    "QueueFull",
    "RecipeNotFound",
    "Relay",
    "RelayError",
    "Run",
    "SchemaMismatch",
    "Settings",
    "StorageFull",
    "Unreachable",
    "WaitTimeout",
]

_WHERE = {
    "AsyncBatch": "torchrelay.handles",
    "AsyncJob": "torchrelay.handles",
    "AsyncRelay": "torchrelay.async_client",
    "AsyncRun": "torchrelay.handles",
    "Attempt": "torchrelay_storage.attempts",
    "Backoff": "torchrelay_storage.options",
    "Batch": "torchrelay.handles",
    "Counts": "torchrelay_storage.batch_store",
    "Job": "torchrelay.handles",
    "JobState": "torchrelay_storage.states",
    "Relay": "torchrelay.client",
    "Run": "torchrelay.handles",
    "Settings": "torchrelay.settings",
}  # the others are errors


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_WHERE.get(name, "torchrelay_storage.errors")), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
