"""What can go wrong in a training run beside what its dataset and its settings cause, and how a failure is recorded.

RelayError
├── NonFinite       the loss is NaN or infinite
└── OutOfMemory     a step, or the data, does not fit into the memory
"""

from __future__ import annotations

import orjson
import torch
import torch.distributed as dist

from torchrelay_storage.errors import Corrupt, InvalidInput, NotFound, RelayError
from torchrelay_storage.job_error import JobError
from torchrelay_worker.pipeline.outcomes import describe


class NonFinite(RelayError):
    """The loss, the gradient or the metric that decides is NaN or infinite. The last checkpoint is from before."""


class OutOfMemory(RelayError):
    """The memory of the device, or of the machine, does not suffice."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in message or "can't allocate memory" in message)


def is_mate_lost(error: BaseException) -> bool:
    """Whether another process of the run is gone: what became of that is told by itself, or by how it ended."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or "closed by peer" in str(error).lower())


def out_of_memory(error: BaseException, where: str, batch_size: int | None = None) -> OutOfMemory:
    """Return the error that says what to lower.

    Args:
        where: the memory did not suffice, such as `at step 7`.
        batch_size: where that is likely to be the reason.
    """
    if batch_size is None:
        return OutOfMemory(
            f"the memory did not suffice {where}: use a smaller dataset, or a machine with more: {_first_line(error)}"
        )
    return OutOfMemory(
        f"the memory did not suffice {where} with batch_size {batch_size}: lower batch_size, or make the model or its "
        f"inputs smaller (precision bf16 halves what activations take): {_first_line(error)}"
    )


def may_retry(error: BaseException) -> bool:
    """Whether another try may end otherwise: not where the data, the settings or the arithmetic are at fault."""
    return not isinstance(error, InvalidInput | NotFound | Corrupt | NonFinite | OutOfMemory)


def recorded(error: BaseException) -> JobError:
    """Return the error as it is stored: its type, its message, and the recipe author's part of the traceback."""
    return JobError(**orjson.loads(describe(error)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
