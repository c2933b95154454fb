"""Runs of a small recipe by real processes, without a worker around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from training_runs import Scene
from zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """What run processes are forked off, for all tests of this folder."""
    with Zygote() as zygote:
        yield zygote


@pytest.fixture
def scene(settings: Settings, database: Database, zygote: Zygote) -> Scene:
    """A database, an artifact store, a dataset."""
    return Scene(settings, database, zygote)
