"""`torchrelay train`: what is submitted, what is refused, and waiting for it, with a trainer that trains nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchrelay import Relay
from torchrelay.cli.train import pairs, value_of
from torchrelay_storage.errors import InvalidInput
from torchrelay_storage.job_reader import JobError

Cli = Callable[..., Any]


@pytest.fixture
def table(tmp_path: Path, cli: Cli) -> str:
    """A small dataset in the working directory."""
    (tmp_path / "flowers.csv").write_text("length,width,kind\n1,2,a\n2,3,b\n3,4,a\n4,5,b\n")
    return "flowers.csv"


@pytest.fixture
def pictures(tmp_path: Path, cli: Cli) -> str:
    """The same for the trainer's recipe."""
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode())
    return "pictures"


# --- submitting --------------------------------------------------------------------------------------------


def test_train_prints_the_id_and_nothing_else(cli: Cli, relay: Relay, table: str) -> None:
    answer = cli("train", "iris", "--recipe", "tabular-classification", "--dataset", table, "--target", "kind")
    [run] = relay.runs()
    assert answer.out.strip() == run.id
    assert "torchrelay watch" in answer.err
    assert (run.model, run.recipe, run.state) == ("iris", "tabular-classification", "queued")
    assert run.hyperparameters["target"] == "kind"
    assert run.spec.dataset.format == "csv"


def test_train_as_json(cli: Cli, relay: Relay, table: str) -> None:
    answer = cli("train", "iris", "-r", "regression", "-d", table, "--target", "length", "--json")
    assert answer.json == {
        "id": relay.runs()[0].id, "kind": "training", "state": "queued", "model": "iris", "recipe": "regression",
        "redis": True,
    }  # fmt: skip
    assert answer.err == ""


def test_every_option_arrives(cli: Cli, relay: Relay, table: str, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"length": 1, "width": 2, "kind": "a"}\n')
    name = cli(
        "train", "iris", "--recipe", "tabular-classification", "--dataset", table, "--validation", "other.jsonl",
        "--split", "0.3", "--no-stratify", "--seed", "7", "--devices", "2", "--precision", "bf16",
        "--no-deterministic", "--checkpoint-steps", "50", "--checkpoint-minutes", "1.5", "--keep-checkpoints", "3",
        "--promote", "champion", "--priority", "9", "--key", "nightly", "--not-before", "2100-01-01T00:00:00+00:00",
        "--timeout", "600", "--max-attempts", "5", "--metadata", '{"order": 17}', "--tenant", "acme",
        "--target", "kind", "--epochs=3", "--learning-rate", "1e-2", "--hidden", "[8, 4]", "--patience", "none",
    ).out.strip()  # fmt: skip
    run = relay.run(name)
    spec = run.spec
    assert (spec.split.fraction, spec.split.stratify, spec.seed, spec.devices) == (0.3, False, 7, 2)
    assert (spec.precision, spec.deterministic, spec.promote) == ("bf16", False, "champion")
    assert (spec.checkpoints.steps, spec.checkpoints.minutes, spec.checkpoints.keep) == (50, 1.5, 3)
    assert spec.validation is not None
    assert spec.validation.format == "jsonl"
    assert (run.priority, run.key, run.max_attempts, run.tenant) == (9, "nightly", 5, "acme")
    assert (run.metadata, run.state) == ({"order": 17}, "scheduled")
    chosen = {name: spec.hyperparameters[name] for name in ("epochs", "learning_rate", "hidden", "patience")}
    assert chosen == {"epochs": 3, "learning_rate": 0.01, "hidden": [8, 4], "patience": None}


def test_a_split_column(cli: Cli, relay: Relay, table: str) -> None:
    cli("train", "iris", "-r", "tabular-classification", "-d", table, "--target", "kind", "--split-column", "part")
    assert relay.runs()[0].spec.split.column == "part"


def test_without_redis_a_run_is_stored_and_says_so(cli: Cli, relay: Relay, pictures: str) -> None:
    answer = cli("--broker", "redis://127.0.0.1:1/0", "train", "digits", "-r", "image-classification", "-d", pictures)
    assert "does not answer" in answer.err
    assert relay.run(answer.out.strip()).state == "queued"


TRAIN = ["train", "iris", "--recipe", "tabular-classification", "--dataset", "flowers.csv", "--target", "kind"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TRAIN[:2], "--dataset", "flowers.csv"], "Missing option '--recipe'"),
        ([*TRAIN[:4]], "Missing option '--dataset'"),
        ([*TRAIN[:6]], "needs target"),
        ([*TRAIN, "--epoch", "3"], "did you mean 'epochs'"),
        ([*TRAIN, "--promot", "champion"], "did you mean 'promote'"),
        ([*TRAIN, "--epochs", "many"], "epochs must be a whole number"),
        ([*TRAIN, "--epochs"], "epochs must be a whole number"),
        ([*TRAIN, "--epochs", "3", "4"], "'4' belongs to no option"),
        ([*TRAIN, "--epochs", "3", "--epochs", "4"], "epochs is there twice"),
        ([*TRAIN, "--promote", "7"], "an alias has"),
        ([*TRAIN, "--precision", "fp8"], "precision cannot be 'fp8'"),
        ([*TRAIN, "--metadata", "[1]"], "--metadata must be a JSON object"),
        ([*TRAIN, "--priority", "11"], "priority"),
        ([*TRAIN[:3], "tabular-classifier", *TRAIN[4:]], "did you mean tabular-classification"),
        ([*TRAIN[:5], "missing.csv", *TRAIN[6:]], "missing.csv"),
        (["train", "--epochs", "3", *TRAIN[1:]], "the model's name comes first"),
        (["train", "Iris!", *TRAIN[2:]], "a model's name has"),
    ],
)
def test_what_train_refuses(cli: Cli, relay: Relay, table: str, arguments: list[str], words: str) -> None:
    error = cli(*arguments, "--json", code=2).error
    assert words in error["message"]
    assert relay.runs() == []


# --- hyperparameters ---------------------------------------------------------------------------------------


def test_pairs() -> None:
    words = ["--learning-rate", "1e-3", "--epochs=20", "--augment", "--shift", "-3", "--note=", "--mirror"]
    assert pairs(words) == {
        "learning_rate": "1e-3", "epochs": "20", "augment": "true", "shift": "-3", "note": "", "mirror": "true",
    }  # fmt: skip
    for bad in (["3"], ["--"], ["--=3"], ["--a", "1", "--a=2"], ["--a-b", "1", "--a_b", "2"], ["-x", "1"]):
        with pytest.raises(InvalidInput):
            pairs(bad)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20", 20),
        ("1e-3", 0.001),
        ("true", True),
        ("[64, 32]", [64, 32]),
        ('{"layers": 2}', {"layers": 2}),
        ('"20"', "20"),
        ("null", None),
        ("none", None),
        ("cosine", "cosine"),
        ("[64", "[64"),
    ],
)
def test_values_are_json_where_they_are_json(text: str, value: Any) -> None:
    assert value_of("x", text, {}) == value


def test_what_is_to_be_text_stays_text() -> None:
    assert value_of("target", "1", {"target": {"type": "string"}}) == "1"
    assert value_of("target", "none", {"target": {"type": "string"}}) == "none"


def test_a_value_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    assert value_of("config", "@config.json", {}) == {"num_hidden_layers": 2}


# --- waiting -----------------------------------------------------------------------------------------------


def run_at_the_first_look(trainer: Any, monkeypatch: pytest.MonkeyPatch, do: Callable[[Any], object]) -> None:
    monkeypatch.setattr("torchrelay.cli.live.time.sleep", lambda _: do(trainer.begin()))


def test_wait_shows_the_run_until_it_ends(
    cli: Cli, trainer: Any, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_at_the_first_look(trainer, monkeypatch, trainer.finish)
    answer = cli("train", "digits", "-r", "image-classification", "-d", pictures, "--wait")
    first, last = answer.out.splitlines()
    assert first.endswith(" queued")
    assert last.endswith("digits@1")
    assert "waiting" in answer.err
    lines = cli("train", "digits", "-r", "image-classification", "-d", pictures, "--wait", "--json").lines
    assert [line["state"] for line in lines] == ["queued", "succeeded"]
    assert (lines[-1]["version"], lines[-1]["metrics"]["accuracy"]) == (2, pytest.approx(0.993, abs=1e-3))


def test_wait_for_a_run_that_fails(cli: Cli, trainer: Any, pictures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = JobError("InvalidDataset", "row 7 of column 'image' is no picture")
    run_at_the_first_look(trainer, monkeypatch, lambda writer: writer.fail(error, retry_in=None))
    answer = cli("train", "digits", "-r", "image-classification", "-d", pictures, "--wait", code=1)
    assert "InvalidDataset: row 7 of column 'image' is no picture" in answer.out


def test_a_wait_that_is_over(cli: Cli, relay: Relay, pictures: str) -> None:
    arguments = ["train", "digits", "-r", "image-classification", "-d", pictures, "--wait-limit", "0.1"]
    answer = cli(*arguments, "--json", code=1)
    [run] = relay.runs()
    assert answer.error["type"] == "WaitTimeout"
    assert run.id in answer.error["message"]
    assert run.state == "queued"


def test_an_interrupted_wait_leaves_the_run(
    cli: Cli, relay: Relay, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchrelay.cli.live.time.sleep", interrupt)
    answer = cli("train", "digits", "-r", "image-classification", "-d", pictures, "--wait", code=130)
    [run] = relay.runs()
    assert f"torchrelay cancel {run.id}" in answer.err
    assert run.state == "queued"


def test_wait_draws_on_a_terminal(trainer: Any, pictures: str, terminal: Callable[..., str], tmp_path: Path) -> None:
    shown = terminal(
        "--artifacts", f"file://{tmp_path}/artifacts", "train", "digits", "-r", "image-classification", "-d",
        str(tmp_path / pictures), "--wait", seen="queued", then=lambda: trainer.finish(trainer.begin()),
    )  # fmt: skip
    for word in ("digits@1", "100%", "accuracy", "validation loss", "┤"):
        assert word in shown, word
