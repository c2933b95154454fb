"""Each process's share of each batch, from any position on; on a device the next is prepared while a step runs.

Which examples a batch has follows from the order of the epoch and the index of the batch, and how they are augmented
from a generator of the batch's own: so it does not matter who prepares a batch, when, and after which other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from torchrelay_worker.training.recipe import Batch, Examples, Recipe
from torchrelay_worker.training.team import Team


@dataclass(frozen=True, slots=True)
class Part:
    """Examples, and the indices, int64 [n], of those that are used."""

    examples: Examples
    indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class Share:
    """What one process computes of a batch.

    Attributes:
        batch: tensors [n, ...] on the process's device.
        size: how many of the whole batch's examples these are. 0: there were fewer examples than processes, and one is
            computed that another has too, since every process must take part; it counts for nothing.
        whole: examples of the batch in all processes.
    """

    batch: Batch
    size: int
    whole: int

    @property
    def part(self) -> float:
        """Which part of the whole batch this is."""
        return self.size / self.whole


def batches(
    recipe: Recipe,
    examples: Examples,
    order: torch.Tensor,
    size: int,
    team: Team,
    *,
    start: int = 0,
    generator: Callable[[int], torch.Generator] | None = None,
) -> Iterator[Share]:
    """Yield this process's shares of the batches of an epoch.

    Args:
        order: indices of the examples, int64 [n]; batch i has those from i * size on.
        size: examples of a batch in all processes.
        start: the first batch that is wanted.
        generator: what to augment batch i with; None: there is no augmentation.
    """
    count = -(-len(order) // size)
    on_device = team.device.type != "cpu"

    def prepare(i: int) -> Share:
        whole = order[i * size : (i + 1) * size]
        mine = team.share(whole)
        batch = recipe.batch(examples, mine if len(mine) else whole[:1], generator(i) if generator else None)
        if on_device:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return Share(batch, len(mine), len(whole))

    if not on_device:  # a thread would take the time from the step that it is to save it for
        yield from map(prepare, range(start, count))
        return
    with ThreadPoolExecutor(1, "batches") as thread:
        ahead = [thread.submit(prepare, i) for i in range(start, min(start + 1, count))]
        for i in range(start, count):
            share = ahead.pop().result()
            if i + 1 < count:
                ahead.append(thread.submit(prepare, i + 1))
            yield Share(team.to_device(share.batch), share.size, share.whole)
