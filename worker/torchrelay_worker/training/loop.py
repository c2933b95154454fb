"""The training loop: epochs of steps, a validation after each, a checkpoint now and then, the best weights at the end.

`Training._train` reads from top to bottom; the methods below it are its words. A run that goes on from a checkpoint
makes the same steps as one that was never disturbed: the position says which examples come next, and whatever else a
step depends on is in the checkpoint. Not here: where the data comes from and what becomes of the result (`process`).
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntFlag

import orjson
import torch

from torchrelay_storage.errors import InvalidInput
from torchrelay_storage.run_writer import Order, Point
from torchrelay_worker.training.batches import Share, batches
from torchrelay_worker.training.checkpoints import Best, Checkpoints, Snapshot, weights_of
from torchrelay_worker.training.errors import NonFinite, is_out_of_memory, out_of_memory
from torchrelay_worker.training.gate import Gate
from torchrelay_worker.training.losses import Losses
from torchrelay_worker.training.randomness import (
    augmentation,
    epoch_order,
    mixed,
    random_state,
    set_random_state,
    set_seed,
    undisturbed,
)
from torchrelay_worker.training.reporter import Reporter
from torchrelay_worker.training.task import End, Ended, Task
from torchrelay_worker.training.team import Team

POINTS = 500  # of one metric, about: as many as a curve can show


class Do(IntFlag):
    """What the processes of a run do between two steps."""

    GO_ON = 0
    READ = 1  # the losses, from the device
    SAVE = 2  # write a checkpoint
    LEAVE = 4  # write a checkpoint, and end
    STOP = 8  # end


@dataclass(slots=True)
class Position:
    """Where a run is."""

    step: int = 0  # steps that were made
    epoch: int = 0  # epochs that were made and validated
    since_best: int = 0  # of these, after the best


class Training:
    """One run, in one of its processes."""

    def __init__(
        self,
        task: Task,
        team: Team,
        reporter: Reporter,
        checkpoints: Checkpoints | None = None,
        *,
        restored: Snapshot | None = None,
        gate: Gate | None = None,
        leaving: threading.Event | None = None,
    ) -> None:
        """Make it.

        Args:
            checkpoints: None in those processes that do not write.
            restored: the checkpoint from which the run goes on, the same in all its processes.
            gate: by which inference on the same device goes first.
            leaving: set when the process is to end.
        """
        self.task, self.team, self.reporter, self.checkpoints = task, team, reporter, checkpoints
        self.recipe, self.spec, self.parameters = task.recipe, task.spec, task.recipe.parameters
        self.restored, self.gate, self.leaving = restored, gate, leaving or threading.Event()
        self.position = Position()
        self.losses = Losses(team, eager=gate is not None)
        self.scaler: torch.amp.GradScaler | None = team.accelerator.scaler  # of fp16
        self.best: Best | None = None
        self.epochs = self.parameters.epochs
        self.steps_of_epoch = math.ceil(len(task.train) / self.parameters.batch_size)
        self.steps = self.epochs * self.steps_of_epoch

    # --- the loop -----------------------------------------------------------------------------------------

    def train(self) -> Ended:
        """Train, and return why that ended.

        Raises:
            NonFinite: a loss is NaN or infinite.
            OutOfMemory: a step does not fit.
            InvalidInput: the recipe contradicts itself.
        """
        try:
            return self._train()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            step, epoch = self.position.step, self.position.epoch + 1
            where = f"at step {step + 1} (epoch {epoch})"
            if self.reporter.phase == "validating":
                where = f"in the validation after step {step} (epoch {epoch})"
            raise out_of_memory(error, where, self.parameters.batch_size) from error

    def _train(self) -> Ended:
        # The weights are drawn by the run's seed, alike in all processes; from there on each draws its own.
        set_seed(self.spec.seed)
        self.bare = self.recipe.build()
        self.optimizer = self.recipe.optimizer(self.bare)
        self.schedule = self.recipe.schedule(self.optimizer, self.steps)
        self.module = self.team.accelerator.prepare(self.bare)
        set_seed(mixed(self.spec.seed, self.team.rank))
        if self.scaler is not None:  # it may leave the very first step out, and the schedule wonders
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        if self.restored is not None:
            self.restore(self.restored)
        position = self.position
        self.reporter.begin(
            self.steps,
            self.epochs,
            self.parameters.batch_size,
            step=position.step,
            epoch=min(position.epoch + 1, self.epochs),
        )

        while position.epoch < self.epochs and not self.is_out_of_patience():
            self.reporter.enter("training")
            self.module.train()
            for share in self.rest_of_epoch():
                if (end := self.attend()) is not None:
                    return Ended(end)
                if self.gate is not None:
                    self.gate.wait()

                rate = self.optimizer.param_groups[0]["lr"]
                loss, _ = self.recipe.loss(self.module, share.batch)
                self.backward(loss, share)
                norm = self.clip()
                self.update()

                position.step += 1
                self.measure(loss, share, norm, rate)
                self.reporter.at(position.step, position.epoch + 1)

            metrics = self.validate()
            if metrics is None:  # it was asked to leave; where that is taken back meanwhile, it validates anew
                if (end := self.attend()) is not None:
                    return Ended(end)
                continue
            position.epoch += 1
            metrics = {"train_loss": self.losses.epoch()} | metrics
            self.keep_best(metrics)
            self.report_validation(metrics)

        if (end := self.attend()) is not None:
            return Ended(end)
        return self.done()

    # --- steps --------------------------------------------------------------------------------------------

    def rest_of_epoch(self) -> Iterator[Share]:
        """Yield the batches of this epoch that were not trained on yet."""
        seed, epoch, rank = self.spec.seed, self.position.epoch, self.team.rank
        train = self.task.train
        return batches(
            self.recipe,
            train.examples,
            train.indices[epoch_order(len(train), seed, epoch)],
            self.parameters.batch_size,
            self.team,
            start=self.position.step - epoch * self.steps_of_epoch,
            generator=lambda i: augmentation(seed, epoch, i, rank),
        )

    def backward(self, loss: torch.Tensor, share: Share) -> None:
        """Compute the gradient of the mean loss of the whole batch."""
        if self.team.world > 1:  # the processes' gradients are averaged, not summed
            loss = loss * (share.part * self.team.world)
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self) -> torch.Tensor | None:
        """Shorten the gradient where it is too long; return the length that it had, where that is known."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.parameters.clip_norm is None:
            return None
        return torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.parameters.clip_norm)

    def update(self) -> None:
        """Change the weights by the gradient, and forget it."""
        if self.scaler is None:
            self.optimizer.step()
        else:  # fp16: it leaves a step out where the gradient has overflown
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()

    def measure(self, loss: torch.Tensor, share: Share, norm: torch.Tensor | None, rate: float) -> None:
        """Note the loss of the step that has just been made; at each so many steps it becomes a point."""
        step, epoch = self.position.step, self.position.epoch + 1
        if self.scaler is not None:
            norm = None  # that of fp16 may be infinite
        self.losses.add(loss, share.part, norm, step=step, epoch=epoch, rate=rate)
        if step % math.ceil(self.steps / POINTS) == 0 or step == self.steps:
            self.losses.read()
            self.reporter.add(
                [
                    Point("train_loss", step, epoch, self.losses.point()),
                    Point("learning_rate", step, epoch, rate),
                ]
            )

    # --- between two steps --------------------------------------------------------------------------------

    def attend(self) -> End | None:
        """Do what is due between two steps; return why the loop must end, or None."""
        do = self.agree()
        if do & Do.READ:
            self.losses.read()
        if do & (Do.SAVE | Do.LEAVE):
            self.save(last=bool(do & Do.LEAVE))
        if do & Do.STOP:
            return End.LOST
        return End.LEFT if do & Do.LEAVE else None

    def agree(self) -> Do:
        """Return what is due, as the first process sees it: all do the same at the same step."""
        do = Do.GO_ON
        if self.team.is_first:
            if self.reporter.order is Order.LOST:
                do = Do.STOP
            elif self.leaving.is_set() or self.reporter.order is Order.PAUSE:
                do = Do.LEAVE | Do.READ  # no checkpoint after a NaN
            elif self.checkpoints is not None and self.checkpoints.is_due(self.position.step):
                do = Do.SAVE | Do.READ
            elif self.losses.is_due:
                do = Do.READ
        return Do(self.team.agree(int(do)))

    # --- checkpoints --------------------------------------------------------------------------------------

    def save(self, *, last: bool) -> None:
        """Write a checkpoint of this moment."""
        mine = random_state(self.team.device)
        generators = {name: self.team.stacked(state) for name, state in mine.items()}
        if self.checkpoints is None:
            return
        state = {
            "position": asdict(self.position),
            "losses": self.losses.state(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "generators": generators,
            "data": dict(self.task.data),
            "preprocessing": orjson.dumps(self.recipe.preprocessing).decode(),
        }
        self.checkpoints.write(Snapshot(self.position.step, weights_of(self.bare), state, self.best), last=last)

    def restore(self, snapshot: Snapshot) -> None:
        """Bring everything into the state that it had when the checkpoint was written."""
        state = snapshot.state
        self.position = Position(**state["position"])
        self.losses.restore(state["losses"])
        self.best = snapshot.best
        if self.best is not None:
            self.reporter.best(self.best.step, self.best.value)
        if self.best is not None:
            self.reporter.best(self.best.step, self.best.value)
        self.bare.load_state_dict(snapshot.weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        # Copied: torch reads a generator's state from where the tensor's storage begins.
        mine = {name: states[self.team.rank].clone() for name, states in state["generators"].items()}
        set_random_state(mine, self.team.device)

    # --- validation ---------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float] | None:
        """Return the metrics of the weights as they are, or None if the run was asked to leave before that was done."""
        self.reporter.enter("validating")
        self.losses.read()
        part, team = self.task.validation, self.team
        team.align(self.bare)
        self.bare.eval()
        losses = torch.zeros((), dtype=torch.float64)
        sums: dict[str, torch.Tensor] = {}
        shares = batches(self.recipe, part.examples, part.indices, self.parameters.batch_size, team)
        with torch.no_grad(), undisturbed(team.device):
            for share in shares:
                if self.agree() & (Do.LEAVE | Do.STOP):
                    return None
                if self.gate is not None:
                    self.gate.wait()
                loss, outputs = self.recipe.loss(self.bare, share.batch)
                losses += loss.item() * share.size
                for name, value in self.recipe.statistics(outputs, share.batch).items():
                    counted = value if share.size else value * 0  # a stand-in's, which another process counts
                    sums[name] = sums[name] + counted if name in sums else counted
                self.reporter.beat()
        metrics = {"validation_loss": team.total(losses).item() / len(part)}
        totals = {name: team.total(value).cpu() for name, value in sums.items()}
        return metrics | {name: float(value) for name, value in self.recipe.summarize(totals).items()}

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Keep the weights if none were better.

        Raises:
            NonFinite: the validation loss, or the metric that decides, is NaN or infinite.
        """
        step, name = self.position.step, self.recipe.metric
        if name not in metrics:
            raise InvalidInput(
                f"the recipe {type(self.recipe).__name__} is to keep what has the best {name!r}, and there are only "
                f"{', '.join(metrics)}: its `summarize` must return it"
            )
        for deciding in ("validation_loss", name):
            if not math.isfinite(metrics[deciding]):
                raise NonFinite(
                    f"{deciding} is {metrics[deciding]} after step {step} (epoch {self.position.epoch}, learning rate "
                    f"{self.optimizer.param_groups[0]['lr']:g}): lower learning_rate, or look for extreme values in "
                    "the validation set; the last checkpoint is from before"
                )
        value = metrics[name]
        if self.best is None or (value > self.best.value if self.recipe.greater_is_better else value < self.best.value):
            weights = weights_of(self.bare, copied=True) if self.team.is_first else {}
            self.best = Best(step, value, metrics, weights)
            self.position.since_best = 0
            self.reporter.best(step, value)
        else:
            self.position.since_best += 1

    def is_out_of_patience(self) -> bool:
        """Whether it was not better for so many epochs that it is not likely to get better any more."""
        patience = self.parameters.patience
        return patience is not None and self.position.since_best >= patience

    def report_validation(self, metrics: dict[str, float]) -> None:
        """Report the metrics of the epoch that has just ended; of very many epochs not of each, but of the last."""
        step, epoch = self.position.step, self.position.epoch
        last = epoch == self.epochs or self.is_out_of_patience()
        if epoch % math.ceil(self.epochs / POINTS) and not last:
            return
        # The curve of the training loss has points of its own, finer ones.
        self.reporter.add([Point(n, step, epoch, value) for n, value in metrics.items() if n != "train_loss"])
        if self.team.is_first:
            told = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"epoch {epoch}/{self.epochs}  step {step}/{self.steps}  {told}", flush=True)

    # --- the end ------------------------------------------------------------------------------------------

    def done(self) -> Ended:
        """Return the result: the best weights in a module without wrappers."""
        assert self.best is not None
        position, best = self.position, self.best
        module = None
        if self.team.is_first:
            module = self.team.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False).cpu().eval()
            module.load_state_dict(best.weights)
        return Ended(End.DONE, position.step, position.epoch, best.step, best.metrics, module)
