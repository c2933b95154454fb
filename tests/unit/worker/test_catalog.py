"""The recipes that this machine has, and what is said of those that it has not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torchrelay.recipes import READY
from torchrelay_storage.errors import InvalidInput, RecipeNotFound
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.training.catalog import Recipes
from torchrelay_worker.training.recipe import Recipe


class Mine(Recipe):
    """A recipe of an operator's."""


def test_the_ready_recipes_are_there_each_with_a_handler() -> None:
    recipes, handlers = Recipes(), Handlers()
    for name, hyperparameters in READY.items():
        assert name in recipes
        assert recipes.find(name).Hyperparameters is hyperparameters
        assert recipes.schema(name) == hyperparameters.model_json_schema()
        assert name in handlers
        handlers.find(name)
    assert recipes.names() == sorted(READY)


def test_every_hyperparameter_is_described() -> None:
    for name in READY:
        for key, property_ in Recipes().schema(name)["properties"].items():
            assert property_.get("description"), f"{name}.{key}"


def test_a_setting_adds_a_recipe_or_takes_the_place_of_one() -> None:
    recipes = Recipes({"mine": f"{__name__}:Mine", "regression": f"{__name__}:Mine"})
    sys.modules.setdefault(__name__, sys.modules[Mine.__module__])
    assert recipes.find("mine") is Mine
    assert "mine" in recipes.names()
    assert recipes.schema("regression") == Recipe.Hyperparameters.model_json_schema()


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(RecipeNotFound, match="did you mean regression"):
        Recipes().find("regresion")
    with pytest.raises(RecipeNotFound, match="there are: image-classification"):
        Recipes().schema("zzz")
    with pytest.raises(RecipeNotFound, match="cannot be imported: ModuleNotFoundError"):
        Recipes({"a": "no_such_module:X"}).find("a")
    with pytest.raises(InvalidInput, match="not a subclass"):
        Recipes({"a": "pathlib:Path"}).find("a")


def test_names_and_schemas_load_no_torch() -> None:
    program = (
        "from torchrelay_worker.training.catalog import Recipes\nr = Recipes()\n"
        "[r.schema(name) for name in r.names()]\nimport sys\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
