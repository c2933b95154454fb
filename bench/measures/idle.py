"""(g) An idle worker: the processor time of all its processes, and the queries that it makes.

One worker that has served a model and has nothing to do, which therefore also leads the maintenance: the busiest that
an idle worker is. Queries are counted by PostgreSQL itself, which logs each statement of this database; BEGIN, COMMIT
and ROLLBACK are counted apart. The relay that warmed it up is closed by then.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import psutil
from cases import Case
from ground import Ground
from measures.ours import KINDS, SUBJECT, VALUE, Supervisor, about, open_relay
from record import Sample
from system import warm, workers

MEASURES = ("idle worker: processor", "idle worker: queries")

SECONDS, QUICK_SECONDS = 30.0, 5.0
SETTLE_SECONDS = 3.0
_TURNS = ("BEGIN", "COMMIT", "ROLLBACK")
_LOGGED = re.compile(r"LOG:  (?:statement|execute [^:]+): (?P<statement>.*\S.*)")


def cases(ground: Ground) -> list[Case]:
    """Both databases; queries of PostgreSQL only, for SQLite has no server that would count them."""
    return [
        Case("idle worker: processor", SUBJECT, kind, partial(_idle, ground, kind), 2, quick=kind == "postgresql")
        for kind in KINDS
    ]


def _idle(ground: Ground, kind: str, round_: int) -> Iterator[Sample]:
    seconds = QUICK_SECONDS if ground.quick else SECONDS
    with ground.fresh(kind) as settings:
        if kind == "postgresql":
            name = settings.database_url.rpartition("/")[2]
            ground.postgres.execute("ALTER DATABASE {} SET log_statement = 'all'", name)
        with workers(settings, 1) as started:
            with open_relay(settings) as relay:
                warm(relay, "noop", VALUE, 1)
            time.sleep(SETTLE_SECONDS)
            commands, logged = _commands(ground), ground.postgres.log_path.stat().st_size
            began, before = time.monotonic(), _processor(started[0])
            time.sleep(seconds)
            lasted, used = time.monotonic() - began, _processor(started[0]) - before
            counted = _statements(ground, logged)
            commands = _commands(ground) - commands
    turns = sum(counted[one] for one in _TURNS)
    more = about("1 worker, leading the maintenance", seconds=round(lasted, 1),
                 redis_commands_per_s=round(commands / lasted, 2))  # fmt: skip
    yield Sample("idle worker: processor", SUBJECT, kind, round_, 100 * used / lasted, "% of a core", more)
    if kind == "postgresql":
        queries = (sum(counted.values()) - turns) / lasted
        more = {**more, "begin_commit_per_s": round(turns / lasted, 2), "most": counted.most_common(12)}
        yield Sample("idle worker: queries", SUBJECT, kind, round_, queries, "/s", more)


def _processor(supervisor: Supervisor) -> float:
    """Return the processor time of a worker's processes in seconds."""
    parent = psutil.Process(supervisor.pid)
    times = [one.cpu_times() for one in (parent, *parent.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def _statements(ground: Ground, since: int) -> Counter[str]:
    """Count the statements that PostgreSQL has logged since, by how they begin."""
    with ground.postgres.log_path.open("rb") as file:
        file.seek(since)
        log = file.read().decode(errors="replace").replace("\n\t", " ")  # a statement of several lines is one
    found: Counter[str] = Counter()
    for line in log.splitlines():
        if logged := _LOGGED.search(line):
            words = logged["statement"].split()
            found[words[0] if words[0] in _TURNS else " ".join(words[:4])] += 1
    return found


def _commands(ground: Ground) -> int:
    with ground.redis.client() as client:
        info = client.info("stats")
    assert isinstance(info, dict)
    return int(info["total_commands_processed"])
