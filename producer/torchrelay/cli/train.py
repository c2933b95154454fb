"""`torchrelay train`: submits a training run. Not here: what there is to see of runs (`runs`, `watch_runs`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from torchrelay.cli.arguments import (
    BackoffWords,
    Delay,
    ExpiresIn,
    Key,
    MaxAttempts,
    Metadata,
    NotBefore,
    Priority,
    Tenant,
    Wait,
    WaitLimit,
    backoff_of,
    complete_model,
    complete_recipe,
    point_in_time,
    road_is_open,
)
from torchrelay.cli.session import Json, Session, core_of
from torchrelay_storage.errors import InvalidInput, WaitTimeout

if TYPE_CHECKING:
    from torchrelay.client import Relay

LOOK_SECONDS = 0.5  # between two looks of --wait
PANEL = "Training"


def add(app: typer.Typer) -> None:
    """Add the command."""
    # What is no option of ours is a hyperparameter of the recipe.
    extra = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(rich_help_panel=PANEL, context_settings=extra)(train)


def train(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Name that the trained model is registered under.", autocompletion=complete_model)
    ],
    *,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            help="How it is trained: `torchrelay models recipes` lists them.",
            autocompletion=complete_recipe,
        ),
    ],
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            "-d",
            metavar="FILE|FOLDER|URI",
            help=".csv .tsv .jsonl .parquet .npz, a folder or .zip of pictures, or a URI.",
        ),
    ],
    validation: Annotated[
        str | None, typer.Option(metavar="FILE|FOLDER|URI", help="A dataset of its own to validate on.")
    ] = None,
    split: Annotated[float, typer.Option(help="Part of the dataset that is held out for validation.")] = 0.2,
    split_column: Annotated[
        str | None, typer.Option(help="Column that says train or validation for each example.", metavar="COLUMN")
    ] = None,
    stratify: Annotated[
        bool, typer.Option("--stratify/--no-stratify", help="The same share of each class in both parts.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.")] = 0,
    devices: Annotated[int, typer.Option(help="Processes on one machine, each with a device.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32, or mixed with bf16 or fp16.")] = "fp32",
    deterministic: Annotated[
        bool, typer.Option("--deterministic/--no-deterministic", help="The same seed gives the same weights.")
    ] = True,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Steps between two checkpoints.", metavar="N")] = None,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between two checkpoints.", metavar="N")] = 5.0,
    keep_checkpoints: Annotated[int, typer.Option(help="How many are kept.", metavar="N")] = 2,
    promote: Annotated[
        str | None, typer.Option(help="Alias that the new version gets, such as champion.", metavar="ALIAS")
    ] = None,
    priority: Priority = 5,
    key: Key = None,
    delay: Delay = None,
    not_before: NotBefore = None,
    expires_in: ExpiresIn = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that the run may take.", metavar="SECONDS")] = None,
    max_attempts: MaxAttempts = 3,
    backoff: BackoffWords = None,
    metadata: Metadata = None,
    tenant: Tenant = "",
    wait: Wait = False,
    wait_limit: WaitLimit = None,
    _json: Json = False,
) -> None:
    """Train a model: submit a run and print its id; with --wait, watch it.

    Other options are hyperparameters; `torchrelay models recipes NAME` lists those of a recipe.

    \b
    torchrelay train digits --recipe image-classification --dataset pictures.npz --epochs 30 --learning-rate 1e-3 --wait
    """
    from torchrelay.cli.inputs import read_object

    session = Session.of(ctx)
    screen = session.screen
    if model.startswith("-"):
        raise InvalidInput(f"the model's name comes first, then the options: torchrelay train NAME {model} …")
    described, waits = read_object(metadata, "--metadata"), backoff_of(backoff)
    with session.relay() as relay:
        words, known = pairs(ctx.args), properties(relay, recipe)
        parameters = {name: value_of(name, text, known) for name, text in words.items()}
        run = relay.train(
            model, recipe=recipe, dataset=dataset, validation=validation, split=split, split_column=split_column,
            stratify=stratify, seed=seed, devices=devices, precision=precision, deterministic=deterministic,
            checkpoint_steps=checkpoint_steps, checkpoint_minutes=checkpoint_minutes,
            keep_checkpoints=keep_checkpoints, promote=promote, priority=priority, key=key, delay=delay,
            not_before=point_in_time(not_before), expires_in=expires_in, timeout=timeout,
            max_attempts=max_attempts, backoff=waits, metadata=described, tenant=tenant,
            hyperparameters=parameters,
        )  # fmt: skip
        if not wait and wait_limit is None:
            document = {
                "id": run.id, "kind": "training", "state": run.state.value, "model": run.model, "recipe": recipe,
            }  # fmt: skip
            screen.show(document | {"redis": road_is_open(core_of(relay), screen)}, run.id)
            screen.note(f"`torchrelay watch {run.id}` follows it")
            return
        screen.note(f"{run.id}: waiting for a worker that trains")
        road_is_open(core_of(relay), screen)
        code = _watch(session, relay, run.id, wait_limit)
    raise typer.Exit(code)


def _watch(session: Session, relay: Relay, name: str, limit: float | None) -> int:
    from torchrelay.cli.live import follow
    from torchrelay.cli.watch_runs import OneRun
    from torchrelay_storage import ids

    try:
        return follow(session.screen, OneRun(core_of(relay), ids.read(ids.Kind.JOB, name)), LOOK_SECONDS, limit).code
    except WaitTimeout:
        raise WaitTimeout(f"run {name} has not ended after {limit:g} seconds; it goes on") from None
    except KeyboardInterrupt:
        session.screen.note(f"{name} goes on; `torchrelay watch {name}` follows it, `torchrelay cancel {name}` ends it")
        raise


# --- hyperparameters ---------------------------------------------------------------------------------------


def pairs(words: Sequence[str]) -> dict[str, str]:
    """Return the text of each hyperparameter by its name, from `--learning-rate 1e-3`, `--epochs=20` and `--augment`.

    Raises:
        InvalidInput: a word that belongs to none, or a hyperparameter that is there twice.
    """
    found: dict[str, str] = {}
    waiting: str | None = None
    for word in words:
        if not word.startswith("--"):
            if waiting is None:
                raise InvalidInput(
                    f"{word!r} belongs to no option; a hyperparameter is written as --name VALUE, such as --epochs 20"
                )
            found[waiting], waiting = word, None
            continue
        name, given, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not name:
            raise InvalidInput(f"{word!r} is no hyperparameter; one is written as --name VALUE, such as --epochs 20")
        if name in found:
            raise InvalidInput(f"the hyperparameter {name} is there twice")
        found[name] = text if given else "true"
        waiting = None if given else name
    return found


def value_of(name: str, text: str, known: Mapping[str, Any]) -> Any:
    """Return a hyperparameter's value: JSON where it is JSON, none as null, @file as its content, else the text.

    Args:
        known: JSON Schema by name. A column that is called 1 or true stays text where the recipe wants text.
    """
    if text.startswith("@"):
        from torchrelay.cli.inputs import read_value

        return read_value(text)
    if known.get(name, {}).get("type") == "string":
        return text
    if text.lower() == "none":
        return None
    with suppress(orjson.JSONDecodeError):
        return orjson.loads(text.encode(errors="surrogateescape"))
    return text


def properties(relay: Relay, recipe: str) -> Mapping[str, Any]:
    """Return the JSON Schema of each hyperparameter of a recipe; of an unknown recipe none, the submit refuses it."""
    schema = relay.recipes().get(recipe, {})
    found = schema.get("properties", {})
    return found if isinstance(found, Mapping) else {}
