"""Which models this worker serves: those it was asked for, else all whose handler is installed here.

Looked up anew every two seconds, so that a model registered a moment ago is served without a restart. Where the worker
trains, also the lanes of its recipes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from torchrelay_storage.registry import ModelVersion
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.models.residency import Residency
from torchrelay_worker.pipeline.pace import Pace

log = structlog.get_logger("torchrelay.serving")


class Versions(Protocol):
    """What is needed of a Registry."""

    def versions(self, name: str | None = None) -> list[ModelVersion]: ...
    def set_chunk_size(self, version: int, chunk_size: int) -> None: ...


class Trains(Protocol):
    """What is needed of the Lanes of a worker that trains."""

    def names(self) -> Mapping[str, int]: ...


class Serving:
    """The served models by name, and the chunk sizes that suit them."""

    def __init__(
        self,
        registry: Versions,
        handlers: Handlers,
        asked_for: Sequence[str] | None = None,
        lanes: Trains | None = None,
    ) -> None:
        """Make it.

        Args:
            asked_for: the models to serve; empty: none, None: all whose handler is installed here.
            lanes: of a worker that trains.
        """
        self._registry = registry
        self._handlers = handlers
        self._asked_for = frozenset(asked_for) if asked_for is not None else None
        self._lanes = lanes
        self._lane_ids: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._served: dict[str, int] = {}
        self._versions: dict[int, ModelVersion] = {}
        self._said: set[str] = set()
        self.added: Callable[[str], None] = lambda name: None  # called for each model that is served from now on

    def names(self) -> Mapping[str, int]:
        """Return the served models: name -> id."""
        return self._served

    def lanes(self) -> frozenset[int]:
        """Return the ids of the served lanes of training runs."""
        return self._lane_ids

    def look(self) -> None:
        """Learn of new models. Raises Unreachable."""
        lanes = self._lanes.names() if self._lanes is not None else {}
        versions = self._registry.versions()
        newest: dict[str, ModelVersion] = {}
        for version in versions:  # the newest of each name first
            newest.setdefault(version.name, version)
        served = {name: v.model for name, v in newest.items() if self._serves(v)} | dict(lanes)
        with self._lock:
            self._lane_ids = frozenset(lanes.values())
            added = [name for name in served if name not in self._served]
            self._served = served
            self._versions = {v.id: v for v in versions}
        for name in self._asked_for or ():
            if name not in newest:
                self._say_once(name, "it is not registered yet; it is served as soon as it is")
        for name in added:
            log.info("model_served", model=name)
            self.added(name)

    def _serves(self, version: ModelVersion) -> bool:
        if self._asked_for is not None and version.name not in self._asked_for:
            return False
        if version.handler in self._handlers:
            return True
        if self._asked_for is not None:
            self._say_once(version.name, f"its handler {version.handler!r} is not installed here")
        return False

    def _say_once(self, name: str, reason: str) -> None:
        if name not in self._said:
            self._said.add(name)
            log.warning("model_not_served", model=name, reason=reason)

    def rates(self, pace: Pace) -> dict[str, float]:
        """Return chunks a second by model, as the announcer reads them from the heartbeat's stats."""
        found = {name: pace.chunks_per_s(number) for name, number in self._served.items()}
        return {name: round(rate, 3) for name, rate in found.items() if rate > 0}

    def job_rates(self, pace: Pace) -> dict[str, float]:
        """Return jobs a second by model."""
        found = {name: pace.jobs_per_s(number) for name, number in self._served.items()}
        return {name: round(rate, 1) for name, rate in found.items() if rate}

    def fit_chunks(self, residency: Residency, pace: Pace) -> None:
        """Record for each loaded model how many jobs should travel together. Raises Unreachable."""
        for number in residency.resident():
            version = self._versions.get(number)
            limits = residency.limits(number)
            if version is None or limits is None:
                continue
            wanted = pace.chunk_size(version.model, limits.size)
            if not 0.7 <= wanted / version.chunk_size <= 1.4:  # rates waver; a new size is worth a clear change only
                self._registry.set_chunk_size(number, wanted)
