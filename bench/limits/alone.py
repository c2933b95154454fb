"""A limit run by itself: a process of its own, one thread, offline; its answer is the last line that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 900.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def run(name: str, *arguments: str) -> Any:
    """Return what `bench/limits/NAME.py` answers. Raises RuntimeError with the end of what it complained of."""
    script = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(
        command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def one_thread() -> Iterator[None]:
    """Let what is started meanwhile compute on one thread, offline."""
    before = dict(os.environ)
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name in ONE_THREAD:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
