"""What `relay.train` and its neighbours do: check a run, upload its dataset, store it; read runs; move aliases.

Everything is checked before anything is uploaded, and everything is uploaded before the run exists. All of it blocks;
AsyncRelay runs it on threads. Not here: handles (`run_handles`), and training itself (`torchrelay_worker.training`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from torchrelay import pretrained
from torchrelay.checks import check_key, check_limit, read_states
from torchrelay.core import Prepared
from torchrelay.datasets import Source, opened
from torchrelay.hyperparameters import Schema, check
from torchrelay.uploads import Upload
from torchrelay_storage import ids, values
from torchrelay_storage.aliases import AliasMove, check_alias
from torchrelay_storage.errors import (
    InvalidHyperparameter,
    InvalidInput,
    JobNotFound,
    KeyConflict,
    RecipeNotFound,
    RelayError,
)
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobRow
from torchrelay_storage.options import Options
from torchrelay_storage.registry import LANE, NAME, ModelVersion, check_name
from torchrelay_storage.run_spec import DEFAULT_SPLIT, Dataset, RunSpec
from torchrelay_storage.runs import RunRow
from torchrelay_storage.submission import NewJob, Submitted

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from torchrelay.core import Core
    from torchrelay.recipes import Hyperparameters

_PARAMETERS: dict[tuple[str, ...], str] = {  # of `train`, by their place in a RunSpec
    ("split", "fraction"): "split",
    ("split", "column"): "split_column",
    ("split", "stratify"): "stratify",
    ("checkpoints", "steps"): "checkpoint_steps",
    ("checkpoints", "minutes"): "checkpoint_minutes",
    ("checkpoints", "keep"): "keep_checkpoints",
}
_OPTIONS = (
    *("dataset", "validation", "split", "split_column", "stratify", "seed", "devices", "precision", "deterministic"),
    *("checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "promote", "priority", "key", "delay"),
    *("not_before", "expires_in", "timeout", "max_attempts", "backoff", "metadata", "tenant", "session"),
)
_NO_DATASET = Dataset(uri="", format="csv")  # while the rest of a spec is checked


@dataclass(frozen=True, slots=True)
class Request:
    """What was passed to `train`, unchecked."""

    model: str
    recipe: str
    dataset: Source
    validation: Source | None = None
    split: float = DEFAULT_SPLIT
    split_column: str | None = None
    stratify: bool = True
    seed: int = 0
    devices: int = 1
    precision: str = "fp32"
    deterministic: bool = True
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = 5.0
    keep_checkpoints: int = 2
    promote: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that was checked, and whose dataset is uploaded.

    Attributes:
        schema: of its recipe's hyperparameters, for a lane that is yet to be made.
        lane: whose chunk the run will be; None: there is none yet.
        existing: the job that has its key and its input.
    """

    spec: RunSpec
    schema: Schema
    lane: ModelVersion | None
    options: Options
    job: NewJob
    metadata: dict[str, Any]
    existing: int | None


@dataclass(frozen=True, slots=True)
class PlacedRun:
    """Where a run was stored."""

    prepared: Prepared
    spec: RunSpec
    at: Submitted


Facts = tuple[JobRow, RunRow]
"""A run's two rows; the job's has its input, which is the spec."""


# --- submit ---------------------------------------------------------------------------------------------------------


def merged(given: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters passed in a dict and as arguments. Raises InvalidInput."""
    if given is not None and not isinstance(given, Mapping):
        raise InvalidInput(f"hyperparameters must be a dict, not a {type(given).__name__}")
    for name in more:
        if name in (given or {}):
            raise InvalidHyperparameter(name, f"{name} is passed twice: as an argument and in hyperparameters")
    return {**(given or {}), **more}


def prepare(
    core: Core, request: Request, options: Options, *, key: str | None, metadata: Mapping[str, Any] | None
) -> PreparedRun:
    """Check a run, then upload its dataset where it is not in the object store yet.

    Raises:
        RecipeNotFound: it names the recipes that come near.
        InvalidHyperparameter, InvalidDataset, InvalidInput: nothing was uploaded or stored.
        KeyConflict: the key belongs to another run.
        Unreachable: the database or the object store does not answer.
    """
    options.validate()
    check_key(key)
    described = core.encode_metadata(metadata)
    _check_names(request)
    schema, lane = find_recipe(core, request.recipe)
    chosen = check(request.recipe, schema, request.hyperparameters, _OPTIONS)
    ready = _ready(core).get(request.recipe)
    if ready is not None:  # the class gives whole numbers as such, so that equal runs look alike
        chosen = ready.model_validate(chosen).model_dump(mode="json")
    spec = _spec(request, chosen)
    with ExitStack() as stack:
        spec, uploads = _with_datasets(core, stack, request, spec)
        encoded = core.check_size(values.encode(spec.model_dump(mode="json")))
        digest = values.digest(encoded) if key is not None else None
        existing = _find_key(core, lane, options.tenant, key, digest)
        if existing is None:
            for upload in uploads:
                upload.send(core.artifacts)
            encoded = core.store_input(encoded)
    job = NewJob(encoded, key, digest, described)
    return PreparedRun(spec, schema, lane, options, job, dict(metadata or {}), existing)


def place(core: Core, run: PreparedRun, session: Session | None = None) -> PlacedRun:
    """Store a prepared run, in the caller's own transaction where there is one. Raises KeyConflict, Unreachable."""
    lane = run.lane
    if run.existing is not None and lane is not None:
        return _placed(run, lane, Submitted(run.existing, 0, existed=True))

    def store(connection: Connection | None) -> Submitted | KeyConflict:
        nonlocal lane
        # SQLite has one writer at a time: while the caller's transaction writes, another would wait in vain.
        of_caller = connection if core.db.url.get_backend_name() == "sqlite" else None
        lane = lane or core.registry.lane(run.spec.recipe, run.schema, of_caller)
        return core.runs.submit(lane, run.options, run.job, run.spec, connection)

    try:
        if session is not None:
            from torchrelay.sessions import store_in  # the ORM takes a fifth of a second to import

            at = store_in(core, session, LANE + run.spec.recipe, store)
        else:
            placed = store(None)
            if isinstance(placed, KeyConflict):
                raise placed
            at = placed
            core.wake(LANE + run.spec.recipe)
    except RelayError:
        core.forget_input(run.job.input)
        raise
    assert lane is not None, "store has seen to it"
    return _placed(run, lane, at)


def _placed(run: PreparedRun, lane: ModelVersion, at: Submitted) -> PlacedRun:
    return PlacedRun(Prepared(lane, run.options, run.job, run.metadata), run.spec, at)


def facts(core: Core, placed: PlacedRun) -> Facts:
    """Return the rows of a run that was just stored; where a transaction hides them yet, as they will be."""
    if placed.at.existed:
        core.forget_input(placed.prepared.job.input)
    try:
        return read(core, placed.at.job)
    except JobNotFound:
        row = core.new_row(placed.prepared, placed.at)
        row = replace(row, input=placed.prepared.job.input, trains=placed.spec.model)
        return row, new_run(row, placed.spec)


def new_run(row: JobRow, spec: RunSpec) -> RunRow:
    """Return what is known of a run that nobody has begun."""
    return RunRow(
        job=row.id, model=spec.model, recipe=spec.recipe, phase="", step=0, steps=0, epoch=0, epochs=0,
        examples_per_s=None, eta=None, paused=False, deaths=0, best=None, best_step=None, split={},
        dataset_sha256=None, version=None, created_at=row.created_at, started_at=None, updated_at=None,
    )  # fmt: skip


def _check_names(request: Request) -> None:
    model, alias = request.model, request.promote
    if not isinstance(model, str):
        raise InvalidInput(f"a model is named by a string such as 'digits', not by {model!r}")
    if NAME.fullmatch(model.partition("@")[0]) and "@" in model:
        raise InvalidInput(f"a run registers the next version of its model by itself: pass a name, not {model!r}")
    check_name(model)
    if alias is not None:
        if not isinstance(alias, str):
            raise InvalidInput(f"promote must be an alias such as 'champion', not {alias!r}")
        check_alias(alias)
    if request.split_column is not None and request.validation is not None:
        raise InvalidInput("split_column and validation both say which examples are held out; pass one of them")


def _spec(request: Request, hyperparameters: Mapping[str, Any]) -> RunSpec:
    """The spec without its datasets. Raises InvalidInput that names the parameter."""
    document = {
        "model": request.model, "recipe": request.recipe, "dataset": _NO_DATASET,
        "hyperparameters": dict(hyperparameters),
        "split": {"fraction": request.split, "column": request.split_column, "stratify": request.stratify},
        "seed": _number(request.seed), "devices": _number(request.devices), "precision": request.precision,
        "deterministic": request.deterministic, "promote": request.promote,
        "checkpoints": {"steps": _number(request.checkpoint_steps), "minutes": request.checkpoint_minutes,
                        "keep": _number(request.keep_checkpoints)},
    }  # fmt: skip
    try:
        return RunSpec.model_validate(document, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = tuple(str(part) for part in problem["loc"])
        name = _PARAMETERS.get(place[:2], place[0] if place else "the run")
        raise InvalidInput(f"{name} cannot be {problem['input']!r:.200}: {problem['msg']}") from None


def _number(value: Any) -> Any:
    """NumPy's whole numbers as Python's."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _with_datasets(core: Core, stack: ExitStack, request: Request, spec: RunSpec) -> tuple[RunSpec, list[Upload]]:
    """The spec with the URIs of what the run reads, and what has to be uploaded for that."""
    roots = core.settings.datasets
    dataset, upload = stack.enter_context(opened(core.artifacts, request.dataset, roots))
    uploads, update = [upload], {"dataset": dataset}
    if request.validation is not None:
        update["validation"], upload = stack.enter_context(opened(core.artifacts, request.validation, roots))
        uploads.append(upload)
    spec = spec.model_copy(update=update)
    weights = spec.hyperparameters.get("pretrained")
    if weights is not None and spec.recipe in _ready(core):
        upload = stack.enter_context(pretrained.opened(core.artifacts, weights, roots))
        uploads.append(upload)
        chosen = {**spec.hyperparameters, "pretrained": upload.uri}
        spec = spec.model_copy(update={"hyperparameters": chosen})
    return spec, uploads


def _find_key(core: Core, lane: ModelVersion | None, tenant: str, key: str | None, digest: bytes | None) -> int | None:
    """The job that has this key and this input. Raises KeyConflict. The submit itself asks again, and decides."""
    found = core.jobs.of_key(lane.model, tenant, key) if lane is not None and key is not None else None
    if found is None or key is None:
        return None
    job, known = found
    if known != digest:
        raise KeyConflict(key, show(Kind.JOB, job))
    return job if core.jobs.get([job], with_output=False) else None


# --- recipes --------------------------------------------------------------------------------------------------------


def find_recipe(core: Core, name: str) -> tuple[Schema, ModelVersion | None]:
    """Return the JSON Schema of a recipe's hyperparameters, and its lane where there is one. Raises RecipeNotFound."""
    if not isinstance(name, str) or not name:
        raise InvalidInput(f"a recipe is named by a string such as 'tabular-classification', not by {name!r}")
    lane = core.ready().registry.find_lane(name)
    ready = _ready(core).get(name)
    if ready is not None:
        return ready.model_json_schema(), lane
    if lane is not None:
        return lane.config, lane
    if name in core.settings.recipes:
        raise RecipeNotFound(
            f"no worker has made the recipe {name!r} of the setting `recipes` known yet; start one that trains: "
            "`torchrelay worker --train only`"
        )
    known = list(recipes(core))
    near = difflib.get_close_matches(name, known, n=3) or [other for other in known if name in other]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise RecipeNotFound(
        f"no recipe is known as {name!r}; {hint} (an author's recipe is known once a worker that trains with it has "
        "started)"
    )


def recipes(core: Core) -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each known recipe's hyperparameters, by its name."""
    found = {lane.handler: dict(lane.config) for lane in core.ready().registry.lanes()}
    found |= {name: ready.model_json_schema() for name, ready in _ready(core).items()}
    return dict(sorted(found.items()))


def _ready(core: Core) -> dict[str, type[Hyperparameters]]:
    """The recipes that come with torchrelay, without those in whose place the operator has put others."""
    from torchrelay.recipes import READY  # takes longer to import than the rest of this module

    return {name: ready for name, ready in READY.items() if name not in core.settings.recipes}


# --- read -----------------------------------------------------------------------------------------------------------


def read(core: Core, job: int) -> Facts:
    """Return a run's rows. Raises JobNotFound."""
    run = core.ready().runs.get(job)
    return core.job(job, with_input=True), run


def page(
    core: Core, *, model: str | None, state: str | Iterable[str] | None, limit: int, before: str | None
) -> list[Facts]:
    """Return the newest runs that pass the filters. Raises InvalidInput, NotFound."""
    check_limit(limit)
    last = ids.read(Kind.JOB, before) if before is not None else None
    found = core.ready().runs.page(model=model, states=read_states(state), limit=limit, before=last)
    return _with_specs(core, {row.id: row for _, row in found}, {run.job: run for run, _ in found})


def runs_among(core: Core, rows: Sequence[JobRow]) -> dict[int, Facts]:
    """Return the rows of those jobs that are training runs, by the job's id."""
    jobs = {row.id: row for row in rows if row.trains is not None}
    found = core.ready().runs.find(list(jobs)) if jobs else {}
    return {row.id: (row, run) for row, run in _with_specs(core, jobs, found)}


def _with_specs(core: Core, jobs: Mapping[int, JobRow], runs: Mapping[int, RunRow]) -> list[Facts]:
    inputs = core.jobs.get(list(jobs), with_input=True, with_output=False) if jobs else {}
    return [
        (replace(row, input=inputs[job].input), runs[job]) for job, row in jobs.items() if job in inputs and job in runs
    ]


# --- versions and aliases -------------------------------------------------------------------------------------------


def versions(core: Core, model: str) -> list[ModelVersion]:
    """Return a model's versions, the newest first. Raises ModelNotFound."""
    return core.registry.versions(core.fresh_model(model).name)


def promote(core: Core, ref: str, alias: str, by: str) -> ModelVersion:
    """Let an alias stand for a version. Raises ModelNotFound, InvalidInput."""
    version = core.fresh_model(ref)
    core.aliases.set(version.name, alias, version.version, by)
    return core.fresh_model(version.ref)


def rollback(core: Core, model: str, alias: str, by: str) -> ModelVersion:
    """Let an alias stand for the version that it stood for before. Raises ModelNotFound, InvalidInput."""
    name = core.fresh_model(model).name
    number = core.aliases.rollback(name, alias, by)
    return core.fresh_model(f"{name}@{number}")


def aliases(core: Core, model: str) -> dict[str, int]:
    """Return which version each of a model's aliases stands for. Raises ModelNotFound."""
    return core.aliases.of(core.fresh_model(model).name)


def alias_history(core: Core, model: str, alias: str | None) -> list[AliasMove]:
    """Return what a model's aliases stood for and since when, the newest first. Raises ModelNotFound."""
    return core.aliases.history(core.fresh_model(model).name, alias)
