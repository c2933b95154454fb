"""Commands that look at training runs and steer them, over SQLite and a trainer that writes what runs write."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchrelay import Relay
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_reader import JobError
from torchrelay_storage.run_writer import Order

Cli = Callable[..., Any]


# --- status and list ---------------------------------------------------------------------------------------


def test_status_of_a_run_on_its_way(cli: Cli, trainer: Any) -> None:
    name = trainer.submit(timeout=600.0)
    queued = cli("status", name, "--json").json
    assert (queued["kind"], queued["state"], queued["model"]) == ("training", "queued", "digits")
    assert (queued["recipe"], queued["version"], queued["paused"]) == ("image-classification", None, False)
    writer = trainer.begin()
    trainer.report(writer, 10)
    writer.checkpoint(10, {"model": "file:///c/10.safetensors"}, 0.43, 2)
    shown = cli("status", name, "--json").json
    assert (shown["state"], shown["worker"]) == ("running", "trainer")
    assert shown["progress"] == {
        "phase": "training", "step": 10, "steps": 40, "epoch": 1, "epochs": 4, "examples_per_s": 1234.5, "eta": 30.0,
    }  # fmt: skip
    assert shown["metrics"]["accuracy"] == pytest.approx(0.7135, abs=1e-4)
    assert (shown["best"]["step"], shown["split"]) == (10, {"train": 80, "validation": 20})
    [checkpoint] = shown["checkpoints"]
    assert (checkpoint["step"], checkpoint["files"]) == (10, {"model": "file:///c/10.safetensors"})
    words = cli("status", name).out
    for word in ("running, training", "epoch 1 of 4, step 10 of 40, 1,234 examples/s, 30 s to go", "accuracy 0.7135",
                 "train 80, validation 20", "step 10 at ", "10 min"):  # fmt: skip
        assert word in words


def test_status_of_a_run_that_has_registered_its_model(cli: Cli, trainer: Any) -> None:
    name = trainer.train()
    shown = cli("status", name, "--json").json
    assert (shown["state"], shown["model"], shown["version"]) == ("succeeded", "digits@1", 1)
    assert shown["progress"]["eta"] is None
    assert cli("result", name, "--json").json["result"]["model"] == "digits"


def test_status_of_a_failed_run_has_its_error(cli: Cli, trainer: Any) -> None:
    name = trainer.submit()
    trainer.begin().fail(JobError("NonFinite", "the loss is NaN at step 7", "tb"), retry_in=None)
    words = cli("status", name).out
    assert "NonFinite: the loss is NaN at step 7" in words
    assert "failed" in words


def test_a_list_tells_runs_from_jobs(cli: Cli, relay: Relay, trainer: Any) -> None:
    job = relay.submit("double", 1).id
    assert "kind" not in cli("list").out
    run = trainer.submit()
    assert [(j["id"], j["kind"], j["model"]) for j in cli("list", "--json").json] == [
        (run, "training", "digits"), (job, "inference", "double@1"),
    ]  # fmt: skip
    assert "training" in cli("list").out
    assert "train:" not in cli("list").out, "a lane never shows"


def test_list_of_runs(cli: Cli, trainer: Any, relay: Relay) -> None:
    relay.submit("double", 1)
    done, other, waiting = trainer.train(), trainer.train("flowers"), trainer.submit()

    def names(*arguments: str) -> list[str]:
        return [run["id"] for run in cli("list", "--runs", "--json", *arguments).json]

    assert names() == [waiting, other, done]
    assert names("--model", "digits") == [waiting, done]
    assert names("--state", "succeeded") == [other, done]
    assert names("--limit", "1") == [waiting]
    assert names("--before", waiting, "--limit", "1") == [other]
    words = cli("list", "--runs", "--limit", "3")
    for word in ("digits@1", "flowers@1", "100 %", "image-classification", "queued"):
        assert word in words.out
    assert f"--before {done}" in words.err
    assert "torchrelay train" in cli("list", "--runs", "--model", "nothing").err
    assert "--runs goes with" in cli("list", "--runs", "--tenant", "acme", code=2).err


# --- metrics and logs --------------------------------------------------------------------------------------


def test_metrics(cli: Cli, trainer: Any) -> None:
    name = trainer.submit()
    assert "no metrics yet" in cli("metrics", name).err
    trainer.finish(trainer.begin())
    shown = cli("metrics", name, "--json").json
    assert (shown["id"], shown["model"]) == (name, "digits@1")
    assert len(shown["points"]) == 8 + 8 + 4 + 4
    assert shown["points"][0] == {"name": "learning_rate", "step": 5, "epoch": 0, "value": 1e-3}
    lines = cli("metrics", name).out.splitlines()
    assert lines[0].split() == ["step", "epoch", "train_loss", "validation_loss", "accuracy", "learning_rate"]
    assert [line.split()[:2] for line in lines[1:]] == [["10", "1"], ["20", "2"], ["30", "3"], ["40", "4"]]
    few = cli("metrics", name, "--limit", "1")
    assert few.out.splitlines()[1:] == lines[-1:]
    assert "3 rows before these" in few.err


def test_some_metrics(cli: Cli, trainer: Any) -> None:
    name = trainer.train()
    points = cli("metrics", name, "--name", "accuracy", "--json").json["points"]
    assert {point["name"] for point in points} == {"accuracy"}
    error = cli("metrics", name, "--name", "f1", "--json", code=2).error
    assert "no metric 'f1'" in error["message"]
    assert "accuracy" in error["message"]


def test_metrics_as_a_picture(cli: Cli, trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = trainer.train()
    answer = cli("metrics", name, "--plot", "run.png")
    assert answer.out == ""
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert cli("metrics", name, "--plot", "run.png", "--json").json["file"] == "run.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "torchrelay[plot]" in cli("metrics", name, "--plot", "run.png", "--json", code=2).error["message"]


def test_metrics_on_a_terminal_have_a_curve(trainer: Any, terminal: Callable[..., str]) -> None:
    shown = terminal("metrics", trainer.train())
    assert "validation loss" in shown
    assert "┤" in shown
    assert "accuracy" in shown


def test_logs(cli: Cli, trainer: Any) -> None:
    name = trainer.submit()
    assert "nothing yet" in cli("logs", name).err
    writer = trainer.begin()
    writer.log([(1_700_000_000.0 + i, f"line {i} [red]") for i in range(2_500)])
    lines = cli("logs", name).out.splitlines()
    assert lines == [f"line {i} [red]" for i in range(2_500)]
    assert cli("logs", name, "--tail", "2").out.splitlines() == lines[-2:]
    [last] = cli("logs", name, "--tail", "1", "--json").lines
    assert last == {"at": "2023-11-14T22:54:59.000Z", "line": "line 2499 [red]"}


def test_logs_are_followed_to_the_end(cli: Cli, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = trainer.submit()
    writer = trainer.begin()
    writer.log([(1.0, "first")])
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            writer.log([(2.0, "second")])
        else:
            writer.log([(3.0, "last")])
            trainer.finish(writer)

    monkeypatch.setattr("torchrelay.cli.runs.time.sleep", sleep)
    assert cli("logs", name, "--follow").out.splitlines() == ["first", "second", "last"]
    assert len(slept) == 2


@pytest.mark.parametrize("command", ["metrics", "logs"])
def test_an_id_that_is_no_run(cli: Cli, relay: Relay, command: str) -> None:
    job, batch = relay.submit("double", 1).id, relay.submit_batch("double", [1]).id
    for name in (job, batch, "j_0000000000000", "nonsense"):
        error = cli(command, name, "--json", code=2).error
        assert error["type"] == "JobNotFound"
        assert name in error["message"]


# --- watch -------------------------------------------------------------------------------------------------


def test_watch_of_a_run_tells_each_change_in_a_line(cli: Cli, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = trainer.submit()
    steps: list[Callable[[], object]] = []

    def begin() -> None:
        writer = trainer.begin()
        steps.extend([lambda: trainer.report(writer, 10), lambda: None, lambda: trainer.finish(writer)])

    steps.append(begin)
    monkeypatch.setattr("torchrelay.cli.live.time.sleep", lambda _: steps.pop(0)())
    lines = cli("watch", name).out.splitlines()
    assert lines[0] == f"{name} queued"
    assert lines[2].startswith(
        f"{name} running · training · epoch 1 of 4, step 10 of 40, 1,234 examples/s, 30 s to go · train_loss 0.3679, "
    )
    assert lines[-1].startswith(f"{name} succeeded · epoch 4 of 4, step 40 of 40 · ")
    assert lines[-1].endswith(" · digits@1")
    assert len(lines) == 4, "what did not change is told once"


def test_watch_of_a_run_as_json_lines(cli: Cli, trainer: Any) -> None:
    name = trainer.train()
    [line] = cli("watch", name, "--json").lines
    assert (line["id"], line["state"], line["model"]) == (name, "succeeded", "digits@1")
    assert line["metrics"]["accuracy"] > 0.9


def test_watch_of_a_run_that_fails(cli: Cli, trainer: Any) -> None:
    name = trainer.submit()
    trainer.begin().fail(JobError("OutOfMemory", "batch_size 4096 is too much"), retry_in=None)
    assert "OutOfMemory: batch_size 4096 is too much" in cli("watch", name, code=1).out
    assert cli("watch", name, "--json", code=1).lines[-1]["state"] == "failed"


def test_watch_of_a_run_draws_a_bar_and_a_curve(trainer: Any, terminal: Callable[..., str]) -> None:
    name = trainer.submit()
    writer = trainer.begin()
    for step in range(5, 25, 5):
        trainer.report(writer, step)
    shown = terminal("watch", name, "--every", "0.1", seen="50%", then=lambda: trainer.finish(writer))
    for word in (name, "50%", "epoch 2 of 4", "1,234 examples/s", "20 s to go", "accuracy", "validation loss", "┤",
                 "100%", "digits@1"):  # fmt: skip
        assert word in shown, word


# --- pause and resume, cancel and retry --------------------------------------------------------------------


def test_a_run_is_paused_and_goes_on(cli: Cli, trainer: Any) -> None:
    name = trainer.submit()
    writer = trainer.begin()
    assert cli("pause", name, "--json").json == {"run": name, "paused": True}
    shown = cli("status", name, "--json").json
    assert (shown["state"], shown["paused"]) == ("running", True)
    assert "pausing" in cli("list", "--runs").out
    assert writer.checkpoint(10, {}, None, 2)[0] is Order.PAUSE
    writer.hand_back()
    assert "paused" in cli("list", "--runs").out
    assert cli("resume", name).out == f"run {name} is resumed\n"
    assert cli("status", name, "--json").json["paused"] is False
    trainer.finish(trainer.begin())
    assert "has ended" in cli("pause", name, code=2).err
    assert cli("pause", "j_0000000000000", "--json", code=2).error["type"] == "JobNotFound"


def test_pause_of_a_job_that_is_no_run(cli: Cli, relay: Relay) -> None:
    job = relay.submit("double", 1).id
    assert "job of inference" in cli("pause", job, "--json", code=2).error["message"]


def test_a_run_is_cancelled_and_retried(cli: Cli, trainer: Any) -> None:
    name = trainer.submit()
    assert cli("cancel", name, "--json").json["cancelled"] == 1
    assert cli("status", name, "--json").json["state"] == "cancelled"
    assert cli("retry", name, "--json").json["retried"] == 1
    assert show(Kind.JOB, trainer.begin().hold.job) == name


def test_everything_shows_runs_too(cli: Cli, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = trainer.submit()

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchrelay.cli.live.time.sleep", interrupt)
    trainer.report(trainer.begin(), 10)
    done = trainer.train("flowers")
    [line] = cli("watch", "--json", code=130).lines
    assert [job["id"] for job in line["jobs"]] == [done, name]
    assert [(run["id"], run["progress"]["step"]) for run in line["runs"]] == [(name, 10)]
    assert [model["name"] for model in line["models"]] == ["flowers"], "lanes do not show"
    assert cli("watch", code=130).out == "0 waiting, 0 running, 1 workers, 1 training runs under way\n"
