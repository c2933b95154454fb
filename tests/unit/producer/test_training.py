"""relay.train and its neighbours: what is refused before anything is stored, what is stored; versions and aliases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from servers import wait_until
from torchrelay import (
    AsyncRelay,
    AsyncRun,
    InvalidDataset,
    InvalidHyperparameter,
    InvalidInput,
    Job,
    JobNotFound,
    JobState,
    KeyConflict,
    ModelNotFound,
    RecipeNotFound,
    Relay,
    Run,
    Unreachable,
)
from torchrelay.messages import queue_name
from torchrelay.recipes import READY
from torchrelay.settings import Settings
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.registry import ModelVersion, Registry

RECIPE = "tabular-classification"
DATA = {"x": [1.0, 2.0], "y": ["a", "b"]}


@pytest.fixture
def both(settings: Settings) -> Iterator[Relay]:
    """A relay on SQLite, then on PostgreSQL."""
    with Relay(settings=settings) as relay:
        yield relay


def artifacts_of(relay: Relay) -> list[Path]:
    root = Path(relay.settings.artifacts_url.removeprefix("file://"))
    return [path for path in root.rglob("*") if path.is_file()]


def announced(relay: Relay, recipe: str = RECIPE) -> int:
    return sum(relay._core.broker.depths(queue_name(f"train:{recipe}")).values())


# --- stored ---------------------------------------------------------------------------------------------------------


def test_a_run_is_stored_with_all_that_it_was_asked(both: Relay) -> None:
    seven: Any = np.int64(7)
    run = both.train(
        "digits", recipe=RECIPE, dataset=DATA, validation={"x": [3.0], "y": ["a"]}, stratify=False, seed=seven,
        devices=2, precision="bf16", deterministic=False, checkpoint_steps=100, checkpoint_minutes=None,
        keep_checkpoints=3, promote="champion", priority=8, key="k", timeout=60, max_attempts=5, metadata={"who": "ü"},
        tenant="t", hyperparameters={"hidden": (8, 4)}, target="y", epochs=3.0,
    )  # fmt: skip
    assert isinstance(run, Run)
    assert (run.state, run.model, run.recipe, run.paused, run.worker) == (
        JobState.QUEUED,
        "digits",
        RECIPE,
        False,
        None,
    )
    assert (run.priority, run.key, run.max_attempts, run.metadata, run.tenant) == (8, "k", 5, {"who": "ü"}, "t")
    spec = run.spec
    assert (spec.seed, spec.devices, spec.precision, spec.deterministic, spec.promote) == (
        7,
        2,
        "bf16",
        False,
        "champion",
    )
    assert (spec.split.stratify, spec.checkpoints.steps, spec.checkpoints.minutes) == (False, 100, None)
    assert spec.checkpoints.keep == 3
    assert spec.validation is not None
    for dataset in (spec.dataset, spec.validation):
        assert dataset.format == "jsonl"
        assert both._core.artifacts.size(dataset.uri)
    ready = READY[RECIPE](target="y", hidden=[8, 4], epochs=3)  # type: ignore[call-arg]
    assert run.hyperparameters == ready.model_dump(mode="json")  # the defaults are written down too
    assert type(run.hyperparameters["epochs"]) is int
    again = both.run(run.id)
    assert again == run
    assert again.spec == spec
    assert again.as_dict() == run.as_dict()
    assert run.as_dict()["recipe"] == RECIPE
    wait_until(lambda: announced(both) == 1)
    assert run.input()["recipe"] == RECIPE


def test_runs_are_jobs_that_are_found_in_both_ways(both: Relay) -> None:
    both.register_model("double", handler="double")
    job = both.submit("double", {"n": 1})
    first = both.train("digits", recipe=RECIPE, dataset=DATA, target="y")
    second = both.train("other", recipe="regression", dataset=DATA, target="x", delay=60)
    assert type(both.job(job.id)) is Job
    found = both.job(first.id)
    assert isinstance(found, Run)
    assert found.hyperparameters["target"] == "y"
    assert [type(one) for one in both.jobs()] == [Run, Run, Job]
    assert [one.id for one in both.jobs(model="double")] == [job.id]
    assert [one.id for one in both.runs()] == [second.id, first.id]
    assert [one.id for one in both.runs(limit=1, before=second.id)] == [first.id]
    assert [one.id for one in both.runs(model="digits")] == [first.id]
    assert [one.id for one in both.runs(state="scheduled")] == [second.id]
    assert both.runs(state=["running", "failed"]) == []
    assert both.runs()[0].spec.recipe == "regression"
    with pytest.raises(JobNotFound, match="no training run"):
        both.run(job.id)
    with pytest.raises(InvalidInput, match="limit"):
        both.runs(limit=0)
    with pytest.raises(InvalidInput, match="unknown state 'done'"):
        both.runs(state="done")
    assert [row.newest.name for row in both.models()] == ["double"]  # lanes are no models
    with pytest.raises(ModelNotFound):
        both.submit(f"train:{RECIPE}", {})


def test_the_same_key_and_input_are_the_same_run(both: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(**changed: Any) -> Run:
        arguments: dict[str, Any] = {"recipe": RECIPE, "dataset": DATA, "target": "y", "key": "k"}
        return both.train("digits", **(arguments | changed))

    run = train()
    (tmp_path / "named-otherwise.jsonl").write_bytes(both._core.artifacts.get(run.spec.dataset.uri))
    with monkeypatch.context() as patched:
        patched.setattr(Artifacts, "put_file", lambda *_: pytest.fail("nothing is uploaded for a run that exists"))
        assert train() == run
        assert train(dataset=tmp_path / "named-otherwise.jsonl", epochs=run.hyperparameters["epochs"]) == run
    before = len(artifacts_of(both))
    for changed in ({"dataset": {"x": [1.0], "y": ["c"]}}, {"epochs": 3}, {"seed": 1}):
        with pytest.raises(KeyConflict, match=run.id):
            train(**changed)
    assert len(artifacts_of(both)) == before  # not even the other dataset
    assert train(tenant="other") != run
    assert train(key=None) != train(key=None)


def test_a_large_spec_lies_in_the_object_store(both: Relay) -> None:
    features = [f"column-{n}" for n in range(10_000)]
    run = both.train("digits", recipe=RECIPE, dataset=DATA, target="y", features=features, key="k")
    before = len(artifacts_of(both))
    assert both.run(run.id).hyperparameters["features"] == features
    assert both.train("digits", recipe=RECIPE, dataset=DATA, target="y", features=features, key="k") == run
    assert len(artifacts_of(both)) == before


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"recipe": "tabular"}, RecipeNotFound, r"'tabular'; did you mean tabular-classification"),
        ({"recipe": "zzz"}, RecipeNotFound, "known are image-classification, regression"),
        ({"recipe": ""}, InvalidInput, "a recipe is named by a string"),
        ({"recipe": None}, InvalidInput, "a recipe is named by a string"),
        ({"recipe": f"train:{RECIPE}"}, RecipeNotFound, "did you mean"),
        ({"target": 3}, InvalidHyperparameter, "target must be a text"),
        ({"epohs": 3}, InvalidHyperparameter, "did you mean 'epochs'"),
        ({"priorty": 3}, InvalidHyperparameter, "did you mean 'priority'"),
        ({"epochs": 0}, InvalidHyperparameter, "from 1 to"),
        ({"epochs": 3, "hyperparameters": {"epochs": 3}}, InvalidHyperparameter, "epochs is passed twice"),
        ({"hyperparameters": [1]}, InvalidInput, "hyperparameters must be a dict"),
        ({"model": "Digits"}, InvalidInput, "a model's name has"),
        ({"model": "digits@3"}, InvalidInput, "by itself"),
        ({"model": 3}, InvalidInput, "a model is named"),
        ({"split": 0.0}, InvalidInput, "split cannot be 0.0"),
        ({"split": 1}, InvalidInput, "split cannot be 1"),
        ({"split": "half"}, InvalidInput, "split cannot be 'half'"),
        ({"split": float("nan")}, InvalidInput, "split cannot be nan"),
        ({"split_column": "part", "validation": DATA}, InvalidInput, "pass one of them"),
        ({"stratify": "yes"}, InvalidInput, "stratify cannot be 'yes'"),
        ({"seed": -1}, InvalidInput, "seed cannot be -1"),
        ({"seed": 0.5}, InvalidInput, "seed cannot be 0.5"),
        ({"devices": 0}, InvalidInput, "devices cannot be 0"),
        ({"devices": True}, InvalidInput, "devices cannot be True"),
        ({"precision": "fp8"}, InvalidInput, "precision cannot be 'fp8'.*'fp32', 'bf16' or 'fp16'"),
        ({"checkpoint_steps": 0}, InvalidInput, "checkpoint_steps cannot be 0"),
        ({"checkpoint_minutes": 0}, InvalidInput, "checkpoint_minutes cannot be 0"),
        ({"keep_checkpoints": 0}, InvalidInput, "keep_checkpoints cannot be 0"),
        ({"promote": "3"}, InvalidInput, "an alias has"),
        ({"promote": "the champion"}, InvalidInput, "an alias has"),
        ({"promote": 3}, InvalidInput, "promote must be an alias"),
        ({"priority": 10}, InvalidInput, "priority"),
        ({"delay": -1}, InvalidInput, "delay"),
        ({"max_attempts": 0}, InvalidInput, "max_attempts"),
        ({"key": ""}, InvalidInput, "key must be"),
        ({"metadata": [1]}, InvalidInput, "metadata must be a dict"),
        ({"session": "s"}, InvalidInput, "must be a SQLAlchemy Session"),
        ({"dataset": "missing.csv"}, InvalidDataset, r"no file or folder missing\.csv"),
        ({"dataset": "file:///etc/data.csv"}, InvalidDataset, "outside of what runs may read"),
        ({"dataset": {"x": [1], "y": []}}, InvalidDataset, "column 'y' has 0 rows"),
        ({"validation": "missing.csv"}, InvalidDataset, "no file or folder"),
        (
            {"recipe": "translation", "target": "t", "pretrained": "none"},
            InvalidHyperparameter,
            "no file or folder none",
        ),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    relay: Relay, arguments: dict[str, Any], kind: type[Exception], says: str
) -> None:
    def train() -> None:
        relay.train(**({"model": "digits", "recipe": RECIPE, "dataset": DATA, "target": "y"} | arguments))

    with pytest.raises(kind, match=says):
        train()
    relay.train("other", recipe="regression", dataset={"y": [1.0]}, target="y")  # also once there are lanes
    before = len(artifacts_of(relay))
    with pytest.raises(kind, match=says):
        train()
    assert len(artifacts_of(relay)) == before == 1
    assert len(relay.jobs()) == 1
    assert [lane.recipe for lane in relay._core.registry.lanes()] == ["regression"]


def test_a_uri_below_a_root_of_the_settings(sqlite_settings: Settings) -> None:
    settings = sqlite_settings.model_copy(update={"datasets": ["s3://shared/sets"]})
    with Relay(settings=settings) as relay:
        run = relay.train("digits", recipe=RECIPE, dataset="s3://shared/sets/a.parquet", target="y")
        assert (run.spec.dataset.uri, run.spec.dataset.sha256) == ("s3://shared/sets/a.parquet", None)
        with pytest.raises(InvalidDataset, match="outside"):
            relay.train("digits", recipe=RECIPE, dataset="s3://shared/other/a.parquet", target="y")


def test_pretrained_weights_are_uploaded(relay: Relay, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "bert").mkdir(exist_ok=True)
        (tmp_path / "bert" / name).write_text("{}")
    run = relay.train(
        "texts",
        recipe="text-classification",
        dataset={"text": ["a"], "label": ["b"]},
        pretrained=str(tmp_path / "bert"),
    )
    assert relay._core.artifacts.size(run.hyperparameters["pretrained"])
    assert relay.run(run.id).hyperparameters == run.hyperparameters


def test_a_database_that_is_away(tmp_path: Path) -> None:
    with Relay(
        database="postgresql://u:p@127.0.0.1:9/x", broker="redis://127.0.0.1:9/0", artifacts=f"file://{tmp_path}/a"
    ) as relay:
        with pytest.raises(Unreachable):
            relay.train("digits", recipe=RECIPE, dataset=DATA, target="y")
        assert artifacts_of(relay) == []


# --- authors' recipes -----------------------------------------------------------------------------------------------


SCHEMA = {
    "type": "object",
    "properties": {"rank": {"type": "integer", "minimum": 1, "default": 4}, "kind": {"enum": ["a", "b"]}},
    "required": ["kind"],
    "additionalProperties": False,
}


def test_an_authors_recipe_is_checked_by_what_workers_publish(both: Relay) -> None:
    with pytest.raises(RecipeNotFound, match="once a worker that trains with it has started"):
        both.train("mine", recipe="low-rank", dataset=DATA, kind="a")
    Registry(both._core.db).lane("low-rank", SCHEMA)
    run = both.train("mine", recipe="low-rank", dataset=DATA, kind="a")
    assert run.hyperparameters == {"rank": 4, "kind": "a"}
    wait_until(lambda: announced(both, "low-rank") == 1)
    for given, says in (
        ({}, "needs kind"),
        ({"kind": "c"}, "'a' or 'b'"),
        ({"kind": "a", "rnk": 1}, "did you mean 'rank'"),
    ):
        with pytest.raises(InvalidHyperparameter, match=says):
            both.train("mine", recipe="low-rank", dataset=DATA, **given)
    assert both.recipes()["low-rank"] == SCHEMA
    assert set(both.recipes()) == {*READY, "low-rank"}
    with pytest.raises(RecipeNotFound, match="did you mean low-rank"):
        both.train("mine", recipe="low_rank", dataset=DATA)


def test_a_recipe_in_the_place_of_a_ready_one(sqlite_settings: Settings) -> None:
    settings = sqlite_settings.model_copy(update={"recipes": {RECIPE: "mine:Own"}})
    with Relay(settings=settings) as relay:
        with pytest.raises(RecipeNotFound, match="no worker has made the recipe 'tabular-classification'"):
            relay.train("mine", recipe=RECIPE, dataset=DATA, target="y")
        assert RECIPE not in relay.recipes()
        Registry(relay._core.db).lane(RECIPE, SCHEMA)
        assert relay.train("mine", recipe=RECIPE, dataset=DATA, kind="b").hyperparameters["rank"] == 4
        assert relay.recipes()[RECIPE] == SCHEMA


# --- in the caller's transaction ------------------------------------------------------------------------------------


def test_a_run_in_the_callers_transaction(both: Relay) -> None:
    engine = create_engine(both.settings.database_url.replace("postgresql://", "postgresql+psycopg://"))
    with Session(engine) as session:
        session.execute(text("CREATE TABLE orders (n INTEGER)"))
        session.execute(text("INSERT INTO orders VALUES (1)"))  # SQLite lets nobody else write now, not even the lane
        lost = both.train("digits", recipe=RECIPE, dataset=DATA, target="y", session=session)
        assert (lost.state, lost.model, lost.spec.model) == (JobState.QUEUED, "digits", "digits")
        session.rollback()
        kept = both.train("digits", recipe=RECIPE, dataset=DATA, target="y", key="k", session=session)
        assert both.train("digits", recipe=RECIPE, dataset=DATA, target="y", key="k", session=session) == kept
        with pytest.raises(KeyConflict):
            both.train("digits", recipe=RECIPE, dataset=DATA, target="x", key="k", session=session)
        with pytest.raises(JobNotFound):
            both.run(kept.id)
        assert both._core.announcer.flush(1)
        assert announced(both) == 0
        session.commit()
        assert both.train("digits", recipe=RECIPE, dataset=DATA, target="y", key="k", session=session) == kept
    engine.dispose()
    assert [run.id for run in both.runs()] == [kept.id]
    wait_until(lambda: announced(both) == 1)


def test_the_async_twin_trains_too(settings: Settings) -> None:
    scheme, _, rest = settings.database_url.partition("://")
    url = f"{'sqlite+aiosqlite' if scheme == 'sqlite' else 'postgresql+psycopg'}://{rest}"

    async def main() -> list[str]:
        engine = create_async_engine(url)
        async with AsyncRelay(settings=settings) as relay:
            run = await relay.train("digits", recipe=RECIPE, dataset=DATA, target="y", epochs=2, key="k")
            assert isinstance(run, AsyncRun)
            assert run.hyperparameters["epochs"] == 2
            assert await relay.train("digits", recipe=RECIPE, dataset=DATA, target="y", epochs=2, key="k") == run
            with pytest.raises(InvalidHyperparameter):
                await relay.train("digits", recipe=RECIPE, dataset=DATA)
            async with AsyncSession(engine) as session:
                await relay.train("digits", recipe=RECIPE, dataset=DATA, target="y", session=session)
                await session.rollback()
                second = await relay.train("digits", recipe=RECIPE, dataset=DATA, target="x", session=session)
                assert second.spec.hyperparameters["target"] == "x"
                await session.commit()
            assert isinstance(await relay.job(run.id), AsyncRun)
            assert [type(job) for job in await relay.jobs()] == [AsyncRun, AsyncRun]
            assert (await relay.run(run.id)).spec == run.spec
            assert set(await relay.recipes()) == set(READY)
            found = [run.id for run in await relay.runs(model="digits")]
        await engine.dispose()
        assert found == [second.id, run.id]
        return found

    assert len(asyncio.run(main())) == 2


# --- versions and aliases -------------------------------------------------------------------------------------------


def test_versions_and_aliases(both: Relay) -> None:
    for _ in range(3):
        both.register_model("digits", handler="digits")
    assert [version.ref for version in both.versions("digits")] == ["digits@3", "digits@2", "digits@1"]
    with pytest.raises(ModelNotFound):
        both.versions("digit")
    with pytest.raises(ModelNotFound, match="champion"):
        both.submit("digits@champion", {})
    promoted = both.promote("digits@1", by="ada")
    assert isinstance(promoted, ModelVersion)
    assert (promoted.ref, promoted.aliases) == ("digits@1", ("champion",))
    assert both.submit("digits@champion", {}).model == "digits@1"
    both.promote("digits@3")
    assert both.submit("digits@champion", {}).model == "digits@3"  # at once, though the name is kept for a while
    both.promote("digits@champion", alias="stable")
    assert both.aliases("digits") == {"champion": 3, "stable": 3}
    assert both.rollback("digits", by="bob").ref == "digits@1"
    assert both.submit("digits@champion", {}).model == "digits@1"
    moves = both.alias_history("digits", "champion")
    assert [(move.version, move.by, move.rollback) for move in moves] == [
        (1, "bob", True),
        (3, "", False),
        (1, "ada", False),
    ]
    assert len(both.alias_history("digits")) == 4
    with pytest.raises(InvalidInput, match="no version to go back to"):
        both.rollback("digits")
    for wrong in ("digits@9", "other@1", "digits@nobody"):
        with pytest.raises(ModelNotFound):
            both.promote(wrong)
    with pytest.raises(InvalidInput):
        both.promote("digits@1", alias="1")
    for ask in (both.aliases, both.alias_history, both.rollback):
        call: Callable[[str], object] = ask
        with pytest.raises(ModelNotFound):
            call("other")


def test_versions_and_aliases_by_the_async_twin(sqlite_settings: Settings) -> None:
    async def main() -> None:
        async with AsyncRelay(settings=sqlite_settings) as relay:
            for _ in range(2):
                await relay.register_model("digits", handler="digits")
            assert len(await relay.versions("digits")) == 2
            await relay.promote("digits@1")
            assert (await relay.promote("digits@2", by="ada")).ref == "digits@2"
            assert (await relay.submit("digits@champion", {})).model == "digits@2"
            assert (await relay.rollback("digits")).ref == "digits@1"
            assert await relay.aliases("digits") == {"champion": 1}
            assert [move.by for move in await relay.alias_history("digits")] == ["", "ada", ""]

    asyncio.run(main())
