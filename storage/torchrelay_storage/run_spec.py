"""What a training run is asked to do: the input of its job, as JSON. Written by clients, read by the run's process.

Not here: which hyperparameters a recipe takes (`torchrelay.recipes`), and how a run goes (`run_writer`, `runs`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from torchrelay_storage.errors import Corrupt

Format = Literal["csv", "tsv", "jsonl", "parquet", "npz", "pictures"]
"""How a dataset is stored. `pictures` is a zip file of CLASS/NAME.png, or of train/CLASS/NAME.png and validation/…"""

DEFAULT_SPLIT = 0.2  # part of the examples that is held out for validation


class Dataset(BaseModel):
    """A dataset in the object store.

    Attributes:
        uri: where it lies.
        sha256: of the file; None where it was named by its URI: the run records it then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    format: Format
    sha256: str | None = None


class Split(BaseModel):
    """How the examples are split into those that are trained on and those held out for validation.

    One of these: a dataset of its own for validation (`RunSpec.validation`); a column that says train or validation for
    each example (train and validation folders of pictures count as one); else a fraction, drawn by the run's seed,
    with the same share of each label in both parts where the recipe has labels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fraction: Annotated[float, Field(gt=0, lt=1)] = DEFAULT_SPLIT
    column: str | None = None
    stratify: bool = True


class Checkpoints(BaseModel):
    """When a run writes checkpoints (also when it is paused or its worker ends), and how many are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Annotated[int, Field(ge=1)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = 5.0
    keep: Annotated[int, Field(ge=1, le=100)] = 2


class RunSpec(BaseModel):
    """One training run.

    Attributes:
        model: the name under which the trained model is registered as the next version.
        recipe: which recipe trains it.
        hyperparameters: the recipe's own, checked at the submit.
        seed: of the split, the initial weights, the order of the examples and of augmentation and dropout.
        devices: processes of the run on one machine, each with a device of its own (on a CPU: cores).
        precision: `bf16` and `fp16` are mixed with fp32 as torch's autocast does.
        deterministic: ask torch for deterministic algorithms: the same seed on the same machine gives the same weights.
        promote: an alias, such as `champion`, that the new version gets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    recipe: str
    dataset: Dataset
    validation: Dataset | None = None
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    split: Split = Split()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    devices: Annotated[int, Field(ge=1, le=64)] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = True
    checkpoints: Checkpoints = Checkpoints()
    promote: str | None = None


def read_spec(document: object) -> RunSpec:
    """Return the spec that a job's decoded input is. Raises Corrupt."""
    try:
        return RunSpec.model_validate(document)
    except ValidationError as error:
        raise Corrupt(f"the input of a training job is no run that this release knows: {error}") from error
