"""The command line of both processes, devices, and what the supervisor makes of the inner one's reports."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import orjson
import pytest
import torch

from torchrelay_worker import InvalidInput, __main__, supervisor, worker
from torchrelay_worker.supervisor import SILENT_SECONDS, START_SECONDS, Inner


def test_the_command_line() -> None:
    options = __main__.parse(["--models", "a, b,a", "--device", "cpu", "--name", "w1", "--max-loaded", "2"])
    assert (options.models, options.device, options.name, options.max_loaded) == (("a", "b"), "cpu", "w1", 2)
    assert __main__.parse([]).models is None
    for wrong in (["--name", "a b"], ["--threads", "0"], ["--grace", "x"], ["--nope"]):
        with pytest.raises(SystemExit) as caught:
            __main__.parse(wrong)
        assert caught.value.code == 2
    inner = worker.parse(["--worker-id", "5", "--report-fd", "3", "--name", "w", "--models", "a,b"])
    assert (inner.worker_id, inner.report_fd, inner.models) == (5, 3, ["a", "b"])


def test_devices() -> None:
    assert worker.resolve_device("cpu") == torch.device("cpu")
    assert worker.resolve_device("auto").type in ("cpu", "cuda")
    for wrong in ("gpu", "cuda:999"):
        with pytest.raises(InvalidInput, match=wrong):
            worker.resolve_device(wrong)


@pytest.fixture
def pipe() -> Iterator[tuple[Inner, worker.Reports]]:
    """An inner process that is none: both ends of its report pipe, here."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    inner = object.__new__(Inner)
    inner.started = inner.reported = time.monotonic()
    inner.has_reported = False
    inner.deadline = inner.alone = None
    inner.stats = {}
    inner._buffer = b""
    inner.reports = read
    reports = worker.Reports(write)
    yield inner, reports
    reports._file.close()
    os.close(read)


def test_reports_arrive(pipe: tuple[Inner, worker.Reports]) -> None:
    inner, reports = pipe
    reports._write({"left": 5.0, "stats": {"recorded": 3}})
    reports.alone(77)
    inner.read()
    assert inner.deadline is not None
    assert 4.0 < inner.deadline - time.monotonic() <= 5.0
    assert (inner.alone, inner.stats) == (77, {"recorded": 3})
    reports.alone(None)
    reports._write({"left": None, "stats": {}})
    os.write(reports._file.fileno(), orjson.dumps({"left": 1.0, "stats": {}})[:5])  # half a line waits for its rest
    inner.read()
    assert (inner.deadline, inner.alone) == (None, None)


def test_a_long_forward_is_not_a_dead_process(pipe: tuple[Inner, worker.Reports]) -> None:
    inner, reports = pipe
    assert inner.trouble() is None
    reports._write({"left": 100.0, "stats": {}})
    inner.read()
    inner.reported -= 10 * SILENT_SECONDS  # silent, as a forward that keeps the interpreter to itself is
    assert inner.trouble() is None
    inner.deadline = time.monotonic() - 1.0
    assert "limit" in (inner.trouble() or "")
    inner.deadline = None
    assert "answer" in (inner.trouble() or "")
    inner.has_reported = False
    inner.started -= START_SECONDS + 1
    assert "start" in (inner.trouble() or "")


def test_nobody_reads_any_more(pipe: tuple[Inner, worker.Reports]) -> None:
    inner, reports = pipe
    os.close(inner.reports)
    assert not reports._write({"left": None, "stats": {}})
    inner.reports = os.open(os.devnull, os.O_RDONLY)


def test_the_supervisor_needs_no_torch() -> None:
    assert "torch" not in vars(supervisor)
