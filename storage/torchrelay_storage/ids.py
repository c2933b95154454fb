"""Ids: 63-bit integers, roughly in the order of time, drawn without asking anyone; shown as short strings.

An id is the millisecond since 2026 in its upper 41 bits and a random number in its lower 22, the layout of Twitter's
Snowflake with chance in place of a machine number. A run of n ids is consecutive, and one process never draws the same
twice. Two processes may, about once in four million for two submits of the same millisecond: the primary key notices,
and the submit draws again.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from enum import StrEnum

from torchrelay_storage.errors import BatchNotFound, InvalidInput, JobNotFound, NotFound

EPOCH_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z
RANDOM_BITS = 22
LARGEST = 2**63 - 1

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_DIGITS = {c: i for i, c in enumerate(_ALPHABET)} | {"i": 1, "l": 1, "o": 0}
_WIDTH = 13  # 5 bits each

_lock = threading.Lock()
_next = 0


def _forget() -> None:
    # A forked child must not go on with its parent's run of ids, nor wait for a lock that a thread of it held.
    global _lock, _next
    _lock = threading.Lock()
    _next = 0


os.register_at_fork(after_in_child=_forget)


class Kind(StrEnum):
    """What an id names; the first letter of how it is shown."""

    JOB = "j"
    BATCH = "b"
    CHUNK = "c"
    WORKER = "w"

    @property
    def noun(self) -> str:
        """The kind as a word, for messages."""
        return self.name.lower()


def draw(n: int = 1) -> int:
    """Return the first of `n` consecutive ids that this process has not drawn before."""
    global _next
    fresh = ((time.time_ns() // 1_000_000 - EPOCH_MS) << RANDOM_BITS) | secrets.randbits(RANDOM_BITS)
    with _lock:
        first = max(fresh, _next)
        _next = first + n
    return first


def show(kind: Kind, number: int) -> str:
    """Return the id as users see it, such as `j_0c8ks4t2m1x7f`."""
    digits = []
    for _ in range(_WIDTH):
        digits.append(_ALPHABET[number & 31])
        number >>= 5
    return f"{kind.value}_{''.join(reversed(digits))}"


def read(kind: Kind, text: str) -> int:
    """Return the number behind a shown id.

    Raises:
        JobNotFound, BatchNotFound, NotFound: it is no id, or one of another kind; the message says which.
    """
    number = _number(text)
    if number is not None and text[0].lower() == kind.value:
        return number
    missing = {Kind.JOB: JobNotFound, Kind.BATCH: BatchNotFound}.get(kind, NotFound)
    if number is not None:
        raise missing(f"{text} is the id of a {Kind(text[0].lower()).noun}, not of a {kind.noun}")
    raise missing(f"{text!r} is not an id of a {kind.noun}; such an id looks like {show(kind, 0)}")


def kind_of(text: str) -> Kind:
    """Return which kind of id this is. Raises InvalidInput if it is none."""
    if _number(text) is None:
        raise InvalidInput(f"{text!r} is not an id; one looks like {show(Kind.JOB, 0)} or {show(Kind.BATCH, 0)}")
    return Kind(text[0].lower())


def _number(text: str) -> int | None:
    lowered = text.lower()
    if len(lowered) != _WIDTH + 2 or lowered[1] != "_" or lowered[0] not in {k.value for k in Kind}:
        return None
    number = 0
    for c in lowered[2:]:
        if c not in _DIGITS:
            return None
        number = number << 5 | _DIGITS[c]
    return number if number <= LARGEST else None
