"""How ends are written down: the error as JSON, trimmed to the author's frames; whether and when it is tried again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrelay_storage.errors import Corrupt, InvalidInput, NotFound
from torchrelay_storage.options import DEFAULT_BACKOFF, Backoff
from torchrelay_storage.states import End
from torchrelay_worker.models.model import collate
from torchrelay_worker.models.residency import LoadFailed
from torchrelay_worker.pipeline.ledger import Ledger, Work
from torchrelay_worker.pipeline.outcomes import (
    TRACEBACK_LIMIT,
    BadOutput,
    Timeout,
    backoff,
    describe,
    failed,
    limit,
)
from worker_fakes import Loaded, Plus, chunk


def work(**options: Any) -> Work:
    [hold] = Ledger().claim([chunk(1, [1], token=4, **options)])
    return Work(hold, 100, hold.claimed.jobs[0].failures)


def caught(call: Any, *arguments: Any) -> BaseException:
    try:
        call(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("it did not raise")


def author(depth: int) -> None:
    if depth:
        author(depth - 1)
    raise ValueError("secret" * 500)


def test_the_traceback_is_the_authors() -> None:
    found = json.loads(describe(caught(collate, [torch.zeros(1), "x"])))
    assert found["type"] == "TypeError"
    assert "model.py" not in found["traceback"]
    assert "in caught" in found["traceback"]


def test_long_texts_are_cut() -> None:
    found = json.loads(describe(caught(author, 200)))
    assert len(found["message"]) == 1_000
    assert len(found["traceback"]) <= TRACEBACK_LIMIT + 1


def test_our_own_errors_show_their_cause() -> None:
    error = LoadFailed("model m@1 cannot be loaded")
    error.__cause__ = caught(author, 0)
    found = json.loads(describe(error))
    assert (found["type"], found["message"]) == ("LoadFailed", "model m@1 cannot be loaded")
    assert "in author" in found["traceback"]
    assert "traceback" not in json.loads(describe(Timeout("late")))
    assert json.loads(describe(KeyError()))["message"]


def test_the_backoff_is_the_jobs_else_the_models_else_the_default() -> None:
    class Patient(Plus):
        backoff = Backoff(seconds=7, factor=1, jitter=False)

    it = work(backoff=Backoff(seconds=3, factor=1, jitter=False))
    it.hold.resident = Loaded({1: Patient()}).pin(1)
    assert failed(it, ValueError()).retry_in == 3.0
    it = work()
    it.hold.resident = Loaded({1: Patient()}).pin(1)
    assert failed(it, ValueError()).retry_in == 7.0
    assert backoff(work()) == DEFAULT_BACKOFF


@given(st.integers(0, 200))
def test_a_failure_waits_no_longer_than_the_policy_lets_it(failures: int) -> None:
    retry_in = failed(work(max_attempts=1_000, failures=failures), ValueError()).retry_in
    assert retry_in is not None
    assert 0.0 <= retry_in <= min(DEFAULT_BACKOFF.longest, 2.0**failures)


def test_a_batch_may_take_the_shortest_of_its_jobs_timeouts() -> None:
    assert limit([work(timeout=5.0).hold, work(timeout=2.0).hold], Plus()) == 2.0
    assert limit([work(timeout=5.0).hold, work().hold], Plus()) == 5.0, "and not the model's, which is longer"
    assert limit([work().hold], Plus()) == Plus.timeout


@pytest.mark.parametrize("error", [InvalidInput("x"), Corrupt("x"), NotFound("x"), BadOutput("x"), Timeout("x")])
def test_what_would_fail_again_is_final(error: Exception) -> None:
    assert failed(work(), error).end is End.FAILED


def test_the_last_attempt_is_final() -> None:
    assert failed(work(max_attempts=3, failures=1), ValueError()).end is End.OPEN
    assert failed(work(max_attempts=3, failures=2), ValueError()).end is End.FAILED
    outcome = failed(work(), LoadFailed("x"))
    assert (outcome.end, outcome.chunk, outcome.token) == (End.OPEN, 1, 4)


def test_the_model_says_what_is_tried_again() -> None:
    class Choosy(Plus):
        retry_on = (OSError,)

    it = work()
    it.hold.resident = Loaded({1: Choosy()}).pin(1)
    assert failed(it, ValueError()).end is End.FAILED
    assert failed(it, ConnectionError()).end is End.OPEN
    assert failed(it, LoadFailed("x")).end is End.OPEN
