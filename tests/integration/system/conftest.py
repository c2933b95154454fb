"""What the tests of the whole system share: a relay on the test's settings, and the models of `system_models`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from torchrelay import Relay
from torchrelay.settings import Settings

HANDLERS = {n.lower(): f"integration.system_models:{n}" for n in ("Double", "Slow", "Moody", "Shapes", "Unloadable")}


@pytest.fixture
def relay(settings: Settings) -> Iterator[Relay]:
    """An application's relay on the test's database and Redis."""
    with Relay(settings=settings) as relay:
        yield relay


class Runs:
    """What the workers of a test ran: (process, input) pairs in the order of the forward passes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[tuple[int, int]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [(int(pid), int(value)) for pid, value in (line.split() for line in lines)]

    def inputs(self) -> list[int]:
        return [value for _, value in self.all()]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """What the workers of this test ran."""
    return Runs(tmp_path / "runs.txt")


@pytest.fixture
def start(worker: Callable[..., Any], runs: Runs) -> Callable[..., Any]:
    """As `worker`, with the tests' models."""

    def go(*arguments: str, environment: dict[str, str] | None = None, **more: Any) -> Any:
        more.setdefault("handlers", HANDLERS)
        return worker(*arguments, environment={"TEST_RUNS": str(runs.path), **(environment or {})}, **more)

    return go
