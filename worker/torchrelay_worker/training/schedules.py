"""Schedules of the learning rate, each a factor as a function of the step: there is nothing to restore but the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def schedule(optimizer: Optimizer, name: str, steps: int, *, warmup: float = 0.0) -> LRScheduler:
    """Return a schedule over `steps` steps: `constant`, `linear`, `cosine` (Loshchilov, Hutter 2017).

    Args:
        warmup: part of the steps in which the rate rises from nearly 0 to the optimiser's (Goyal et al. 2017).
    """
    rising = round(steps * warmup)
    falling = max(1, steps - rising)
    shape = _SHAPES[name]

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return shape(min(1.0, (step - rising) / falling))

    return LambdaLR(optimizer, factor)


_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda part: 1.0,
    "linear": lambda part: 1.0 - part,
    "cosine": lambda part: 0.5 * (1.0 + math.cos(math.pi * part)),
}
