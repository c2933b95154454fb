"""The options of a job, checked once. Jobs that share them travel together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchrelay_storage.errors import InvalidInput

MAX_SECONDS = 10 * 366 * 86400.0  # what is later than ten years is a mistake, such as milliseconds
MAX_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class Options:
    """How jobs are to be run. Seconds are counted on the database's clock from the moment of the submit."""

    priority: int = 5  # 0 to 9, 9 the most urgent
    delay: float | None = None  # seconds until it may start
    not_before: float | None = None  # the same as a point in time: seconds since 1970, UTC
    expires_in: float | None = None  # seconds within which it must have started
    timeout: float | None = None  # seconds that its device batch may take
    max_attempts: int = 3  # how often it may fail
    tenant: str = ""

    def validate(self) -> Options:
        """Return self. Raises InvalidInput that names the option."""
        if isinstance(self.priority, bool) or not isinstance(self.priority, int) or not 0 <= self.priority <= 9:
            raise InvalidInput(
                f"priority must be a whole number from 0 to 9 (9 the most urgent), not {self.priority!r}"
            )
        attempts = self.max_attempts
        if isinstance(attempts, bool) or not isinstance(attempts, int) or not 1 <= attempts <= MAX_ATTEMPTS:
            raise InvalidInput(f"max_attempts must be a whole number from 1 to {MAX_ATTEMPTS}, not {attempts!r}")
        for name, least in (("delay", 0.0), ("expires_in", 0.001), ("timeout", 0.001)):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and least <= value <= MAX_SECONDS):
                raise InvalidInput(f"{name} must be seconds, at least {least:g} and less than ten years, not {value!r}")
        if self.not_before is not None and not (_is_number(self.not_before) and self.not_before >= 0):
            raise InvalidInput(f"not_before must be seconds since 1970 (UTC), not {self.not_before!r}")
        if self.delay is not None and self.not_before is not None:
            raise InvalidInput("delay and not_before say the same thing; pass one of them")
        if not isinstance(self.tenant, str) or len(self.tenant) > 200:
            raise InvalidInput("tenant must be a string of at most 200 characters")
        return self


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
