"""Which models are loaded: as many as the device's memory (or a set limit) takes, the least recently used out first.

A model with work on its way is pinned and stays. Not here: what is done with a loaded model (`pipeline`).
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import torch

from torchrelay_storage.errors import RelayError
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.models.model import Model
from torchrelay_worker.models.weights import Weights, WeightsCache
from torchrelay_worker.pipeline.batcher import Limits

log = structlog.get_logger("torchrelay.residency")

RETRY_SECONDS = 10.0  # after which a model that could not be loaded is tried again
ROOM_SECONDS = 120.0  # that a load waits for the models that are in its way to finish their work
HEADROOM = 1.2  # device memory that a model needs, as a multiple of its weights file


class LoadFailed(RelayError):
    """A model cannot be loaded on this worker; its jobs are tried again, here or on another."""


@dataclass(slots=True)
class Resident:
    """A loaded model version."""

    version: ModelVersion
    model: Model
    limits: Limits
    pins: int = 0
    used: float = field(default_factory=time.monotonic)


def limits_of(model: Model) -> Limits:
    """Return how the batcher is to treat a model's inputs."""
    return Limits(
        size=max(1, int(model.max_batch_size)),
        wait=max(0.0, float(model.max_wait_ms) / 1000.0),
        cost=model.max_batch_cost if model.has_length else None,
        padding=float(model.max_padding),
    )


class Residency:
    """The loaded models of one device. `acquire` is called by one thread, the loader; the rest by any."""

    def __init__(
        self,
        registry: Registry,
        handlers: Handlers,
        weights: WeightsCache,
        device: torch.device,
        *,
        max_loaded: int | None = None,
        on_loaded: Callable[[Resident], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        room_seconds: float = ROOM_SECONDS,
    ) -> None:
        self.device = device
        self._registry = registry
        self._handlers = handlers
        self._weights = weights
        self._max_loaded = max_loaded
        self._on_loaded = on_loaded
        self._clock = clock
        self._room_seconds = room_seconds
        self._changed = threading.Condition()
        self._loaded: dict[int, Resident] = {}
        self._failed: dict[int, tuple[float, LoadFailed]] = {}
        self._waiting = 0
        self._closing = False

    # --- questions ----------------------------------------------------------------------------------------

    def resident(self) -> frozenset[int]:
        """Return the ids of the versions that are loaded."""
        with self._changed:
            return frozenset(self._loaded)

    def limits(self, version: int) -> Limits | None:
        """Return the limits of a loaded model; None if it is not loaded."""
        with self._changed:
            resident = self._loaded.get(version)
            return resident.limits if resident else None

    def names(self) -> list[str]:
        """Return what is loaded, as `digits@3`."""
        with self._changed:
            return sorted(r.version.ref for r in self._loaded.values())

    def failures(self) -> list[str]:
        """Return why models could not be loaded."""
        with self._changed:
            return sorted(str(error) for _, error in self._failed.values())

    @property
    def is_waited_for(self) -> bool:
        """Whether a load waits until a pinned model is free: nothing more should be claimed for the loaded ones."""
        return self._waiting > 0

    def pin(self, version: int) -> Resident | None:
        """Return a loaded model and keep it until `release`; None if it is not loaded."""
        with self._changed:
            resident = self._loaded.get(version)
            if resident is not None:
                resident.pins += 1
                resident.used = self._clock()
            return resident

    def release(self, version: int, pins: int = 1) -> None:
        """Give pins back."""
        with self._changed:
            resident = self._loaded.get(version)
            if resident is not None:
                resident.pins = max(0, resident.pins - pins)
                resident.used = self._clock()
                self._changed.notify_all()

    def load_timeout(self, version: int) -> float:
        """Return the seconds that loading a version may take, with the waiting for room."""
        try:
            return float(self._handlers.find(self._registry.version(version).handler).load_timeout) + self._room_seconds
        except Exception:  # whatever it is, the load will meet it, and say so
            return Model.load_timeout + self._room_seconds

    # --- loading ------------------------------------------------------------------------------------------

    def acquire(self, version: int) -> Resident:
        """Load a version if it is not loaded, and pin it.

        Raises:
            LoadFailed: it cannot be loaded; the message says why. Asked again soon, the same error comes at once.
        """
        resident = self.pin(version)
        if resident is not None:
            return resident
        with self._changed:
            failed = self._failed.get(version)
            if failed is not None and self._clock() - failed[0] < RETRY_SECONDS:
                raise failed[1]
        try:
            resident = self._load(version)
        except LoadFailed as error:
            with self._changed:
                self._failed[version] = (self._clock(), error)
            log.warning("model_not_loaded", version=version, reason=str(error))
            raise
        with self._changed:
            self._failed.pop(version, None)
            self._loaded[version] = resident
            resident.pins += 1
        if self._on_loaded is not None:
            self._on_loaded(resident)
        return resident

    def _load(self, number: int) -> Resident:
        try:
            version = self._registry.version(number)
        except RelayError as error:
            raise LoadFailed(f"model version {number} cannot be loaded: {error}") from error
        try:
            weights = self._weights.fetch(version)
            handler = self._handlers.find(version.handler)
            need = int((weights.path.stat().st_size if weights.path else 0) * HEADROOM)
            self._make_room(need)
            started = self._clock()
            while (model := self._try(handler, weights)) is None:
                if not self._evict_one(wait=True):
                    raise LoadFailed("the device's memory is full, and no loaded model could make room")
            log.info("model_loaded", model=version.ref, seconds=round(self._clock() - started, 2))
            return Resident(version, model, limits_of(model), used=self._clock())
        except BaseException as error:
            raise LoadFailed(f"model {version.ref} cannot be loaded: {type(error).__name__}: {error}") from error

    def _try(self, handler: type[Model], weights: Weights) -> Model | None:
        model = handler()
        model.device = self.device
        try:
            model.load(weights, self.device)
        except torch.OutOfMemoryError:
            return None  # and what it has allocated is let go of
        Options(backoff=model.backoff).validate()
        return model

    def _make_room(self, need: int) -> None:
        while self._max_loaded is not None and len(self._loaded) >= self._max_loaded:
            if not self._evict_one(wait=True):
                raise LoadFailed(f"no room: {len(self._loaded)} models are loaded and busy (max_loaded)")
        while self._free() < need:
            if not self._evict_one(wait=False):
                return  # the load itself will tell

    def _free(self) -> float:
        if self.device.type != "cuda":
            return float("inf")
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return float(free + kept)

    def _evict_one(self, *, wait: bool) -> bool:
        """Unload the least recently used model that has no work; with `wait`, wait for one to have none."""
        with self._changed:
            if not self._loaded:
                return False
            if wait and all(r.pins for r in self._loaded.values()):
                self._waiting += 1
                try:
                    self._changed.wait_for(
                        lambda: self._closing or any(not r.pins for r in self._loaded.values()), self._room_seconds
                    )
                finally:
                    self._waiting -= 1
            idle = [r for r in self._loaded.values() if not r.pins]
            if not idle or self._closing:
                return False
            victim = min(idle, key=lambda r: r.used)
            del self._loaded[victim.version.id]
        log.info("model_unloaded", model=victim.version.ref)
        del idle, victim
        self._reclaim()
        return True

    def _reclaim(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let no load wait any longer."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
