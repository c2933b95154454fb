"""Checkpoints: files in the artifact store, and a row that names them. One exists when its row commits, not before.

    model.safetensors   the weights, bit for bit
    best.safetensors    the best weights so far, written once for each improvement
    state.pt            optimiser, schedule, scaler, generators, position, sums; read by torch.load(weights_only=True)

Writing to local files happens between two steps, so that all of it is of one moment; the upload and the row follow on a
thread while the run goes on. Not here: what a state holds, and when one is written (`loop`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import orjson
import structlog
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from torchrelay_storage.artifacts import Artifacts, run_path
from torchrelay_storage.errors import Corrupt, InvalidInput, NotFound, Unreachable
from torchrelay_storage.run_spec import Checkpoints as Rules
from torchrelay_storage.run_writer import CheckpointRow, Order

log = structlog.get_logger("torchrelay.checkpoints")

MODEL, BEST, STATE = "model.safetensors", "best.safetensors", "state.pt"
AGAIN_SECONDS = 15.0  # until the next try where the artifact store or the database was away

_TIED = "tied"  # in the file's header: names of tensors that are another one under a second name

Tensors = dict[str, torch.Tensor]


class Writes(Protocol):
    """What is needed of a RunWriter."""

    def checkpoint(
        self, step: int, files: Mapping[str, str], value: float | None, keep: int
    ) -> tuple[Order, tuple[str, ...]]: ...


@dataclass(frozen=True, slots=True)
class Best:
    """The best weights so far, on the CPU.

    Attributes:
        step: after which they were reached.
        value: of the metric that decides.
        metrics: all metrics of that validation, and the training loss of its epoch.
    """

    step: int
    value: float
    metrics: Mapping[str, float]
    weights: Tensors


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a run at one moment, between two steps.

    Attributes:
        step: steps that were made.
        weights: of the module, on the CPU; tied ones under each of their names.
        state: the rest: dicts, lists, texts, numbers and tensors.
        best: the best weights so far; None before the first validation.
    """

    step: int
    weights: Tensors
    state: Mapping[str, Any]
    best: Best | None


class Checkpoints:
    """The checkpoints of one run. A context manager: at its end, what is being uploaded is stored."""

    def __init__(
        self,
        writer: Writes,
        artifacts: Artifacts,
        folder: Path,
        rules: Rules,
        *,
        job: int,
        token: int,
        flush: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it.

        Args:
            folder: a local one, this run's alone.
            flush: called before a row is written: what a run has reported before a checkpoint must stand when it does,
                since a run that goes on from there will not report it again.
        """
        self._writer = writer
        self._artifacts = artifacts
        self._folder = folder
        self._rules = rules
        self._path = run_path(job, "checkpoints")
        self._token = token
        self._flush = flush
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._upload: Future[bool] | None = None
        self._step = 0  # of the last that was written
        self._at = clock()  # when that was
        self._not_before = self._at
        self._best: tuple[int, str] | None = None  # the step and the URI of the best weights last uploaded

    # --- reading ------------------------------------------------------------------------------------------

    def restore(self, rows: list[CheckpointRow]) -> Snapshot | None:
        """Return the newest checkpoint that can be read, and leave its files in `restored`; None: begin anew.

        Args:
            rows: the run's checkpoints, newest first.

        Raises:
            Unreachable: the artifact store is away.
        """
        folder = self._folder / "restored"
        for row in rows:
            try:
                for name, uri in row.files.items():
                    self._artifacts.fetch(uri, folder / name)
                snapshot = read_snapshot(folder)
            except (NotFound, Corrupt) as error:
                shutil.rmtree(folder, ignore_errors=True)
                log.warning("checkpoint_unreadable", step=row.step, reason=str(error), effect="an older one is taken")
                continue
            self._step = row.step
            if snapshot.best is not None:
                self._best = snapshot.best.step, row.files[BEST]
            return snapshot
        return None

    def sweep(self, rows: list[CheckpointRow]) -> None:
        """Delete the files that no row names: of checkpoints in whose middle an earlier process was killed.

        Only what was written under an earlier claim is touched: whoever holds the run now need not be this process.
        """
        named = {uri for row in rows for uri in row.files.values()}
        try:
            found = [uri for uri in self._artifacts.under(self._path) if uri not in named]
            self._artifacts.delete([uri for uri in found if _token_of(uri) < self._token])
        except Unreachable as error:
            log.warning("checkpoints_not_swept", reason=str(error))

    # --- writing ------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether one should be written after this step. Never while another is being uploaded."""
        if step <= self._step or (self._upload is not None and not self._upload.done()):
            return False
        every_steps, every_minutes = self._rules.steps, self._rules.minutes
        now = self._clock()
        if now < self._not_before:
            return False
        if every_steps is not None and step - self._step >= every_steps:
            return True
        return every_minutes is not None and now - self._at >= every_minutes * 60

    def write(self, snapshot: Snapshot, *, last: bool = False) -> bool:
        """Write a checkpoint; the upload goes on when this returns, unless it is the `last` of this process.

        Returns:
            False only for a last one that could not be stored. Others are tried again a little later.

        Raises:
            InvalidInput: the recipe's module, optimiser or schedule has a state that cannot be stored.
            OSError: the local disk is full.
        """
        self.settle()
        if snapshot.step == self._step:
            return True  # nothing has happened since
        first = self._upload is None
        folder = self._folder / f"{snapshot.step}"
        folder.mkdir(parents=True, exist_ok=True)
        save_snapshot(snapshot, folder, with_best=snapshot.best is not None and self._best_uri(snapshot.best) is None)
        if first:
            _check_readable(folder / STATE)
        self._upload = self._pool.submit(self._store, snapshot.step, snapshot.best, folder)
        return self.settle() if last else True

    def settle(self) -> bool:
        """Wait until what was written is stored; False where it could not be."""
        return self._upload is None or self._upload.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def _store(self, step: int, best: Best | None, folder: Path) -> bool:
        """Upload the files and write the row: on the thread."""
        path = f"{self._path}/{step}-{self._token}"
        uris: dict[str, str] = {}
        try:
            for file in sorted(folder.iterdir()):
                uris[file.name] = self._artifacts.put_file(f"{path}/{file.name}", file)[0]
            files = dict(uris)
            if best is not None and BEST not in files:
                files[BEST] = self._best_uri(best) or ""
            self._flush()
            value = best.value if best is not None else None
            order, pruned = self._writer.checkpoint(step, files, value, self._rules.keep)
        except Unreachable as error:
            log.warning("checkpoint_not_stored", step=step, reason=str(error), effect="it is tried again")
            self._not_before = self._clock() + AGAIN_SECONDS
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if order is Order.LOST:
            self._delete(uris.values())  # no row names them
            return False
        self._step, self._at = step, self._clock()
        if best is not None:
            self._best = best.step, files[BEST]
        self._delete(pruned)
        return True

    def _best_uri(self, best: Best) -> str | None:
        return self._best[1] if self._best is not None and self._best[0] == best.step else None

    def _delete(self, uris: Any) -> None:
        try:
            self._artifacts.delete(uris)
        except Unreachable as error:
            log.warning("checkpoint_files_left", reason=str(error))


def _token_of(uri: str) -> int:
    """The token of the claim under which a checkpoint's file was written: .../STEP-TOKEN/NAME."""
    return int(uri.split("/")[-2].partition("-")[2])


# --- files -------------------------------------------------------------------------------------------------


def save_snapshot(snapshot: Snapshot, folder: Path, *, with_best: bool) -> None:
    """Write the files of a checkpoint. Raises InvalidInput for a state that torch.save cannot write."""
    best = snapshot.best
    state = {
        "format": 1,
        "step": snapshot.step,
        "best": None if best is None else {"step": best.step, "value": best.value, "metrics": dict(best.metrics)},
        "state": dict(snapshot.state),
    }
    save_tensors(snapshot.weights, folder / MODEL)
    if best is not None and with_best:
        save_tensors(best.weights, folder / BEST)
    try:
        torch.save(state, folder / STATE)
    except OSError:
        raise
    except Exception as error:  # pickle raises many, of a lambda for instance
        raise InvalidInput(f"the state of this recipe's optimiser or schedule cannot be stored: {error}") from error


def read_snapshot(folder: Path) -> Snapshot:
    """Read the files of a checkpoint. Raises Corrupt."""
    try:
        saved = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        if saved["format"] != 1:
            raise Corrupt(f"a checkpoint of the format {saved['format']}, which this release does not know")
        best = saved["best"] and Best(**saved["best"], weights=read_tensors(folder / BEST))
        return Snapshot(saved["step"], read_tensors(folder / MODEL), saved["state"], best)
    except Corrupt:
        raise
    except Exception as error:  # torch raises whatever the damage leads to
        raise Corrupt(f"a checkpoint cannot be read: {type(error).__name__}: {error}") from error


def _check_readable(state: Path) -> None:
    """Read a state as it will be read after a crash: better refused now than found out then."""
    try:
        torch.load(state, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidInput(
            "the state of this recipe's optimiser or schedule holds more than numbers, texts and tensors, so that no "
            f"checkpoint of it could be read: {error}"
        ) from error


def weights_of(module: nn.Module, *, copied: bool = False) -> Tensors:
    """Return the module's parameters and buffers on the CPU.

    Args:
        copied: whether they must stay as they are when the training goes on.

    Raises:
        InvalidInput: the module's state holds what is no tensor.
    """
    weights: Tensors = {}
    moved: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInput(
                f"{name} in the state of this recipe's module is a {type(tensor).__name__}; only tensors can be stored"
            )
        key = _identity(tensor)
        if key not in moved:
            moved[key] = tensor.detach().to("cpu", copy=copied)
        weights[name] = moved[key]
    return weights


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write tensors as safetensors, which has no two names for one tensor: such names go into its header."""
    kept: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    written: Tensors = {}
    for name, tensor in tensors.items():
        first = kept.setdefault(_identity(tensor), name)
        if first != name:
            tied[name] = first
            continue
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        written[name] = tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)
    save_file(written, path, metadata={_TIED: orjson.dumps(tied).decode()})


def read_tensors(path: Path) -> Tensors:
    """Read what `save_tensors` wrote. Raises Corrupt."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors: Tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            tied = orjson.loads((file.metadata() or {}).get(_TIED, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise Corrupt(f"{path.name} cannot be read as tensors: {error}") from error
    return tensors | {name: tensors[first] for name, first in tied.items()}


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two names for one tensor have in common. Empty tensors have no place of their own."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
