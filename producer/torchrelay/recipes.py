"""The ready recipes' hyperparameters, typed and documented, so that a client can refuse bad ones without torch.

A recipe of an author has its own class; workers publish its JSON Schema, and clients check against that (`training`).
Not here: training (`torchrelay_worker.training`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
Decay = Annotated[float, Field(ge=0, le=10)]
Rate = Annotated[float, Field(gt=0, le=10)]
Part = Annotated[float, Field(ge=0, lt=1)]


class Hyperparameters(BaseModel):
    """What every recipe takes. A subclass adds its own; each field has a description."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Epochs = Field(10, description="Times that each example is seen.")
    batch_size: BatchSize = Field(64, description="Examples of one step, over all devices.")
    learning_rate: Rate = Field(1e-3, description="Rate at the top of the schedule.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the rate falls after the warm-up."
    )
    warmup: Part = Field(0.1, description="Part of all steps in which the rate rises.")
    weight_decay: Decay = Field(0.01, description="AdamW's, on matrices.")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="Longest gradient; none: not clipped.")
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Epochs without a better validation after which the run stops early; none: it never does."
    )


class TabularHyperparameters(Hyperparameters):
    """Shared by the recipes on tables: columns of numbers and of categories."""

    target: str = Field(description="Column to predict.")
    features: list[str] | None = Field(None, description="Columns to predict it from; none: all others.")
    categories: list[str] = Field([], description="Columns whose numbers are names, such as postcodes, not amounts.")
    batch_size: BatchSize = Field(32, description="Examples of one step, over all devices.")
    weight_decay: Decay = Field(0.1, description="AdamW's, on matrices.")
    hidden: list[Annotated[int, Field(ge=1, le=65_536)]] = Field([64, 64], description="Widths of the hidden layers.")
    dropout: Part = Field(0.2, description="Part of the hidden units that is dropped in training.")


class TabularClassification(TabularHyperparameters):
    """Rows of a table to classes: a multi-layer perceptron, cross-entropy."""

    epochs: Epochs = Field(50, description="Times that each example is seen.")


class Regression(TabularHyperparameters):
    """Rows of a table to a number: a multi-layer perceptron, mean squared error."""

    epochs: Epochs = Field(50, description="Times that each example is seen.")


class ImageClassification(Hyperparameters):
    """Pictures to classes: a small convolutional net, cross-entropy."""

    epochs: Epochs = Field(20, description="Times that each example is seen.")
    learning_rate: Rate = Field(3e-3, description="Rate at the top of the schedule.")
    image: str = Field("image", description="Column of the pictures.")
    target: str = Field("label", description="Column of the classes.")
    size: Annotated[int, Field(ge=4, le=4096)] | None = Field(
        None, description="Pixels of each edge that pictures are resized to; none: they must be of one size."
    )
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 colours; none: as the data has them.")
    width: Annotated[int, Field(ge=4, le=1024)] = Field(16, description="Channels of the first block.")
    dropout: Part = Field(0.2, description="Part of the last features that is dropped in training.")
    augment: bool = Field(False, description="Shift and mirror pictures at random in training.")
    mirror: bool = Field(False, description="With augment: whether a mirrored picture is of the same class.")


class TextHyperparameters(Hyperparameters):
    """Shared by the recipes on texts: a transformers model, from given weights or from a config."""

    epochs: Epochs = Field(10, description="Times that each example is seen.")
    batch_size: BatchSize = Field(32, description="Examples of one step, over all devices.")
    pretrained: str | None = Field(
        None,
        description="URI of a zip in the artifact store with config.json, model.safetensors and tokenizer.json.",
    )
    config: dict[str, Any] = Field(
        {}, description="Without pretrained: what differs from the small default, as transformers' config has it."
    )
    vocabulary: Annotated[int, Field(ge=16, le=1_000_000)] | None = Field(
        None,
        description="Without pretrained: most entries of the vocabulary that is learned from the data; none: 8,000, "
        "and fewer where pieces for a translation are learned from less than 400,000 examples.",
    )
    max_length: Annotated[int, Field(ge=2, le=65_536)] = Field(128, description="Tokens; longer texts are cut.")


class TextClassification(TextHyperparameters):
    """Texts to classes: a transformers encoder (BERT), cross-entropy."""

    text: str = Field("text", description="Column of the texts.")
    target: str = Field("label", description="Column of the classes.")


class Translation(TextHyperparameters):
    """Texts to texts: a transformers encoder-decoder, cross-entropy with teacher forcing."""

    epochs: Epochs = Field(6, description="Times that each example is seen.")
    learning_rate: Rate = Field(2e-3, description="Rate at the top of the schedule.")
    source: str = Field("source", description="Column of the texts to translate.")
    target: str = Field("target", description="Column of the translations.")
    tokens: Literal["words", "pieces", "characters"] = Field(
        "pieces", description="Without pretrained: what a token is; pieces are learned by byte-pair encoding."
    )


READY: dict[str, type[Hyperparameters]] = {
    "tabular-classification": TabularClassification,
    "regression": Regression,
    "image-classification": ImageClassification,
    "text-classification": TextClassification,
    "translation": Translation,
}
"""The recipes that come with torchrelay, by name."""
