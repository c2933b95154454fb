"""Every error that torchrelay raises on purpose. Says what happened, to which job, and what to do.

RelayError
├── InvalidInput            what was passed cannot be stored or run; nothing was enqueued
│   ├── KeyConflict         the key is taken by another input
│   ├── InvalidDataset      names the column or the row of a dataset that cannot be trained on
│   └── InvalidHyperparameter   names the hyperparameter
├── NotFound
│   ├── JobNotFound
│   ├── BatchNotFound
│   ├── ModelNotFound
│   └── RecipeNotFound
├── JobFailed               the job ran, and its last attempt failed
├── JobCancelled
├── JobExpired              it was not started within its `expires_in`
├── WaitTimeout             the wait is over, the job is not (also a TimeoutError)
├── QueueFull               the model, or the whole queue, takes no more jobs for now
├── Unreachable             the database, Redis or the object store does not answer
│   └── StorageFull         the database has no room left; nothing was stored
├── SchemaMismatch          the database's schema and this code do not fit
└── Corrupt                 stored bytes are not what was recorded
"""

from __future__ import annotations


class RelayError(Exception):
    """The base of all errors of torchrelay."""


class InvalidInput(RelayError):
    """An input or an option is refused. Raised by the client before anything is stored, and by `Model.preprocess`."""


class KeyConflict(InvalidInput):
    """The key belongs to a job or batch with another input.

    Attributes:
        key: the key that was passed.
        job: the shown id of the job (or batch) that has it.
    """

    def __init__(self, key: str, job: str) -> None:
        super().__init__(
            f"the key {key!r} belongs to {job}, which was submitted with another input; "
            "use another key, or submit the same input to get that job back"
        )
        self.key = key
        self.job = job


class InvalidDataset(InvalidInput):
    """A dataset cannot be read, or cannot be trained on.

    Attributes:
        column: the column at fault, where there is one.
        row: the row at fault, counted from 0 without a header, where there is one.
    """

    def __init__(self, message: str, *, column: str | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.column = column
        self.row = row


class InvalidHyperparameter(InvalidInput):
    """A recipe does not take this hyperparameter, or not this value.

    Attributes:
        key: its name.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class NotFound(RelayError):
    """What was asked for does not exist, or no longer."""


class JobNotFound(NotFound):
    """No job has this id: it never existed, or retention has purged it."""


class BatchNotFound(NotFound):
    """No batch has this id: it never existed, or retention has purged it."""


class ModelNotFound(NotFound):
    """No registered model has this name or version."""


class RecipeNotFound(NotFound):
    """No recipe has this name."""


class _JobEnded(RelayError):
    def __init__(self, job: str, message: str) -> None:
        super().__init__(message)
        self.job = job


class JobFailed(_JobEnded):
    """The job failed for good.

    Attributes:
        job: the job's shown id.
        kind: the name of the error's type in the worker, such as `InvalidInput`, `Timeout` or `ValueError`.
        message: that error's text.
        traceback: the end of its traceback, where there was one.
    """

    def __init__(self, job: str, kind: str, message: str, traceback: str | None = None) -> None:
        super().__init__(job, f"job {job} failed with {kind}: {message}")
        self.kind = kind
        self.message = message
        self.traceback = traceback


class JobCancelled(_JobEnded):
    """The job was cancelled and has no result."""

    def __init__(self, job: str) -> None:
        super().__init__(job, f"job {job} was cancelled; `retry` runs it after all")


class JobExpired(_JobEnded):
    """The job was not started before its `expires_in` ran out."""

    def __init__(self, job: str) -> None:
        super().__init__(job, f"job {job} expired before a worker could start it; add workers, or retry it")


class WaitTimeout(RelayError, TimeoutError):
    """The time given to a wait ran out; the job goes on."""


class QueueFull(RelayError):
    """There is no room for more jobs, of the model or at all. Nothing of a job or a list of inputs was stored.

    Attributes:
        retry_after: seconds after which another try makes sense.
        batch: of a batch from a stream: its shown id. What had been stored of it before runs.
        stored: how many inputs of that batch are stored.
    """

    def __init__(self, message: str, retry_after: float, *, batch: str | None = None, stored: int = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.batch = batch
        self.stored = stored

    def __reduce__(self) -> tuple[object, ...]:
        # What has arguments of its own beside the message is not restored by itself.
        return _queue_full, (str(self), self.retry_after, self.batch, self.stored)


def _queue_full(message: str, retry_after: float, batch: str | None, stored: int) -> QueueFull:
    return QueueFull(message, retry_after, batch=batch, stored=stored)


class Unreachable(RelayError):
    """A part that is needed does not answer."""


class StorageFull(Unreachable):
    """The database has no room left. Workers keep what they have computed and go on once there is some."""


class SchemaMismatch(RelayError):
    """The database's schema and this code do not fit; the message says which side to upgrade."""


class Corrupt(RelayError):
    """Stored bytes or weights are not what was recorded about them."""
