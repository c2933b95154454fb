"""The processes of one run, as one: whose share of a batch is whose, what they sum, and that they agree on what to do.

Accelerate places the module on the device, mixes the precision and wraps it for several processes. A run of one
process uses the same calls, which then cost nothing. Not here: what is computed (`loop`).
"""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from torchrelay_storage.errors import InvalidInput

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # one process may prepare data or write a checkpoint while others wait

_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Team:
    """This process and its mates. The elastic launcher's environment says how many there are; without it: one.

    Attributes:
        rank: of this process; 0 is the one that writes.
        world: how many processes.
        device: of this process.
        accelerator: prepares the module, and has the scaler of fp16.
    """

    def __init__(self, device: str = "cpu", precision: str = "fp32") -> None:
        """Join the others; waits until all are there.

        Raises:
            InvalidInput: this machine has no such device, or not as many as there are processes, or the precision
                needs another.
        """
        wanted = torch.device(device)
        local_rank = int(os.environ.get("LOCAL_RANK", "-1"))
        _check(wanted, precision, local_rank)
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        on_cpu = wanted.type == "cpu"
        handlers: list[Any] = []
        if local_rank >= 0:  # started by the elastic launcher; the device is the one of this process's rank
            # Orders and random states travel between CPUs, whatever the gradients travel by.
            backend = "gloo" if on_cpu else "cuda:nccl,cpu:gloo"
            handlers.append(InitProcessGroupKwargs(backend, timeout=COLLECTIVE_TIMEOUT))
            # A recipe may have a part that not every batch uses.
            handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
        elif not on_cpu:
            torch.cuda.set_device(wanted)
            os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{torch.cuda.current_device()}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")  # `--threads` says
            self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=_MIXED[precision], kwargs_handlers=handlers)
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, indices: torch.Tensor) -> torch.Tensor:
        """Return this process's part of the indices [n]: as large as the others', or one less; it may be empty."""
        return indices.tensor_split(self.world)[self.rank]

    def agree(self, decision: int) -> int:
        """Return the decision of process 0."""
        if self.world == 1:
            return decision
        told = torch.tensor([decision])
        dist.broadcast(told, 0)
        return int(told.item())

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of the tensor over all processes."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def stacked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors [...], which lie on CPUs and have the same shape everywhere, as [world, ...]."""
        if self.world == 1:
            return tensor[None]
        everywhere = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(everywhere, tensor)
        return torch.stack(everywhere)

    def align(self, module: nn.Module) -> None:
        """Give all processes the buffers of process 0, such as batch norm's: each has counted its own share."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.total(torch.zeros(()))

    def to_device(self, batch: Any) -> Any:
        """Return a batch on this process's device."""
        if self.device.type == "cpu":
            return batch
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        from accelerate.state import AcceleratorState

        if kind is None and dist.is_initialized():  # after an error the others may wait for something else
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the whole process


def _check(device: torch.device, precision: str, local_rank: int) -> None:
    if precision == "fp16" and device.type != "cuda":
        raise InvalidInput("precision fp16 needs a CUDA device; on a CPU use bf16 or fp32")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"device {device}: this torch ({torch.__version__}) finds no CUDA device")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise InvalidInput(
            f"the run asks for {os.environ.get('WORLD_SIZE')} devices, this machine has {torch.cuda.device_count()}; "
            "train it with fewer `devices`"
        )
