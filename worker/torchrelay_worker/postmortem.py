"""What became of a worker's chunks when its inner process has ended: handed back, or given up with what is known.

Not here: who is suspected and who is blamed (`torchrelay_storage.lost`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

import structlog

from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.errors import RelayError
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.lost import Evidence
from torchrelay_worker.inner import Inner

log = structlog.get_logger("torchrelay.postmortem")


def described(code: int, killed_for: str | None, last_words: str | None = None) -> str:
    """Return how a process has ended, in words; the last are its own."""
    if killed_for is not None:
        return f"its process was killed because {killed_for}"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"its process was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return f"its process ended with exit code {code}{f' ({last_words})' if last_words else ''}"


def evidence(inner: Inner, *, from_outside: bool = False) -> Evidence | None:
    """Return what the black box says; None: too much to be named."""
    found = inner.box.read()
    if found.overflow:
        return None
    return Evidence(found.jobs, found.versions, timed_out=inner.overran, from_outside=from_outside)


class Postmortem:
    """Settles what an inner process has left behind. Never raises: what cannot be done now, a rescue does later."""

    def __init__(
        self, chunks: ChunkStore, fleet: Fleet, publish: Callable[[Sequence[int], Sequence[int]], object]
    ) -> None:
        self._chunks = chunks
        self._fleet = fleet
        self._publish = publish

    def of_dead(self, inner: Inner, ended: str, *, from_outside: bool = False) -> None:
        """Give up what a process held that has died of itself, or that was killed for what it ran.

        Args:
            from_outside: it was killed, and not by its supervisor.
        """
        try:
            moved = self._chunks.give_up(inner.worker, ended, evidence(inner, from_outside=from_outside))
        except RelayError as error:
            log.info("not_given_up_yet", reason=str(error), effect="it is rescued once it is stale")
            return
        if moved.chunks:
            log.warning("given_up", chunks=len(moved.chunks), jobs=moved.count, reason=ended)
            self._publish(moved.chunks, moved.batches)

    def of_ended(self, inner: Inner, ended: str) -> None:
        """Hand back what a process held that was asked to end, without a suspicion on anything."""
        try:
            held = [(h.chunk, h.token) for h in self._chunks.held(inner.worker)]
            if held:
                log.info("handed_back", chunks=self._chunks.hand_back(held, inner.worker))
            self._fleet.stop(inner.worker, ended)
        except RelayError as error:
            log.info("not_handed_back", reason=str(error), effect="it is rescued once it is stale")
