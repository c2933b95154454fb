"""What is submitted, and how it is cut into chunks. Pure: the statements that store it are in `job_store`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torchrelay_storage.errors import KeyConflict
from torchrelay_storage.options import Options
from torchrelay_storage.registry import ModelVersion
from torchrelay_storage.settle import MAX_CHUNK
from torchrelay_storage.states import ChunkState

LONE_FLOW = 0  # lone jobs of a model share one flow
CHUNK_BYTES = 8 << 20  # a chunk is read whole by its worker: large inputs travel in smaller company


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be stored.

    Attributes:
        input: encoded as in `values`.
        digest: sha256 of the input as encoded, before it went to the object store; needed with a key.
        metadata: JSON.
    """

    input: bytes
    key: str | None = None
    digest: bytes | None = None
    metadata: bytes | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """Jobs of one model version that share their options, and so may share chunks.

    Attributes:
        window: how many chunks of the model may be announced and not claimed, where the submitter sends what is
            announced at once; 0: all wait to be announced.
        ids: the first of `len(jobs)` consecutive ids, where they were drawn before (an input in the object store lies
            under its job's id); None: drawn here.
    """

    version: ModelVersion
    options: Options
    jobs: Sequence[NewJob]
    batch: int | None = None
    ids: int | None = None
    window: int = 0

    @property
    def flow(self) -> int:
        """Who shares fairly with whom: the tenant where there is one, else the batch, else all lone jobs."""
        if self.options.tenant:
            return int.from_bytes(hashlib.sha256(self.options.tenant.encode()).digest()[:8], "big") >> 1
        return self.batch if self.batch is not None else LONE_FLOW


@dataclass(frozen=True, slots=True)
class Submitted:
    """Where a job was stored.

    Attributes:
        existed: the key was known, with this very input; nothing was stored.
        announced: its chunk is to be sent through Redis once the transaction is committed.
    """

    job: int
    chunk: int
    existed: bool = False
    announced: bool = False


def resolved(
    placed: Submitted | KeyConflict, first: int, where: dict[int, Submitted | KeyConflict]
) -> Submitted | KeyConflict:
    """Fill in the chunk of a job whose key a neighbour in the same submission has just taken."""
    if isinstance(placed, Submitted) and placed.chunk == 0:
        owner = where.get(placed.job - first)
        if isinstance(owner, Submitted):
            return Submitted(owner.job, owner.chunk, existed=True)
    return placed


def runs(submission: Submission, taken: dict[int, Submitted | KeyConflict]) -> Iterator[list[int]]:
    """Cut a submission into chunks: the indexes of the jobs to store, by count and by bytes."""
    run: list[int] = []
    size = 0
    most = min(submission.version.chunk_size, MAX_CHUNK)
    for i, job in enumerate(submission.jobs):
        if i in taken:
            continue
        size += len(job.input)
        if run and (len(run) == most or size > CHUNK_BYTES or i - run[0] >= MAX_CHUNK):
            yield run
            run, size = [], len(job.input)
        run.append(i)
    if run:
        yield run


def spans(version: ModelVersion, inputs: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Cut inputs into chunks as `runs` does: where each begins, and how many it takes."""
    most = min(version.chunk_size, MAX_CHUNK)
    start = 0
    while start < len(inputs):
        some = inputs[start : start + most]
        n = len(some)
        if sum(map(len, some)) > CHUNK_BYTES:
            sizes = accumulate(map(len, some))
            n = max(1, sum(1 for size in sizes if size <= CHUNK_BYTES))
        yield start, n
        start += n


def chunk_row(submission: Submission, span: tuple[int, int, int], turn: int, now: float) -> dict[str, object]:
    """Return the row of a chunk that waits. `span`: its first and last job, and how many it has."""
    first, last, size = span
    version, options = submission.version, submission.options
    start = now + options.delay if options.delay is not None else options.not_before
    due = start is None or start <= now
    return {
        "id": first, "state": ChunkState.WAITING, "announced_at": None,
        "model": version.model, "version": version.id, "batch": submission.batch,
        "tenant": options.tenant, "flow": submission.flow, "priority": options.priority, "turn": turn,
        "first_id": first, "last_id": last, "size": size, "due": due, "not_before": start,
        "timeout": options.timeout, "max_attempts": options.max_attempts, "created_at": now,
        "expires_at": now + options.expires_in if options.expires_in is not None else None,
        "backoff": options.backoff.encode() if options.backoff is not None else None,
    }  # fmt: skip
