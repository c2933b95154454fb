"""States of jobs and chunks, and the moves between them, as data.

Not here: the statements that make the moves (`job_store`, `chunk_store`). Tests walk every pair of these tables.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class JobState(StrEnum):
    """What a user sees. Stored nowhere as such: the view `job_status` derives it from the job's end and its chunk."""

    SCHEDULED = "scheduled"  # waits for its time
    QUEUED = "queued"  # waits for a worker
    RUNNING = "running"  # a worker holds it
    RETRYING = "retrying"  # failed before, waits for its next try
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})


class End(IntEnum):
    """How a job ended: the column `jobs.state`. A row is written with OPEN, and once more at its end."""

    OPEN = 0
    SUCCEEDED = 1
    FAILED = 2
    CANCELLED = 3
    EXPIRED = 4

    @property
    def shown(self) -> JobState:
        """The user's word for a terminal end. Raises KeyError for OPEN, whose word depends on the chunk."""
        return _SHOWN[self]


_SHOWN = {
    End.SUCCEEDED: JobState.SUCCEEDED,
    End.FAILED: JobState.FAILED,
    End.CANCELLED: JobState.CANCELLED,
    End.EXPIRED: JobState.EXPIRED,
}


class ChunkState(IntEnum):
    """Where a chunk is: the column `chunks.state`."""

    WAITING = 0  # in SQL only
    ANNOUNCED = 1  # its id was sent through Redis
    CLAIMED = 2  # a worker holds it, with the chunk's token
    DONE = 3  # none of its jobs is open


# Who may move what. The key is the move's name, as the stores' methods call it. A chunk begins as waiting, or as
# announced where its submitter sends it at once.
CHUNK_MOVES: dict[str, tuple[frozenset[ChunkState], ChunkState]] = {
    "announce": (frozenset({ChunkState.WAITING}), ChunkState.ANNOUNCED),
    "claim": (frozenset({ChunkState.WAITING, ChunkState.ANNOUNCED}), ChunkState.CLAIMED),
    "hand_back": (frozenset({ChunkState.CLAIMED}), ChunkState.WAITING),
    "rescue": (frozenset({ChunkState.CLAIMED}), ChunkState.WAITING),
    "recall": (frozenset({ChunkState.ANNOUNCED}), ChunkState.WAITING),
    "settle": (frozenset({ChunkState.WAITING, ChunkState.ANNOUNCED, ChunkState.CLAIMED}), ChunkState.DONE),
}

JOB_MOVES: dict[str, tuple[frozenset[End], frozenset[End]]] = {
    "finish": (frozenset({End.OPEN}), frozenset({End.OPEN, End.SUCCEEDED, End.FAILED})),
    "cancel": (frozenset({End.OPEN}), frozenset({End.CANCELLED})),
    "expire": (frozenset({End.OPEN}), frozenset({End.EXPIRED})),
    "retry": (frozenset({End.FAILED, End.CANCELLED, End.EXPIRED}), frozenset({End.OPEN})),
}
