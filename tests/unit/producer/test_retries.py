"""What a client sees and asks of retries: backoff, attempts, running again by a filter. On both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from torchrelay import (
    AsyncRelay,
    Backoff,
    BatchNotFound,
    InvalidInput,
    Job,
    JobNotFound,
    JobState,
    ModelNotFound,
    Relay,
)
from torchrelay.retries import read_backoff
from torchrelay.settings import Settings
from torchrelay_storage.ids import Kind, read
from torchrelay_storage.job_error import JobError
from torchrelay_storage.states import End

PATIENT = Backoff(seconds=2, factor=3, longest=60, jitter=False)


@pytest.fixture
def relay(settings: Settings) -> Iterator[Relay]:
    with Relay(settings=settings) as relay:
        relay.register_model("digits", handler="digits", chunk_size=4)
        relay.register_model("other", handler="other", chunk_size=4)
        yield relay


@pytest.fixture
def hand(settings: Settings, hands: Callable[[Settings], Any]) -> Any:
    return hands(settings)


def states(jobs: list[Job]) -> list[str]:
    return [str(job.refresh().state) for job in jobs]


# --- backoff --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [PATIENT, {"seconds": 2, "factor": 3, "longest": 60, "jitter": False}])
def test_a_backoff_travels_with_the_jobs(relay: Relay, hand: Any, given: Backoff | Mapping[str, Any]) -> None:
    relay.submit("digits", 1, backoff=given)
    assert hand.take().backoff == PATIENT
    relay.submit_batch("digits", [1, 2], backoff=given)
    assert hand.take().backoff == PATIENT
    relay.submit("digits", 1, backoff=None)
    assert hand.take().backoff is None


def test_a_run_and_the_async_twin_take_one_too(relay: Relay, hand: Any, settings: Settings) -> None:
    columns = {"x": [1.0, 2.0, 3.0, 4.0], "y": ["a", "b", "a", "b"]}
    relay.train("new", recipe="tabular-classification", dataset=columns, target="y", backoff={"seconds": 7})
    assert hand.take().backoff == Backoff(seconds=7)

    async def main() -> None:
        async with AsyncRelay(settings=settings) as twin:
            await twin.submit("digits", 1, backoff=PATIENT)
            await twin.submit_batch("digits", [1], backoff={"seconds": 9})

    asyncio.run(main())
    assert [hand.take().backoff, hand.take().backoff] == [PATIENT, Backoff(seconds=9)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (2, "must be a Backoff, or a dict"),
        ("seconds=2", "must be a Backoff, or a dict"),
        ({"second": 2}, "no 'second'; it is made of seconds, factor, longest, jitter"),
        ({"seconds": -1}, "seconds must be seconds"),
        ({"seconds": [1]}, "seconds must be seconds"),
        ({"factor": 0.5}, "factor must be a number from 1"),
        ({"jitter": "yes"}, "jitter must be true or false"),
        (Backoff(longest=float("inf")), "longest must be seconds"),
    ],
)
def test_what_is_no_backoff_is_refused(relay: Relay, given: Any, words: str) -> None:
    for submit in (lambda: relay.submit("digits", 1, backoff=given),
                   lambda: relay.submit_batch("digits", [1], backoff=given)):  # fmt: skip
        with pytest.raises(InvalidInput, match=words):
            submit()
    assert relay.jobs() == []


def test_a_dict_may_have_some_of_the_parts() -> None:
    assert read_backoff({}) == Backoff()
    assert read_backoff({"longest": 5}) == Backoff(longest=5)
    assert read_backoff(None) is None


# --- attempts -------------------------------------------------------------------------------------------------------


def test_the_tries_of_a_job(relay: Relay, hand: Any) -> None:
    job = relay.submit("digits", 1)
    assert job.attempts() == []
    claim = hand.take()
    [running] = job.attempts()
    assert (running.number, running.outcome, running.worker, running.ended_at) == (1, "running", "w1", None)
    assert running.started_at is not None
    hand.end(claim, End.OPEN, "not yet")
    hand.run(End.SUCCEEDED)
    first, second = job.attempts()
    assert (first.number, first.outcome, first.worker) == (1, "failed", "w1")
    assert first.error == JobError("ValueError", "not yet", "tb")
    assert first.started_at is not None
    assert first.ended_at is not None
    assert first.ended_at >= first.started_at
    assert (second.number, second.outcome, second.error) == (2, "succeeded", None)


def test_the_tries_before_a_retry_stay(relay: Relay, hand: Any, settings: Settings) -> None:
    job = relay.submit("digits", 1, max_attempts=1)
    hand.run(End.FAILED)
    assert job.retry()
    assert job.failures == 0
    hand.run(End.SUCCEEDED)
    assert [(a.number, a.outcome) for a in job.attempts()] == [(1, "failed"), (2, "succeeded")]

    async def twin() -> None:
        async with AsyncRelay(settings=settings) as other:
            assert await (await other.job(job.id)).attempts() == job.attempts()

    asyncio.run(twin())


def test_a_worker_that_was_lost_says_how(relay: Relay, hand: Any) -> None:
    job = relay.submit("digits", 1)
    hand.take()
    hand.fleet.stop(hand.worker, "killed by SIGSEGV")
    hand.chunks.rescue(None)
    [lost] = job.attempts()
    assert (lost.outcome, lost.worker, lost.worker_ended) == ("lost", "w1", "killed by SIGSEGV")
    assert job.refresh().failures == 0
    [row] = relay.workers()
    assert row.ended == "killed by SIGSEGV"


def test_the_revision_that_computed_a_result(relay: Relay, hand: Any) -> None:
    job = relay.submit("digits", 1)
    assert job.handler_revision is None
    claim = hand.take()
    hand.fleet.serves(hand.worker, claim.version, "abc123")
    hand.end(claim, End.SUCCEEDED)
    assert job.refresh().handler_revision == "abc123"
    assert job.as_dict()["handler_revision"] == "abc123"


def test_attempts_of_a_job_that_is_gone(relay: Relay) -> None:
    job = relay.submit("digits", 1)
    job._row = replace(job._row, id=1)
    with pytest.raises(JobNotFound):
        job.attempts()


# --- run again ------------------------------------------------------------------------------------------------------


def failed(relay: Relay, hand: Any, model: str, n: int, **options: Any) -> list[Job]:
    jobs = [relay.submit(model, i, max_attempts=1, **options) for i in range(n)]
    hand.run(*[End.FAILED] * n)
    return jobs


def test_retry_by_model_state_batch_and_tenant(relay: Relay, hand: Any) -> None:
    ours, others = failed(relay, hand, "digits", 3), failed(relay, hand, "other", 2)
    acme = failed(relay, hand, "digits", 1, tenant="acme")
    batch = relay.submit_batch("digits", range(6), max_attempts=1)
    hand.run(End.FAILED, End.FAILED)
    cancelled = relay.submit("digits", 1)
    cancelled.cancel()

    assert relay.retry(tenant="acme") == 1
    assert states(acme) == ["queued"]
    assert relay.retry(model="other") == 2
    assert relay.retry(model="other") == 0
    assert states(others) == ["queued"] * 2
    assert states(ours) == ["failed"] * 3
    assert relay.retry(batch=batch.id, state="cancelled") == 0
    assert relay.retry(batch=batch.id, model="digits@1") == 6
    assert batch.counts().queued == 6
    assert relay.retry(state=("failed", "expired")) == 3
    assert cancelled.refresh().state is JobState.CANCELLED
    assert relay.retry(state="cancelled", model="digits") == 1
    assert cancelled.refresh().state is JobState.QUEUED


def test_what_retry_refuses(relay: Relay, hand: Any) -> None:
    [job] = failed(relay, hand, "digits", 1)
    for arguments, words in (
        ({}, "say which jobs"),
        ({"state": "running"}, "jobs that are running cannot be retried"),
        ({"state": ["failed", "succeeded"]}, "jobs that are succeeded cannot"),
        ({"state": "purple"}, "unknown state"),
        ({"state": []}, "names no state"),
    ):
        with pytest.raises(InvalidInput, match=words):
            relay.retry(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ModelNotFound):
        relay.retry(model="nope")
    with pytest.raises(BatchNotFound):
        relay.retry(batch="b_0000000000000")
    with pytest.raises(BatchNotFound, match="is the id of a job"):
        relay.retry(batch=job.id)
    assert states([job]) == ["failed"]


def test_retry_of_everything_takes_runs_along(relay: Relay, hand: Any) -> None:
    columns = {"x": [1.0, 2.0, 3.0, 4.0], "y": ["a", "b", "a", "b"]}
    run = relay.train("new", recipe="tabular-classification", dataset=columns, target="y")
    run.cancel()
    job = relay.submit("digits", 1)
    job.cancel()
    assert relay.retry(state="cancelled") == 2
    assert states([run, job]) == ["queued", "queued"]
    assert {hand.take().jobs[0].id for _ in range(2)} == {read(Kind.JOB, run.id), read(Kind.JOB, job.id)}


def test_the_async_twin_retries(relay: Relay, hand: Any, settings: Settings) -> None:
    failed(relay, hand, "digits", 2)

    async def main() -> int:
        async with AsyncRelay(settings=settings) as twin:
            with pytest.raises(InvalidInput):
                await twin.retry()
            return await twin.retry(model="digits")

    assert asyncio.run(main()) == 2
