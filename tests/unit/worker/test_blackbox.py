"""What a process wrote before it was killed can be read afterwards."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile

import pytest

from torchrelay_worker.blackbox import PLACE_SIZE, SIZE, BlackBox, scratch


def test_it_tells_what_runs_now() -> None:
    box = scratch()
    assert box.read().jobs == frozenset()
    first = box.launched([1, 2, 3])
    second = box.launched([4])
    assert box.read().jobs == {1, 2, 3, 4}
    box.landed(first)
    assert box.read().jobs == {4}
    slot, other = box.slot(), box.slot()
    slot.note(2**62)
    other.note(9)
    slot.note(8)
    box.loading(7)
    box.landed(second)
    found = box.read()
    assert (found.jobs, found.versions, found.overflow) == ({8, 9}, {7}, False)
    slot.note(0)
    other.note(0)
    box.loading(0)
    assert (box.read().jobs, box.read().versions) == (frozenset(), frozenset())


def test_a_batch_that_is_too_large_is_said_to_be() -> None:
    box = scratch()
    box.launched(range(1, PLACE_SIZE + 2))
    found = box.read()
    assert found.overflow
    assert len(found.jobs) == PLACE_SIZE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_it_outlives_the_process(number: signal.Signals) -> None:
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            try:
                faulthandler.disable()
                BlackBox(file.fileno()).launched([11, 12])
                os.kill(os.getpid(), number)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == number
        assert os.fstat(file.fileno()).st_size == SIZE
        assert BlackBox(file.fileno()).read().jobs == {11, 12}
