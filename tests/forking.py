"""Running a part of a test in a forked child that always ends: it must never go on as a second test runner."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable


def run_in_child(work: Callable[[], object], seconds: float = 60.0) -> None:
    """Fork, run `work` in the child, and wait; fails where the child raised, or did not end in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            assert os.waitstatus_to_exitcode(status) == 0, "see the child's traceback on the standard error"
            return
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"the child did not end within {seconds:g} s")
        time.sleep(0.01)
