"""Which `Model` classes this machine has: by entry point, or by the operator's settings; never by a client.

Knowing the names imports nothing; `find` imports the class, and torch with it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from torchrelay_storage.errors import InvalidInput, ModelNotFound

if TYPE_CHECKING:
    from torchrelay_worker.models.model import Model

GROUP = "torchrelay.models"


class Handlers:
    """The handlers by name. What the settings name goes before an entry point of the same name."""

    def __init__(self, configured: Mapping[str, str] | None = None) -> None:
        self._targets = {point.name: point.value for point in entry_points(group=GROUP)} | dict(configured or {})

    def names(self) -> list[str]:
        """Return the names of all handlers, sorted."""
        return sorted(self._targets)

    def __contains__(self, name: str) -> bool:
        return name in self._targets

    def find(self, name: str) -> type[Model]:
        """Import and return the class.

        Raises:
            ModelNotFound: there is no handler of this name, or it cannot be imported; the message names what there is.
            InvalidInput: what it names is not a subclass of `Model`.
        """
        from torchrelay_worker.models.model import Model

        target = self._targets.get(name)
        if target is None:
            near = difflib.get_close_matches(name, self.names(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(self.names()) or 'none'}"
            raise ModelNotFound(
                f"no handler {name!r} is installed here; {hint} (an entry point of the group {GROUP!r}, or the setting "
                "`handlers`, adds one)"
            )
        module, _, attribute = target.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise ModelNotFound(
                f"handler {name!r} ({target}) cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, Model)):
            raise InvalidInput(f"handler {name!r} ({target}) is not a subclass of torchrelay_worker.Model")
        return found
