"""Named points between two steps at which a test may kill the process. Production code passes them at no cost.

`hook` is set by the chaos suite's processes and by nobody else.
"""

from __future__ import annotations

from collections.abc import Callable

POINTS = (
    "committed",  # a client: its jobs are stored, their chunks not yet announced
    "announced",  # the announcer: moved in SQL, not yet sent
    "popped",  # a worker: a message is out of its queue, its chunk not yet claimed
    "claimed",  # the claim is committed, nothing has run
    "forwarded",  # a device batch has run, nothing of it is recorded
    "recording",  # inside the transaction of the finish, before its commit
    "recorded",  # after that commit, nobody told
    "acknowledging",  # claimed, the message not yet acknowledged
    "rescuing",  # inside the transaction of a rescue
)

hook: Callable[[str], None] | None = None


def reach(point: str) -> None:
    """Say that a point was reached."""
    if hook is not None:
        hook(point)
