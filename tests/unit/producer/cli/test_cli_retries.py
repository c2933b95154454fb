"""Retries on the command line: --backoff, attempts in `status`, the dead letters, `retry` by filter, ended workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchrelay import Backoff, Relay
from torchrelay_storage.job_error import JobError
from torchrelay_storage.states import End

Cli = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("double")


# --- --backoff ------------------------------------------------------------------------------------------------------


def test_backoff_of_submit_batch_and_train(cli: Cli, hand: Any) -> None:
    words = "seconds=2, factor=3,longest=60,jitter=false"
    cli("submit", "double", "-i", "1", "--backoff", words)
    assert hand.take().backoff == Backoff(2, 3, 60, jitter=False)
    cli("batch", "double", "-", "--backoff", "seconds=0.5", stdin="1\n2\n")
    assert hand.take().backoff == Backoff(0.5)
    cli("submit", "double", "-i", "1")
    assert hand.take().backoff is None
    Path("data.csv").write_text("x,y\n" + "1,a\n2,b\n" * 4)
    cli("train", "new", "--recipe", "tabular-classification", "--dataset", "data.csv", "--target", "y",
        "--backoff", "jitter=TRUE,longest=9")  # fmt: skip
    assert hand.take().backoff == Backoff(longest=9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2", "--backoff is written as seconds=2,factor=3"),
        ("", "--backoff is written as"),
        ("second=2", "--backoff is written as"),
        ("seconds=2;factor=3", "seconds must be a number, not '2;factor=3'"),
        ("seconds=2,seconds=3", "has seconds twice"),
        ("seconds=soon", "seconds must be a number, not 'soon'"),
        ("jitter=2", "jitter is true or false"),
        ("factor=0", "factor must be a number from 1"),
        ("longest=nan", "longest must be seconds"),
    ],
)
def test_what_is_no_backoff(cli: Cli, double: Relay, text: str, words: str) -> None:
    for command in (["submit", "double", "-i", "1"], ["batch", "double", "-"]):
        answer = cli(*command, "--backoff", text, "--json", code=2, stdin="1\n")
        assert answer.error["type"] == "InvalidInput"
        assert words in answer.error["message"]
    assert double.jobs() == []


# --- attempts and dead letters --------------------------------------------------------------------------------------


def test_status_shows_the_attempts(cli: Cli, double: Relay, hand: Any) -> None:
    job = double.submit("double", 1)
    assert cli("status", job.id, "--json").json["attempts"] == []
    assert "outcome" not in cli("status", job.id).out
    hand.run(End.OPEN, words="not [yet]")
    claim = hand.take()
    hand.fleet.serves(hand.worker, claim.version, "abc123")
    hand.end(claim, End.SUCCEEDED)
    shown = cli("status", job.id, "--json").json
    assert (shown["model"], shown["version"], shown["handler_revision"]) == ("double@1", 1, "abc123")
    first, second = shown["attempts"]
    assert (first["number"], first["outcome"], first["worker"]) == (1, "failed", "w1")
    assert first["error"] == {"type": "ValueError", "message": "not [yet]", "traceback": "tb"}
    assert first["started_at"] <= first["ended_at"]
    assert (second["number"], second["outcome"], second["error"], second["worker_ended"]) == (
        2,
        "succeeded",
        None,
        None,
    )
    lines = cli("status", job.id).out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("attempt"))
    assert lines[header].split() == ["attempt", "started", "took", "worker", "outcome", "error"]
    assert lines[header + 1].split()[0] == "1"
    assert "ValueError: not [yet]" in lines[header + 1]
    assert "succeeded" in lines[header + 2]
    assert any(line.split() == ["handler", "revision", "abc123"] for line in lines)


def test_status_shows_how_a_worker_was_lost(cli: Cli, double: Relay, hand: Any) -> None:
    job = double.submit("double", 1)
    hand.take()
    hand.fleet.stop(hand.worker, "killed by SIGSEGV")
    hand.chunks.rescue(None)
    [lost] = cli("status", job.id, "--json").json["attempts"]
    assert (lost["outcome"], lost["worker_ended"]) == ("lost", "killed by SIGSEGV")
    assert "lost, killed by SIGSEGV" in cli("status", job.id).out
    assert "no worker is alive" in cli("workers").err
    words = cli("workers", "--all").out
    assert "how it ended" in words
    assert "killed by SIGSEGV" in words
    [worker] = cli("workers", "--all", "--json").json
    assert worker["ended"] == "killed by SIGSEGV"


def test_workers_that_are_alive_have_no_end(cli: Cli, hand: Any) -> None:
    assert "how it ended" not in cli("workers").out
    assert cli("workers", "--json").json[0]["ended"] is None


def test_status_of_a_run_has_attempts_too(cli: Cli, trainer: Any) -> None:
    name = trainer.submit()
    assert trainer.begin().fail(JobError("ValueError", "a nan", None), retry_in=0.0)
    [first] = cli("status", name, "--json").json["attempts"]
    assert (first["outcome"], first["error"]["message"]) == ("failed", "a nan")
    assert "ValueError: a nan" in cli("status", name).out


def test_the_dead_letters(cli: Cli, double: Relay, hand: Any) -> None:
    words = "x" * 70
    dead = double.submit("double", "bad", max_attempts=2)
    hand.run(End.OPEN, End.FAILED, words=words)
    waiting = double.submit("double", 1)
    answer = cli("list", "--state", "failed")
    [header, line] = answer.out.splitlines()
    assert header.split() == ["id", "state", "model", "priority", "age", "took", "attempts", "error"]
    assert line.startswith(dead.id)
    assert "2 of 2" in line
    assert f"ValueError: {words}" in line
    assert "torchrelay retry --state failed" in answer.err
    [shown] = cli("list", "--state", "failed", "--json").json
    assert (shown["failures"], shown["max_attempts"], shown["error"]["message"]) == (2, 2, words)
    everything = cli("list")
    assert waiting.id in everything.out
    assert words not in everything.out
    assert "retry" not in everything.err
    hand.run(End.SUCCEEDED)
    assert "attempts" not in cli("list", "--state", "succeeded").out


# --- retry ----------------------------------------------------------------------------------------------------------


def test_retry_by_filter(cli: Cli, double: Relay, hand: Any) -> None:
    double.register_model("other", handler="other")
    ours = [double.submit("double", i, max_attempts=1, tenant="acme") for i in range(3)]
    other = double.submit("other", 1, max_attempts=1)
    hand.run(*[End.FAILED] * 4)
    assert cli("retry", "--model", "double", "--tenant", "nobody", "--json").json["retried"] == 0
    answer = cli("retry", "--model", "double", "--state", "failed", "--json").json
    assert answer == {"retried": 3, "by_state": {"failed": 3}}
    assert {job.refresh().state for job in ours} == {"queued"}
    assert other.refresh().state == "failed"
    assert cli("retry", "--model", "other").out == "1 will run again\n"
    assert "nothing to retry" in cli("retry", "--tenant", "acme").err
    ours[0].cancel()
    answer = cli("retry", "--state", "failed", "--state", "cancelled", "--tenant", "acme", "--json").json
    assert answer == {"retried": 1, "by_state": {"failed": 0, "cancelled": 1}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say which jobs"),
        (["j_0000000000000", "--tenant", "acme"], "either ids, or options"),
        (["j_0000000000000", "--batch", "b_0000000000000"], "either ids, or options"),
        (["--state", "failed", "--state", "succeeded"], "--state succeeded: only failed"),
        (["--model", "nope"], "nope"),
        (["--batch", "b_0000000000000"], "b_0000000000000"),
        (["--batch", "j_0000000000000"], "j_0000000000000"),
        (["j_0000000000000"], "nothing was done"),
    ],
)
def test_what_retry_refuses(cli: Cli, double: Relay, hand: Any, arguments: list[str], words: str) -> None:
    job = double.submit("double", 1, max_attempts=1)
    hand.run(End.FAILED)
    assert words in cli("retry", *arguments, "--json", code=2).error["message"]
    assert job.refresh().state == "failed"
