"""The duty that sends what waits: delayed jobs whose time has come, retries, and messages that Redis has lost."""

from __future__ import annotations

from typing import Protocol

from torchrelay_storage.waiting import ModelDue


class Models(Protocol):
    """What it needs of a ChunkStore."""

    def due_models(self) -> list[ModelDue]: ...


class Sends(Protocol):
    """What it needs of an Announcer."""

    def announce(self, model: str) -> int: ...
    def announce_again(self, model: str) -> int: ...


class Announce:
    """Where a look finds some: announce, and announce again, for each model that has something to announce."""

    name = "announce"
    every = 60.0  # whatever a look finds

    def __init__(self, chunks: Models, announcer: Sends) -> None:
        self._chunks = chunks
        self._announcer = announcer

    def run(self) -> None:
        """Do it once. Raises Unreachable."""
        for due in self._chunks.due_models():
            if due.announced:  # first: what is new would take the room of what was lost
                self._announcer.announce_again(due.name)
            if due.waiting:
                self._announcer.announce(due.name)
