"""A recipe trained by a plain loop, in one process and without a queue: what the tests of recipes compare with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchrelay_storage.run_spec import Split
from torchrelay_worker.training import split
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.recipe import Examples, Recipe


@dataclass
class Trained:
    """A trained recipe."""

    recipe: Recipe
    module: nn.Module
    examples: Examples
    drawn: split.Drawn
    losses: list[float]
    metrics: dict[str, float]


def train(
    recipe: type[Recipe], table: Table, *, seed: int = 0, given: Split | None = None, **hyperparameters: Any
) -> Trained:
    """Train on a table; `metrics` are those of the last epoch."""
    torch.set_num_threads(
        1
    )  # models this small are no faster with more, and threads that wait for a busy core are slow
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = recipe.Hyperparameters(**hyperparameters)
    trained = recipe(parameters)
    table, column = split.take(table, given or Split())
    examples = trained.read(table)
    drawn = split.draw(len(examples), given or Split(), seed, trained.labels(examples), column)
    trained.preprocessing = trained.fit(examples, drawn.train)
    module = trained.build()
    optimizer = trained.optimizer(module)
    steps = parameters.epochs * -(-len(drawn.train) // parameters.batch_size)
    schedule = trained.schedule(optimizer, steps)
    losses: list[float] = []
    for _ in range(parameters.epochs):
        module.train()
        order = drawn.train[torch.randperm(len(drawn.train), generator=generator)]
        for indices in order.split(parameters.batch_size):
            loss, _ = trained.loss(module, trained.batch(examples, indices, generator))
            optimizer.zero_grad()
            loss.backward()
            if parameters.clip_norm is not None:
                nn.utils.clip_grad_norm_(module.parameters(), parameters.clip_norm)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    metrics = validate(trained, module, examples, drawn.validation)
    return Trained(trained, module, examples, drawn, losses, metrics)


def validate(recipe: Recipe, module: nn.Module, examples: Examples, indices: torch.Tensor) -> dict[str, float]:
    """Return the metrics over these examples."""
    module.eval()
    sums: Counter[str] = Counter()
    with torch.no_grad():
        for part in indices.split(recipe.parameters.batch_size):
            batch = recipe.batch(examples, part, None)
            loss, outputs = recipe.loss(module, batch)
            sums["loss"] += loss * len(part)
            sums.update(recipe.statistics(outputs, batch))
    return recipe.summarize(sums) | {"validation_loss": float(sums["loss"] / len(indices))}
