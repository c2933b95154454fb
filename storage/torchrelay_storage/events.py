"""Where the library's log events go: to structlog as the program configured it, else to Python's `logging`.

Unconfigured, structlog would print to an application's standard output.
"""

from __future__ import annotations

import logging
from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger

_render = structlog.processors.LogfmtRenderer(key_order=["event"])


def get_logger(name: str) -> Any:
    """Return a logger of structured events."""

    def route(logger: WrappedLogger, method: str, event: EventDict) -> str:
        if structlog.is_configured():
            getattr(structlog.get_logger(name), method)(**event)
            raise structlog.DropEvent
        return _render(logger, method, event)

    return structlog.wrap_logger(
        logging.getLogger(name), processors=[route], wrapper_class=structlog.stdlib.BoundLogger
    )
