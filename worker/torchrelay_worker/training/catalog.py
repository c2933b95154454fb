"""Which `Recipe` classes this machine has: by entry point, or by the operator's settings; never by a client.

Knowing the names, and the hyperparameters of the ready recipes, imports no torch; `find` imports the class.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from torchrelay.recipes import READY
from torchrelay_storage.errors import InvalidInput, RecipeNotFound

if TYPE_CHECKING:
    from torchrelay_worker.training.recipe import Recipe

GROUP = "torchrelay.recipes"
_OURS = "torchrelay_worker.training.recipes."


class Recipes:
    """The recipes by name. What the settings name goes before an entry point of the same name."""

    def __init__(self, configured: Mapping[str, str] | None = None) -> None:
        self._targets = {point.name: point.value for point in entry_points(group=GROUP)} | dict(configured or {})

    def names(self) -> list[str]:
        """Return the names of all recipes, sorted."""
        return sorted(self._targets)

    def __contains__(self, name: str) -> bool:
        return name in self._targets

    def find(self, name: str) -> type[Recipe]:
        """Import and return the class.

        Raises:
            RecipeNotFound: there is no recipe of this name, or it cannot be imported; the message names what there is.
            InvalidInput: what it names is not a subclass of `Recipe`.
        """
        from torchrelay_worker.training.recipe import Recipe

        target = self._target(name)
        module, _, attribute = target.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise RecipeNotFound(
                f"recipe {name!r} ({target}) cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, Recipe)):
            raise InvalidInput(f"recipe {name!r} ({target}) is not a subclass of torchrelay_worker.Recipe")
        return found

    def schema(self, name: str) -> dict[str, Any]:
        """Return the JSON Schema of the recipe's hyperparameters, which is what clients check against.

        Raises:
            RecipeNotFound, InvalidInput: as `find`.
        """
        if name in READY and self._target(name).startswith(_OURS):
            return READY[name].model_json_schema()
        return self.find(name).Hyperparameters.model_json_schema()

    def _target(self, name: str) -> str:
        if name in self._targets:
            return self._targets[name]
        near = difflib.get_close_matches(name, self.names(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(self.names()) or 'none'}"
        raise RecipeNotFound(
            f"no recipe {name!r} is installed here; {hint} (an entry point of the group {GROUP!r}, or the setting "
            "`recipes`, adds one)"
        )
