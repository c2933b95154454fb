"""How long each fault was felt, read from the audit trail after the run.

Work goes on when the next chunk is claimed: by the worker that was hit, else by any. A fault is over when all that it
had hit has moved on: the chunks that a worker held are done or wait again, those whose messages Redis lost have been
claimed all the same, a poison job has ended; that includes waiting for their turn behind all others. Other faults go on
meanwhile, and lengthen both. Not here: whether all is right in the end (`checker`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from chaos.checker import ANNOUNCED, CLAIMED, DONE, WAITING, rows
from chaos.faults import Injected
from chaos.schedule import DATABASE_KINDS, REDIS_KINDS

# Counted from their end: while the outage lasts, nothing can be asked of anybody.
OUTAGES = {"kill redis", "stop redis", "kill database", "stop database", "lock database", "kill writer",
           "swallow database", "slow database", "refuse database", "swallow redis", "slow redis"}  # fmt: skip
FRESH_SECONDS = 1.0  # what a client committed before it was killed


@dataclass(frozen=True, slots=True)
class _Move:
    at: float
    became: int
    worker: int | None


def recoveries(url: str, injected: Iterable[Injected]) -> dict[str, list[float]]:
    """Return for each kind of fault how many seconds each took that had hit anything."""
    trail = _Trail(url)
    found: dict[str, list[float]] = defaultdict(list)
    for one in injected:
        seconds = trail.poison(one) if one.poison is not None else trail.seconds(one)
        if seconds is not None:
            found[one.fault.kind].append(round(seconds, 2))
    return dict(found)


def resumptions(url: str, injected: Iterable[Injected]) -> dict[str, list[float]]:
    """Return for each kind of fault after how many seconds work went on; a poison job is part of the work."""
    trail = _Trail(url)
    found: dict[str, list[float]] = defaultdict(list)
    for one in injected:
        seconds = trail.resumed(one) if one.poison is None else None
        if seconds is not None:
            found[one.fault.kind].append(round(seconds, 2))
    return dict(found)


class _Trail:
    def __init__(self, url: str) -> None:
        lanes = {
            id for (id,) in rows(url, "SELECT c.id FROM chunks c JOIN models m ON m.id = c.model WHERE m.training")
        }
        self.chunks: dict[int, list[_Move]] = defaultdict(list)
        for at, chunk, became, worker in rows(
            url, "SELECT at, chunk, became, worker FROM audit_chunks WHERE was IS NULL OR was <> became ORDER BY seq"
        ):
            if chunk not in lanes:
                self.chunks[chunk].append(_Move(at, became, worker))
        self.names: Mapping[int, str] = dict(rows(url, "SELECT id, name FROM workers"))
        ended = rows(url, "SELECT job, max(at) FROM audit_jobs WHERE became > 0 GROUP BY job")
        self.ends: Mapping[int, float] = dict(ended)
        self.jobs: Mapping[int, bytes] = dict(rows(url, "SELECT id, input FROM jobs"))

    def resumed(self, one: Injected) -> float | None:
        """Return the time from a fault's end until the next claim, of the worker that was hit if one was."""
        over = one.ended if one.fault.kind in OUTAGES or one.fault.kind.startswith("stop ") else one.began
        claims = (
            move.at
            for moves in self.chunks.values()
            for move in moves
            if move.became == CLAIMED and move.at >= over and one.hit in (None, self.names.get(move.worker or 0))
        )
        first = min(claims, default=None)
        return None if first is None else first - over

    def seconds(self, one: Injected) -> float | None:
        """Return the time until all chunks that the fault had hit have moved on."""
        kind = one.fault.kind
        over: list[float] = []
        for moves in self.chunks.values():
            index = bisect_right([move.at for move in moves], one.began) - 1
            if index < 0 or not self._hit(one, kind, moves, moves[index]):
                continue
            # What a lost worker held needs no more than to wait again; what Redis lost is found when it is claimed.
            well = {WAITING, CLAIMED, DONE} if moves[index].became == CLAIMED else {CLAIMED, DONE}
            later = [move.at for move in moves[index + 1 :] if move.became in well]
            if later:
                over.append(later[0])
        if not over:
            return None
        return max(0.0, max(over) - (one.ended if kind in OUTAGES else one.began))

    def _hit(self, one: Injected, kind: str, moves: list[_Move], last: _Move) -> bool:
        if kind in DATABASE_KINDS["sqlite"] or kind in DATABASE_KINDS["postgresql"]:
            return last.became == CLAIMED
        if kind in REDIS_KINDS or kind == "at popped":
            return last.became == ANNOUNCED
        if kind in {"kill client", "at committed", "at announced"}:
            return last.became in {WAITING, ANNOUNCED} and last.at > one.began - FRESH_SECONDS
        return last.became == CLAIMED and self.names.get(last.worker or 0) == one.hit

    def poison(self, one: Injected) -> float | None:
        """Return the time until the job that was made for the fault has ended."""
        sought = f'"n":{one.poison},'.encode()
        for id, input in self.jobs.items():
            if sought in bytes(input) and id in self.ends:
                return float(self.ends[id] - one.began)
        return None
