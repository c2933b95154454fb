"""`Model`: the class that a model's author writes. One subclass is one handler; one instance is one loaded version.

Not here: when the hooks are called (`pipeline`), and where weights come from (`weights`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from torchrelay_storage.errors import InvalidInput
from torchrelay_storage.options import Backoff

if TYPE_CHECKING:
    from torchrelay_worker.models.weights import Weights


class Model:
    """How one model runs. Override `load` and `forward`; the other hooks have defaults.

    The hooks of an instance are called in this order, n jobs at a time in the middle:

        load(weights, device)                      once
        preprocess(input) -> prepared              each input, on CPU threads, several at a time
        length(prepared) -> int                    each input, only if overridden
        collate([prepared, ...]) -> batch          n inputs, then moved to the device
        forward(batch) -> outputs                  n inputs, on the device's thread, under torch.inference_mode
        split(outputs, n) -> [output, ...]         n outputs, which are on the CPU by then
        decode(output) -> value                    each output, on the recorder's thread

    `preprocess`, `length` and `decode` must not change the instance: they run beside each other.
    """

    max_batch_size: int = 32
    """Most inputs of one forward pass."""

    max_wait_ms: float = 5.0
    """How long an input may wait for mates while the device is busy. An idle device never waits."""

    max_batch_cost: int | None = None
    """Most cost of one forward pass, as padded length x inputs (for example padded tokens). Needs `length`."""

    max_padding: float = 0.1
    """Which part of a batch may be padding before it is cut in two. Needs `length`."""

    oversize: Literal["alone", "refuse"] = "alone"
    """What becomes of an input above `max_batch_cost`: it runs alone, or it is refused as InvalidInput."""

    timeout: float = 600.0
    """Seconds that a device batch may take whose jobs have no timeout. A worker that overruns them is replaced."""

    load_timeout: float = 600.0
    """Seconds that `load` may take. A worker that overruns them is replaced."""

    backoff: Backoff | None = None
    """How long a failed job waits for its next try, where the job does not say: `Backoff(seconds=2, longest=60)`.
    None: torchrelay's own, a second that doubles with each failure up to five minutes, with jitter."""

    revision: str | None = None
    """What of the handler's code a result was computed by, kept with each job. None: a hash of the class's file."""

    retry_on: tuple[type[BaseException], ...] = (Exception,)
    """Which errors are tried again, as often as the job's `max_attempts` allows. InvalidInput and Timeout never are."""

    check_nan: bool = False
    """Fail the jobs whose outputs hold a NaN, instead of recording it."""

    pad_value: float | Mapping[str, float] = 0.0
    """What `collate` pads with; for dicts of tensors also by key."""

    device: torch.device = torch.device("cpu")
    """The device that the instance was loaded for. Set before `load` is called."""

    # Which hooks a subclass brought, found once a class instead of once a job.
    has_length: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.has_length = cls.length is not Model.length

    def load(self, weights: Weights, device: torch.device) -> None:
        """Build the module and bring it to `device`. Called once, before any other hook.

        Args:
            weights: the version's weights: `.state_dict()`, `.program()`, `.path`, `.config`.
            device: where `forward` will run.
        """

    def preprocess(self, input: Any) -> Any:
        """Turn one input into what `collate` takes.

        Args:
            input: what the application submitted: a JSON value, bytes, a NumPy array or a torch tensor.

        Returns:
            One tensor without a batch dimension, of shape [...] or, for sequences, [length, ...]; or a dict, tuple
            or list of such tensors. NumPy arrays and numbers count as tensors.

        Raises:
            InvalidInput: the input can never run; the job fails at once, and the message goes to its owner.
        """
        if isinstance(input, torch.Tensor):
            return input
        try:
            return torch.as_tensor(input)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"the input is not a number, a list of numbers or an array: {error}") from error

    def length(self, prepared: Any) -> int:
        """Return the length by which even batches are formed, such as a number of tokens. Optional."""
        raise NotImplementedError

    def collate(self, prepared: list[Any]) -> Any:
        """Make one batch of n prepared inputs.

        The default stacks tensors of shape [...] to [n, ...], and pads sequences of shape [length, ...] with
        `pad_value` to [n, longest, ...]; dicts, tuples and lists are collated part by part. What it returns is
        moved to the device by the caller.
        """
        return collate(prepared, self.pad_value)

    def forward(self, batch: Any) -> Any:
        """Run the model.

        Args:
            batch: what `collate` returned, on the device: tensors of shape [n, ...].

        Returns:
            A tensor of shape [n, ...], a dict or tuple of such tensors, or a list of n outputs.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def split(self, outputs: Any, n: int) -> list[Any]:
        """Turn the outputs of a batch, already on the CPU, into a list of n outputs in the order of the inputs."""
        return split(outputs, n)

    def decode(self, output: Any) -> Any:
        """Turn one output into what the application gets: a JSON value, bytes, an array or a tensor.

        The default returns tensors as they are, and numbers for tensors without dimensions.
        """
        if isinstance(output, torch.Tensor) and output.ndim == 0:
            return output.item()
        return output


def revision_of(handler: type[Model]) -> str:
    """Return which revision of its code a handler is: its own `revision`, else a hash of the file it is written in."""
    if handler.revision is not None:
        return str(handler.revision)
    try:
        source = Path(inspect.getfile(handler)).read_bytes()
    except (OSError, TypeError):
        return "unknown"  # written in a shell
    return hashlib.sha256(source).hexdigest()[:12]


# --- trees of tensors ---------------------------------------------------------------------------------------


def collate(prepared: Sequence[Any], pad_value: float | Mapping[str, float] = 0.0) -> Any:
    """Stack or pad n trees of tensors into one. Raises ValueError if their structures differ."""
    first = prepared[0]
    if isinstance(first, Mapping):
        keys = list(first)
        if any(p.keys() != first.keys() for p in prepared):
            raise ValueError("the prepared inputs of a batch have different keys")
        return {key: collate([p[key] for p in prepared], _pad_of(pad_value, key)) for key in keys}
    if isinstance(first, tuple | list):
        if any(len(p) != len(first) for p in prepared):
            raise ValueError("the prepared inputs of a batch have different numbers of parts")
        return tuple(collate([p[i] for p in prepared], pad_value) for i in range(len(first)))
    value = 0.0 if isinstance(pad_value, Mapping) else pad_value
    return _stack([_tensor(p) for p in prepared], value)


def _pad_of(pad_value: float | Mapping[str, float], key: str) -> float | Mapping[str, float]:
    return pad_value.get(key, 0.0) if isinstance(pad_value, Mapping) else pad_value


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Number) or hasattr(value, "__array__"):
        return torch.as_tensor(value)
    raise TypeError(f"preprocess must return tensors, arrays or numbers, not {type(value).__name__}")


def _stack(tensors: list[torch.Tensor], pad_value: float) -> torch.Tensor:
    shape = tensors[0].shape
    if all(t.shape == shape for t in tensors):
        return torch.stack(tensors)
    if any(t.shape[1:] != shape[1:] or t.ndim != len(shape) for t in tensors):
        shapes = sorted({tuple(t.shape) for t in tensors})
        raise ValueError(f"tensors of a batch may differ in their first dimension only, not as {shapes[:4]}")
    return pad_sequence(tensors, batch_first=True, padding_value=pad_value)


def split(outputs: Any, n: int) -> list[Any]:
    """Cut a tree of tensors of shape [n, ...] into n trees. Raises ValueError if it holds another number."""
    if isinstance(outputs, torch.Tensor):
        if outputs.ndim == 0 or outputs.shape[0] != n:
            raise ValueError(f"forward returned a tensor of shape {tuple(outputs.shape)} for a batch of {n}")
        return list(outputs.unbind(0))
    if isinstance(outputs, Mapping):
        columns = {key: split(value, n) for key, value in outputs.items() if value is not None}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(outputs, tuple):
        return list(zip(*(split(part, n) for part in outputs), strict=True))
    if hasattr(outputs, "__array__"):
        return split(torch.as_tensor(outputs), n)
    if isinstance(outputs, list):
        if len(outputs) != n:
            raise ValueError(f"forward returned a list of {len(outputs)} outputs for a batch of {n}")
        return outputs
    raise TypeError(f"forward must return tensors, or a dict, tuple or list of them, not {type(outputs).__name__}")


_PLAIN = frozenset((int, float, str, bytes, bool, type(None)))


def move(tree: Any, device: torch.device) -> Any:
    """Bring all tensors of a tree to a device. To CUDA the copy goes on beside the caller; from it, it is awaited."""
    if type(tree) in _PLAIN:
        return tree
    if isinstance(tree, torch.Tensor):
        if tree.device == device:
            return tree
        if device.type == "cuda" and tree.device.type == "cpu":
            return tree.pin_memory().to(device, non_blocking=True)
        return tree.to(device)
    if isinstance(tree, dict | Mapping):  # a dict is told apart at a tenth of a Mapping's cost
        return {key: move(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple):
        parts = [move(part, device) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [move(part, device) for part in tree]
    return tree


def nan_rows(outputs: Any, n: int) -> set[int]:
    """Return which of the n rows of a tree of outputs hold a NaN."""
    if isinstance(outputs, torch.Tensor):
        if not (outputs.is_floating_point() or outputs.is_complex()) or outputs.ndim == 0 or outputs.shape[0] != n:
            return set()
        return set(torch.isnan(outputs).reshape(n, -1).any(1).nonzero().flatten().tolist())
    if isinstance(outputs, Mapping):
        return set().union(*(nan_rows(value, n) for value in outputs.values()))
    if isinstance(outputs, list) and len(outputs) == n:
        return {i for i, output in enumerate(outputs) if _holds_nan(output)}
    if isinstance(outputs, tuple):
        return set().union(*(nan_rows(part, n) for part in outputs))
    return set()


def _holds_nan(value: Any) -> bool:
    if isinstance(value, float):
        return value != value  # noqa: PLR0124
    if isinstance(value, torch.Tensor):
        return bool((value.is_floating_point() or value.is_complex()) and torch.isnan(value).any())
    if isinstance(value, Mapping):
        return any(_holds_nan(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_nan(v) for v in value)
    return False
