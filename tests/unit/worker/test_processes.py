"""The command line of both processes, devices, and what the supervisor makes of the inner one's reports."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import orjson
import pytest
import torch

from servers import wait_until
from torchrelay_worker import InvalidInput, __main__, arguments, supervisor
from torchrelay_worker.blackbox import scratch
from torchrelay_worker.inner import PAUSED_SECONDS, SILENT_SECONDS, START_SECONDS, Inner
from torchrelay_worker.reports import Reports


def test_the_command_line() -> None:
    options = __main__.parse(["--models", "a, b,a", "--device", "cpu", "--name", "w1", "--max-loaded", "2"])
    assert (options.models, options.device, options.name, options.max_loaded) == (("a", "b"), "cpu", "w1", 2)
    assert __main__.parse([]).models is None
    for wrong in (["--name", "a b"], ["--threads", "0"], ["--grace", "x"], ["--nope"]):
        with pytest.raises(SystemExit) as caught:
            __main__.parse(wrong)
        assert caught.value.code == 2
    inner = arguments.parse(["--black-box-fd", "5", "--report-fd", "3", "--name", "w", "--models", "a,b"])
    assert (inner.black_box_fd, inner.report_fd, inner.models, inner.max_jobs) == (5, 3, ["a", "b"], None)


def test_devices() -> None:
    assert arguments.resolve_device("cpu") == torch.device("cpu")
    assert arguments.resolve_device("auto").type in ("cpu", "cuda")
    for wrong in ("gpu", "cuda:999"):
        with pytest.raises(InvalidInput, match=wrong):
            arguments.resolve_device(wrong)


@pytest.fixture
def pipe() -> Iterator[tuple[Inner, Reports]]:
    """An inner process that is none: both ends of its report pipe, here."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    inner = object.__new__(Inner)
    inner.started = inner.reported = inner._looked = inner._patient_until = time.monotonic()
    inner.has_reported = False
    inner.reason = inner.still = None
    inner.stats = {}
    inner.box = scratch()
    inner._buffer = b""
    inner.reports = read
    reports = Reports(write)
    yield inner, reports
    reports._file.close()
    os.close(read)


def report(**parts: object) -> dict[str, object]:
    return {"reason": None, "still": None, "stats": {}, **parts}


def test_reports_arrive(pipe: tuple[Inner, Reports]) -> None:
    inner, reports = pipe
    reports._write(report(reason="it is slow", stats={"recorded": 3}))
    inner.read()
    assert (inner.has_reported, inner.reason, inner.stats) == (True, "it is slow", {"recorded": 3})
    reports._write(report())
    os.write(reports._file.fileno(), orjson.dumps(report(reason="x"))[:5])  # half a line waits for its rest
    inner.read()
    assert inner.reason is None


def test_they_go_on_until_nobody_reads(pipe: tuple[Inner, Reports]) -> None:
    inner, reports = pipe
    reports.start(lambda: report(stats={"recorded": 1}))
    wait_until(lambda: inner.read() or inner.stats, 10, "a report")
    reports.close()


def test_a_long_forward_is_not_a_dead_process(pipe: tuple[Inner, Reports]) -> None:
    inner, reports = pipe
    assert inner.trouble() is None
    reports._write(report(reason="a device batch has overrun its limit of 100 s"))
    inner.read()
    now = time.monotonic()
    inner.box.due(now + 100.0, now + 50.0)
    assert not inner.is_late
    inner.box.due(now + 100.0, now - 1.0)
    assert inner.is_late
    inner.reported -= 10 * SILENT_SECONDS  # silent, as a forward that keeps the interpreter to itself is
    assert inner.trouble() is None
    assert not inner.has_overrun
    inner.box.due(time.monotonic() - 1.0)
    assert "of 100 s" in (inner.trouble() or "")
    assert inner.has_overrun
    inner.box.due(None)
    assert "answer" in (inner.trouble() or "")
    inner.has_reported = False
    inner.started -= START_SECONDS + 1
    assert "start" in (inner.trouble() or "")


def test_what_stands_still_is_trouble_and_no_overrun(pipe: tuple[Inner, Reports]) -> None:
    inner, reports = pipe
    reports._write(report(still="inputs wait"))
    inner.read()
    assert inner.trouble() == "inputs wait"
    assert not inner.has_overrun


def test_who_was_stopped_itself_is_patient(pipe: tuple[Inner, Reports]) -> None:
    inner, _ = pipe
    inner.box.due(time.monotonic() - 1.0)
    inner._looked -= 2 * PAUSED_SECONDS
    assert inner.trouble() is None, "the inner process may have been stopped with us"
    inner._patient_until = time.monotonic()
    assert inner.trouble() is not None


def test_nobody_reads_any_more(pipe: tuple[Inner, Reports]) -> None:
    inner, reports = pipe
    os.close(inner.reports)
    assert not reports._write(report())
    inner.reports = os.open(os.devnull, os.O_RDONLY)


def test_the_supervisor_needs_no_torch() -> None:
    assert "torch" not in vars(supervisor)
