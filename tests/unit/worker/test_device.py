"""The device's thread with fake stores: only the guilty fail, out of memory halves, late and unwanted jobs."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servers import wait_until
from torchrelay_storage import values
from torchrelay_storage.errors import Unreachable
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.states import End
from torchrelay_worker.pipeline import recorder
from torchrelay_worker.pipeline.device import CANCEL_SECONDS, DeviceLost, is_lost, is_out_of_memory
from worker_fakes import Line, Plus, chunk


def results(outcomes: dict[int, Outcome]) -> dict[int, Any]:
    """The decoded output, or the type of the error, by job."""
    return {
        job: values.decode(o.output) if o.output is not None else json.loads(o.error or b"")["type"]
        for job, o in sorted(outcomes.items())
    }


def test_jobs_of_several_chunks_share_batches_and_keep_their_results() -> None:
    with Line(Plus()) as line:
        outcomes = line.run(chunk(1, range(20)), chunk(2, range(50, 53)))
    assert results(outcomes) == {100 + i: i + 1 for i in range(20)} | {200 + i: 51 + i for i in range(3)}
    assert all(o.end is End.SUCCEEDED and o.token == 1 for o in outcomes.values())
    assert len(line.ledger) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.sets(st.integers(0, 7)))
def test_only_the_guilty_fail(n: int, guilty: set[int]) -> None:
    def trouble(batch: torch.Tensor) -> None:
        if guilty & set(batch.int().tolist()):
            raise ValueError("one of these")

    model = Plus()
    model.trouble = trouble
    with Line(model) as line:
        outcomes = line.run(chunk(1, range(n), max_attempts=1))
    assert results(outcomes) == {100 + i: "ValueError" if i in guilty else i + 1 for i in range(n)}


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError, StopIteration])
def test_whatever_forward_raises_is_the_jobs_failure(error: type[BaseException]) -> None:
    def trouble(batch: torch.Tensor) -> None:
        if (batch == 2).any():
            raise error

    model = Plus()
    model.trouble = trouble
    with Line(model) as line:
        outcomes = line.run(chunk(1, range(4), max_attempts=1))
    assert results(outcomes) == {100: 1, 101: 2, 102: error.__name__, 103: 4}
    assert not line.fatal


def test_out_of_memory_halves_the_batch_and_remembers_what_fitted() -> None:
    def trouble(batch: torch.Tensor) -> None:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = Plus()
    model.trouble = trouble
    with Line(model) as line:
        assert results(line.run(chunk(1, range(8)))) == {100 + i: i + 1 for i in range(8)}
        assert max(map(len, model.batches)) == 8
        model.batches.clear()
        line.store.outcomes.clear()
        line.run(chunk(2, range(8)))
        assert max(map(len, model.batches)) == 2


def test_an_input_that_never_fits_fails_alone() -> None:
    def trouble(batch: torch.Tensor) -> None:
        if (batch == 1).any():
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = Plus()
    model.trouble = trouble
    with Line(model) as line:
        assert results(line.run(chunk(1, range(4), max_attempts=1)))[101] == "OutOfMemoryError"
    assert len([o for o in line.store.outcomes.values() if o.end is End.SUCCEEDED]) == 3


def break_context(batch: torch.Tensor) -> None:
    raise RuntimeError("CUDA error: device-side assert triggered")


def test_a_broken_context_ends_the_process_and_blames_nobody() -> None:
    model = Plus()
    model.trouble = break_context
    with Line(model) as line:
        line.put(chunk(1, range(4)))
        assert line.lost.wait(20)
    assert isinstance(line.fatal[0], DeviceLost)
    assert not line.store.outcomes


def test_which_errors_mean_what() -> None:
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_lost(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_lost(RuntimeError("shapes differ"))


def test_nan_rows_fail_only_if_the_model_asks_for_it() -> None:
    class Divides(Plus):
        check_nan = True

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch / batch

    class Careless(Divides):
        check_nan = False

    with Line(Divides()) as line:
        assert results(line.run(chunk(1, [1, 0, 2], max_attempts=1))) == {100: 1.0, 101: "NotANumber", 102: 1.0}
    with Line(Careless()) as line:  # a NaN is no JSON: it cannot be recorded in silence either
        assert results(line.run(chunk(1, [1, 0, 2], max_attempts=1))) == {100: 1.0, 101: "BadOutput", 102: 1.0}


def test_wrong_numbers_of_outputs_are_failures() -> None:
    class Short(Plus):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch[:1]

    class Splits(Plus):
        def split(self, outputs: Any, n: int) -> list[Any]:
            return []

    with Line(Short()) as line:
        assert results(line.run(chunk(1, [1, 2], max_attempts=1))) == {100: 1.0, 101: 2.0}  # alone, one is right
    with Line(Splits()) as line:
        assert set(results(line.run(chunk(1, [1, 2]))).values()) == {"BadOutput"}


def test_a_job_whose_batch_took_longer_than_its_timeout_fails() -> None:
    model = Plus()
    begun = threading.Event()
    model.trouble = lambda batch: (begun.set(), threading.Event().wait(0.3))[0]  # type: ignore[assignment, func-returns-value]
    with Line(model) as line:
        [outcome] = line.run(chunk(1, [1], timeout=0.05, max_attempts=1)).values()
        assert begun.is_set()
        assert json.loads(outcome.error or b"")["type"] == "Timeout"
        [fast] = [o for j, o in line.run(chunk(2, [1], timeout=60.0)).items() if j == 200] or [
            line.store.wait_for(2)[200]
        ]
        assert fast.end is End.SUCCEEDED
    assert line.watch.left() is None


def test_unwanted_jobs_are_not_run() -> None:
    model = Plus()
    running, go_on = threading.Event(), threading.Event()

    def trouble(batch: torch.Tensor) -> None:
        running.set()
        go_on.wait(20)

    model.trouble = trouble
    with Line(model) as line:
        first = line.put(chunk(1, range(8)))
        assert running.wait(20)
        second = line.put(chunk(2, range(8)))
        first.cancelled = frozenset({103})
        second.cancelled = frozenset({200, 201})
        go_on.set()
        outcomes = line.store.wait_for(13)
        assert sorted(outcomes) == [j for j in range(100, 108) if j != 103] + list(range(202, 208))
        assert line.recorder.flush(20)
    assert len(line.ledger) == 0


def test_stop_lets_the_running_batch_end_and_starts_no_other() -> None:
    model = Plus()
    running, go_on = threading.Event(), threading.Event()

    def trouble(batch: torch.Tensor) -> None:
        running.set()
        go_on.wait(20)

    model.trouble = trouble
    line = Line(model)
    with line:
        line.put(chunk(1, range(8)))
        assert running.wait(20)
        line.put(chunk(2, range(8)))
        assert not line.device.stop(0.05)
        go_on.set()
        assert line.device.stop(20)
        line.recorder.flush(20)
    assert sorted(line.store.outcomes) == list(range(100, 108))
    assert [h.claimed.chunk for h in line.ledger.holds()] == [2]


# --- what the supervisor and the warden are told ------------------------------------------------------------


class Blocks(Plus):
    """Runs until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.go_on = threading.Event(), threading.Event()
        self.trouble = self._block

    def _block(self, batch: torch.Tensor) -> None:
        self.running.set()
        assert self.go_on.wait(20)


def test_the_black_box_names_the_jobs_that_run_and_no_others() -> None:
    model = Blocks()
    with Line(model) as line:
        line.put(chunk(1, range(8)))
        assert model.running.wait(20)
        line.put(chunk(2, range(8)))
        assert line.box.read().jobs == set(range(100, 108))
        model.go_on.set()
        line.store.wait_for(16)
        wait_until(lambda: not line.box.read().jobs, 10, "an empty box")


def test_a_lost_device_leaves_its_jobs_in_the_black_box() -> None:
    model = Plus()
    model.trouble = break_context
    with Line(model) as line:
        line.put(chunk(1, range(4)))
        assert line.lost.wait(20)
        assert line.box.read().jobs == set(range(100, 104))


def test_what_nobody_wants_any_more_is_given_little_time() -> None:
    model = Blocks()
    with Line(model) as line:
        hold = line.put(chunk(1, range(8), timeout=600.0))
        assert model.running.wait(20)
        hold.cancelled = frozenset(range(100, 107))
        line.device.forsake()
        assert (line.watch.left() or 0) > 500, "one is still wanted"
        hold.cancelled = frozenset(range(100, 108))
        line.device.forsake()
        assert 0 < (line.watch.left() or 0) <= CANCEL_SECONDS
        assert "cancelled" in (line.watch.reason() or "")
        model.go_on.set()
        wait_until(lambda: line.watch.left() is None, 10, "the end")
        assert line.recorder.flush(10)
    assert not line.store.outcomes


def test_close_tells_what_runs_so_that_the_rest_can_go_back_at_once() -> None:
    model = Blocks()
    with Line(model) as line:
        running = line.put(chunk(1, range(8)))
        assert model.running.wait(20)
        line.put(chunk(2, range(8)))
        assert line.device.close() == {running}
        model.go_on.set()
        assert line.device.stop(20)
        line.store.wait_for(8)
    assert sorted(line.store.outcomes) == list(range(100, 108))
    assert line.device.close() == set()


def test_mates_of_a_batch_that_was_late_keep_their_results() -> None:
    model = Plus()
    model.trouble = lambda batch: threading.Event().wait(0.2) and None
    with Line(model) as line:
        outcomes = line.run(chunk(1, range(4), timeout=0.05))
    assert all(o.end is End.SUCCEEDED for o in outcomes.values()), "nobody knows whose fault it was"


def test_each_part_of_a_batch_that_failed_has_its_own_time() -> None:
    clock, lefts = [0.0], list[float]()

    def trouble(batch: torch.Tensor) -> None:
        lefts.append(line.watch.left() or 0.0)
        clock[0] += 8.0  # of the ten that it may take
        if (batch == 3).any():
            raise ValueError("guilty")

    model = Plus()
    model.trouble = trouble
    line = Line(model)
    line.watch._clock = lambda: clock[0]
    with line:
        line.run(chunk(1, range(8), timeout=10.0, max_attempts=1))
    assert len(lefts) == 7
    assert min(lefts) >= 10.0


def test_a_device_that_waits_for_the_database_does_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "WAITING", 8)
    line = Line(Plus())
    line.store.faults = [Unreachable("away")] * 1_000_000
    with line:
        line.put(chunk(1, range(64)))
        wait_until(lambda: line.device._is_recording, 10, "a device that waits")
        turns = line.device.turns
        wait_until(line.batcher.counts, 10, "inputs that wait")
        assert not line.device.has_waiting
        assert line.device.turns == turns
        line.store.faults = []
        line.store.wait_for(64)
