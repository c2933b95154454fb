"""pytest fixtures for an application's tests; loaded by pytest where torchrelay is installed, so it imports nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torchrelay.testing import InlineRelay


@pytest.fixture
def inline_models() -> Mapping[str, Callable[[Any], Any]]:
    """The models of `inline_relay`, name -> function of one input. Override it in a conftest.py or a test module."""
    return {}


@pytest.fixture
def inline_relay(inline_models: Mapping[str, Callable[[Any], Any]]) -> Iterator[InlineRelay]:
    """A relay without Redis and workers, with an empty database: jobs run where they are submitted."""
    from torchrelay.testing import InlineRelay

    with InlineRelay(inline_models) as relay:
        yield relay
