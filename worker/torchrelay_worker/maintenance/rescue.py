"""The duty that gives the chunks of dead workers back to the living."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from torchrelay_storage.settle import Moved

log = structlog.get_logger("torchrelay.maintenance")


class Rescues(Protocol):
    """What it needs of a ChunkStore."""

    def rescue(self, stale_after: float) -> Moved: ...


class Rescue:
    """Each second: what is held by workers that are stopped, gone or silent waits again."""

    name = "rescue"
    every = 1.0

    def __init__(
        self, chunks: Rescues, publish: Callable[[Sequence[int], Sequence[int]], object], stale_after: float
    ) -> None:
        self._chunks = chunks
        self._publish = publish
        self._stale_after = stale_after

    def run(self) -> None:
        """Do it once. Raises Unreachable."""
        while (moved := self._chunks.rescue(self._stale_after)).chunks:
            log.warning("rescued", chunks=len(moved.chunks), jobs=moved.count)
            self._publish(moved.chunks, moved.batches)
