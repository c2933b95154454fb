"""Everything random in a run: seeds, the order of the examples, and the generators' states in a checkpoint.

What is random about the data follows from the seed and the position, so a position is sought, not reached by replaying.
What a recipe draws beside that, as dropout does, comes from the process's generators, whose states checkpoints hold.
"""

from __future__ import annotations

import hashlib
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

RandomState = dict[str, torch.Tensor]
"""The state of every generator of a process, as tensors whose shapes are the same in all processes of a run."""


def mixed(*parts: int) -> int:
    """Return one seed, of 63 bits, from several numbers; other numbers give another."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def set_seed(seed: int) -> None:
    """Seed every generator that a recipe may draw from: torch's on all devices, Python's and NumPy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order in which the n examples of an epoch are seen, int64 [n]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed(seed, epoch)))


def augmentation(seed: int, epoch: int, step: int, rank: int) -> torch.Generator:
    """Return the generator by which process `rank` augments the batch of a step, whoever prepares it and when."""
    return torch.Generator().manual_seed(mixed(seed, epoch, step, rank))


def random_state(device: torch.device) -> RandomState:
    """Return the states of this process's generators."""
    _, words, gauss = random.getstate()
    numpys = np.random.get_state(legacy=False)
    assert isinstance(numpys, dict)
    key = [*numpys["state"]["key"].tolist(), numpys["state"]["pos"], numpys["has_gauss"]]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "numpy": torch.tensor(key),
        "gauss": torch.tensor([math.nan if gauss is None else gauss, numpys["gauss"]], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Bring this process's generators into these states."""
    gauss, numpy_gauss = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    *key, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, dtype=np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": numpy_gauss,
        }
    )
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """A block, such as a validation, after which the generators are as they were before."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


def set_deterministic(wanted: bool) -> None:
    """Ask torch for algorithms that give the same result each time, where it has such; it goes on where it has none."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.backends.cudnn.benchmark = not wanted
    # Filling what is not initialised is for finding bugs, and costs a pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if wanted:
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
