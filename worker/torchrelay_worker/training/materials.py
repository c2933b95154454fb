"""From a spec to a task: the recipe with its hyperparameters, the examples it reads, how they are split, what it fits.

The same in every process of a run, and each time that it goes on. Not here: training (`loop`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import ValidationError

from torchrelay.settings import Settings
from torchrelay_storage.errors import InvalidDataset, InvalidHyperparameter, InvalidInput
from torchrelay_storage.run_spec import RunSpec
from torchrelay_worker.training import data, split
from torchrelay_worker.training.batches import Part
from torchrelay_worker.training.catalog import Recipes
from torchrelay_worker.training.checkpoints import Snapshot
from torchrelay_worker.training.randomness import set_seed
from torchrelay_worker.training.recipe import Recipe
from torchrelay_worker.training.sources import Sources
from torchrelay_worker.training.task import Task


def make_recipe(spec: RunSpec, settings: Settings) -> Recipe:
    """Return the recipe that the spec names, with its hyperparameters.

    Raises:
        RecipeNotFound: it is not installed here.
        InvalidHyperparameter: this release of the recipe does not take one of them, or not its value.
    """
    recipe = Recipes(settings.recipes).find(spec.recipe)
    try:
        return recipe(recipe.Hyperparameters.model_validate(spec.hyperparameters))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InvalidHyperparameter(key, f"hyperparameter {key!r} of recipe {spec.recipe!r}: {first['msg']}") from None


def prepare(spec: RunSpec, recipe: Recipe, sources: Sources, restored: Snapshot | None = None) -> Task:
    """Read the data, split it and fit the preprocessing; of a run that goes on, the preprocessing is the checkpoint's.

    Raises:
        InvalidDataset: a dataset cannot be trained on; or it is not the one that the checkpoint was trained on.
        InvalidInput: the recipe's `fit` returned what is no JSON.
        Corrupt, NotFound, Unreachable: a dataset cannot be fetched.
    """
    set_seed(spec.seed)
    path, dataset_sha256 = sources.dataset(spec.dataset)
    table, given = split.take(data.read(path, spec.dataset.format), spec.split)
    examples = held_out = recipe.read(table)
    validation_sha256 = None
    if spec.validation is not None:
        path, validation_sha256 = sources.dataset(spec.validation)
        table, _ = split.take(data.read(path, spec.validation.format), spec.split.model_copy(update={"column": None}))
        held_out = recipe.read(table)
        drawn = split.apart(len(examples), len(held_out))
    else:
        drawn = split.draw(len(examples), spec.split, spec.seed, recipe.labels(examples), given)
    sums = {"dataset_sha256": dataset_sha256, "validation_sha256": validation_sha256}
    if restored is None:
        recipe.preprocessing = _as_json(recipe, recipe.fit(examples, drawn.train))
    else:
        _check_unchanged(sums, restored.state["data"])
        recipe.preprocessing = orjson.loads(restored.state["preprocessing"])
    return Task(recipe, spec, Part(examples, drawn.train), Part(held_out, drawn.validation), drawn.record, sums)


def _as_json(recipe: Recipe, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing as a checkpoint gives it back, so that it is the same before and after."""
    try:
        return dict(orjson.loads(orjson.dumps(preprocessing)))
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"`fit` of the recipe {type(recipe).__name__} must return JSON, a dict of numbers, texts and lists: {error}"
        ) from error


def _check_unchanged(now: Mapping[str, str | None], then: Mapping[str, str | None]) -> None:
    for name, sha256 in then.items():
        if now[name] != sha256:
            what = "dataset" if name == "dataset_sha256" else "validation set"
            raise InvalidDataset(
                f"the {what} is not the one that this run has trained on so far: its sha256 is {now[name]}, and was "
                f"{sha256} at the last checkpoint; train a new run on it"
            )
