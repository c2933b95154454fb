"""Training from the outside: real data, real servers, the command line and Python; then served through the queue.

On SQLite by the command line, on PostgreSQL by Python. Predictions must be those of the exported model run bare.
"""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import number_words
from servers import wait_until
from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.artifacts import Artifacts
from workers import WorkerProcess

# Number words in a minute or two on one thread.
TRANSLATION: dict[str, Any] = {}

Trained = tuple[str, dict[str, Any]]
Train = Callable[..., Trained]


@pytest.fixture
def relay(settings: Settings, worker: Callable[..., WorkerProcess]) -> Iterator[Relay]:
    """A relay, and a worker that serves and trains."""
    worker("--train", "also", "--torch-threads", "1")
    with Relay(settings=settings) as relay:
        yield relay


@pytest.fixture
def train(relay: Relay, settings: Settings, tmp_path: Path) -> Train:
    """Train a model and return the ref of its version and the run's result: by the command line, else by Python."""

    def by_command(model: str, recipe: str, dataset: Path, **options: Any) -> Trained:
        words = ["train", model, "--recipe", recipe, "--dataset", str(dataset), "--wait", "--json"]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
        command(settings, tmp_path, *words)
        run = relay.runs(model=model, limit=1)[0]
        return run.model, run.result()

    def by_python(model: str, recipe: str, dataset: Path, **options: Any) -> Trained:
        run = relay.train(model, recipe=recipe, dataset=dataset, **options)
        result = run.result(timeout=200)
        return run.model, result

    return by_command if settings.database_url.startswith("sqlite") else by_python


def command(settings: Settings, folder: Path, *words: str) -> None:
    """Run `torchrelay` with these words in a folder."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "torchrelay"), *words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, **settings.as_environment()}, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def exported(relay: Relay, settings: Settings, ref: str, tmp_path: Path) -> tuple[Path, Mapping[str, Any]]:
    """Fetch the file of a version, checked against its sha256, and its config."""
    [version] = [v for v in relay.versions(ref.partition("@")[0]) if v.ref == ref]
    assert version.weights is not None
    path = tmp_path / f"exported{Path(version.weights).suffix}"
    Artifacts(settings.artifacts_url).fetch(version.weights, path, version.sha256)
    return path, version.config


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def test_digits(relay: Relay, train: Train, settings: Settings, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    np.savez(tmp_path / "digits.npz", image=data.images.astype(np.float32), label=data.target)
    ref, result = train("digits", "image-classification", tmp_path / "digits.npz", epochs=20, promote="champion")
    assert ref == "digits@1"
    assert result["metrics"]["accuracy"] >= 0.97
    assert relay.aliases("digits") == {"champion": 1}

    batch = relay.submit_batch("digits@champion", [{"image": rows} for rows in data.images.tolist()])
    outputs = list(batch.results(timeout=100))
    path, config = exported(relay, settings, ref, tmp_path)
    with torch.inference_mode():
        bare = torch.export.load(str(path)).module()(torch.tensor(data.images, dtype=torch.float32)[:, None])
    probabilities, labels = bare.softmax(1).max(1)
    assert [o["label"] for o in outputs] == [config["classes"][i] for i in labels.tolist()]
    np.testing.assert_allclose([o["probability"] for o in outputs], probabilities, atol=1e-5)
    assert relay.job(relay.jobs(batch=batch.id, limit=1)[0].id).model == "digits@1"


def test_breast_cancer(relay: Relay, train: Train, settings: Settings, tmp_path: Path) -> None:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    names = [str(name) for name in data.feature_names]
    rows = [[*row, str(data.target_names[label])] for row, label in zip(data.data.tolist(), data.target, strict=True)]
    dataset = write_csv(tmp_path / "cancer.csv", [*names, "diagnosis"], rows)
    ref, result = train("cancer", "tabular-classification", dataset, target="diagnosis", seed=3)
    assert result["metrics"]["accuracy"] >= 0.95
    assert 0.9 < result["metrics"]["f1"] <= 1.0

    inputs = [dict(zip(names, row, strict=True)) for row in data.data.tolist()]
    outputs = list(relay.submit_batch(ref, inputs).results(timeout=100))
    path, config = exported(relay, settings, ref, tmp_path)
    bare = run_table(path, torch.tensor(data.data, dtype=torch.float32))
    probabilities, labels = bare.softmax(1).max(1)
    assert [o["label"] for o in outputs] == [config["classes"][i] for i in labels.tolist()]
    np.testing.assert_allclose([o["probability"] for o in outputs], probabilities, atol=1e-5)

    # A second version, not as good: promoted by mistake, and rolled back, while the worker runs.
    poor, _ = train("cancer", "tabular-classification", dataset, target="diagnosis", epochs=1)
    assert (ref, poor) == ("cancer@1", "cancer@2")
    served = []
    for move in (["promote", "cancer@1"], ["promote", "cancer@2"], ["rollback", "cancer"]):
        steer(relay, settings, tmp_path, *move)
        wanted = {"cancer": "cancer@1"}.get(move[1], move[1])
        # A client that has resolved the alias before uses it for some seconds more where another process has moved it.
        wait_until(lambda wanted=wanted: relay.submit("cancer@champion", inputs[0]).model == wanted, 10, "the move")
        job = relay.submit("cancer@champion", inputs[0])
        job.result(timeout=60)
        served.append(job.refresh().model)
    assert served == ["cancer@1", "cancer@2", "cancer@1"]
    assert [move.version for move in relay.alias_history("cancer")] == [1, 2, 1]
    assert relay.submit("cancer", inputs[0]).model == "cancer@2", "without an alias it is the newest"


def steer(relay: Relay, settings: Settings, folder: Path, move: str, what: str) -> None:
    """Move the alias `champion`: by the command line on SQLite, by Python on PostgreSQL."""
    if settings.database_url.startswith("sqlite"):
        command(settings, folder, "models", move, what, "--alias", "champion")
    elif move == "promote":
        relay.promote(what, alias="champion")
    else:
        relay.rollback(what, alias="champion")


def test_diabetes(relay: Relay, train: Train, settings: Settings, tmp_path: Path) -> None:
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    names = [str(name) for name in data.feature_names]
    rows = [[*row, value] for row, value in zip(data.data.tolist(), data.target.tolist(), strict=True)]
    dataset = write_csv(tmp_path / "diabetes.csv", [*names, "progression"], rows)
    ref, result = train("diabetes", "regression", dataset, target="progression")
    assert result["metrics"]["rmse"] <= 60

    outputs = list(relay.submit_batch(ref, data.data.tolist()).results(timeout=100))
    path, _ = exported(relay, settings, ref, tmp_path)
    bare = run_table(path, torch.tensor(data.data, dtype=torch.float32)).flatten()
    np.testing.assert_allclose(outputs, bare, rtol=1e-4)


def run_table(path: Path, numbers: torch.Tensor) -> torch.Tensor:
    """Run an exported tabular program bare: raw numbers, no categories."""
    with torch.inference_mode():
        program = torch.export.load(str(path)).module()
        bare: torch.Tensor = program(numbers, torch.zeros(len(numbers), 0, dtype=torch.int64))
    return bare


def test_translation(relay: Relay, train: Train, settings: Settings, tmp_path: Path) -> None:
    numbers = list(range(number_words.LIMIT))
    random.Random(1).shuffle(numbers)
    held_out, trained_on = numbers[:500], numbers[500:4500]
    for name, some in (("train", trained_on), ("held_out", held_out)):
        rows = [(number_words.english(n), number_words.german(n)) for n in some]
        write_csv(tmp_path / f"{name}.csv", ["source", "target"], rows)
    ref, result = train(
        "numbers", "translation", tmp_path / "train.csv", validation=str(tmp_path / "held_out.csv"), **TRANSLATION
    )
    batch = relay.submit_batch(ref, [number_words.english(n) for n in held_out])
    outputs = list(batch.results(timeout=150))
    right = sum(output == number_words.german(n) for output, n in zip(outputs, held_out, strict=True))
    assert right / len(held_out) >= 0.95, result

    path, config = exported(relay, settings, ref, tmp_path)
    translate = bare_translator(path, config["longest"])
    assert [translate(number_words.english(n)) for n in held_out[:50]] == outputs[:50]


def bare_translator(path: Path, longest: int) -> Callable[[str], str]:
    """Return a function that translates by transformers alone, from the exported file, one text at a time."""
    from safetensors import safe_open
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    with safe_open(str(path), "pt") as file:
        said = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tokenizer = Tokenizer.from_str(said["tokenizer"])
    document = json.loads(said["config"])
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**document)).eval()
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    model.tie_weights()

    def translate(source: str) -> str:
        ids = torch.tensor([tokenizer.encode(source).ids])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=1, do_sample=False, max_new_tokens=longest
            )
        return str(tokenizer.decode(out[0].tolist(), skip_special_tokens=True))

    return translate
