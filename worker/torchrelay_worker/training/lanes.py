"""The lanes of a worker that trains: for each recipe installed here a hidden model, whose queue its runs travel by.

Publishing a lane also tells clients the recipe's hyperparameters. Not here: which inference models are served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import structlog

from torchrelay_storage.errors import RelayError, Unreachable
from torchrelay_storage.registry import ModelVersion

log = structlog.get_logger("torchrelay.lanes")


class Catalog(Protocol):
    """What is needed of the Recipes."""

    def names(self) -> list[str]: ...
    def schema(self, name: str) -> Mapping[str, Any]: ...


class Publishes(Protocol):
    """What is needed of a Registry."""

    def lane(self, recipe: str, schema: Mapping[str, Any]) -> ModelVersion: ...


class Lanes:
    """The lanes by name, published at the first look."""

    def __init__(self, registry: Publishes, recipes: Catalog) -> None:
        self._registry = registry
        self._recipes = recipes
        self._lanes: dict[str, int] | None = None

    def names(self) -> Mapping[str, int]:
        """Return the lanes: name -> id of the hidden model. Raises Unreachable where they are not published yet."""
        if self._lanes is None:
            self._lanes = self._publish()
        return self._lanes

    def _publish(self) -> dict[str, int]:
        lanes: dict[str, int] = {}
        for recipe in self._recipes.names():
            try:
                lane = self._registry.lane(recipe, self._recipes.schema(recipe))
            except Unreachable:
                raise
            except RelayError as error:  # one recipe that cannot be imported must not keep the others from being served
                log.warning("recipe_not_served", recipe=recipe, reason=str(error))
                continue
            lanes[lane.name] = lane.model
        return lanes
