"""Each ready recipe trained on real data by the plain loop; once a process, since several tests look at them."""

from __future__ import annotations

import ast
import functools
import os
from pathlib import Path

import number_words
from plain_loop import Trained, train
from torchrelay_worker.training.data import Table


@functools.cache
def digits() -> Trained:
    """scikit-learn's 8x8 pictures of digits, levels from 0 to 16."""
    from sklearn.datasets import load_digits

    from torchrelay_worker.training.recipes.images import ImageClassification

    data = load_digits()
    return train(ImageClassification, Table({"image": data.images, "label": data.target}), epochs=10)


@functools.cache
def cancer_table() -> Table:
    """scikit-learn's breast cancer, its classes as texts."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    columns = {name: data.data[:, i] for i, name in enumerate(data.feature_names)}
    return Table(columns | {"diagnosis": data.target_names[data.target]})


@functools.cache
def cancer() -> Trained:
    """The table above."""
    from torchrelay_worker.training.recipes.tabular import TabularClassification

    return train(TabularClassification, cancer_table(), seed=1, target="diagnosis")


@functools.cache
def diabetes() -> Trained:
    """scikit-learn's diabetes, with its two values of sex as a category."""
    from sklearn.datasets import load_diabetes

    from torchrelay_worker.training.recipes.tabular import Regression

    data = load_diabetes()
    columns = {name: data.data[:, i] for i, name in enumerate(data.feature_names)}
    columns["sex"] = ["f" if value < 0 else "m" for value in columns["sex"]]
    return train(Regression, Table(columns | {"progression": data.target}), target="progression")


@functools.cache
def docstrings(packages: tuple[str, ...] = ("asyncio", "email", "tkinter")) -> Table:
    """The first lines of the standard library's docstrings, and in which package they stand."""
    texts: list[str] = []
    labels: list[str] = []
    for package in packages:
        for file in sorted((Path(os.__file__).parent / package).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                    text = (ast.get_docstring(node) or "").partition("\n\n")[0]
                    if text:
                        texts.append(text)
                        labels.append(package)
    return Table({"text": texts, "label": labels})


@functools.cache
def packages() -> Trained:
    """The table above."""
    from torchrelay_worker.training.recipes.text import TextClassification

    return train(TextClassification, docstrings(), max_length=24, epochs=5, vocabulary=2000)


@functools.cache
def numbers() -> Trained:
    """A few numbers in words: enough to see that it learns, not to learn them all (the acceptance test does)."""
    from torchrelay_worker.training.recipes.translation import Translation

    one_layer = {"dropout": 0.0, "encoder_layers": 1, "decoder_layers": 1}
    table = number_words.table(range(0, 10_000, 10))
    return train(Translation, table, epochs=5, learning_rate=3e-3, batch_size=16, max_length=24, config=one_layer)
