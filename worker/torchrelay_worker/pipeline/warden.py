"""Compares what this worker thinks it holds with what the database says, twice a second while it holds something.

So it learns of cancelled jobs, and of chunks that were rescued from it. Not here: rescuing others (`maintenance`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import structlog

from torchrelay_storage.chunk_store import Held
from torchrelay_worker.pipeline.batcher import Batcher
from torchrelay_worker.pipeline.ledger import Hold, Ledger, Work

log = structlog.get_logger("torchrelay.warden")

# Looks after which a chunk that only the database knows as ours goes back: the answer to its claim was lost.
STRAY_ROUNDS = 4
# Looks of which one asks for such chunks while nothing is held: ten seconds. It is seldom that there is one.
IDLE_ROUNDS = 20


class Holds(Protocol):
    """What the warden needs of a ChunkStore."""

    def held(self, worker: int) -> list[Held]: ...
    def open_jobs(self, chunks: Sequence[int]) -> set[int]: ...
    def hand_back(self, holds: Sequence[tuple[int, int]], worker: int) -> int: ...


class Warden:
    """One look a call; whoever owns it calls it now and then."""

    def __init__(
        self,
        store: Holds,
        ledger: Ledger,
        batcher: Batcher[Work],
        *,
        worker: int,
        lost: Callable[[int], None] = lambda chunks: None,
        elsewhere: Callable[[], Collection[int]] = frozenset,
    ) -> None:
        """Make it.

        Args:
            elsewhere: chunks that this worker holds outside the ledger, such as training runs: no strays.
        """
        self._store = store
        self._ledger = ledger
        self._batcher = batcher
        self._worker = worker
        self._lost = lost
        self._elsewhere = elsewhere
        self._strays: dict[tuple[int, int], int] = {}
        self._idle_looks = 0

    def look(self) -> None:
        """Drop what is no longer ours, and forget cancelled jobs. Raises Unreachable."""
        mine = {hold.claimed.chunk: hold for hold in self._ledger.holds()}
        if not mine and not self._strays:
            self._idle_looks += 1
            if self._idle_looks % IDLE_ROUNDS:
                return
        held = {h.chunk: h for h in self._store.held(self._worker)}
        self._drop_lost(mine, held)
        self._forget_cancelled(mine, held)
        self._return_strays(mine, held)

    def _drop_lost(self, mine: dict[int, Hold], held: dict[int, Held]) -> None:
        lost = [
            c
            for c, hold in mine.items()
            if not hold.recording and (c not in held or held[c].token != hold.claimed.token)
        ]
        dropped = self._ledger.drop(lost)  # those that were finished meanwhile are gone from it already
        if dropped:
            log.info("chunks_lost", chunks=len(dropped))
            self._discard(dropped)
            self._lost(len(dropped))

    def _forget_cancelled(self, mine: dict[int, Hold], held: dict[int, Held]) -> None:
        changed = [
            hold for c, hold in mine.items() if c in held and not hold.dropped and held[c].cancelled > hold.cancels_seen
        ]
        if not changed:
            return
        open_jobs = self._store.open_jobs([hold.claimed.chunk for hold in changed])
        for hold in changed:
            hold.cancelled = frozenset(job.id for job in hold.claimed.jobs if job.id not in open_jobs)
            hold.cancels_seen = held[hold.claimed.chunk].cancelled
        self._discard(changed)

    def _discard(self, holds: Sequence[Hold]) -> None:
        versions = {hold.claimed.version for hold in holds}
        self._ledger.ended(self._batcher.discard(lambda work: not work.is_wanted, versions))

    def _return_strays(self, mine: dict[int, Hold], held: dict[int, Held]) -> None:
        elsewhere = self._elsewhere()
        strays = {(h.chunk, h.token) for h in held.values() if h.chunk not in mine and h.chunk not in elsewhere}
        self._strays = {stray: self._strays.get(stray, 0) + 1 for stray in strays}
        back = [stray for stray, seen in self._strays.items() if seen >= STRAY_ROUNDS]
        if back:
            log.info("strays_handed_back", chunks=self._store.hand_back(back, self._worker))
