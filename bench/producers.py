"""An application in a process of its own, which submits as it is told; the last line of its output is a JSON object.

python bench/producers.py batch --jobs N                    a batch from a generator: seconds, and how memory grew
python bench/producers.py singles --jobs N --callers K      K concurrent callers; starts at a line on its input
python bench/producers.py load --rate R                     R single jobs a second, until its input ends

The settings come from the environment (`Settings.as_environment`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

from torchrelay import AsyncRelay, Relay
from torchrelay.settings import Settings

MODEL = "noop"
MOST_SECONDS = 600.0
TICK = 0.005  # seconds between two handfuls of a load


def batch(jobs: int, model: str) -> dict[str, Any]:
    """Submit a batch from a generator; memory as it was with everything imported and a job submitted, and at most."""
    with Relay() as relay:
        relay.submit(model, {"x": 0})
        before = resident_peak()
        began = time.perf_counter()
        submitted = relay.submit_batch(model, ({"x": i} for i in range(jobs)))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "start_mb": before, "grown_mb": resident_peak() - before, "batch": submitted.id}


def resident_peak() -> float:
    """Return the most memory that this process has had at a time, in MB (10^6 bytes)."""
    status = Path("/proc/self/status").read_text()  # getrusage would begin with what the parent had
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def singles(jobs: int, callers: int) -> dict[str, Any]:
    """Submit jobs one at a time, by so many callers at once."""

    def wait_to_go() -> None:
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()

    began, ended = asyncio.run(submit_by(callers, jobs, Settings.load(), wait_to_go))
    return {"began": began, "ended": ended}


async def submit_by(
    callers: int, jobs: int, settings: Settings, wait_to_go: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Return when concurrent callers began and ended to submit so many jobs, each one at a time.

    By this machine's monotonic clock, on which its processes agree.
    """

    async def call(mine: range) -> None:
        for i in mine:
            await relay.submit(MODEL, {"x": i})

    async with AsyncRelay(settings=settings) as relay:
        await relay.submit(MODEL, {"x": 0})
        wait_to_go()
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for k in range(callers):
                group.create_task(call(range(k, jobs, callers)))
        return began, time.monotonic()


async def capacity(callers: int, seconds: float, settings: Settings) -> float:
    """Return how many jobs a second go from submit to result where so many callers each wait for theirs."""
    done = 0

    async def call() -> None:
        nonlocal done
        while time.perf_counter() < until:
            job = await relay.submit(MODEL, {"x": 0})
            await job.result(timeout=60)
            done += 1

    async with AsyncRelay(settings=settings) as relay:
        began = time.perf_counter()
        until = began + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(call())
        return done / (time.perf_counter() - began)


async def load(rate: float) -> dict[str, Any]:
    """Submit at a steady rate, whatever becomes of it, until the input ends."""
    ended = threading.Event()

    def follow() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=follow, name="input", daemon=True).start()
    submitted, waiting = 0, set[asyncio.Task[Any]]()
    async with AsyncRelay() as relay:
        began = time.perf_counter()
        while not ended.is_set():
            await asyncio.sleep(TICK)
            due = int((time.perf_counter() - began) * rate)
            for i in range(submitted, due):
                task = asyncio.create_task(relay.submit(MODEL, {"x": i}))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            submitted = max(submitted, due)
        seconds = time.perf_counter() - began
        await asyncio.gather(*waiting)
    return {"rate": submitted / seconds, "jobs": submitted}


# --- from the harness' side -------------------------------------------------------------------------------------------


@contextmanager
def producer(settings: Settings, *arguments: str, script: Path = Path(__file__)) -> Iterator[subprocess.Popen[str]]:
    """Start one; it is ended with the block, or after MOST_SECONDS. Its input and output are pipes."""
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environ, **settings.as_environment()},
    )
    watchdog = threading.Timer(MOST_SECONDS, process.kill)
    with process:
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.terminate()


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the next JSON object that it prints. Raises RuntimeError where it ends without."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise RuntimeError(f"a producer ended with {process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["batch", "singles", "load"])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--model", default=MODEL)
    arguments = parser.parse_args()
    if arguments.what == "batch":
        figures = batch(arguments.jobs, arguments.model)
    elif arguments.what == "singles":
        figures = singles(arguments.jobs, arguments.callers)
    else:
        figures = asyncio.run(load(arguments.rate))
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
