"""The duty that gives the chunks of dead workers back to the living."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from torchrelay_storage.settle import Moved

log = structlog.get_logger("torchrelay.maintenance")


class Rescues(Protocol):
    """What it needs of a ChunkStore."""

    def rescue(self, stale_after: float | None) -> Moved: ...


class Trusts(Protocol):
    """What it needs of a Reach."""

    @property
    def is_trusted(self) -> bool: ...


class Rescue:
    """Where a look finds some: what is held by workers that are stopped or gone waits again; and what is held by silent
    ones, once their silence means something.
    """

    name = "rescue"
    every = 60.0  # whatever a look finds

    def __init__(
        self,
        chunks: Rescues,
        publish: Callable[[Sequence[int], Sequence[int]], object],
        stale_after: float,
        reach: Trusts,
    ) -> None:
        self._chunks = chunks
        self._publish = publish
        self._stale_after = stale_after
        self._reach = reach

    def run(self) -> None:
        """Do it once. Raises Unreachable."""
        while (moved := self._chunks.rescue(self._stale_after if self._reach.is_trusted else None)).chunks:
            log.warning("rescued", chunks=len(moved.chunks), jobs=moved.count)
            self._publish(moved.chunks, moved.batches)
