"""The handlers of the ready recipes: their answers are the trained module's, and they refuse what it cannot take."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import trainings
from plain_loop import Trained
from torchrelay_storage.errors import Corrupt
from torchrelay_worker import InvalidInput, Model, check
from torchrelay_worker.models import images, weights
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.models.images import ImageClassifier
from torchrelay_worker.models.text import TextClassifier
from torchrelay_worker.models.translation import Translator
from torchrelay_worker.training.data import Table
from torchrelay_worker.training.pictures import Pictures
from torchrelay_worker.training.recipes.images import ImageClassification

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a training's handler and weights, exported once."""
    made: dict[str, tuple[type[Model], weights.Weights]] = {}

    def export(training: Any) -> tuple[type[Model], weights.Weights]:
        name = training.__name__
        if name not in made:
            trained: Trained = training()
            found = trained.recipe.export(trained.module.eval(), tmp_path_factory.mktemp(name))
            made[name] = Handlers().find(found.handler), weights.local(found.file, config=found.config)
        return made[name]

    return export


def loaded(exported: Any, training: Any) -> Any:
    handler, files = exported(training)
    model = handler()
    model.load(files, CPU)
    return model


def answers(model: Model, inputs: list[Any]) -> list[Any]:
    with torch.inference_mode():
        outputs = model.forward(model.collate([model.preprocess(given) for given in inputs]))
        return [model.decode(part) for part in model.split(outputs, len(inputs))]


def bare(trained: Trained, indices: torch.Tensor) -> Any:
    with torch.inference_mode():
        return trained.recipe.loss(trained.module.eval(), trained.recipe.batch(trained.examples, indices, None))[1]


# --- what they answer ---------------------------------------------------------------------------------------


@functools.cache
def all_digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits().images


def digit(i: int) -> Any:
    return all_digits()[i]


def row(table: Table, i: int) -> dict[str, Any]:
    return {name: table.column(name)[i] for name in table.columns}


def diabetic(i: int) -> dict[str, Any]:
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    values = dict(zip(data.feature_names, data.data[i].tolist(), strict=True))
    return values | {"sex": "f" if values["sex"] < 0 else "m"}


INPUTS: dict[Any, Any] = {
    trainings.digits: lambda i: {"image": digit(i).tolist()},
    trainings.cancer: lambda i: row(trainings.cancer_table(), i),
    trainings.packages: lambda i: trainings.docstrings().texts("text")[i],
}
BY_NAME = lambda training: getattr(training, "__name__", "")  # noqa: E731


@pytest.mark.parametrize("training", list(INPUTS), ids=BY_NAME)
def test_classes_are_those_of_the_module_run_bare(exported: Any, training: Any) -> None:
    trained: Trained = training()
    held_out = trained.drawn.validation[:40]
    probabilities, labels = bare(trained, held_out).softmax(1).max(1)
    classes = trained.recipe.preprocessing["classes"]
    found = answers(loaded(exported, training), [INPUTS[training](i) for i in held_out.tolist()])
    assert [answer["label"] for answer in found] == [classes[i] for i in labels.tolist()]
    assert [answer["probability"] for answer in found] == pytest.approx(probabilities.tolist(), abs=1e-5)
    assert all(type(answer["label"]) is type(classes[0]) for answer in found)


def test_numbers_are_those_of_the_module_run_bare(exported: Any) -> None:
    trained = trainings.diabetes()
    held_out = trained.drawn.validation
    model = loaded(exported, trainings.diabetes)
    found = answers(model, [diabetic(i) for i in held_out.tolist()])
    assert found == pytest.approx(bare(trained, held_out).tolist(), rel=1e-5)
    # In the unit of the target, not of its deviation.
    assert np.sqrt(np.mean((np.array(found) - trained.examples.target[held_out].numpy()) ** 2)) <= 60  # type: ignore[attr-defined]


def test_translations_are_those_of_the_module_run_bare(exported: Any) -> None:
    trained = trainings.numbers()
    held_out = trained.drawn.validation
    model = loaded(exported, trainings.numbers)
    sources: list[str] = trained.examples.sources  # type: ignore[attr-defined]
    tokens = bare(trained, held_out).translations
    expected = trained.recipe.tokenizer.decode_batch(tokens.tolist())  # type: ignore[attr-defined]
    together = answers(model, [sources[i] for i in held_out.tolist()])
    assert together == expected
    alone = [answers(model, [{"source": sources[i]}])[0] for i in held_out.tolist()[:10]]
    assert alone == expected[:10]
    assert len(set(expected)) > 20


@pytest.mark.parametrize(
    ("training", "given"),
    [
        (trainings.digits, lambda: {"pixels": digit(3).flatten().tolist()}),
        (trainings.cancer, lambda: [float(i) for i in range(30)]),
        (trainings.diabetes, lambda: diabetic(3)),
        (trainings.packages, lambda: {"text": "Return the event loop."}),
        (trainings.numbers, lambda: "two thousand five"),
    ],
    ids=BY_NAME,
)
def test_each_passes_the_dry_run(exported: Any, training: Any, given: Any) -> None:
    handler, files = exported(training)
    report = check.try_model(handler, files, given(), CPU, "m@1")
    assert report.batch == 4
    assert report.as_json()["ok"]
    assert (report.length is not None) == (handler in (TextClassifier, Translator))


@pytest.mark.parametrize("training", [*INPUTS, trainings.diabetes, trainings.numbers], ids=BY_NAME)
def test_a_damaged_file_is_corrupt(exported: Any, training: Any, tmp_path: Path) -> None:
    handler, files = exported(training)
    broken = tmp_path / files.path.name
    broken.write_bytes(files.path.read_bytes()[: files.path.stat().st_size // 2])
    with pytest.raises(Corrupt):
        handler().load(weights.local(broken, config=files.config), CPU)
    with pytest.raises(InvalidInput):
        handler().load(weights.Weights(None, files.config), CPU)


# --- pictures -----------------------------------------------------------------------------------------------


def png(size: tuple[int, int] = (8, 8), mode: str = "L", level: Any = 255) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, level).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "given",
    [
        {"image": [[16] * 8] * 8},
        {"pixels": [16.0] * 64},
        {"pixels": [[16] * 8] * 8},
        [[16] * 8] * 8,
        [16] * 64,
        [[[16]] * 8] * 8,
        np.full((8, 8), 16, dtype=np.uint8),
        np.full((8, 8), 16, dtype=np.uint16),
        np.full((8, 8), 16, dtype=np.float64),
        torch.full((8, 8, 3), 16.0),
        png(),
        png(mode="RGB", level=(255, 255, 255)),
        png(mode="RGBA", level=(255, 255, 255, 0)),
        png(mode="1", level=1),
    ],
)
def test_every_kind_of_input_is_the_same_picture(exported: Any, given: Any) -> None:
    prepared = loaded(exported, trainings.digits).preprocess(given)
    assert prepared.dtype == torch.float32
    assert torch.allclose(prepared, torch.full((1, 8, 8), 16.0))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"picture": 1}, '"image" or "pixels": 8 rows of 8 pixels, a number each, or a PNG or JPEG of 8x8'),
        ([1, 2], r"8 rows of 8 pixels.*not of shape \[2\]"),
        ([[0] * 9] * 8, r"not of shape \[8, 9\]"),
        ([[255] * 8] * 8, "from about 0 to 16, as in training, not from 255 to 255"),
        ([float("nan")] * 64, "from about 0 to 16"),
        (["a"] * 64, "8 rows of 8"),
        (None, "8 rows of 8"),
        ([[1, 2], [3]], "8 rows of 8"),
        (b"no picture", "no picture"),
        (png((9, 8)), "8x8 pixels, not 9x8"),
        (png()[:30], "no picture"),
    ],
)
def test_what_is_no_picture_of_the_training_s_is_refused(exported: Any, given: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        loaded(exported, trainings.digits).preprocess(given)


def test_a_picture_file_is_the_same_in_training_and_serving(tmp_path: Path) -> None:
    files = [png((7 + i, 9), "RGB", (20 * i, 50, 255 - i)) for i in range(6)] + [png((8, 8), "L", 30)]
    table = Table({"image": Pictures(list("abcdefg"), files.__getitem__), "label": [0, 1, 0, 1, 0, 1, 0]})
    recipe = ImageClassification(ImageClassification.Hyperparameters(size=8))
    examples = recipe.read(table)
    recipe.preprocessing = recipe.fit(examples, torch.arange(7))
    module = recipe.build().eval()
    found = recipe.export(module, tmp_path)
    model = ImageClassifier()
    model.load(weights.local(found.file, config=found.config), CPU)
    trained_on = recipe.batch(examples, torch.arange(7), None)["image"]
    served = torch.stack([model.preprocess(data) for data in files])
    assert torch.equal(served, trained_on)
    arrays = torch.stack([model.preprocess(images.unpack(data)) for data in files])
    assert torch.equal(arrays, trained_on)
    with torch.inference_mode():
        assert torch.allclose(model.net(served), module(trained_on), atol=1e-5)
    with pytest.raises(InvalidInput, match="rows of pixels, three numbers each"):
        model.preprocess([1, 2, 3])


def test_a_camera_s_turn_is_followed_and_sixteen_bits_become_eight() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (4, 2)).save(file, "JPEG", exif=exif)
    assert images.unpack(file.getvalue()).shape == (4, 2)
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0x1234, dtype=np.uint16)).save(file, "PNG")
    assert images.unpack(file.getvalue()).tolist() == [[0x12] * 2] * 2


# --- rows ---------------------------------------------------------------------------------------------------


def test_a_row_may_come_as_a_dict_a_list_or_an_array(exported: Any) -> None:
    model = loaded(exported, trainings.cancer)
    given = row(trainings.cancer_table(), 5)
    values = [given[name] for name in model.columns]
    found = answers(model, [given, values, tuple(values), np.array(values), torch.tensor(values)])
    assert found == [found[0]] * 5
    assert found[0]["label"] in ("benign", "malignant")


def test_categories_may_be_unknown_or_missing(exported: Any) -> None:
    model = loaded(exported, trainings.diabetes)
    given = diabetic(0)
    known, unknown, none, missing = answers(
        model,
        [given, given | {"sex": "x"}, given | {"sex": None}, {k: v for k, v in given.items() if k != "sex"}],
    )
    assert unknown == none == missing
    assert known != unknown
    assert answers(model, [given | {"sex": f" {given['sex']} "}]) == [known]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bmi": "abc"}, "column 'bmi' must be a number, not 'abc'"),
        ({"bmi": None}, "column 'bmi' must be a number"),
        ({"bmi": float("nan")}, "column 'bmi' is NaN"),
        ({"s1": 1e300}, "column 's1' is NaN, infinite or too large"),
        ({"s1": 10**400}, "column 's1' is too large"),
        ({"sex": [1]}, "column 'sex' must be a text"),
    ],
)
def test_what_is_no_row_is_refused(exported: Any, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        loaded(exported, trainings.diabetes).preprocess(diabetic(0) | change)


def test_missing_columns_are_named(exported: Any) -> None:
    model = loaded(exported, trainings.diabetes)
    given = diabetic(0)
    given["BMI_"] = given.pop("bmi")
    given["bmi_"] = given.pop("BMI_")
    with pytest.raises(InvalidInput, match="no column 'bmi'; did you write it 'bmi_'"):
        model.preprocess(given)
    with pytest.raises(InvalidInput, match="2 values; it must have 10: age, sex, bmi"):
        model.preprocess([1, 2])
    with pytest.raises(InvalidInput, match="not str"):
        model.preprocess("35")


# --- texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["Return the loop.", {"text": "Return the loop."}])
def test_a_text_may_come_bare_or_by_its_column(exported: Any, given: Any) -> None:
    model = loaded(exported, trainings.packages)
    assert answers(model, [given]) == answers(model, ["Return the loop."])
    assert model.length(model.preprocess("word " * 1000)) == 24


@pytest.mark.parametrize("given", [5, None, ["a"], {"txt": "a"}, {"text": 5}, b"bytes"])
def test_what_is_no_text_is_refused(exported: Any, given: Any) -> None:
    for training in (trainings.packages, trainings.numbers):
        with pytest.raises(InvalidInput, match="must be a text"):
            loaded(exported, training).preprocess(given)


def test_a_text_s_mates_do_not_change_its_answer(exported: Any) -> None:
    model = loaded(exported, trainings.packages)
    texts = ["Return.", "Return the running event loop of this thread, or raise RuntimeError.", ""]
    together = answers(model, texts)
    for text, answer in zip(texts, together, strict=True):
        alone = answers(model, [text])[0]
        assert alone["label"] == answer["label"]
        assert alone["probability"] == pytest.approx(answer["probability"], abs=1e-4)


def test_a_translation_ends(exported: Any) -> None:
    model = loaded(exported, trainings.numbers)
    with torch.inference_mode():
        tokens = model.forward(model.collate([model.preprocess("xyz ?! nothing of a number")]))
    assert tokens.shape[1] <= model.longest
