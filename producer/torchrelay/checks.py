"""Arguments that several calls of a client take, checked in one place. Options of jobs have a class of their own."""

from __future__ import annotations

from collections.abc import Iterable

from torchrelay_storage.errors import InvalidInput
from torchrelay_storage.states import JobState

KEY_LENGTH = 256  # characters


def check_key(key: str | None) -> None:
    """Raise InvalidInput where a key is none."""
    if key is None:
        return
    if not isinstance(key, str) or not 1 <= len(key) <= KEY_LENGTH or "\0" in key:
        raise InvalidInput(f"a key must be a string of 1 to {KEY_LENGTH} characters without NUL, not {key!r:.80}")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise InvalidInput("a key must be Unicode text; this one holds a lone surrogate") from None


def check_limit(limit: int) -> None:
    """Raise InvalidInput where the length of a page is none."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise InvalidInput(f"limit must be a whole number above 0, not {limit!r}")


def read_states(state: str | Iterable[str] | None) -> tuple[JobState, ...]:
    """Return the states that a caller has named, one or several. Raises InvalidInput."""
    if state is None:
        return ()
    try:
        return tuple(JobState(word) for word in ([state] if isinstance(state, str) else state))
    except ValueError:
        raise InvalidInput(f"unknown state {state!r}; states are {', '.join(JobState)}") from None
