"""The preparing threads: decoding, artifacts, lengths, refusals; what is served, and how it is learnt."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import torch

from servers import wait_until
from torchrelay_storage import values
from torchrelay_storage.artifacts import store_large
from torchrelay_storage.chunk_store import Claimed
from torchrelay_storage.errors import InvalidInput, Unreachable
from torchrelay_storage.states import End
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.pipeline.pace import Pace
from torchrelay_worker.pipeline.preparer import CANCEL_SECONDS
from torchrelay_worker.pipeline.serving import Serving
from worker_fakes import Line, Loaded, Plus, Versions, chunk, version


class Words(Plus):
    """A list of numbers in; their sum and the padded length out."""

    max_batch_cost = 10
    oversize = "refuse"

    def preprocess(self, input: Any) -> torch.Tensor:
        if not input:
            raise InvalidInput("an empty list")
        return torch.tensor(input, dtype=torch.float32)

    def length(self, prepared: torch.Tensor) -> int:
        return len(prepared)

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return batch.sum(1), torch.full((len(batch),), batch.shape[1])

    def decode(self, output: Any) -> Any:
        return [float(part) for part in output]


def types(line: Line, *chunks: Claimed) -> dict[int, Any]:
    return {
        job: values.decode(o.output) if o.output is not None else json.loads(o.error or b"")["type"]
        for job, o in line.run(*chunks).items()
    }


def test_lengths_make_even_batches_and_refuse_what_is_too_long() -> None:
    with Line(Words()) as line:
        found = types(line, chunk(1, [[1], [1] * 8, [], [2], [1] * 11]))
    assert found == {100: [1.0, 1.0], 101: [8.0, 8.0], 102: "InvalidInput", 103: [2.0, 1.0], 104: "InvalidInput"}


def test_what_is_too_long_runs_alone_where_the_model_lets_it() -> None:
    class Patient(Words):
        oversize = "alone"

    with Line(Patient()) as line:
        assert types(line, chunk(1, [[1], [1] * 11])) == {100: [1.0, 1.0], 101: [11.0, 11.0]}


def stored(line: Line, claimed: Claimed, value: Any) -> Claimed:
    """The chunk with its first input replaced by a reference to an artifact."""
    data = store_large(line.artifacts, values.encode(value), "jobs/x/input", 0)
    return dataclasses.replace(claimed, jobs=(claimed.jobs[0]._replace(input=data), *claimed.jobs[1:]))


def test_large_inputs_are_fetched() -> None:
    with Line(Plus()) as line:
        assert types(line, stored(line, chunk(1, [0, 1]), 41)) == {100: 42.0, 101: 2.0}


def test_a_store_that_is_away_for_a_moment_is_waited_for() -> None:
    with Line(Plus()) as line:
        claimed = stored(line, chunk(1, [0]), 41)
        get, faults = line.artifacts.get, [Unreachable("away")]

        def flaky(uri: str) -> bytes:
            if faults:
                raise faults.pop()
            return get(uri)

        line.artifacts.get = flaky  # type: ignore[method-assign]
        assert types(line, claimed) == {100: 42.0}


def test_an_input_that_is_gone_or_damaged_fails_alone() -> None:
    with Line(Plus()) as line:
        gone = stored(line, chunk(1, [0, 1]), 41)
        line.artifacts.delete([values.as_reference(gone.jobs[0].input).uri])  # type: ignore[union-attr]
        broken = dataclasses.replace(chunk(2, [3]), jobs=(chunk(2, [3]).jobs[0]._replace(input=b"{"),))
        assert types(line, gone, broken) == {100: "NotFound", 101: 2.0, 200: "Corrupt"}
        assert {o.end for o in line.store.outcomes.values()} == {End.SUCCEEDED, End.FAILED}


def test_whatever_preprocess_raises_is_the_jobs_failure() -> None:
    class Exits(Plus):
        def preprocess(self, input: Any) -> torch.Tensor:
            if input == 1:
                raise SystemExit(3)
            return super().preprocess(input)

    with Line(Exits()) as line:
        assert types(line, chunk(1, [0, 1], max_attempts=1)) == {100: 1.0, 101: "SystemExit"}
    assert line.watch.left() is None


# --- serving ------------------------------------------------------------------------------------------------


def served(serving: Serving, pace: Pace | None = None) -> tuple[dict[str, int], dict[str, float]]:
    return dict(serving.names()), serving.rates(pace or Pace())


def test_all_models_with_a_handler_are_served_also_those_registered_later() -> None:
    registry = Versions(version(1, name="a", handler="digits"), version(2, name="b", handler="not-here"))
    serving = Serving(registry, Handlers())
    added: list[str] = []
    serving.added = added.append
    serving.look()
    assert dict(serving.names()) == {"a": 10}
    registry.all.insert(0, version(3, name="c", handler="digits"))
    serving.look()
    serving.look()
    assert dict(serving.names()) == {"a": 10, "c": 30}
    assert added == ["a", "c"]


def test_only_what_was_asked_for_is_served() -> None:
    registry = Versions(version(1, name="a", handler="digits"), version(2, name="b", handler="digits"))
    serving = Serving(registry, Handlers(), ["b", "later"])
    serving.look()
    assert dict(serving.names()) == {"b": 20}


def test_chunk_sizes_follow_the_batch_size_and_change_for_a_reason_only() -> None:
    registry = Versions(version(1, chunk_size=256, handler="digits"))
    serving = Serving(registry, Handlers())
    serving.look()
    loaded: Any = Loaded({1: Plus()})
    loaded.limits = lambda number: loaded.all[number].limits
    serving.fit_chunks(loaded, Pace())
    assert registry.chunk_sizes == {1: 64}
    registry.all = [version(1, chunk_size=64, handler="digits")]
    registry.chunk_sizes.clear()
    serving.look()
    serving.fit_chunks(loaded, Pace())
    assert registry.chunk_sizes == {}


# --- what the supervisor is told ------------------------------------------------------------------------------


class Hangs(Plus):
    """Preprocesses until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def preprocess(self, input: Any) -> torch.Tensor:
        if input == 7:
            self.inside.set()
            assert self.go_on.wait(20)
        return super().preprocess(input)


def test_an_input_that_is_being_prepared_is_in_the_black_box_and_has_its_jobs_time() -> None:
    model = Hangs()
    with Line(model) as line:
        line.put(chunk(1, [1, 7, 2], timeout=5.0))
        assert model.inside.wait(20)
        assert line.box.read().jobs == {101}
        assert 4.0 < (line.watch.left() or 0) <= 5.25
        model.go_on.set()
        line.store.wait_for(3)
        wait_until(lambda: line.watch.left() is None, 10, "the end")
        wait_until(lambda: not line.box.read().jobs, 10, "an empty box")


def test_a_cancelled_input_does_not_hold_a_thread_for_long() -> None:
    model = Hangs()
    with Line(model) as line:
        hold = line.put(chunk(1, [1, 7, 2]))
        assert model.inside.wait(20)
        line.preparer.forsake()
        assert (line.watch.left() or 0) > 100
        hold.cancelled = frozenset({101})
        line.preparer.forsake()
        assert 0 < (line.watch.left() or 0) <= CANCEL_SECONDS
        model.go_on.set()
        assert sorted(line.store.wait_for(2)) == [100, 102]


def test_a_store_in_trouble_is_not_the_inputs_fault() -> None:
    line = Line(Plus())
    reference = store_large(line.artifacts, values.encode(4), "inputs/1", 0)
    claimed = chunk(1, [0], timeout=2.0)
    claimed = dataclasses.replace(claimed, jobs=(claimed.jobs[0]._replace(input=reference),))
    lefts: list[float] = []
    load = line.preparer._load
    line.preparer._load = lambda data: (lefts.append(line.watch.left() or 0), load(data))[1]  # type: ignore[method-assign]
    with line:
        line.run(claimed)
    assert lefts[0] > 100
