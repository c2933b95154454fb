"""The training loop in one process: where it goes on it ends alike, what it measures, when it ends, what it refuses."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.errors import InvalidInput, Unreachable
from torchrelay_storage.run_spec import Checkpoints as Rules
from torchrelay_storage.run_spec import Dataset, RunSpec
from torchrelay_storage.run_writer import CheckpointRow, Order, Point, Progress
from torchrelay_worker.training import loop as module
from torchrelay_worker.training import watchdog
from torchrelay_worker.training.batches import Part, batches
from torchrelay_worker.training.checkpoints import Checkpoints, Snapshot
from torchrelay_worker.training.errors import NonFinite, OutOfMemory
from torchrelay_worker.training.gate import Gate
from torchrelay_worker.training.loop import Training
from torchrelay_worker.training.losses import UNREAD, Losses
from torchrelay_worker.training.randomness import (
    augmentation,
    epoch_order,
    random_state,
    set_random_state,
    undisturbed,
)
from torchrelay_worker.training.reporter import Reporter
from torchrelay_worker.training.task import End, Ended, Task
from torchrelay_worker.training.team import Team
from training_runs import Examples, Tiny, TinyHyperparameters, examples

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two would wait for each other on a machine that is busy; these sums need no second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def team() -> Iterator[Team]:
    with Team("cpu") as team:
        yield team


class Written:
    """What a run writes, in memory."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, int], Point] = {}
        self.best: tuple[int, float] | None = None
        self.rows: list[CheckpointRow] = []
        self.order = Order.GO
        self.faults: list[BaseException] = []
        self.progress: list[Progress] = []

    def report(self, progress: Progress, points: Sequence[Point] = (), best: tuple[int, float] | None = None) -> Order:
        if self.faults:
            raise self.faults.pop(0)
        self.progress.append(progress)
        self.points |= {(point.name, point.step): point for point in points}
        self.best = best or self.best
        return self.order

    def checkpoint(self, step: int, files: Any, value: float | None, keep: int) -> tuple[Order, tuple[str, ...]]:
        self.rows.insert(0, CheckpointRow(step, dict(files), value, 0.0))
        return self.order, ()

    def series(self, name: str) -> dict[int, float]:
        return {step: point.value for (n, step), point in sorted(self.points.items()) if n == name}


class Lab:
    """Runs of `Tiny` in this process, on the same data."""

    def __init__(self, team: Team, folder: Path) -> None:
        self.team, self.folder = team, folder
        self.artifacts = Artifacts("memory://")
        self.written = Written()
        self.leaving = threading.Event()
        self.tokens = 0
        columns = examples(60)
        self.examples = Examples(torch.from_numpy(columns["x"]), torch.from_numpy(columns["y"]))

    def task(self, **parameters: Any) -> Task:
        recipe = Tiny(TinyHyperparameters(**{"epochs": 3, **parameters}))
        spec = RunSpec(model="m", recipe="tiny", dataset=Dataset(uri="file:///x.npz", format="npz"), seed=5)
        train, held_out = torch.arange(0, 40), torch.arange(40, 60)
        recipe.preprocessing = recipe.fit(self.examples, train)
        return Task(recipe, spec, Part(self.examples, train), Part(self.examples, held_out))

    def train(
        self,
        task: Task,
        *,
        rules: Rules | None = None,
        leave_at: int | None = None,
        change: Callable[[Training], object] = lambda training: None,
        gate: Gate | None = None,
    ) -> Ended:
        """Train, from the last checkpoint if there is one; ask it to leave after a step."""
        self.tokens += 1
        self.leaving.clear()
        reporter = Reporter(self.written)  # not started: what it is told is written when it is flushed
        with Checkpoints(
            self.written, self.artifacts, self.folder / f"{self.tokens}", rules or Rules(minutes=None),
            job=1, token=self.tokens, flush=reporter.flush,
        ) as checkpoints:  # fmt: skip
            restored = checkpoints.restore(self.written.rows)
            training = Training(
                task, self.team, reporter, checkpoints, restored=restored, leaving=self.leaving, gate=gate
            )
            at = reporter.at

            def spy(step: int, epoch: int) -> None:
                at(step, epoch)
                if step == leave_at:
                    self.leaving.set()

            reporter.at = spy  # type: ignore[method-assign]
            change(training)
            ended = training.train()
        reporter.flush()
        return ended


@pytest.fixture
def lab(team: Team, tmp_path: Path) -> Lab:
    return Lab(team, tmp_path)


def weights(ended: Ended) -> dict[str, torch.Tensor]:
    assert ended.module is not None
    return ended.module.state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- going on ---------------------------------------------------------------------------------------------------------

RESTLESS = {"dropout": 0.3, "momentum": 0.9, "augment": 0.1, "numpy_noise": True, "batch_size": 16}


@pytest.mark.parametrize("parameters", [RESTLESS, {"tied": True, "schedule": "linear", "clip_norm": None}])
def test_from_whatever_step_it_goes_on_it_ends_with_the_same_weights_and_metrics(
    lab: Lab, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    whole = lab.train(lab.task(**parameters))
    assert (whole.end, whole.steps) == (End.DONE, 9)
    for step in range(1, 10):
        other = Lab(lab.team, tmp_path / f"{step}")
        left = other.train(other.task(**parameters), leave_at=step)
        assert left.end is End.LEFT
        assert [row.step for row in other.written.rows] == [step]
        again = other.train(other.task(**parameters))
        assert (again.end, again.metrics, again.best_step) == (End.DONE, whole.metrics, whole.best_step)
        assert_equal(weights(again), weights(whole))
        assert other.written.points == lab.written.points
        assert other.written.best == lab.written.best


def test_losses_that_still_wait_on_the_device_are_in_a_checkpoint_too(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POINTS", 2)  # one for five steps

    def lazy(training: Training) -> None:
        training.losses._eager = False

    lab.train(lab.task(), change=lazy)
    assert list(lab.written.series("train_loss")) == [5, 9]
    for step in (4, 7):
        other = Lab(lab.team, tmp_path / f"{step}")
        assert other.train(other.task(), change=lazy, leave_at=step).end is End.LEFT
        other.train(other.task(), change=lazy)
        assert other.written.points == lab.written.points


def test_it_goes_on_after_many_interruptions_and_through_a_validation(lab: Lab, tmp_path: Path) -> None:
    whole = lab.train(lab.task(**RESTLESS))
    other = Lab(lab.team, tmp_path / "other")

    def leave_in_validation(training: Training) -> None:
        training.reporter.beat = other.leaving.set  # type: ignore[method-assign]

    for _ in range(8):  # each validation has two batches, and is left after the first
        ended = other.train(other.task(**RESTLESS), change=leave_in_validation)
        assert ended.end is End.LEFT
        assert other.written.rows[0].step == 3
    for step in (4, 5, 8):
        assert other.train(other.task(**RESTLESS), leave_at=step).end is End.LEFT
    again = other.train(other.task(**RESTLESS))
    assert_equal(weights(again), weights(whole))
    assert other.written.points == lab.written.points


def test_a_validation_does_not_disturb_the_training(lab: Lab, tmp_path: Path) -> None:
    def restless(training: Training) -> None:
        loss = training.recipe.loss

        def noisy(net: Any, batch: Any) -> Any:
            if not net.training:
                torch.rand(3)
            return loss(net, batch)

        training.recipe.loss = noisy  # type: ignore[method-assign]

    quiet = lab.train(lab.task(dropout=0.3))
    other = Lab(lab.team, tmp_path / "other")
    assert_equal(weights(other.train(other.task(dropout=0.3), change=restless)), weights(quiet))


def test_seeds_differ(lab: Lab, tmp_path: Path) -> None:
    one = lab.train(lab.task())
    other = Lab(lab.team, tmp_path / "other")
    task = other.task()
    changed = Task(task.recipe, task.spec.model_copy(update={"seed": 6}), task.train, task.validation)
    assert not torch.equal(weights(one)["last.weight"], weights(other.train(changed))["last.weight"])


def test_checkpoints_are_written_every_so_many_steps_without_a_trace_in_the_result(lab: Lab, tmp_path: Path) -> None:
    whole = lab.train(lab.task(**RESTLESS), rules=Rules(steps=2, minutes=None, keep=9))
    assert len(lab.written.rows) >= 2  # one that is due while another is uploaded comes later
    other = Lab(lab.team, tmp_path / "other")
    assert_equal(weights(other.train(other.task(**RESTLESS))), weights(whole))


# --- randomness -------------------------------------------------------------------------------------------------------


def test_the_order_of_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(epoch_order(50, 1, 1), orders[1])


def test_each_batch_of_each_process_has_a_generator_of_its_own() -> None:
    where = [(s, e, i, r) for s in (0, 1) for e in (0, 1) for i in (0, 1) for r in (0, 1)]
    drawn = {torch.rand(1, generator=augmentation(*w)).item() for w in where}
    assert len(drawn) == len(where)


def test_generators_come_back_with_their_halves_of_a_gaussian_pair() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, ...]:
        return torch.rand(1).item(), random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), random.random()

    draw()  # both Python and NumPy keep the second half of a pair
    state = random_state(CPU)
    first = draw()
    with undisturbed(CPU):
        draw()
    second = draw()
    set_random_state(state, CPU)
    assert (draw(), draw()) == (first, second)


# --- batches ----------------------------------------------------------------------------------------------------------


class Pair(Team):
    """A process of two, without the other."""

    def __init__(self, rank: int, device: str = "cpu") -> None:
        self.rank, self.world, self.device = rank, 2, torch.device(device)


def shares(team: Team, n: int, size: int, start: int = 0) -> list[tuple[list[float], int, int]]:
    columns = examples(n)
    data = Examples(torch.arange(n, dtype=torch.float32)[:, None].repeat(1, 8), torch.from_numpy(columns["y"]))
    recipe = Tiny(TinyHyperparameters())
    recipe.preprocessing = {"mean": [0.0] * 8, "std": [1.0] * 8}
    found = batches(recipe, data, torch.arange(n), size, team, start=start)
    return [(share.batch["x"][:, 0].tolist(), share.size, share.whole) for share in found]


def test_two_processes_share_each_batch_and_an_empty_share_is_a_stand_in_that_counts_nothing() -> None:
    first, second = shares(Pair(0), 7, 3), shares(Pair(1), 7, 3)
    assert first == [([0, 1], 2, 3), ([3, 4], 2, 3), ([6], 1, 1)]
    assert second == [([2], 1, 3), ([5], 1, 3), ([6], 0, 1)]


def test_batches_begin_where_they_are_asked_to(team: Team) -> None:
    assert shares(team, 7, 3, start=1) == [([3, 4, 5], 3, 3), ([6], 1, 1)]
    assert shares(team, 7, 3, start=3) == []


def test_a_device_gets_the_same_batches_from_a_thread(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Team, "to_device", lambda self, batch: batch)
    for start in (0, 1, 3):
        assert shares(Pair(0, "cuda"), 7, 3, start) == shares(Pair(0), 7, 3, start)


# --- what it measures -------------------------------------------------------------------------------------------------


def test_each_point_is_the_mean_since_the_last_and_the_rate_of_its_step(lab: Lab, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "POINTS", 3)
    seen: list[float] = []

    def spy(training: Training) -> None:
        loss = training.recipe.loss

        def noting(net: Any, batch: Any) -> Any:
            result = loss(net, batch)
            if net.training:
                seen.append(result[0].item())
            return result

        training.recipe.loss = noting  # type: ignore[method-assign]

    lab.train(lab.task(epochs=3, batch_size=10, schedule="linear", warmup=0.0), change=spy)
    assert len(seen) == 12
    expected = {step: sum(seen[step - 4 : step]) / 4 for step in (4, 8, 12)}
    assert lab.written.series("train_loss") == pytest.approx(expected)
    assert lab.written.series("learning_rate") == pytest.approx({s: 0.05 * (1 - (s - 1) / 12) for s in (4, 8, 12)})
    assert list(lab.written.series("validation_loss")) == [4, 8, 12]
    assert lab.written.points["accuracy", 8].epoch == 2


def test_a_long_run_has_so_many_points_of_each_metric_and_the_last(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.POINTS == 500
    monkeypatch.setattr(module, "POINTS", 50)
    lab.train(lab.task(epochs=61, batch_size=40, learning_rate=1e-6))
    for name in ("train_loss", "learning_rate", "accuracy", "validation_loss"):
        assert list(lab.written.series(name)) == [*range(2, 61, 2), 61], name


def test_the_validation_counts_each_example_once_whatever_the_batches(lab: Lab, tmp_path: Path) -> None:
    lab.train(lab.task(epochs=1, batch_size=40))
    whole = lab.written.series("validation_loss")[1]
    other = Lab(lab.team, tmp_path / "other")
    task = other.task(epochs=1, batch_size=40)
    task.recipe.parameters = TinyHyperparameters(epochs=1, batch_size=40)

    def uneven(training: Training) -> None:
        validate = training.validate

        def smaller() -> Any:
            training.parameters = TinyHyperparameters(epochs=1, batch_size=7)
            return validate()

        training.validate = smaller  # type: ignore[method-assign]

    other.train(task, change=uneven)
    assert other.written.series("validation_loss")[1] == pytest.approx(whole, rel=1e-6)


def test_losses_are_read_together_and_in_order(team: Team) -> None:
    clock = iter(range(1000))
    losses = Losses(team, clock=lambda: next(clock) * 0.0)
    losses._eager = False
    for step in range(UNREAD):
        assert not losses.is_due
        losses.add(torch.tensor(float(step)), 1.0, None, step=step, epoch=1, rate=0.1)
    assert losses.is_due
    losses.read()
    assert losses.point() == sum(range(UNREAD)) / UNREAD
    losses.add(torch.tensor(4.0), 0.5, None, step=UNREAD, epoch=1, rate=0.1)
    losses.read()
    assert losses.point() == 2.0, "its share of the batch was a half"
    assert losses.epoch() == (sum(range(UNREAD)) + 2.0) / (UNREAD + 1)


# --- when it ends -----------------------------------------------------------------------------------------------------


def test_the_best_weights_are_kept_not_the_last(lab: Lab) -> None:
    values = iter([0.2, 0.9, 0.3, 0.9])
    at_best: dict[str, torch.Tensor] = {}

    def script(training: Training) -> None:
        training.recipe.summarize = lambda sums: {"accuracy": next(values)}  # type: ignore[method-assign]
        report = training.report_validation

        def noting(metrics: Any) -> None:
            if training.position.epoch == 2:
                at_best.update({name: t.clone() for name, t in training.bare.state_dict().items()})
            report(metrics)

        training.report_validation = noting  # type: ignore[method-assign]

    ended = lab.train(lab.task(epochs=4), change=script)
    assert ended.best_step == 6, "the first of two that are as good"
    assert ended.metrics["accuracy"] == 0.9
    points = lab.written.series("train_loss")
    assert ended.metrics["train_loss"] == pytest.approx(sum(points[step] for step in (4, 5, 6)) / 3)
    assert lab.written.best == (6, 0.9)
    assert_equal(weights(ended), at_best)


def test_patience_ends_a_run_that_gets_no_better_also_after_an_interruption(lab: Lab) -> None:
    def never_better(training: Training) -> None:
        training.recipe.summarize = lambda sums: {"accuracy": 0.5}  # type: ignore[method-assign]

    task = lab.task(epochs=50, patience=2)
    assert lab.train(task, change=never_better, leave_at=8).end is End.LEFT
    ended = lab.train(lab.task(epochs=50, patience=2), change=never_better)
    assert (ended.end, ended.epochs, ended.steps, ended.best_step) == (End.DONE, 3, 9, 3)
    assert 9 in lab.written.series("accuracy"), "the last validation is reported"
    assert lab.train(lab.task(epochs=50, patience=2), change=never_better).steps == 9


def test_it_leaves_without_a_trace_once_it_is_lost(lab: Lab) -> None:
    def lose(training: Training) -> None:
        training.reporter.order = Order.LOST

    assert lab.train(lab.task(), change=lose).end is End.LOST
    assert lab.written.rows == []


def test_a_pause_writes_a_checkpoint_and_ends(lab: Lab) -> None:
    def pause(training: Training) -> None:
        begin = training.reporter.at

        def at(step: int, epoch: int) -> None:
            begin(step, epoch)
            if step == 4:
                training.reporter.order = Order.PAUSE

        training.reporter.at = at  # type: ignore[method-assign]

    assert lab.train(lab.task(), change=pause).end is End.LEFT
    assert [row.step for row in lab.written.rows] == [4]


def test_between_two_steps_it_looks_at_the_gate(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Gate, "wait", lambda self, limit=0.5: waits.append(limit) or 0.0)
    with Gate.make(tmp_path / "gate") as gate:
        lab.train(lab.task(), gate=gate)
    assert len(waits) == 9 + 3 * 2


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_by_name_of_its_step(lab: Lab) -> None:
    with pytest.raises(NonFinite, match=r"training loss is nan at step 5 \(epoch 2, learning rate 0\.0\d+\)"):
        lab.train(lab.task(trouble="nan", at=5), rules=Rules(steps=1, minutes=None, keep=50))
    assert max(row.step for row in lab.written.rows) <= 4


def test_an_infinite_gradient_ends_the_run_before_it_spoils_a_checkpoint(lab: Lab) -> None:
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * math.inf

    def spike(training: Training) -> None:
        loss = training.recipe.loss

        def changed(net: Any, batch: Any) -> Any:
            value, outputs = loss(net, batch)
            return (Spike.apply(value) if training.recipe.made == 4 else value), outputs  # type: ignore[attr-defined]

        training.recipe.loss = changed  # type: ignore[method-assign]

    with pytest.raises(NonFinite, match=r"gradient is (inf|nan) at step 4"):
        lab.train(lab.task(), rules=Rules(steps=1, minutes=None, keep=50), change=spike)
    assert max(row.step for row in lab.written.rows) <= 3


@pytest.mark.parametrize("name", ["validation_loss", "accuracy"])
def test_a_validation_that_is_not_finite_ends_the_run(lab: Lab, name: str) -> None:
    def spoil(training: Training) -> None:
        validate = training.validate
        training.validate = lambda: (validate() or {}) | {name: math.nan}  # type: ignore[method-assign]

    with pytest.raises(NonFinite, match=rf"{name} is nan after step 3 \(epoch 1"):
        lab.train(lab.task(), change=spoil)


def test_out_of_memory_says_where_and_what_to_lower(lab: Lab) -> None:
    with pytest.raises(OutOfMemory, match=r"at step 5 \(epoch 2\) with batch_size 16: lower batch_size"):
        lab.train(lab.task(trouble="memory", at=5))


def test_a_recipe_whose_metric_is_not_measured_is_refused_by_name(lab: Lab) -> None:
    def rename(training: Training) -> None:
        training.recipe.summarize = lambda sums: {"f1": 1.0}  # type: ignore[method-assign]

    with pytest.raises(InvalidInput, match=r"best 'accuracy', and there are only .*validation_loss, f1"):
        lab.train(lab.task(), change=rename)


# --- precision --------------------------------------------------------------------------------------------------------


def test_mixed_precision_trains_and_goes_on_alike(tmp_path: Path) -> None:
    with Team("cpu", "bf16") as team:
        whole, other = Lab(team, tmp_path / "one"), Lab(team, tmp_path / "two")
        ended = whole.train(whole.task(dropout=0.2, batch_size=20))
        assert other.train(other.task(dropout=0.2, batch_size=20), leave_at=3).end is End.LEFT
        again = other.train(other.task(dropout=0.2, batch_size=20))
    assert_equal(weights(again), weights(ended))
    assert ended.module is not None
    assert ended.module(torch.zeros(1, 8)).dtype is torch.float32
    assert {t.dtype for t in weights(ended).values() if t.is_floating_point()} == {torch.float32}
    with Team("cpu", "fp32") as team:
        plain = Lab(team, tmp_path / "three")
        single = plain.train(plain.task(dropout=0.2, batch_size=20))
    assert not torch.equal(weights(single)["last.weight"], weights(ended)["last.weight"])


def test_a_precision_or_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="fp16 needs a CUDA device"):
        Team("cpu", "fp16")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInput, match="finds no CUDA device"):
            Team("cuda")


# --- reporting --------------------------------------------------------------------------------------------------------


def test_what_could_not_be_reported_is_reported_later(lab: Lab) -> None:
    reporter = Reporter(lab.written)
    lab.written.faults = [Unreachable("away")]
    reporter.add([Point("a", 1, 1, 0.5)])
    reporter.best(1, 0.5)
    with pytest.raises(Unreachable):
        reporter.flush()
    assert lab.written.points == {}
    reporter.add([Point("a", 2, 1, 0.4)])
    reporter.flush()
    assert lab.written.series("a") == {1: 0.5, 2: 0.4}
    assert lab.written.best == (1, 0.5)


def test_the_thread_reports_through_an_outage_and_hears_the_orders(lab: Lab) -> None:
    heard = threading.Event()
    report = lab.written.report

    def hear(*arguments: Any) -> Order:
        order = report(*arguments)
        if lab.written.progress and lab.written.progress[-1].step == 7:
            heard.set()
        return order

    lab.written.report = hear  # type: ignore[method-assign]
    lab.written.faults = [Unreachable("away"), InvalidInput("odd")]
    lab.written.order = Order.PAUSE
    with Reporter(lab.written, every=0.001) as reporter:
        reporter.begin(10, 2, 16)
        reporter.enter("training")
        reporter.at(7, 2)
        assert heard.wait(30)
    assert reporter.order is Order.PAUSE
    last = lab.written.progress[-1]
    assert (last.phase, last.step, last.steps, last.epoch, last.epochs) == ("training", 7, 10, 2, 2)


def test_the_watchdog_is_wound_up_by_what_ends_and_sleeps_where_there_are_no_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float | None] = []
    looks = iter([None, 1, 1, 2, 2, None, 3])
    done = threading.Event()

    def ended() -> int | None:
        looked = next(looks, 3)
        if looked == 3:
            done.set()
        return looked

    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, exit: seen.append(seconds))
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", lambda: seen.append(None))
    with watchdog.Watchdog(ended, 9.0, look=0.001):
        assert done.wait(30)
    assert seen == [9.0, 9.0, None, 9.0, None]


def test_speed_and_remaining_time_are_those_of_the_last_steps(lab: Lab) -> None:
    now = [0.0]
    reporter = Reporter(lab.written, clock=lambda: now[0])
    reporter.begin(100, 4, 16, 10, 1)
    for _ in range(40):  # two steps a second, seen each second
        reporter.flush()
        now[0] += 1.0
        reporter.at(reporter._step + 2, 1)
    last = lab.written.progress[-1]
    assert lab.written.progress[0].eta is None
    assert last.examples_per_s == pytest.approx(32.0)
    assert last.eta == pytest.approx((100 - last.step) / 2)
    now[0] += 60.0  # then one slow step
    reporter.at(reporter._step + 1, 1)
    reporter.flush()
    speed = lab.written.progress[-1].examples_per_s
    assert speed is not None
    assert speed < 32.0


def test_once_lost_it_reports_nothing_more(lab: Lab) -> None:
    lab.written.order = Order.LOST
    reporter = Reporter(lab.written)
    reporter.flush()
    reporter.add([Point("a", 1, 1, 0.5)])
    reporter.flush()
    assert len(lab.written.progress) == 1


def test_a_process_that_does_not_write_reports_nothing() -> None:
    with Reporter(None) as reporter:
        reporter.add([Point("a", 1, 1, 0.5)])
        reporter.flush()
    assert reporter.order is Order.GO


def test_restoring_needs_nothing_but_the_files(lab: Lab) -> None:
    lab.train(lab.task(**RESTLESS), leave_at=5)
    with Checkpoints(lab.written, lab.artifacts, lab.folder / "new", Rules(), job=1, token=9) as checkpoints:
        restored = checkpoints.restore(lab.written.rows)
    assert isinstance(restored, Snapshot)
    assert restored.state["position"] == {"step": 5, "epoch": 1, "since_best": restored.state["position"]["since_best"]}
    assert restored.state["generators"]["torch"].shape[0] == 1, "one row for each process"
