"""Notices a consumer that is silent: alive, idle, with messages in its queues, and nothing comes out of them.

Seen with Celery on Redis after reconnects. First the consumer is built anew, then the process is to be replaced. Not
here: a device that stands still with work in hand (`standstill`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from torchrelay import messages
from torchrelay_storage.errors import Unreachable

log = structlog.get_logger("torchrelay.silence")

LOOKS = 10  # at the queues in the time after which a consumer counts as silent
PAUSED_SECONDS = 5.0  # between two looks: this process was stopped meanwhile, and nothing is known of that time


class Hears(Protocol):
    """What it needs of an Intake."""

    heard_at: float

    @property
    def is_offered(self) -> bool: ...
    def has_room(self, model: str) -> bool: ...


class Rebuilds(Protocol):
    """What it needs of a Consumer."""

    def rebuild(self) -> None: ...


class Silence:
    """Called once a second or so; it asks Redis less often."""

    def __init__(
        self,
        intake: Hears,
        consumer: Rebuilds,
        *,
        served: Callable[[], Mapping[str, int]],
        depths: Callable[[str], Mapping[int, int]],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it.

        Args:
            depths: how many messages a queue holds, by priority.
            seconds: that messages may wait until the consumer is built anew, and again until the process is replaced.
        """
        self._intake = intake
        self._consumer = consumer
        self._served = served
        self._depths = depths
        self._limit = seconds
        self._clock = clock
        self._looked = clock()
        self._heard = intake.heard_at
        self._silent = 0.0  # seconds for which messages have waited and none came
        self._rebuilt = False

    def look(self) -> str | None:
        """Build the consumer anew where it must be; return why the process must be replaced, None: it need not."""
        now = self._clock()
        step = now - self._looked
        if step < self._limit / LOOKS:
            return None
        self._looked = now
        heard, self._heard = self._heard, self._intake.heard_at
        if heard != self._heard or self._intake.is_offered or not self._messages_wait():
            self._silent, self._rebuilt = 0.0, False
            return None
        if step < max(self._limit / 2, PAUSED_SECONDS):
            self._silent += step
        if self._rebuilt and self._silent >= 2 * self._limit:
            return f"its consumer was silent for {self._silent:.0f} s while messages waited"
        if not self._rebuilt and self._silent >= self._limit:
            self._rebuilt = True
            log.warning("consumer_rebuilt", reason=f"messages waited for {self._silent:.0f} s and none was consumed")
            self._consumer.rebuild()
        return None

    def _messages_wait(self) -> bool:
        """Whether a queue of a model that there is room for holds messages."""
        try:
            return any(
                sum(self._depths(messages.queue_name(model)).values()) > 0
                for model in self._served()
                if self._intake.has_room(model)
            )
        except Unreachable:
            return False  # work goes on without Redis
