"""What a queue peer was asked, and how it answers: arguments, each job's end, percentiles, the last line on stdout.

Run by the peers' own Python, in the script that was asked and in every worker that it starts.
Not for the measures themselves: driving.py has those.
"""

from __future__ import annotations

import argparse
import atexit
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

VARIABLE = "BENCH_PEER_ASKED"  # hands what was asked on to the workers
CANNOT = 3  # the exit code of a peer that cannot run here


@dataclass(frozen=True)
class Asked:
    """One question to a peer."""

    measure: str  # batch, single or latency
    redis: str
    postgres: str
    jobs: int
    processes: int  # of the worker
    settings: dict[str, str]
    ends: str  # the file of Ends

    def __getitem__(self, setting: str) -> str:
        return self.settings[setting]

    def need(self, service: str) -> str:
        """Return the URL of `redis` or `postgres`, which the peer cannot do without."""
        return str(getattr(self, service)) or cannot(f"no --{service} was given")


def read(description: str | None, **defaults: str) -> Asked:
    """Return what was asked: from the command line, and in a worker from its environment.

    `defaults` are the peer's settings; `--setting key=value` replaces one.
    """
    if VARIABLE in os.environ:
        return Asked(**json.loads(os.environ[VARIABLE]))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["batch", "single", "latency"])
    parser.add_argument("--redis", default="", help="redis://127.0.0.1:PORT/DATABASE; nothing else may use it")
    parser.add_argument("--postgres", default="", help="postgresql://postgres@127.0.0.1:PORT/DATABASE, a fresh one")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1, help="of the worker")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="KEY=VALUE", help="of " + json.dumps(defaults)
    )
    arguments = parser.parse_args()
    given = dict(one.split("=", 1) for one in arguments.setting)
    if unknown := given.keys() - defaults.keys():
        parser.error(f"no such setting: {', '.join(sorted(unknown))}")
    asked = Asked(
        measure=arguments.measure,
        redis=arguments.redis,
        postgres=arguments.postgres,
        jobs=arguments.jobs,
        processes=arguments.processes,
        settings=defaults | given,
        ends=tempfile.mkstemp(prefix="bench-peer-ends-")[1],
    )
    atexit.register(Path(asked.ends).unlink, missing_ok=True)
    os.environ[VARIABLE] = json.dumps(asdict(asked))
    return asked


class Ends:
    """When each job ended, by its number: a file of one clock reading a job, mapped by every process.

    Marking costs a tenth of a microsecond, and says that each job ran, not only how many did.
    """

    def __init__(self, path: str, jobs: int) -> None:
        with Path(path).open("r+b") as file:
            file.truncate(8 * jobs)
            self._bytes = mmap.mmap(file.fileno(), 8 * jobs)
        self.at = memoryview(self._bytes).cast("d")  # 0.0: not yet

    def done(self) -> int:
        """Return how many have ended."""
        times = self.at.tolist()
        return len(times) - times.count(0.0)

    def rate(self) -> float:
        """Return the jobs per second from the first end to the last."""
        times = self.at.tolist()
        if 0.0 in times:
            raise RuntimeError(f"{times.count(0.0)} of {len(times)} jobs did not run")
        return (len(times) - 1) / (max(times) - min(times))


_ends: Ends | None = None


def job(value: dict[str, int]) -> dict[str, int]:
    """Do nothing, as every peer's job: a small JSON object in and one out."""
    global _ends
    if _ends is None:
        asked = read(None)
        _ends = Ends(asked.ends, asked.jobs)
    _ends.at[value["x"]] = time.monotonic()  # of the machine, so that processes agree
    return {"y": 1}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50_ms": round(cuts[49] * 1000, 3), "p99_ms": round(cuts[98] * 1000, 3)}


def versions(*packages: str) -> str:
    """Return the version of the peer, and those of what carries it."""
    first, *others = packages
    return version(first) + "".join(f", {package} {version(package)}" for package in others)


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def answer(figures: dict[str, Any]) -> None:
    """Print the answer: the last line on stdout."""
    print(json.dumps(figures), flush=True)


def cannot(error: str) -> NoReturn:
    """Say that the peer cannot run here, or cannot be measured so, and why."""
    answer({"error": error})
    raise SystemExit(CANNOT)
