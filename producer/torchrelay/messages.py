"""What travels through Redis, both ways: the Celery message of a chunk, and the announcement that something ended.

Both are JSON with a version, and neither ever carries an input or a result. Not here: sending (`broker`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import orjson

from torchrelay_storage import ids
from torchrelay_storage.errors import InvalidInput, RelayError
from torchrelay_storage.ids import Kind

VERSION = 1
TASK = "torchrelay.chunk"
CHANNEL = "torchrelay.ended"
PRIORITIES = range(10)  # 9 the most urgent, as users say it
ENDED_LIMIT = 2_000  # ids in one announcement: a million-job batch's cancel must not be one message of megabytes

_QUEUE_PREFIX = "torchrelay."


def queue_name(model: str) -> str:
    """Return the Celery queue of a model's chunks."""
    return _QUEUE_PREFIX + model


def model_of(queue: str) -> str | None:
    """Return the model whose queue this is, or None."""
    return queue.removeprefix(_QUEUE_PREFIX) if queue.startswith(_QUEUE_PREFIX) else None


def redis_priority(priority: int) -> int:
    """Turn our priority (9 first) into that of Celery on Redis (0 first), and back."""
    return 9 - priority


def encode(chunk: int) -> tuple[dict[str, Any]]:
    """Return the task's positional arguments for a chunk."""
    return ({"v": VERSION, "chunk": ids.show(Kind.CHUNK, chunk)},)


def decode(args: Sequence[Any]) -> int:
    """Return the chunk's id from the task's positional arguments.

    Raises:
        InvalidInput: it is no message of torchrelay, or one of a newer version.
    """
    body = args[0] if len(args) == 1 else None
    if not isinstance(body, Mapping) or "v" not in body:
        raise InvalidInput("a message on a queue of torchrelay is not one of torchrelay's; it was left out")
    if body["v"] != VERSION:
        raise InvalidInput(f"a message has version {body['v']!r}, this worker reads {VERSION}; upgrade the worker")
    try:
        return ids.read(Kind.CHUNK, body.get("chunk"))  # type: ignore[arg-type]  # the next line is for other types
    except (RelayError, AttributeError, TypeError) as error:
        raise InvalidInput("a message on a queue of torchrelay names no chunk; it was left out") from error


def read_chunk(data: bytes) -> int | None:
    """Return the chunk's id from a message as it lies in Redis, whose task has the chunk's name; None: not ours."""
    try:
        return ids.read(Kind.CHUNK, orjson.loads(data)["headers"]["id"])
    except (orjson.JSONDecodeError, RelayError, AttributeError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Ended:
    """Jobs of these chunks ended, or were brought back; so the counts of these batches changed."""

    chunks: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()


def encode_ended(chunks: Iterable[int], batches: Iterable[int]) -> Iterator[bytes]:
    """Yield the announcements to publish: none where nothing ended, several where much did."""
    left = {"chunks": iter(chunks), "batches": iter(batches)}
    while True:
        body: dict[str, Any] = {"v": VERSION}
        for name, numbers in left.items():
            body[name] = list(islice(numbers, ENDED_LIMIT))
        if not body["chunks"] and not body["batches"]:
            return
        yield orjson.dumps(body)


def decode_ended(data: bytes | str) -> Ended:
    """Read an announcement. One that cannot be read says nothing: who waits looks into SQL now and then anyway."""
    try:
        body = orjson.loads(data)
        if body["v"] != VERSION:
            return Ended()
        return Ended(tuple(int(c) for c in body.get("chunks", ())), tuple(int(b) for b in body.get("batches", ())))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return Ended()
