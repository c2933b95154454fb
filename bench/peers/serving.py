"""What is asked of a model-serving peer, how it is timed, and its answer: the same for all of them.

    python bench/peers/minilm_NAME_peer.py minilm [--redis URL] [--jobs 250] [--processes 1] [--setting key=value ...]

One client process keeps 256 single-text requests in flight until all texts have their vectors; the seconds count from
the first request to the last answer. The server has one worker with one torch thread unless `--processes` says more.
Some vectors are compared with the bare model's afterwards: a wrong one is no figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asked import answer, say

sys.path.append(str(Path(__file__).parents[1]))

from texts import digest, texts

IN_FLIGHT = 256
WARM_UP = 8  # texts before those that count
CHECKED = 16  # vectors that are compared with the bare model's
SAME = 0.9999  # the cosine from which two vectors are
START_SECONDS = 240.0  # for a server to answer, its model loaded
REQUEST_SECONDS = 600.0  # for one text to come back: there are 256 before it
STOP_SECONDS = 15.0
VARIABLE = "BENCH_SERVER_ASKED"  # hands what was asked on to the server
QUIET = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",  # Infinity
    "RAY_USAGE_STATS_ENABLED": "0",
}

Vector = list[float]
Call = Callable[[str], Awaitable[Vector]]


@dataclass(frozen=True)
class Asked:
    """One question to a server."""

    jobs: int  # texts
    processes: int  # workers of the server
    redis: str
    settings: dict[str, str]

    def __getitem__(self, setting: str) -> str:
        return self.settings[setting]


def read(description: str | None, **defaults: str) -> Asked:
    """Return what was asked: from the command line, and in a server from its environment.

    `defaults` are the peer's settings; `--setting key=value` replaces one.
    """
    if VARIABLE in os.environ:
        return Asked(**json.loads(os.environ[VARIABLE]))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["minilm"])
    parser.add_argument("--redis", default="", help="redis://127.0.0.1:PORT/DATABASE, for those that use one")
    parser.add_argument("--postgres", default="", help="not used by any server")
    parser.add_argument("--jobs", type=int, default=250, help="texts")
    parser.add_argument("--processes", type=int, default=1, help="workers, each with the model and one torch thread")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="KEY=VALUE", help="of " + json.dumps(defaults)
    )
    arguments = parser.parse_args()
    given = dict(one.split("=", 1) for one in arguments.setting)
    if unknown := given.keys() - defaults.keys():
        parser.error(f"no such setting: {', '.join(sorted(unknown))}")
    asked = Asked(arguments.jobs, arguments.processes, arguments.redis, defaults | given)
    os.environ.update(QUIET, **{VARIABLE: json.dumps(asdict(asked))})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are ended when we are
    return asked


# --- the server -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(*command: str, **environment: str) -> Iterator[Callable[[], None]]:
    """Run a server until the block ends; what it yields raises an error with the log's end if it is gone."""
    with tempfile.TemporaryDirectory(prefix="bench-peer-") as folder, tempfile.TemporaryFile("w+b") as log:

        def tail() -> str:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            return log.read().decode(errors="replace")

        def check() -> None:
            if started.poll() is not None:
                raise RuntimeError(f"the server ended with {started.returncode}: {tail()[-600:]}")

        started = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TMPDIR": folder, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # of its own, so that its children can be ended with it
        )
        try:
            yield check
        except BaseException:
            say(tail())
            raise
        finally:
            with suppress(ProcessLookupError):
                started.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                started.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):  # what is left of its group: children, or the server itself
                os.killpg(started.pid, signal.SIGKILL)
            started.wait(STOP_SECONDS)


# --- the client -------------------------------------------------------------------------------------------------------


async def over_http(
    asked: Asked,
    url: str,
    request: Callable[[str], Any],
    vector: Callable[[Any], Vector],
    check: Callable[[], None],
) -> dict[str, Any]:
    """Time a server that answers a JSON request by a JSON document, with one connection for each request in flight."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    connector = aiohttp.TCPConnector(limit=IN_FLIGHT)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def call(text: str) -> Vector:
            async with session.post(url, json=request(text)) as response:
                if response.status != 200:
                    raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
                return vector(await response.json())

        deadline = time.monotonic() + START_SECONDS
        while True:
            check()
            try:
                await call("Is it there?")
                break
            except (aiohttp.ClientError, RuntimeError) as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it did not answer within {START_SECONDS:g} s: {error}") from error
                await asyncio.sleep(0.25)
        return await timed(asked, call)


async def timed(asked: Asked, call: Call) -> dict[str, Any]:
    """Return the figures of a server that is there: texts per second, its vectors checked."""
    some = texts(asked.jobs)
    await asyncio.gather(*(call(text) for text in some[:WARM_UP]))
    say(f"{len(some)} texts, {IN_FLIGHT} in flight")
    vectors: list[Vector] = [[]] * len(some)
    left = iter(enumerate(some))

    async def caller() -> None:
        for i, text in left:
            vectors[i] = await call(text)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(IN_FLIGHT, len(some))):
            group.create_task(caller())
    return figures(some, vectors, time.perf_counter() - began)


def figures(some: list[str], vectors: list[Vector], seconds: float) -> dict[str, Any]:
    """Return what counts, once the vectors are known to be right."""
    say(f"{len(some) / seconds:.1f} texts/s")
    return {"texts_per_s": round(len(some) / seconds, 2), "texts": digest(some), "cosine": check_vectors(some, vectors)}


def check_vectors(some: list[str], vectors: list[Vector]) -> float:
    """Return the least cosine to the bare model's vectors, of a few; raise ValueError if it is too small."""
    import numpy
    from minilm import Encoder

    encoder = Encoder()
    step = max(1, len(some) // CHECKED)
    least = 1.0
    for text, vector in list(zip(some, vectors, strict=True))[::step]:
        right, got = numpy.asarray(encoder.embed([text])[0]), numpy.asarray(vector)
        cosine = float(right @ got / numpy.linalg.norm(right) / numpy.linalg.norm(got))
        if not cosine > SAME:
            raise ValueError(f"the vector of {text[:60]!r} is wrong: cosine {cosine:.5f}")
        least = min(least, cosine)
    return round(least, 6)


def reply(figures: dict[str, Any], *, version: str, settings: str, keeps: str = "nothing") -> None:
    """Answer: the last line on stdout."""
    n = json.loads(os.environ[VARIABLE])["processes"]
    settings += f", {n} worker{'s' if n > 1 else ''}, 1 torch thread a forward pass"
    answer(figures | {"version": version, "settings": settings, "keeps": keeps})
