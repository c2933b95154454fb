"""Imported by each Python process of a chaos run as it starts: makes its fault points deadly and its clock jump.

A file named after a point in the folder CHAOS_FAULTS is a bullet: the first process that reaches the point takes it
away and dies by SIGKILL. A file `clock-NAME` there holds the seconds by which the clock of the worker NAME is wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

_real_time, _real_time_ns = time.time, time.time_ns

LOOK_SECONDS = 0.25


def _die_at_points(folder: str, name: str) -> None:
    from torchrelay_storage import faults

    def take(point: str) -> None:
        try:
            os.unlink(f"{folder}/{point}")
        except OSError:
            return
        line = {"point": point, "pid": os.getpid(), "name": name, "at": _real_time(), "program": sys.argv[:1]}
        file = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, json.dumps(line).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGKILL)

    faults.hook = take


def _let_clock_jump(path: str) -> None:
    offset, looked = 0.0, -1.0

    def read() -> float:
        nonlocal offset, looked
        now = time.monotonic()
        if now - looked > LOOK_SECONDS:
            looked = now
            try:
                with open(path) as file:
                    offset = float(file.read() or 0)
            except (OSError, ValueError):
                offset = 0.0
        return offset

    time.time = lambda: _real_time() + read()
    time.time_ns = lambda: _real_time_ns() + int(read() * 1e9)


if "CHAOS_FAULTS" in os.environ:
    _name = os.environ.get("CHAOS_NAME", "")
    _die_at_points(os.environ["CHAOS_FAULTS"], _name)
    if _name.startswith("w"):
        _let_clock_jump(f"{os.environ['CHAOS_FAULTS']}/clock-{_name}")
