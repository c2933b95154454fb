"""How a job's end is written down: the error as JSON, and whether a failure is tried again, and when."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from torchrelay_storage.errors import Corrupt, InvalidInput, NotFound, RelayError
from torchrelay_storage.options import DEFAULT_BACKOFF, Backoff
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.states import End
from torchrelay_worker.pipeline.ledger import Hold, Work

if TYPE_CHECKING:
    from torchrelay_worker.models.model import Model

MESSAGE_LIMIT = 1_000  # characters
TRACEBACK_LIMIT = 4_000  # characters

_OWN = Path(__file__).parent.parent
_MACHINERY = {"model", "residency", "weights", "handlers"}  # what else lies in models/ is a ready handler


class Timeout(RelayError):
    """The device batch took longer than the job's timeout."""


class BadOutput(RelayError):
    """What the model returned cannot be stored, or is not one output for each input."""


class NotANumber(RelayError):
    """The model returned a NaN, and its `check_nan` is set."""


def describe(error: BaseException) -> bytes:
    """Return an error as the JSON that is stored: its type, its message, and the author's part of the traceback."""
    message = str(error)[:MESSAGE_LIMIT]
    body = {"type": type(error).__name__, "message": message or type(error).__name__}
    trace = _author_frames(error)
    if trace:
        body["traceback"] = trace
    return orjson.dumps(body)


def _author_frames(error: BaseException) -> str:
    if isinstance(error, RelayError) and error.__cause__ is not None:
        error = error.__cause__  # ours says what it means, its cause where it comes from
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_theirs(frame.filename)]
    if not theirs:
        return ""
    lines = [*traceback.format_list(theirs), *traceback.format_exception_only(error)]
    text = "".join(lines)
    return text if len(text) <= TRACEBACK_LIMIT else "…" + text[-TRACEBACK_LIMIT:]  # the end says the most


def _is_theirs(filename: str) -> bool:
    path = Path(filename)
    return not path.is_relative_to(_OWN) or (path.parent.name == "models" and path.stem not in _MACHINERY)


def limit(holds: Iterable[Hold], model: Model) -> float:
    """Return the seconds that a device batch may take: the shortest of its jobs' timeouts, where none, the model's.

    Whoever shares it with a job of a shorter timeout than it needs itself loses nothing but time: should that one be
    overrun, all of them come back, and each runs alone.

    Args:
        holds: the chunks that its jobs are of.
    """
    timeouts = {hold.claimed.timeout for hold in holds}
    return min(float(model.timeout) if t is None else t for t in timeouts)


def backoff(work: Work) -> Backoff:
    """Return the policy by which a failed job waits for its next try: the job's, else the model's, else the default."""
    resident = work.hold.resident
    return work.hold.claimed.backoff or (resident.model.backoff if resident is not None else None) or DEFAULT_BACKOFF


def failed(work: Work, error: BaseException, error_json: bytes | None = None) -> Outcome:
    """Return the outcome of a failure: tried again where the model and the job's attempts allow it, else final."""
    claimed = work.hold.claimed
    body = error_json if error_json is not None else describe(error)
    if work.failures + 1 < claimed.max_attempts and _may_retry(work, error):
        wait = backoff(work).wait(work.failures)
        return Outcome(work.job, claimed.chunk, claimed.token, End.OPEN, error=body, retry_in=wait)
    return Outcome(work.job, claimed.chunk, claimed.token, End.FAILED, error=body)


def _may_retry(work: Work, error: BaseException) -> bool:
    if isinstance(error, InvalidInput | Corrupt | NotFound | BadOutput | Timeout):
        return False  # another try would meet the same
    if isinstance(error, RelayError):  # ours: LoadFailed, NotANumber, an object store that is away
        return True
    resident = work.hold.resident
    return isinstance(error, resident.model.retry_on if resident is not None else Exception)
