"""Commands about jobs and batches, over SQLite and a worker that is a thread."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from torchrelay import Relay
from torchrelay.settings import Settings

Cli = Callable[..., Any]
Work = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("double")


def twice(value: Any) -> Any:
    if isinstance(value, str) and value == "bad":
        raise ValueError("a bad one")
    return value * 2


def echo(value: Any) -> Any:
    return value


def lines_file(folder: Path, values: list[Any]) -> str:
    path = folder / "inputs.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


# --- submit ------------------------------------------------------------------------------------------------


def test_submit_prints_the_id_and_nothing_else(cli: Cli, double: Relay) -> None:
    answer = cli("submit", "double", "--input", "21")
    assert answer.out.strip() == double.jobs()[0].id
    assert answer.err == ""


def test_submit_as_json(cli: Cli, double: Relay) -> None:
    answer = cli("submit", "double", "-i", "21", "--json")
    assert answer.json == {"id": double.jobs()[0].id, "state": "queued", "model": "double@1", "redis": True}
    assert answer.err == ""


def test_submit_and_wait_prints_the_result(cli: Cli, work: Work) -> None:
    with work(twice):
        assert cli("submit", "double", "-i", "21", "--wait").out == "42\n"
        answer = cli("submit", "double", "-i", '{"a": [1]}', "--wait", "--json", code=1)
    assert answer.error["type"] == "JobFailed"
    assert answer.error["kind"] == "TypeError"
    assert answer.out == ""


def test_every_option_of_submit_arrives(cli: Cli) -> None:
    name = cli(
        "submit", "double", "-i", "1", "--priority", "9", "--key", "k", "--not-before", "2100-01-01T00:00:00+00:00",
        "--expires-in", "60", "--timeout", "7", "--max-attempts", "5", "--metadata", '{"order": 17}',
        "--tenant", "acme",
    ).out.strip()  # fmt: skip
    shown = cli("status", name, "--json").json
    assert shown["state"] == "scheduled"
    assert (shown["priority"], shown["timeout"], shown["max_attempts"]) == (9, 7.0, 5)
    assert (shown["key"], shown["tenant"], shown["metadata"]) == ("k", "acme", {"order": 17})
    assert shown["not_before"] == "2100-01-01T00:00:00.000Z"
    words = cli("status", name).out
    assert "order" in words
    assert "2100-01-01" in words


def test_delay(cli: Cli) -> None:
    assert cli("submit", "double", "-i", "1", "--delay", "3600", "--json").json["state"] == "scheduled"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.json", b'{"a": 1}', {"a": 1}),
        ("x.txt", "grüß dich".encode(), "grüß dich"),
        ("x.png", b"\x89PNG\r\n\x1a\n123", {"$bytes": base64.b64encode(b"\x89PNG\r\n\x1a\n123").decode()}),
        ("x.bin", b"\0\1", {"$bytes": "AAE="}),
    ],
)
def test_inputs_from_files(cli: Cli, work: Work, tmp_path: Path, *, name: str, content: bytes, expected: Any) -> None:
    (tmp_path / name).write_bytes(content)
    with work(echo):
        assert cli("submit", "double", "-i", f"@{name}", "--wait", "--json").json["result"] == expected


def test_an_array_from_a_file_and_to_a_file(cli: Cli, work: Work, tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", numpy.arange(6, dtype="int16").reshape(2, 3))
    with work(twice):
        name = cli("submit", "double", "-i", "@x.npy").out.strip()
        answer = cli("result", name, "--wait", "--out", "y.npy", "--json").json
    assert answer == {"id": name, "state": "succeeded", "file": "y.npy"}
    result = numpy.load(tmp_path / "y.npy")
    assert result.dtype == numpy.int16
    assert result.tolist() == [[0, 2, 4], [6, 8, 10]]
    shown = cli("result", name, "--json").json["result"]["$array"]
    assert shown == {"dtype": "int16", "shape": [2, 3], "data": [[0, 2, 4], [6, 8, 10]]}


def test_an_input_from_standard_input(cli: Cli, work: Work) -> None:
    with work(twice):
        assert cli("submit", "double", "-i", "-", "--wait", stdin="[1]").out == "[1,1]\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["double", "-i", "not json"], "is not JSON"),
        (["double", "-i", "@missing.png"], "missing.png cannot be read"),
        (["double", "-i", "1", "--metadata", "[1]"], "--metadata must be a JSON object"),
        (["double", "-i", "1", "--priority", "11"], "priority"),
        (["double", "-i", "1", "--not-before", "tomorrow"], "--not-before must be a time"),
        (["double", "-i", "1", "--delay", "1", "--not-before", "1"], "delay and not_before"),
        (["doubel", "-i", "1"], "did you mean double"),
        (["double@7", "-i", "1"], "double@7"),
        (["double", "-i", "x" * 0], "is not JSON"),
    ],
)
def test_what_submit_refuses(cli: Cli, double: Relay, arguments: list[str], words: str) -> None:
    answer = cli("submit", *arguments, code=2)
    assert words in answer.err
    assert "Traceback" not in answer.err
    assert double.jobs() == []


def test_a_key_with_another_input(cli: Cli) -> None:
    first = cli("submit", "double", "-i", "1", "--key", "k").out
    assert cli("submit", "double", "-i", "1", "--key", "k").out == first
    error = cli("submit", "double", "-i", "2", "--key", "k", "--json", code=2).error
    assert (error["type"], error["key"], error["job"]) == ("KeyConflict", "k", first.strip())


def test_a_wait_that_is_over(cli: Cli) -> None:
    error = cli("submit", "double", "-i", "1", "--wait-limit", "0.1", "--json", code=1).error
    assert error["type"] == "WaitTimeout"


def test_without_redis_a_submit_is_stored_and_says_so(cli: Cli, double: Relay) -> None:
    dead = ["--broker", "redis://127.0.0.1:1/0"]
    answer = cli(*dead, "submit", "double", "-i", "1")
    assert "does not answer" in answer.err
    assert double.job(answer.out.strip()).state == "queued"
    assert cli(*dead, "submit", "double", "-i", "1", "--json").json["redis"] is False


# --- batch -------------------------------------------------------------------------------------------------


def test_a_batch_from_a_file(cli: Cli, double: Relay, work: Work, tmp_path: Path) -> None:
    file = lines_file(tmp_path, list(range(10)))
    answer = cli("batch", "double", file, "--priority", "7")
    batch = double.batch(answer.out.strip())
    assert batch.counts().total == 10
    assert batch.priority == 7
    with work(twice):
        batch.wait(20)
    lines = cli("result", batch.id).lines
    assert [line["result"] for line in lines] == [2 * i for i in range(10)]
    assert {line["state"] for line in lines} == {"succeeded"}


def test_a_batch_that_is_waited_for(cli: Cli, work: Work, tmp_path: Path) -> None:
    with work(twice):
        answer = cli("batch", "double", lines_file(tmp_path, [1, 2]), "--wait", "--json")
        assert answer.json["counts"]["succeeded"] == 2
        failing = lines_file(tmp_path, [1, "bad"])
        answer = cli("batch", "double", failing, "--wait", "--max-attempts", "1", code=1)
        assert "1 succeeded, 1 failed" in answer.out
        name = answer.out.split(":")[0]
        lines = cli("result", name, code=1).lines
        assert [line["state"] for line in lines] == ["succeeded", "failed"]
        assert lines[1]["error"] == {"type": "ValueError", "message": "a bad one"}
        assert cli("watch", name, "--json", code=1).lines[-1]["counts"]["failed"] == 1


def test_a_batch_from_a_stream_goes_on_under_its_key(cli: Cli, double: Relay) -> None:
    answer = cli("batch", "double", "-", "--key", "k", "--json", stdin="1\n\n2\nbroken\n", code=2)
    assert "line 4 of standard input is not JSON" in answer.error["message"]
    [batch] = double.batches()
    assert (batch.counts().total, batch.counts().closed) == (2, False)
    assert "open: its end is not written" in cli("status", batch.id).out
    words = cli("batch", "double", "-", "--key", "k", stdin="1\n2\n3\n")
    assert words.out.strip() == batch.id
    assert (batch.counts().total, batch.counts().closed) == (3, True)
    broken = cli("batch", "double", "-", stdin="1\n{", code=2)
    assert "what came before is stored" in broken.err


def test_a_file_with_a_bad_line_is_refused_whole(cli: Cli, double: Relay, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("1\n2\n{\n")
    assert "line 3 of bad.jsonl" in cli("batch", "double", "bad.jsonl", code=2).err
    assert double.batches() == []


def test_results_of_a_batch_that_goes_on(cli: Cli, tmp_path: Path) -> None:
    name = cli("batch", "double", lines_file(tmp_path, [1])).out.strip()
    answer = cli("result", name, "--json", code=1)
    assert answer.out == ""
    assert answer.error["type"] == "WaitTimeout"


def test_results_of_a_batch_to_a_file(cli: Cli, work: Work, tmp_path: Path) -> None:
    name = cli("batch", "double", lines_file(tmp_path, [1, 2])).out.strip()
    with work(twice):
        assert cli("result", name, "--wait", "--out", "out.jsonl").out == ""
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["result"] for line in written] == [2, 4]


# --- status, list, result ----------------------------------------------------------------------------------


def test_status_of_a_failed_job_has_the_traceback(cli: Cli, work: Work) -> None:
    with work(twice):
        name = cli("submit", "double", "-i", '"bad"', "--max-attempts", "1").out.strip()
        assert "failed with ValueError: a bad one" in cli("result", name, "--wait", code=1).err
    shown = cli("status", name, "--json").json
    assert shown["state"] == "failed"
    assert shown["error"] == {"type": "ValueError", "message": "a bad one", "traceback": "tb"}
    assert shown["worker"] == "thread"
    assert "ValueError: a bad one" in cli("status", name).out
    assert "ValueError" in cli("list").out


def test_status_of_a_batch(cli: Cli, tmp_path: Path) -> None:
    name = cli("batch", "double", lines_file(tmp_path, [1, 2, 3]), "--metadata", '{"a": 1}').out.strip()
    shown = cli("status", name, "--json").json
    assert (shown["state"], shown["total"], shown["counts"]["queued"]) == ("running", 3, 3)
    assert "0 of 3 ended" in cli("status", name).out


@pytest.mark.parametrize("command", ["status", "result", "cancel", "retry", "watch"])
@pytest.mark.parametrize("name", ["j_0000000000000", "b_0000000000000", "w_0000000000000", "nonsense"])
def test_an_id_that_is_none(cli: Cli, command: str, name: str) -> None:
    error = cli(command, name, "--json", code=2).error
    assert error["type"] in ("JobNotFound", "BatchNotFound")
    assert name in error["message"]


def test_list_filters_and_pages(cli: Cli, double: Relay, tmp_path: Path) -> None:
    double.register_model("other", handler="other")
    jobs = [double.submit("double", i).id for i in range(5)]
    other = double.submit("other", 1, tenant="acme").id
    batch = cli("batch", "double", lines_file(tmp_path, [7])).out.strip()
    double.job(jobs[0]).cancel()

    def names(*arguments: str) -> list[str]:
        return [job["id"] for job in cli("list", "--json", *arguments).json]

    everything = names()
    assert everything[1:] == [other, *reversed(jobs)]
    assert names("--limit", "2") == everything[:2]
    assert names("--limit", "2", "--before", everything[1]) == everything[2:4]
    assert names("--model", "other") == [other]
    assert names("--tenant", "acme") == [other]
    assert names("--batch", batch) == everything[:1]
    assert names("--state", "cancelled") == [jobs[0]]
    assert names("--state", "cancelled", "--state", "queued") == everything
    words = cli("list", "--limit", "2")
    assert other in words.out
    assert f"--before {everything[1]}" in words.err
    assert "no job is like this" in cli("list", "--state", "failed").err
    assert cli("list", "--model", "nope", code=2).out == ""
    assert "'purple'" in cli("list", "--state", "purple", "--json", code=2).error["message"]


def test_list_of_batches(cli: Cli, double: Relay, tmp_path: Path) -> None:
    double.register_model("other", handler="other")
    one, two = double.submit_batch("double", [1, 2], key="nightly"), double.submit_batch("other", [3])
    assert [b["id"] for b in cli("list", "--batches", "--json").json] == [two.id, one.id]
    assert [b["id"] for b in cli("list", "--batches", "--json", "--model", "double").json] == [one.id]
    assert [b["id"] for b in cli("list", "--batches", "--json", "--before", two.id).json] == [one.id]
    words = cli("list", "--batches", "--limit", "2")
    assert "nightly" in words.out
    assert f"--before {one.id}" in words.err
    assert "there is no batch" in cli("list", "--batches", "--before", one.id).err
    assert "--batches goes with" in cli("list", "--batches", "--state", "failed", code=2).err


def test_a_result_that_cannot_be_written(cli: Cli, double: Relay, work: Work) -> None:
    job = double.submit("double", 1)
    with work(twice):
        job.wait(20)
    assert "cannot be written" in cli("result", job.id, "--out", "missing/folder", code=2).err


def test_result_of_bytes(cli: Cli, work: Work, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff\xe0rest")
    with work(echo):
        name = cli("submit", "double", "-i", "@x.jpg").out.strip()
        cli("result", name, "--wait", "--out", "y.jpg")
    assert (tmp_path / "y.jpg").read_bytes() == b"\xff\xd8\xff\xe0rest"


def test_result_of_a_job_that_is_not_done(cli: Cli) -> None:
    name = cli("submit", "double", "-i", "1").out.strip()
    answer = cli("result", name, code=1)
    assert "no result yet" in answer.err
    assert answer.out == ""


# --- cancel and retry --------------------------------------------------------------------------------------


def test_cancel_and_retry(cli: Cli, double: Relay, tmp_path: Path) -> None:
    one, two = (cli("submit", "double", "-i", str(i)).out.strip() for i in range(2))
    batch = cli("batch", "double", lines_file(tmp_path, [1, 2, 3])).out.strip()
    assert cli("cancel", one, batch, "--json").json == {"cancelled": 4, "by_id": {one: 1, batch: 3}}
    again = cli("cancel", one, batch)
    assert again.out == "0 cancelled\n"
    assert f"{one} had nothing to cancel" in again.err
    assert cli("result", one, "--json", code=1).error["type"] == "JobCancelled"
    assert cli("retry", one, two, "--json").json == {"retried": 1, "by_id": {one: 1, two: 0}}
    assert "nothing to retry" in cli("retry", two).err
    assert cli("retry", "--state", "cancelled", "--batch", batch, "--json").json["retried"] == 3
    assert double.batch(batch).counts().queued == 3


def test_retry_of_all_that_failed(cli: Cli, double: Relay, work: Work, tmp_path: Path) -> None:
    failing = [double.submit("double", "bad", max_attempts=1) for _ in range(3)]
    batch = double.batch(cli("batch", "double", lines_file(tmp_path, ["bad", 1]), "--max-attempts", "1").out.strip())
    with work(twice):
        for job in failing:
            job.wait(20)
        batch.wait(20)
    assert cli("retry", batch.id, "--json").json["retried"] == 1
    assert cli("retry", "--state", "failed", "--model", "double", "--json").json["by_state"] == {"failed": 3}
    assert {job.refresh().state for job in failing} == {"queued"}


def test_nothing_is_cancelled_where_one_id_is_unknown(cli: Cli, double: Relay) -> None:
    name = cli("submit", "double", "-i", "1").out.strip()
    for unknown in ("j_0000000000000", "b_0000000000000"):
        assert "nothing was done" in cli("cancel", name, unknown, code=2).err
    assert double.job(name).state == "queued"


@pytest.mark.parametrize(
    "arguments",
    [[], ["j_0000000000000", "--state", "failed"], ["j_0000000000000", "--model", "double"], ["--state", "running"]],
)
def test_what_retry_refuses(cli: Cli, arguments: list[str]) -> None:
    assert cli("retry", *arguments, "--json", code=2).error["type"] == "InvalidInput"


# --- watch -------------------------------------------------------------------------------------------------


def test_watch_ends_with_the_job(cli: Cli, double: Relay, work: Work) -> None:
    job = double.submit("double", 1)
    with work(twice):
        words = cli("watch", job.id, "--every", "0.1").out.splitlines()
    assert words[-1] == f"{job.id} succeeded"
    failed = double.submit("double", "bad", max_attempts=1)
    with work(twice):
        assert cli("watch", failed.id, "--every", "0.1", "--json", code=1).lines[-1]["state"] == "failed"


def test_watch_ends_with_the_batch(cli: Cli, double: Relay, work: Work) -> None:
    batch = double.submit_batch("double", range(20))
    with work(twice):
        shown = cli("watch", batch.id, "--every", "0.1", "--json").lines
    assert shown[-1]["done"] is True
    assert len({json.dumps(line) for line in shown}) == len(shown), "only what changed is told"
    assert "20/20 20 succeeded" in cli("watch", batch.id).out


def test_watch_everything_until_it_is_interrupted(
    cli: Cli, double: Relay, monkeypatch: pytest.MonkeyPatch, sqlite_settings: Settings
) -> None:
    double.submit("double", 1)

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchrelay.cli.live.time.sleep", interrupt)
    assert cli("watch", code=130).out == "1 waiting, 0 running, 0 workers\n"
    [line] = cli("watch", "--json", code=130).lines
    assert (line["waiting"], line["models"][0]["name"], len(line["jobs"])) == (1, "double", 1)
