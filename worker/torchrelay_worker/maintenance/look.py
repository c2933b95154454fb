"""What the leader sees at one look: for which duties there is something to do. While there is nothing, it looks seldom.

Each of these duties also has a time of its own, should a look be wrong.
"""

from __future__ import annotations

from typing import Protocol

from torchrelay_storage.upkeep import Needed
from torchrelay_worker.maintenance.announce import Announce
from torchrelay_worker.maintenance.expire import Expire
from torchrelay_worker.maintenance.rescue import Rescue, Trusts

SECONDS = 1.0  # while there is something to do, or chunks are held and there may be in a moment
IDLE_SECONDS = 2.0  # sooner where a delayed chunk's time comes or one expires


class Sees(Protocol):
    """What it needs of an Upkeep."""

    def look(self, stale_after: float | None) -> Needed: ...


class Look:
    """Each second, every two while all is quiet, and whenever something is known to become due."""

    def __init__(self, upkeep: Sees, stale_after: float, reach: Trusts) -> None:
        self._upkeep = upkeep
        self._stale_after = stale_after
        self._reach = reach
        self._needed: Needed | None = None

    @property
    def every(self) -> float:
        """Seconds from the last look to the next."""
        needed = self._needed
        if needed is None:  # the last one failed
            return SECONDS
        busy = needed.announce or needed.rescue or needed.expire or needed.held
        usual = SECONDS if busy else IDLE_SECONDS
        return usual if needed.next_due is None else min(usual, needed.next_due)

    def run(self) -> list[str]:
        """Return the names of the duties for which there is something to do. Raises Unreachable."""
        self._needed = None
        self._needed = needed = self._upkeep.look(self._stale_after if self._reach.is_trusted else None)
        asked = {Announce.name: needed.announce, Rescue.name: needed.rescue, Expire.name: needed.expire}
        return [name for name, is_needed in asked.items() if is_needed]
