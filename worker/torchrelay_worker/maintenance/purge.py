"""The duty that deletes what ended long ago, with its artifacts; and the rows of workers that are long gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torchrelay_storage import values
from torchrelay_storage.artifacts import run_path
from torchrelay_storage.retention import Purged

DAY = 86_400.0  # seconds
WORKERS_KEPT = 7 * DAY  # at least; and as long as the jobs that they ran: their rows tell what ran these
SLICES = 20  # in one run: the other duties must not wait for a million rows


class Purges(Protocol):
    """What it needs of a Retention."""

    def purge(self, older_than: float, *, reference: bytes) -> Purged: ...


class Deletes(Protocol):
    """What it needs of an Artifacts."""

    def under(self, path: str) -> list[str]: ...
    def delete(self, uris: Iterable[str]) -> None: ...


class Forgets(Protocol):
    """What it needs of a Fleet."""

    def forget(self, older_than: float) -> int: ...


class Purge:
    """Each half minute, in slices."""

    name = "purge"
    every = 30.0

    def __init__(self, retention: Purges, artifacts: Deletes, fleet: Forgets, days: float) -> None:
        """Make it.

        Args:
            days: that ended jobs are kept; 0: for ever.
        """
        self._retention = retention
        self._artifacts = artifacts
        self._fleet = fleet
        self._days = days

    def run(self) -> None:
        """Do it once. Raises Unreachable."""
        if self._days <= 0:
            return
        self._fleet.forget(max(WORKERS_KEPT, self._days * DAY))
        tag = bytes((values.REFERENCE,))
        for _ in range(SLICES):
            purged = self._retention.purge(self._days * DAY, reference=tag)
            references = (values.as_reference(stored) for stored in purged.artifacts)
            uris = [reference.uri for reference in references if reference is not None]
            for run in purged.runs:  # by their folder: a process that was killed left files that no row names
                uris += self._artifacts.under(run_path(run, "checkpoints"))
            if uris:
                self._artifacts.delete(uris)
            if not purged.chunks:
                return
