"""The three measures of a queue peer, the same for all: batch, single and latency.

A peer (peer.py) says how to enqueue, how to start a worker process and what its store keeps; here is when.
A job's end is when its body returned, or when the store says that it ended where that has a clock and is written in
batches. Whether the store holds all that the peer promises is checked afterwards.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asked import Ends, answer, cannot, percentiles, say
from peer import AsyncPeer, Peer

START_SECONDS = 60.0  # for the first job of a worker
STALL_SECONDS = 30.0  # without one more job done
STORE_SECONDS = 30.0  # for the store to hold all, after the last job's end
STOP_SECONDS = 15.0
WARM_UP = 20  # calls before latency counts
HERE = Path(__file__).parent


def drive(peer: Peer) -> None:
    """Measure what was asked, and answer."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that workers are ended when we are
    try:
        ends = Ends(peer.asked.ends, peer.asked.jobs)
        figures = _latency(peer) if peer.asked.measure == "latency" else _throughput(peer, ends)
    except Exception as error:
        traceback.print_exc()
        cannot(f"{type(error).__name__}: {error}")
    answer(figures | {"version": peer.version, "settings": peer.settings, "keeps": peer.keeps})


def _throughput(peer: Peer, ends: Ends) -> dict[str, float]:
    values = [{"x": i} for i in range(peer.asked.jobs)]
    peer.time_prepare()
    seconds = peer.time_enqueue(values) if peer.asked.measure == "batch" else peer.time_callers(values)
    say(f"{len(values)} enqueued in {seconds:.2f} s")
    if ends.done():
        raise RuntimeError("jobs ran before a worker was started")
    with _workers(peer) as check:
        _drained(ends, check)
        late = _stored(peer, check)
        bodies, store = ends.rate(), _of(peer, peer.drained())
        say(f"drained at {bodies:.0f} jobs/s by the ends of bodies, {store or 'nothing'} by its store's clock")
    return {
        "enqueued_per_s": round(len(values) / seconds, 1),
        "drained_per_s": round(store or bodies, 1),
        "stored_after_s": late,
    }


def _latency(peer: Peer) -> dict[str, float]:
    if not peer.keeps_results:
        cannot("it keeps no results: there is none to wait for")
    peer.time_prepare()
    values = [{"x": i} for i in range(peer.asked.jobs)]
    with _workers(peer) as check:
        peer.time_results(values[:1] * WARM_UP)
        check()
        return dict(percentiles(peer.time_results(values)))


def _drained(ends: Ends, check: Callable[[], None]) -> None:
    """Return once all jobs have run; raise TimeoutError when none more do."""
    done, deadline = 0, time.monotonic() + START_SECONDS
    look = time.monotonic() + 1.0
    while True:
        time.sleep(0.02)
        # The last job is a cheap first look; counting all of them takes milliseconds.
        if ends.at[-1] == 0.0 and time.monotonic() < look:
            continue
        look = time.monotonic() + 1.0
        check()
        now = ends.done()
        if now == len(ends.at):
            return
        if now > done:
            done, deadline = now, time.monotonic() + STALL_SECONDS
        if time.monotonic() > deadline:
            raise TimeoutError(f"{done} of {len(ends.at)} jobs ran, then none for a while")


def _stored(peer: Peer, check: Callable[[], None]) -> float:
    """Wait until the store holds what the peer promises of all jobs; return how long after the last end that was."""
    began = time.monotonic()
    while (kept := _of(peer, peer.kept())) is not None and kept != peer.asked.jobs:
        check()
        if time.monotonic() - began > STORE_SECONDS:
            raise TimeoutError(f"all {peer.asked.jobs} jobs ran, but its store holds {kept}")
        time.sleep(0.02)
    return round(time.monotonic() - began, 3)


def _of(peer: Peer, said: Any) -> Any:
    """Return what a peer says: an asynchronous one says it in a coroutine."""
    return peer.run(said) if isinstance(peer, AsyncPeer) and asyncio.iscoroutine(said) else said


@contextmanager
def _workers(peer: Peer) -> Iterator[Callable[[], None]]:
    """Run the worker processes until the block ends; what it yields raises an error if one is gone."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    with tempfile.TemporaryFile("w+b") as log:

        def tail() -> str:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            return log.read().decode(errors="replace")

        def check() -> None:
            for process in started:
                if process.poll() is not None:
                    raise RuntimeError(f"a worker ended with {process.returncode}: {tail().strip().splitlines()[-1:]}")

        started = [
            subprocess.Popen(
                peer.worker(),
                cwd=HERE,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # of its own, so that its children can be ended with it
            )
            for _ in range(peer.worker_processes())
        ]
        try:
            yield check
        except BaseException:
            say(tail())
            raise
        finally:
            for process in started:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while process.returncode is None and time.monotonic() < deadline:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.02)
    if process.returncode is None:  # not reaped yet, so that the number of its group is still its own
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children that it left, or the worker itself
        process.wait(STOP_SECONDS)
