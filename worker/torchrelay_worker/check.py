"""A dry run: each hook of a registered model on one input, before it serves. Stores nothing, sends nothing.

    python -m torchrelay_worker.check NAME --input FILE|- [--device auto] [--json]

Behind `torchrelay models check`, which runs this in a process of its own because its own side has no torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from torchrelay.settings import Settings
from torchrelay_storage import values
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, NotFound, RelayError, Unreachable
from torchrelay_storage.registry import Registry
from torchrelay_worker.arguments import resolve_device
from torchrelay_worker.exits import EXIT_UNREACHABLE, EXIT_USAGE
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.models.model import Model, move
from torchrelay_worker.models.weights import Weights, WeightsCache

T = TypeVar("T")

SEVERAL = 4  # inputs of the second batch: enough to show outputs that depend on their mates
TOLERANCE = 1e-3  # of outputs that were computed in batches of other sizes, relative and absolute
WARM_UPS = 2  # forward passes before the one that is timed


class CheckFailed(RelayError):
    """A step of the dry run failed. `step` names the hook."""

    def __init__(self, step: str, error: BaseException) -> None:
        super().__init__(f"{step} failed with {type(error).__name__}: {error}")
        self.step = step


@dataclass(slots=True)
class Report:
    """What a dry run has found. Times are milliseconds, of the last call of each step."""

    model: str
    device: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    length: int | None = None
    batch: int = 0  # inputs of the larger batch that was tried
    output: Any = None

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "ok": True,
            "model": self.model,
            "device": self.device,
            "milliseconds": self.milliseconds,
            "length": self.length,
            "batch": self.batch,
            "output": shown(self.output),
        }


def try_model(handler: type[Model], weights: Weights, given: Any, device: torch.device, name: str) -> Report:
    """Run each hook as the pipeline does.

    Raises:
        CheckFailed: a hook raised, or returned what the pipeline cannot use; `__cause__` is the error itself.
    """
    report = Report(name, str(device))

    def step(what: str, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            result = call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            raise CheckFailed(what, error) from error
        report.milliseconds[what] = round((time.perf_counter() - started) * 1000, 3)
        return result

    stored = step("encode input", lambda: values.encode(given))
    model = step("load", lambda: _load(handler, weights, device))
    prepared = step("preprocess", lambda: model.preprocess(values.decode(stored)))
    n = max(1, min(SEVERAL, int(model.max_batch_size)))
    if model.has_length:
        length = report.length = step("length", lambda: int(model.length(prepared)))
        if model.max_batch_cost is not None:
            n = max(1, min(n, model.max_batch_cost // max(1, length)))
    one = _run(model, [prepared], device, step, "")
    several = _run(model, [prepared] * n, device, step, f" of {n}") if n > 1 else one
    report.batch = n
    for other in several:
        if not alike(one[0], other):
            raise CheckFailed("forward", ValueError(
                f"the same input gives another output in a batch of {n} than alone; is the module in eval() mode, and "
                f"does it mask what collate pads? alone: {shown(one[0])}, in the batch: {shown(other)}"
            ))  # fmt: skip
    report.output = step("encode output", lambda: values.decode(values.encode(one[0])))
    return report


def _load(handler: type[Model], weights: Weights, device: torch.device) -> Model:
    model = handler()
    model.device = device
    model.load(weights, device)
    return model


def _run(
    model: Model, prepared: list[Any], device: torch.device, step: Callable[[str, Callable[[], Any]], Any], of: str
) -> list[Any]:
    n = len(prepared)
    with torch.inference_mode():
        batch = step(f"collate{of}", lambda: move(model.collate(prepared), device))
        for _ in range(WARM_UPS):
            step(f"forward{of}", lambda: model.forward(batch))
        outputs = step(f"forward{of}", lambda: model.forward(batch))
    parts = step(f"split{of}", lambda: model.split(move(outputs, torch.device("cpu")), n))
    if len(parts) != n:
        raise CheckFailed(f"split{of}", ValueError(f"it returned {len(parts)} outputs for a batch of {n}"))
    return [step(f"decode{of}", partial(model.decode, part)) for part in parts]


def alike(a: Any, b: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    if isinstance(a, torch.Tensor) or hasattr(a, "__array__"):
        left, right = torch.as_tensor(a), torch.as_tensor(b)
        if left.shape != right.shape:
            return False
        if left.is_floating_point() or left.is_complex():
            return torch.allclose(left, right, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        return torch.equal(left, right)
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


def shown(value: Any, limit: int = 400) -> Any:
    """Return a value as JSON for a person: arrays and bytes as what they are, long ones shortened."""
    if isinstance(value, torch.Tensor) or hasattr(value, "__array__"):
        tensor = torch.as_tensor(value)
        return f"{tensor.dtype} of shape {list(tensor.shape)}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return {key: shown(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [shown(part) for part in value[:10]] + (["…"] if len(value) > 10 else [])
    if isinstance(value, str) and len(value) > limit:
        return value[:limit] + "…"
    return value


def read_input(source: str) -> Any:
    """Return the input from a file or, for `-`, from standard input: JSON, else the bytes (such as a picture's).

    Raises:
        InvalidInput: there is no such file, or text that was typed in is not JSON.
    """
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InvalidInput(f"the input file {source} cannot be read: {error.strerror}") from error
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        return data
    except ValueError as error:
        raise InvalidInput(f"the input is not JSON: {error}") from None


def run(arguments: argparse.Namespace) -> Report:
    """Check the model that the command line names."""
    settings = Settings.load()
    given = read_input(arguments.input)
    database = Database(settings.database_url, pool_size=1)
    try:
        version = Registry(database).resolve(arguments.name)
    finally:
        database.dispose()
    handler = Handlers(settings.handlers).find(version.handler)
    weights = WeightsCache(Artifacts(settings.artifacts_url), settings.home / "weights").fetch(version)
    return try_model(handler, weights, given, resolve_device(arguments.device), version.ref)


def show(report: Report) -> None:
    """Print it for a person."""
    print(f"{report.model} on {report.device}: all hooks work")
    for step, milliseconds in report.milliseconds.items():
        print(f"  {step:<16} {milliseconds:10.2f} ms")
    if report.length is not None:
        print(f"  length of the input: {report.length}")
    print(f"  output: {json.dumps(shown(report.output), ensure_ascii=False)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: exit code 0 all is well, 1 the model fails, 2 usage, 3 unreachable."""
    parser = argparse.ArgumentParser(prog="torchrelay models check", description="A dry run of a model.")
    parser.add_argument("name", help="the registered model, such as digits or digits@2")
    parser.add_argument("--input", required=True, metavar="FILE", help="JSON or a picture; - for standard input")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        report = run(arguments)
    except RelayError as error:
        step = error.step if isinstance(error, CheckFailed) else None
        cause = error.__cause__ if isinstance(error, CheckFailed) and error.__cause__ is not None else error
        if arguments.json:
            print(json.dumps({"ok": False, "step": step, "type": type(cause).__name__, "message": str(error)}))
        else:
            print(error, file=sys.stderr)
        if isinstance(error, Unreachable):
            return EXIT_UNREACHABLE
        return EXIT_USAGE if isinstance(error, InvalidInput | NotFound) else 1
    if arguments.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
