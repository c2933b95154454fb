"""The training losses on their way from the device to a point of the curve, and to the mean of an epoch.

To read a loss is to wait for the device, so several are read at once; they are summed on the host in the order of the
steps, so that the sum does not depend on when they were read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from torchrelay_worker.training.errors import NonFinite
from torchrelay_worker.training.team import Team

UNREAD = 32  # losses that may wait to be read: how late a NaN is noticed
READ_SECONDS = 0.25  # likewise where steps are slow; and how far the host may run ahead of the device


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    epoch: int
    rate: float


@dataclass(slots=True)
class _Sum:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    def taken(self) -> float:
        mean = self.total / self.count
        self.total, self.count = 0.0, 0
        return mean


class Losses:
    """The losses since the last point, and those of the epoch."""

    def __init__(self, team: Team, *, eager: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Make it.

        Args:
            eager: read each loss at once, so that the host never runs ahead of the device.
        """
        self._team = team
        self._eager = eager or team.device.type == "cpu"
        self._clock = clock
        self._read_at = clock()
        self._steps: list[_Step] = []
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._point = _Sum()
        self._epoch = _Sum()

    def add(
        self, loss: torch.Tensor, part: float, norm: torch.Tensor | None, *, step: int, epoch: int, rate: float
    ) -> None:
        """Take in the loss of a step.

        Args:
            loss: mean over this process's share of the batch, a scalar.
            part: which part of the batch that is.
            norm: length of the gradient, a scalar; None where it is not known or need not be finite.
        """
        self._steps.append(_Step(step, epoch, rate))
        self._losses.append(loss.detach() if part == 1.0 else loss.detach() * part)
        if norm is not None:
            self._norms.append(norm.detach())

    @property
    def is_due(self) -> bool:
        """Whether they should be read now."""
        n = len(self._steps)
        return n > 0 and (self._eager or n >= UNREAD or self._clock() - self._read_at > READ_SECONDS)

    def read(self) -> None:
        """Read those that wait: in all processes at the same step.

        Raises:
            NonFinite: one is NaN or infinite, or the gradient was.
        """
        if not self._steps:
            return
        losses = self._summed(self._losses)
        norms = _values(self._norms)
        steps, self._steps, self._losses, self._norms = self._steps, [], [], []
        self._read_at = self._clock()
        for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
            if not math.isfinite(loss):
                raise _not_finite("the training loss", loss, step)
            if norms and not math.isfinite(norms[i]):
                raise _not_finite("the length of the gradient", norms[i], step)
            self._point.add(loss)
            self._epoch.add(loss)

    def _summed(self, parts: Sequence[torch.Tensor]) -> list[float]:
        """The losses of whole batches from this process's parts of them."""
        if self._team.world == 1:
            return _values(parts)
        return list(self._team.total(torch.stack(list(parts)).float()).tolist())

    def point(self) -> float:
        """Return the mean since the last point, and begin the next. All must have been read."""
        return self._point.taken()

    def epoch(self) -> float:
        """Return the mean of the epoch, and begin the next. All must have been read."""
        return self._epoch.taken()

    def state(self) -> dict[str, tuple[float, int]]:
        """Return what a checkpoint keeps. All must have been read."""
        assert not self._steps
        return {"point": (self._point.total, self._point.count), "epoch": (self._epoch.total, self._epoch.count)}

    def restore(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Go on from there."""
        self._point, self._epoch = _Sum(*state["point"]), _Sum(*state["epoch"])


def _values(scalars: Sequence[torch.Tensor]) -> list[float]:
    if len(scalars) <= 1:  # the usual case on a CPU
        return [scalar.item() for scalar in scalars]
    return list(torch.stack(list(scalars)).tolist())


def _not_finite(what: str, value: float, step: _Step) -> NonFinite:
    return NonFinite(
        f"{what} is {value} at step {step.number} (epoch {step.epoch}, learning rate {step.rate:g}): lower "
        "learning_rate or clip_norm, or look for extreme values in the data; the last checkpoint is from before"
    )
