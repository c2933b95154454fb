"""Limits on queued jobs: how they are set, what shows them, and what a command says where the queue is full."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from torchrelay import Relay

Cli = Callable[..., Any]


def test_a_limit_is_set_shown_and_lifted(cli: Cli, double: Relay) -> None:
    assert "at most" not in cli("models").out
    assert cli("models", "limit", "double", "5").out == "at most 5 jobs of double may wait\n"
    assert cli("models", "--json").json[0]["max_queued"] == 5
    [head, row] = cli("models").out.splitlines()
    assert "at most" in head
    assert row.split()[:4] == ["double@1", "double", "0", "5"]
    assert cli("models", "limit", "double", "0", "--json").json == {"model": "double", "max_queued": 0}
    assert "at most" in cli("models").out
    assert cli("models", "limit", "double", "none", "--json").json == {"model": "double", "max_queued": None}
    assert cli("models", "--json").json[0]["max_queued"] is None
    assert double.models()[0].newest.max_queued is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["double", "many"], "a limit is a whole number of jobs, or none, not 'many'"),
        (["double", "9999999999"], "a limit is a whole number of jobs from 0 to"),
        (["doubel", "5"], "did you mean double"),
        (["double"], "Missing argument 'N|none'"),
    ],
)
@pytest.mark.usefixtures("double")
def test_what_is_no_limit(cli: Cli, arguments: list[str], words: str) -> None:
    assert words in cli("models", "limit", *arguments, "--json", code=2).error["message"]


def test_a_submit_to_a_full_queue_says_when_to_try_again(cli: Cli, double: Relay) -> None:
    double.limit_model("double", 1)
    cli("submit", "double", "-i", "1", "--key", "first")
    answer = cli("submit", "double", "-i", "2", code=3)
    assert answer.out == ""
    assert answer.err.startswith("error: the queue of model 'double' has 1 of at most 1 jobs: there is no room")
    assert "try again in 5 s" in answer.err
    assert cli("submit", "double", "-i", "2", "--json", code=3).error == {
        "type": "QueueFull", "message": answer.err.removeprefix("error: ").strip(), "retry_after": 5.0, "stored": 0
    }  # fmt: skip
    cli("submit", "double", "-i", "1", "--key", "first")
    assert len(double.jobs()) == 1


def test_a_batch_that_fills_the_queue_goes_on_with_its_key(cli: Cli, double: Relay) -> None:
    lines = "".join(json.dumps(n) + "\n" for n in range(9))
    double.limit_model("double", 4)
    told = cli("batch", "double", "-", "--key", "k", "--json", stdin=lines, code=3).error
    assert (told["type"], told["stored"]) == ("QueueFull", 4)
    assert double.batch(told["batch"]).counts().total == 4
    assert f"run as batch {told['batch']}" in cli("batch", "double", "-", "--key", "k", stdin=lines, code=3).err
    cli("models", "limit", "double", "none")
    assert cli("batch", "double", "-", "--key", "k", "--json", stdin=lines).json["total"] == 9
