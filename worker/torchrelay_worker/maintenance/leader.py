"""One of all workers' supervisors does the maintenance: the one that holds the lease. A duty is a file beside this one.

Duties may overlap without harm, should two believe for a moment that they lead. Not here: what there is to do (`look`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Protocol

import structlog

from torchrelay_storage.errors import RelayError, Unreachable

log = structlog.get_logger("torchrelay.maintenance")

LEASE = "maintenance"
LEASE_SECONDS = 10.0  # after which another takes over from a leader that died
RENEW_SECONDS = 5.0  # by who leads, and looks in between
ASK_SECONDS = 3.0  # by who does not
TICK_SECONDS = 0.5


class Duty(Protocol):
    """Something that is done again and again."""

    name: str
    every: float  # seconds

    def run(self) -> None:
        """Do it once. Raises Unreachable where the database, Redis or the object store is away."""


class Looks(Protocol):
    """What the leader needs of a Look."""

    @property
    def every(self) -> float: ...  # seconds, from the last one to the next
    def run(self) -> Collection[str]: ...


class Leases(Protocol):
    """What the leader needs of a Fleet."""

    def acquire(self, lease: str, holder: int, seconds: float) -> bool: ...
    def release(self, lease: str, holder: int) -> None: ...


class Leader:
    """A thread that does the duties while it holds the lease. A context manager."""

    def __init__(
        self,
        leases: Leases,
        holder: Callable[[], int],
        duties: Sequence[Duty],
        clock: Callable[[], float] = time.monotonic,
        *,
        look: Looks | None = None,
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        """Make it.

        Args:
            holder: who this is: the id of the worker's present incarnation.
            look: names the duties for which there is something to do, whatever their own time.
            answered: called whenever the database has answered, whether we lead or not.
        """
        self._answered = answered
        self._leases = leases
        self._holder = holder
        self._duties = duties
        self._look = look
        self._clock = clock
        self._renew_at = 0.0
        self._look_at = 0.0
        self._leads_as: int | None = None
        self._held_as: int | None = None
        self._due = {duty.name: 0.0 for duty in duties}
        self._away: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)

    def __enter__(self) -> Leader:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        self._thread.join(LEASE_SECONDS)

    def _run(self) -> None:
        while not self._closing.wait(TICK_SECONDS):
            self.tick()
        if self._leads_as is not None:
            self._guarded("lease", lambda: self._leases.release(LEASE, self._leads_as or 0))

    def tick(self) -> None:
        """Renew the lease where it is time, and do the duties that are due. Never raises."""
        if self._clock() >= self._renew_at:
            self._leads_as = None
            self._guarded("lease", self._take_lease)
        if self._leads_as is None:
            return
        if self._look is not None and self._clock() >= self._look_at:
            self._guarded("look", self._look_around)
            self._look_at = self._clock() + self._look.every
        for duty in self._duties:
            if self._clock() >= self._due[duty.name] and not self._closing.is_set():
                self._guarded(duty.name, duty.run)
                self._due[duty.name] = self._clock() + duty.every

    def _take_lease(self) -> None:
        holder = self._holder()
        self._renew_at = self._clock() + ASK_SECONDS
        if self._held_as not in (None, holder):  # our process was replaced: the lease of the old one is ours too
            self._leases.release(LEASE, self._held_as or 0)
            self._held_as = None
        if self._leases.acquire(LEASE, holder, LEASE_SECONDS):
            self._leads_as = self._held_as = holder
            self._renew_at = self._clock() + RENEW_SECONDS
        self._answered()

    def _look_around(self) -> None:
        if self._look is not None:
            needed = self._look.run()
            self._answered()
            self._due.update(dict.fromkeys(needed, self._clock()))

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Unreachable as error:
            if name not in self._away:
                self._away.add(name)
                log.warning("duty_waits", duty=name, reason=str(error))
        except RelayError as error:
            log.warning("duty_refused", duty=name, reason=str(error))
        except Exception:
            log.exception("duty_failed", duty=name)
        else:
            if name in self._away:
                self._away.discard(name)
                log.info("duty_goes_on", duty=name)
