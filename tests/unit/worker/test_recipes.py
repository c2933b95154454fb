"""The ready recipes: what they reach on real data, what they fit and on which part, and what they refuse."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics

import number_words
import trainings
from plain_loop import Trained, train, validate
from torchrelay_storage.errors import InvalidDataset, InvalidHyperparameter
from torchrelay_storage.run_spec import Split
from torchrelay_worker.training.data import Table, read
from torchrelay_worker.training.recipe import Recipe
from torchrelay_worker.training.recipes import images, translation
from torchrelay_worker.training.recipes.images import ImageClassification
from torchrelay_worker.training.recipes.tabular import Regression, TabularClassification
from torchrelay_worker.training.recipes.text import TextClassification
from torchrelay_worker.training.recipes.translation import Translation

ALL = [trainings.digits, trainings.cancer, trainings.diabetes, trainings.packages, trainings.numbers]
CLASSIFIERS = [trainings.digits, trainings.cancer, trainings.packages]
BY_NAME = lambda training: training.__name__  # noqa: E731


def fitted(recipe: type[Recipe], table: Table, indices: list[int] | None = None, **hyperparameters: Any) -> Recipe:
    """Return a recipe that has read a table and is fitted, by default on all of it."""
    made = recipe(recipe.Hyperparameters(**hyperparameters))
    examples = made.read(table)
    made.preprocessing = made.fit(examples, torch.tensor(list(range(len(table))) if indices is None else indices))
    return made


def refused(call: Any, *, column: str | None, row: int | None = None, says: str) -> None:
    with pytest.raises(InvalidDataset, match=says) as caught:
        call()
    assert (caught.value.column, caught.value.row) == (column, row), str(caught.value)


# --- what they reach ----------------------------------------------------------------------------------------


def test_digits() -> None:
    assert trainings.digits().metrics["accuracy"] >= 0.97


def test_breast_cancer() -> None:
    assert trainings.cancer().metrics["accuracy"] >= 0.95


def test_diabetes() -> None:
    assert trainings.diabetes().metrics["rmse"] <= 60
    assert trainings.diabetes().metrics["r2"] > 0.3


def test_docstrings() -> None:
    trained = trainings.packages()
    labels = torch.tensor(trained.recipe.labels(trained.examples))[trained.drawn.validation]
    assert trained.metrics["accuracy"] > labels.bincount().max() / len(labels) + 0.2


def test_number_words() -> None:
    trained = trainings.numbers()
    assert trained.losses[-1] < trained.losses[0] / 3
    assert trained.metrics["token_accuracy"] > 0.5


@pytest.mark.parametrize("training", ALL, ids=BY_NAME)
def test_the_deciding_metric_is_one_of_the_summary(training: Any) -> None:
    trained: Trained = training()
    assert trained.recipe.metric in trained.metrics


@pytest.mark.parametrize("training", CLASSIFIERS, ids=BY_NAME)
def test_accuracy_and_f1_are_scikit_learn_s(training: Any) -> None:
    trained: Trained = training()
    target, predicted = outputs(trained, lambda logits: logits.argmax(1))
    assert trained.metrics["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(target, predicted))
    assert trained.metrics["f1"] == pytest.approx(sklearn_metrics.f1_score(target, predicted, average="macro"))


def test_rmse_mae_and_r2_are_scikit_learn_s() -> None:
    trained = trainings.diabetes()
    target, predicted = outputs(trained, lambda numbers: numbers)
    assert trained.metrics["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(target, predicted))
    assert trained.metrics["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(target, predicted))
    assert trained.metrics["r2"] == pytest.approx(sklearn_metrics.r2_score(target, predicted))


def outputs(trained: Trained, decided: Any) -> tuple[list[float], list[float]]:
    with torch.no_grad():
        batch = trained.recipe.batch(trained.examples, trained.drawn.validation, None)
        _, found = trained.recipe.loss(trained.module.eval(), batch)
    return batch["target"].tolist(), decided(found).tolist()


@pytest.mark.parametrize("training", ALL, ids=BY_NAME)
def test_metrics_do_not_depend_on_the_batches(training: Any) -> None:
    trained: Trained = training()
    held_out = trained.drawn.validation[:60]
    whole = validate(trained.recipe, trained.module, trained.examples, held_out)
    turned = validate(trained.recipe, trained.module, trained.examples, held_out.flip(0))
    assert turned == pytest.approx(whole, rel=1e-4)


SMALL: list[tuple[type[Recipe], Any, dict[str, Any]]] = [
    (TabularClassification, trainings.cancer_table, {"target": "diagnosis"}),
    (Regression, trainings.cancer_table, {"target": "mean area"}),
    (ImageClassification, lambda: pictures(24), {"augment": True, "mirror": True, "batch_size": 4}),
    (TextClassification, lambda: rows(["good day", "bad night", "good", "bad"] * 6, [1, 0, 1, 0] * 6), {}),
    (Translation, lambda: number_words.table(range(40)), {}),
]


@pytest.mark.parametrize(("recipe", "table", "given"), SMALL, ids=lambda part: getattr(part, "__name__", ""))
def test_the_same_seed_gives_the_same_weights(recipe: type[Recipe], table: Any, given: dict[str, Any]) -> None:
    first, second, other = (train(recipe, table(), seed=seed, epochs=2, **given) for seed in (3, 3, 4))
    assert first.recipe.preprocessing == second.recipe.preprocessing
    assert first.losses == second.losses
    assert first.losses != other.losses
    assert all(torch.equal(a, b) for a, b in zip(states(first), states(second), strict=True))


def states(trained: Trained) -> list[torch.Tensor]:
    return list(trained.module.state_dict().values())


def rows(texts: list[str], labels: list[Any]) -> Table:
    return Table({"text": texts, "label": labels})


def pictures(n: int, shape: tuple[int, ...] = (8, 8), classes: int = 2) -> Table:
    drawn = np.random.default_rng(0).integers(0, 17, (n, *shape))
    return Table({"image": drawn, "label": np.arange(n) % classes})


# --- tables -------------------------------------------------------------------------------------------------


def test_tables_are_standardised_by_the_training_part_only() -> None:
    trained = trainings.diabetes()
    columns = {column["name"]: column for column in trained.recipe.preprocessing["columns"]}
    from sklearn.datasets import load_diabetes

    bmi = load_diabetes().data[:, 2].astype(np.float32)[trained.drawn.train.numpy()]
    assert columns["bmi"]["mean"] == pytest.approx(bmi.mean(), abs=1e-9)
    assert columns["bmi"]["std"] == pytest.approx(bmi.std(), rel=1e-5)
    assert columns["sex"] == {"name": "sex", "kind": "category", "categories": ["f", "m"]}


def test_categories_may_be_missing_new_or_rare() -> None:
    table = Table({"c": ["a", "a", None, "b", "b", " a ", "once"], "y": [0, 1, 0, 1, 0, 1, 0]})
    recipe = fitted(TabularClassification, table, target="y")
    assert recipe.preprocessing["columns"][0]["categories"] == ["a", "b"]
    batch = recipe.batch(recipe.read(table), torch.arange(7), None)
    assert batch["categories"].flatten().tolist() == [1, 1, 0, 2, 2, 1, 0]
    assert batch["numbers"].shape == (7, 0)


def test_numbers_that_are_names_are_categories() -> None:
    table = Table({"zip": [10, 10, 20, 20], "x": [1.0, 2.0, 3.0, 4.0], "y": [0, 1, 0, 1]})
    recipe = fitted(TabularClassification, table, target="y", categories=["zip"])
    assert recipe.preprocessing["columns"][0] == {"name": "zip", "kind": "category", "categories": ["10", "20"]}


def test_a_column_that_never_changes_is_no_division_by_zero() -> None:
    table = Table({"x": [5.0] * 4, "y": [1.0, 2.0, 3.0, 4.0]})
    recipe = fitted(Regression, table, target="y")
    assert torch.isfinite(recipe.build()(torch.full((1, 1), 5.0), torch.zeros(1, 0, dtype=torch.int64))).all()


CSV = "age,bmi,target\n" + "".join(f"{30 + i},{20 + i / 10},{i % 2}\n" for i in range(20))


def read_csv(folder: Path, text: str) -> Table:
    (folder / "d.csv").write_text(text)
    return read(folder / "d.csv", "csv")


@pytest.mark.parametrize(
    ("text", "column", "row", "says"),
    [
        ("35,abc,1", "bmi", 5, "text 'abc' in row 5.*`categories`"),
        ("35,,1", "bmi", 5, "nothing, or NaN, in row 5"),
        ("35,inf,1", "bmi", 5, "infinite"),
        ("35,1e300,1", "bmi", 5, "too large for float32"),
        ("35,20.5,", "target", 5, "label is missing"),
        ("35,20.5,0.5", "target", 5, "no class"),
    ],
)
def test_what_a_table_must_not_hold_is_named(tmp_path: Path, text: str, column: str, row: int, says: str) -> None:
    table = read_csv(tmp_path, CSV.replace("35,20.5,1", text))
    refused(lambda: fitted(TabularClassification, table, target="target"), column=column, row=row, says=says)


@pytest.mark.parametrize(
    ("given", "column", "says"),
    [
        ({"target": "targte"}, "targte", "did you mean 'target'"),
        ({"features": ["age", "bim"]}, "bim", "did you mean 'bmi'"),
        ({"features": ["age", "target"]}, "target", "both"),
        ({"features": []}, None, "no column to predict"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path: Path, given: dict[str, Any], column: str, says: str) -> None:
    table = read_csv(tmp_path, CSV)
    refused(lambda: fitted(TabularClassification, table, **{"target": "target", **given}), column=column, says=says)


def test_a_target_that_is_always_the_same_is_refused() -> None:
    table = Table({"x": [1.0, 2.0], "y": [7, 7]})
    refused(lambda: fitted(TabularClassification, table, target="y"), column="y", says="at least two classes")
    refused(lambda: fitted(Regression, table, target="y"), column="y", says="holds 7 in all rows")
    refused(lambda: fitted(Regression, Table({"x": [1], "y": ["a"]}), target="y"), column="y", row=0, says="text 'a'")


def test_a_validation_set_must_fit_the_dataset(tmp_path: Path) -> None:
    recipe = TabularClassification(TabularClassification.Hyperparameters(target="target"))
    recipe.read(read_csv(tmp_path, CSV))
    assert len(recipe.read(read_csv(tmp_path, CSV))) == 20
    refused(
        lambda: recipe.read(read_csv(tmp_path, CSV.replace("37,20.7,1", "37,20.7,2"))),
        column="target",
        row=7,
        says="label out of range: row 7 of the validation set has 2",
    )
    refused(lambda: recipe.read(read_csv(tmp_path, "bmi,target\n1,0\n")), column="age", says="no column 'age'")
    refused(lambda: recipe.read(read_csv(tmp_path, "age,bmi,target\nx,1,0\n")), column="age", row=0, says="text 'x'")


def test_a_label_that_only_the_held_out_part_has_is_out_of_range() -> None:
    table = Table({"x": [1.0, 2.0, 3.0], "y": ["a", "b", "c"]})
    refused(
        lambda: fitted(TabularClassification, table, [0, 1], target="y"),
        column="y",
        row=2,
        says="label out of range: row 2 is held out and has 'c'",
    )


def test_the_split_column_is_no_feature() -> None:
    table = Table({"x": [1.0, 2, 3, 4], "part": ["train", "train", "val", "val"], "y": [0, 1, 0, 1]})
    trained = train(TabularClassification, table, given=Split(column="part"), target="y", epochs=1)
    assert [column["name"] for column in trained.recipe.preprocessing["columns"]] == ["x"]
    assert trained.drawn.validation.tolist() == [2, 3]


# --- pictures -----------------------------------------------------------------------------------------------


def test_pictures_are_normalised_by_the_training_part_only() -> None:
    trained = trainings.digits()
    from sklearn.datasets import load_digits

    part = load_digits().images[trained.drawn.train.numpy()]
    fit = trained.recipe.preprocessing
    assert fit["mean"] == pytest.approx([part.mean()])
    assert fit["std"] == pytest.approx([part.std()])
    assert (fit["low"], fit["high"], fit["shape"]) == (0.0, 16.0, [1, 8, 8])
    assert fit["classes"] == list(range(10))


@pytest.mark.parametrize(
    ("shape", "dtype", "given", "expected"),
    [
        ((8, 8), np.uint8, {}, (1, 8, 8)),
        ((6, 9, 3), np.float64, {}, (3, 6, 9)),
        ((8, 8, 1), np.int64, {"size": 5}, (1, 5, 5)),
        ((8, 8, 3), np.uint16, {"channels": 1}, (1, 8, 8)),
        ((8, 8), np.float32, {"channels": 3, "size": 16}, (3, 16, 16)),
    ],
)
def test_arrays_of_any_kind_are_pictures(shape: Any, dtype: Any, given: Any, expected: Any) -> None:
    table = pictures(6, shape)
    table = Table({"image": np.asarray(table.column("image")).astype(dtype), "label": table.classes("label")})
    recipe = fitted(ImageClassification, table, **given)
    batch = recipe.batch(recipe.read(table), torch.tensor([4, 1]), None)
    assert batch["image"].shape == (2, *expected)
    assert batch["image"].dtype == torch.float32
    assert recipe.build().eval()(batch["image"]).shape == (2, 2)


@pytest.mark.parametrize(
    ("table", "column", "row", "says"),
    [
        (pictures(4, (3, 8, 8)), "image", None, r"shape \[4, 3, 8, 8\]"),
        (pictures(4, (64,)), "image", None, r"shape \[4, 64\]"),
        (pictures(4, (2, 8)), "image", None, "8x2 pixels"),
        (Table({"image": ["a", "b"], "label": [0, 1]}), "image", None, "holds texts"),
        (Table({"picture": [1], "label": [0]}), "image", None, "no column 'image'"),
        (Table({"image": np.full((2, 8, 8), [[[1.0]], [[np.nan]]]), "label": [0, 1]}), "image", 1, "NaN"),
    ],
)
def test_what_is_no_picture_is_named(table: Table, column: str, row: int | None, says: str) -> None:
    refused(lambda: fitted(ImageClassification, table), column=column, row=row, says=says)


def test_augmentation_is_drawn_from_the_given_generator_and_only_in_training() -> None:
    table = pictures(4)
    recipe = fitted(ImageClassification, table, augment=True, mirror=True)
    examples, all_ = recipe.read(table), torch.arange(4)

    def drawn(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return recipe.batch(examples, all_, generator)["image"]

    assert torch.equal(drawn(None)[:, 0].long(), torch.as_tensor(table.column("image")))
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert drawn(1).shape == (4, 1, 8, 8)


def zip_of(folder: Path, files: dict[str, tuple[str, tuple[int, int], Any]]) -> Table:
    with zipfile.ZipFile(folder / "p.zip", "w") as archive:
        for name, (mode, size, level) in files.items():
            file = io.BytesIO()
            Image.new(mode, size, level).save(file, "PNG")
            archive.writestr(name, file.getvalue())
    return read(folder / "p.zip", "pictures")


def test_pictures_that_find_no_room_are_unpacked_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{c}/{i}.png": ("RGB", (6 + i, 8), (10 * i, 5, 200)) for i in range(4) for c in "ab"}
    table = zip_of(tmp_path, {**files, "a/9.png": ("L", (8, 8), 3)})
    kept = fitted(ImageClassification, table, size=8)
    together = kept.batch(kept.read(table), torch.arange(9), None)
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    lazy = fitted(ImageClassification, table, size=8)
    examples = lazy.read(table)
    assert not isinstance(examples.pixels, torch.Tensor)  # type: ignore[attr-defined]
    assert torch.equal(lazy.batch(examples, torch.arange(9), None)["image"], together["image"])
    assert lazy.preprocessing == kept.preprocessing
    assert kept.preprocessing["high"] == 255.0
    assert together["image"].shape == (9, 3, 8, 8)


def test_a_picture_of_another_size_is_named(tmp_path: Path) -> None:
    table = zip_of(tmp_path, {"a/1.png": ("L", (8, 8), 0), "b/2.png": ("L", (9, 8), 0)})
    refused(lambda: fitted(ImageClassification, table), column="image", row=1, says="b/2.png has 9x8 .* set `size`")
    recipe = ImageClassification(ImageClassification.Hyperparameters())
    recipe.read(pictures(4))
    refused(lambda: recipe.read(pictures(4, (9, 9))), column="image", says="validation set are of the shape")


# --- texts --------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_learned_from_the_training_part_only() -> None:
    table = rows(["aaaa bbbb"] * 4 + ["zzzzqqqq"] * 4, [0, 1] * 4)
    recipe = fitted(TextClassification, table, [0, 1, 2, 3])
    assert "Ġaaaa" in recipe.tokenizer.get_vocab()  # type: ignore[attr-defined]
    assert "Ġzzzzqqqq" not in recipe.tokenizer.get_vocab()  # type: ignore[attr-defined]
    everything = fitted(TextClassification, table)
    assert "Ġzzzzqqqq" in everything.tokenizer.get_vocab()  # type: ignore[attr-defined]


def test_long_texts_are_cut_and_short_ones_are_masked() -> None:
    table = rows(["a b c d e f g h i j", "a"], [0, 1])
    recipe = fitted(TextClassification, table, max_length=6)
    batch = recipe.batch(recipe.read(table), torch.arange(2), None)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [6, 3]


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_a_missing_text_is_named(missing: str | None) -> None:
    table = rows(["a", "b"], [0, 1])
    refused(lambda: fitted(TextClassification, rows(["a", missing], [0, 1])), column="text", row=1, says="row 1")  # type: ignore[list-item]
    pair = Table({"source": ["a", "b"], "target": ["a", missing]})
    refused(lambda: fitted(Translation, pair), column="target", row=1, says="row 1")
    refused(lambda: fitted(Translation, table), column="source", says="no column 'source'")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"hiden_size": 3}, "config.hiden_size"),
        ({"vocab_size": 3}, "config.vocab_size"),
        ({"hidden_size": 63}, "config"),
    ],
)
def test_a_config_that_transformers_does_not_take_is_refused(config: dict[str, Any], key: str) -> None:
    recipe = fitted(TextClassification, rows(["a", "b"], [0, 1]), config=config)
    with pytest.raises(InvalidHyperparameter) as caught:
        recipe.build()
    assert caught.value.key == key


def test_a_config_is_taken() -> None:
    module = fitted(TextClassification, rows(["a", "b"], [0, 1]), config={"num_hidden_layers": 1}).build()
    assert module.config.num_hidden_layers == 1  # type: ignore[union-attr]


# --- translations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["pieces", "words", "characters"])
def test_tokens_give_the_text_back(tokens: str) -> None:
    table = number_words.table(range(200), reverse=True)
    recipe = fitted(Translation, table, tokens=tokens)
    for number in (0, 21, 142):
        text = number_words.english(number)
        assert recipe.tokenizer.decode(recipe.tokenizer.encode(text).ids) == text  # type: ignore[attr-defined]


def test_the_decoder_sees_the_tokens_before() -> None:
    table = number_words.table(range(30))
    recipe = fitted(Translation, table)
    batch = recipe.batch(recipe.read(table), torch.tensor([1, 21]), None)
    target, before = batch["target"], batch["decoder_input_ids"]
    assert before[:, 0].tolist() == [translation.START] * 2
    there = target[:, :-1] != translation.IGNORED
    assert torch.equal(before[:, 1:][there], target[:, :-1][there])
    assert (before[:, 1:][~there] == translation.PAD).all()
    assert (~there).any()


def test_some_of_the_held_out_are_translated_and_in_training_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "EXAMINED", 3)
    table = number_words.table(range(30))
    recipe = fitted(Translation, table, list(range(20)))
    examples = recipe.read(table)
    assert recipe.preprocessing["examined"] == [20, 24, 29]
    validation = recipe.read(table)  # as one of its own
    assert recipe.batch(validation, torch.arange(30), None)["examined"].nonzero().flatten().tolist() == [0, 14, 29]
    del examples


def test_the_loss_is_a_mean_over_examples() -> None:
    """So that it is the same on two devices that share a batch."""
    table = number_words.table(range(40))
    recipe = fitted(Translation, table)
    torch.manual_seed(0)
    module, examples = recipe.build().eval(), recipe.read(table)
    with torch.no_grad():
        whole, *each = (
            float(recipe.loss(module, recipe.batch(examples, torch.tensor(indices), torch.Generator()))[0])
            for indices in ([1, 38], [1], [38])
        )
    assert whole == pytest.approx(sum(each) / 2, rel=1e-5)


# --- given weights ------------------------------------------------------------------------------------------


@pytest.fixture
def given_encoder(tmp_path: Path) -> Path:
    """A zip file as someone has it from elsewhere: an encoder that was trained on other texts."""
    from transformers import BertConfig, BertModel

    from torchrelay_worker.training.tokens import encoder_tokenizer

    tokenizer = encoder_tokenizer(["the quick brown fox", "the lazy dog"] * 2, 400)
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save(str(tmp_path / "encoder" / "tokenizer.json"))
    with zipfile.ZipFile(tmp_path / "encoder.zip", "w") as archive:
        for file in (tmp_path / "encoder").iterdir():
            archive.write(file, f"encoder/{file.name}")
    return tmp_path / "encoder.zip"


def test_training_goes_on_from_given_weights(given_encoder: Path) -> None:
    table = rows(["the fox", "a dog and a dog and a dog and a dog and a dog"] * 3, ["a", "b"] * 3)
    recipe = fitted(TextClassification, table, pretrained=str(given_encoder))
    module = recipe.build()
    torch.manual_seed(5)
    from transformers import BertModel

    expected = BertModel(module.config.__class__.from_dict(module.config.to_dict()))  # type: ignore[operator,union-attr]
    word = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(module.state_dict()[word], expected.state_dict()[word.removeprefix("bert.")])
    batch = recipe.batch(recipe.read(table), torch.arange(6), None)
    assert batch["input_ids"].shape[1] == 12  # it has no more positions
    assert recipe.loss(module, batch)[1].shape == (6, 2)


def test_what_are_no_given_weights_is_refused(tmp_path: Path, given_encoder: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    for name in ("no.zip", "other.zip"):
        with pytest.raises(InvalidHyperparameter, match="a zip file of config") as caught:
            fitted(TextClassification, rows(["a", "b"], [0, 1]), pretrained=str(tmp_path / name))
        assert caught.value.key == "pretrained"
    with pytest.raises(InvalidHyperparameter, match="no encoder-decoder"):
        fitted(Translation, number_words.table(range(9)), pretrained=str(given_encoder))
