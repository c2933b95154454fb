"""Checkpoints: every weight comes back bit for bit, one exists when its row does, and what is not kept is deleted."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.errors import Corrupt, InvalidInput, Unreachable
from torchrelay_storage.ids import draw
from torchrelay_storage.run_spec import Checkpoints as Rules
from torchrelay_storage.run_writer import CheckpointRow, Order
from torchrelay_worker.training.checkpoints import (
    AGAIN_SECONDS,
    BEST,
    MODEL,
    STATE,
    Best,
    Checkpoints,
    Snapshot,
    read_snapshot,
    read_tensors,
    save_snapshot,
    save_tensors,
    weights_of,
)
from worker_fakes import Clock

JOB = draw()


class Rows:
    """The table of checkpoints, in memory, and the pruning that the store does."""

    def __init__(self) -> None:
        self.rows: list[CheckpointRow] = []
        self.order = Order.GO
        self.faults: list[BaseException] = []
        self.gate = threading.Event()
        self.gate.set()

    def checkpoint(
        self, step: int, files: Mapping[str, str], value: float | None, keep: int
    ) -> tuple[Order, tuple[str, ...]]:
        assert self.gate.wait(30)
        if self.faults:
            raise self.faults.pop(0)
        if self.order is Order.LOST:
            return Order.LOST, ()
        rows = [CheckpointRow(step, dict(files), value, 0.0), *self.rows]
        self.rows, gone = rows[:keep], rows[keep:]
        named = {uri for row in self.rows for uri in row.files.values()}
        return self.order, tuple(uri for row in gone for uri in row.files.values() if uri not in named)


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def artifacts() -> Artifacts:
    return Artifacts("memory://")


def make(rows: Rows, artifacts: Artifacts, folder: Path, *, token: int = 1, **rules: Any) -> Checkpoints:
    clock = rules.pop("clock", Clock())
    flush = rules.pop("flush", lambda: None)
    return Checkpoints(
        rows, artifacts, folder / f"{token}", Rules(**rules), job=JOB, token=token, flush=flush, clock=clock
    )


def snapshot(step: int, best: Best | None = None, **state: Any) -> Snapshot:
    return Snapshot(step, {"w": torch.full((3,), float(step))}, {"n": step, **state}, best)


def best_at(step: int) -> Best:
    return Best(step, 0.5, {"accuracy": 0.5}, {"w": torch.full((3,), -float(step))})


# --- tensors ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose weights are the output layer's too, a view, a buffer of integers and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight
        whole = torch.randn(6, 4)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[1:3])
        self.register_buffer("turned", torch.randn(3, 2).t())
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("nothing_else", torch.empty(0))


def test_tied_weights_views_and_transposed_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    module = Tied()
    save_tensors(weights_of(module), tmp_path / "x.safetensors")
    again = Tied()
    again.load_state_dict(read_tensors(tmp_path / "x.safetensors"))
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.out.weight is again.embedding.weight
    assert (tmp_path / "x.safetensors").stat().st_size < 2 * 5 * 4 * 4 + 1500, "tied weights are written once"


def test_a_copy_of_the_weights_stays_as_it_is_when_the_training_goes_on() -> None:
    module = nn.Linear(2, 2)
    kept, seen = weights_of(module, copied=True), weights_of(module)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(kept["weight"], before)
    assert torch.equal(seen["weight"], before + 1)


def test_a_state_that_is_no_tensor_is_refused_by_name() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"n": 1}

    with pytest.raises(InvalidInput, match="_extra_state"):
        weights_of(Odd(1, 1))


def test_a_damaged_file_is_corrupt(tmp_path: Path) -> None:
    save_snapshot(snapshot(3, best_at(2)), tmp_path, with_best=True)
    for name in (MODEL, BEST, STATE):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(Corrupt):
            read_snapshot(tmp_path)
        (tmp_path / name).write_bytes(data)
    assert read_snapshot(tmp_path).step == 3


# --- writing and reading ----------------------------------------------------------------------------------------------


def test_what_was_written_is_what_is_restored(rows: Rows, artifacts: Artifacts, tmp_path: Path) -> None:
    state = {"sums": [1.5, float("nan")], "text": "{}", "none": None, "nested": {1: torch.arange(3)}}
    with make(rows, artifacts, tmp_path) as checkpoints:
        assert checkpoints.write(snapshot(4, best_at(3), **state), last=True)
    (row,) = rows.rows
    assert (row.step, row.value, sorted(row.files)) == (4, 0.5, [BEST, MODEL, STATE])
    assert all(f"/checkpoints/4-1/{name}" in uri for name, uri in row.files.items())
    with make(rows, artifacts, tmp_path, token=2) as later:
        restored = later.restore(rows.rows)
    assert restored is not None
    assert restored.step == 4
    assert torch.equal(restored.weights["w"], torch.full((3,), 4.0))
    assert torch.equal(restored.state["nested"][1], torch.arange(3))
    assert restored.best is not None
    assert (restored.best.step, restored.best.metrics) == (3, {"accuracy": 0.5})
    assert torch.equal(restored.best.weights["w"], torch.full((3,), -3.0))


def test_a_checkpoint_is_due_by_steps_by_minutes_and_not_while_another_is_uploaded(
    rows: Rows, artifacts: Artifacts, tmp_path: Path
) -> None:
    clock = Clock()
    with make(rows, artifacts, tmp_path, steps=10, minutes=2.0, clock=clock) as checkpoints:
        assert not checkpoints.is_due(0)
        assert not checkpoints.is_due(9)
        assert checkpoints.is_due(10)
        clock.now += 119
        assert not checkpoints.is_due(1)
        clock.now += 1
        assert checkpoints.is_due(1)
        rows.gate.clear()
        checkpoints.write(snapshot(10))
        assert not checkpoints.is_due(99), "one is being uploaded"
        rows.gate.set()
        checkpoints.settle()
        assert not checkpoints.is_due(19)
        assert checkpoints.is_due(20)
    with make(rows, artifacts, tmp_path, minutes=None, token=2) as never:
        assert not never.is_due(10**9)


def test_pruned_files_are_deleted_and_the_best_weights_are_uploaded_once(
    rows: Rows, artifacts: Artifacts, tmp_path: Path
) -> None:
    best = best_at(1)
    with make(rows, artifacts, tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.write(snapshot(step, best))
        checkpoints.settle()
        files = {uri.split("/checkpoints/")[1] for uri in artifacts.under("runs")}
        assert files == {f"{step}-1/{name}" for step in (3, 4) for name in (MODEL, STATE)} | {f"1-1/{BEST}"}
        checkpoints.write(snapshot(5, best_at(5)), last=True)
        checkpoints.write(snapshot(6, best_at(5)), last=True)
        assert {uri for uri in artifacts.under("runs") if uri.endswith(BEST)} == {rows.rows[0].files[BEST]}
    assert not list((tmp_path / "1").glob("[0-9]*")), "local files are gone"


def test_the_best_weights_are_not_uploaded_again_after_a_restart(
    rows: Rows, artifacts: Artifacts, tmp_path: Path
) -> None:
    with make(rows, artifacts, tmp_path) as checkpoints:
        checkpoints.write(snapshot(4, best_at(3)), last=True)
    uri = rows.rows[0].files[BEST]
    with make(rows, artifacts, tmp_path, token=2) as checkpoints:
        restored = checkpoints.restore(rows.rows)
        assert restored is not None
        checkpoints.write(snapshot(5, restored.best), last=True)
    assert rows.rows[0].files[BEST] == uri


def test_nothing_is_written_where_nothing_has_happened_since(rows: Rows, artifacts: Artifacts, tmp_path: Path) -> None:
    with make(rows, artifacts, tmp_path) as checkpoints:
        assert checkpoints.write(snapshot(0), last=True)
        checkpoints.write(snapshot(4))
        assert checkpoints.write(snapshot(4), last=True)
    assert [row.step for row in rows.rows] == [4]
    with make(rows, artifacts, tmp_path, token=2) as checkpoints:
        checkpoints.restore(rows.rows)
        assert checkpoints.write(snapshot(4), last=True)
    assert [row.step for row in rows.rows] == [4]


def test_what_was_reported_is_flushed_before_the_row_is_written(
    rows: Rows, artifacts: Artifacts, tmp_path: Path
) -> None:
    seen: list[int] = []
    with make(rows, artifacts, tmp_path, flush=lambda: seen.append(len(rows.rows))) as checkpoints:
        checkpoints.write(snapshot(1), last=True)
    assert seen == [0]


def test_a_store_that_is_away_fails_no_run_and_is_tried_again_later(
    rows: Rows, artifacts: Artifacts, tmp_path: Path
) -> None:
    clock = Clock()
    with make(rows, artifacts, tmp_path, steps=1, clock=clock) as checkpoints:
        rows.faults = [Unreachable("away"), Unreachable("away")]
        assert checkpoints.write(snapshot(1))
        checkpoints.settle()
        assert not checkpoints.is_due(2), "not at each step"
        clock.now += AGAIN_SECONDS
        assert checkpoints.is_due(2)
        assert checkpoints.write(snapshot(2), last=True) is False
        assert checkpoints.write(snapshot(2), last=True) is True
    assert [row.step for row in rows.rows] == [2]


def test_a_run_that_is_lost_leaves_no_files(rows: Rows, artifacts: Artifacts, tmp_path: Path) -> None:
    rows.order = Order.LOST
    with make(rows, artifacts, tmp_path) as checkpoints:
        assert not checkpoints.write(snapshot(1, best_at(1)), last=True)
    assert artifacts.under("runs") == []


def test_an_older_checkpoint_is_taken_where_the_newest_cannot_be_read(
    rows: Rows, artifacts: Artifacts, tmp_path: Path
) -> None:
    with make(rows, artifacts, tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.write(snapshot(step, best_at(1)), last=True)
    newest, older = rows.rows
    artifacts.put(newest.files[STATE].removeprefix("memory:///"), b"damaged")
    with make(rows, artifacts, tmp_path, token=2) as checkpoints:
        restored = checkpoints.restore(rows.rows)
    assert restored is not None
    assert restored.step == 1
    artifacts.delete(older.files.values())
    with make(rows, artifacts, tmp_path, token=3) as checkpoints:
        assert checkpoints.restore(rows.rows) is None


def test_sweeping_removes_what_no_row_names_of_earlier_claims_only(
    rows: Rows, artifacts: Artifacts, tmp_path: Path
) -> None:
    with make(rows, artifacts, tmp_path, token=2) as checkpoints:
        checkpoints.write(snapshot(1), last=True)
    folder = rows.rows[0].files[MODEL].removeprefix("memory:///").rsplit("/", 2)[0]
    artifacts.put(f"{folder}/7-1/{MODEL}", b"of a process that was killed")
    newer = artifacts.put(f"{folder}/8-3/{MODEL}", b"of the one that holds the run now")
    with make(rows, artifacts, tmp_path, token=3) as checkpoints:
        checkpoints.sweep(rows.rows)
    assert set(artifacts.under("runs")) == {*rows.rows[0].files.values(), newer}


def test_a_state_that_could_not_be_read_back_is_refused_with_the_first_checkpoint(
    rows: Rows, artifacts: Artifacts, tmp_path: Path
) -> None:
    with make(rows, artifacts, tmp_path) as checkpoints:
        with pytest.raises(InvalidInput, match="optimiser or schedule"):
            checkpoints.write(snapshot(1, schedule=lambda step: 1.0))
        with pytest.raises(InvalidInput, match="optimiser or schedule"):
            checkpoints.write(snapshot(1, schedule=Path("a class that torch does not load")))
    assert rows.rows == []
