"""How fast a worker ends each model's jobs, and what follows: how much it may hold, and how large chunks should be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

AHEAD_SECONDS = 1.0  # of work that a worker claims: enough never to run dry, little enough that work spreads
CHUNKS_AHEAD = 2  # one runs, one is prepared
SORTED_SECONDS = 2.0  # of work that is claimed of a model whose inputs are sorted by length: evener with more of them
SAMPLE_SECONDS = 0.25  # of work over which a rate is measured
SMOOTHING = 0.5  # weight of the newest sample
LEAST_SECONDS, MOST_SECONDS = 0.1, 1.0  # of work that one chunk should be
SMALLEST_CHUNK, LARGEST_CHUNK = 64, 4096  # jobs; a chunk costs a message and two transactions, whatever its size


@dataclass(slots=True)
class _Sample:
    busy_since: float | None = None
    seconds: float = 0.0  # of work before that
    jobs: int = 0
    chunks: int = 0
    jobs_per_s: float | None = None
    chunks_per_s: float = 0.0


class Pace:
    """The rates of a worker's models, by a key such as the model's id. Thread-safe.

    Only the time counts in which the worker holds jobs of the model: idleness says nothing of its speed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: dict[int, _Sample] = {}

    def began(self, key: int) -> None:
        """Note that the worker holds jobs of this model from now on, if it did not already."""
        with self._lock:
            sample = self._samples.setdefault(key, _Sample())
            if sample.busy_since is None:
                sample.busy_since = self._clock()

    def ended(self, key: int, jobs: int, chunks: int, left: int) -> None:
        """Note that jobs have ended just now.

        Args:
            chunks: how many chunks ended with them.
            left: how many jobs of the model the worker still holds.
        """
        now = self._clock()
        with self._lock:
            sample = self._samples.setdefault(key, _Sample())
            if sample.busy_since is not None:
                sample.seconds += now - sample.busy_since
            sample.busy_since = now if left > 0 else None
            sample.jobs += jobs
            sample.chunks += chunks
            if sample.seconds >= SAMPLE_SECONDS:
                fresh, fresh_chunks = sample.jobs / sample.seconds, sample.chunks / sample.seconds
                if sample.jobs_per_s is None:
                    sample.jobs_per_s, sample.chunks_per_s = fresh, fresh_chunks
                else:
                    sample.jobs_per_s += SMOOTHING * (fresh - sample.jobs_per_s)
                    sample.chunks_per_s += SMOOTHING * (fresh_chunks - sample.chunks_per_s)
                sample.seconds, sample.jobs, sample.chunks = 0.0, 0, 0

    def jobs_per_s(self, key: int) -> float | None:
        """Return the measured rate, or None."""
        with self._lock:
            sample = self._samples.get(key)
            return sample.jobs_per_s if sample else None

    def chunks_per_s(self, key: int) -> float:
        """Return the measured rate of chunks; 0 where it is not known."""
        with self._lock:
            sample = self._samples.get(key)
            return sample.chunks_per_s if sample else 0.0

    def has_room(self, key: int, chunks: int, jobs: int, batch: int | None, choice: int = 0) -> bool:
        """Whether a worker that holds so much of a model should claim more.

        Args:
            batch: inputs of a full device batch, two of which are always worth holding; None: not loaded yet.
            choice: of how many inputs a device batch is chosen, where they are sorted by length.
        """
        if chunks < CHUNKS_AHEAD:
            return True
        if batch is None:
            return False
        rate = self.jobs_per_s(key) or 0.0
        return jobs < max(2.0 * batch, AHEAD_SECONDS * rate, min(choice, SORTED_SECONDS * rate))

    def chunk_size(self, key: int, batch: int) -> int:
        """Return how many jobs should travel together: a few device batches, and from a tenth to a second of work.

        Args:
            batch: inputs of a full device batch.
        """
        wanted = max(4 * batch, SMALLEST_CHUNK)
        rate = self.jobs_per_s(key)
        if rate is not None:
            wanted = max(wanted, int(rate * LEAST_SECONDS))
        wanted = min(wanted, LARGEST_CHUNK)
        if rate is not None and rate * MOST_SECONDS < wanted:
            wanted = max(min(batch, wanted), int(rate * MOST_SECONDS), 1)
        return wanted
