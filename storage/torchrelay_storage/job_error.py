"""Why a job failed, as it is stored: a type, a message, and the end of a traceback."""

from __future__ import annotations

from dataclasses import dataclass

import orjson


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, or why its last try did."""

    type: str
    message: str
    traceback: str | None = None


def encode_error(error: JobError) -> bytes:
    """Return an error as it is stored: JSON. What is no Unicode text in it is replaced."""
    fields = {"type": error.type, "message": error.message, "traceback": error.traceback}
    return orjson.dumps({k: v.encode(errors="replace").decode() for k, v in fields.items() if v is not None})


def decode_error(stored: bytes | None) -> JobError | None:
    """Return what was stored."""
    if not stored:
        return None
    fields = orjson.loads(stored)
    return JobError(fields["type"], fields["message"], fields.get("traceback"))
