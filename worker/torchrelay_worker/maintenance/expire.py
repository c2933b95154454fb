"""The duty that ends jobs which were not started within their `expires_in`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torchrelay_storage.settle import Moved


class Expires(Protocol):
    """What it needs of a ChunkStore."""

    def expire(self) -> Moved: ...


class Expire:
    """Where a look finds some."""

    name = "expire"
    every = 60.0  # whatever a look finds

    def __init__(self, chunks: Expires, publish: Callable[[Sequence[int], Sequence[int]], object]) -> None:
        self._chunks = chunks
        self._publish = publish

    def run(self) -> None:
        """Do it once. Raises Unreachable."""
        while (moved := self._chunks.expire()).chunks:
            self._publish(moved.chunks, moved.batches)
