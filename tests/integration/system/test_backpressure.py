"""Limits on queued jobs, on both databases: who is refused, what is stored all the same, when there is room again."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from torchrelay import AsyncRelay, QueueFull, Relay
from torchrelay.settings import Settings


@pytest.fixture
def digits(relay: Relay) -> Relay:
    """A relay with the model `double`, of which ten jobs may wait."""
    relay.register_model("double", handler="double", chunk_size=4)
    relay.limit_model("double", 10)
    return relay


@pytest.fixture
def engine(relay: Relay) -> Iterator[Engine]:
    """The application's own way to the database."""
    url = relay._core.db.engine.url
    engine = create_engine(url, connect_args={} if url.drivername == "sqlite" else {"prepare_threshold": None})
    yield engine
    engine.dispose()


def queued(relay: Relay) -> int:
    return relay._core.jobs.queued()


def refused(work: Callable[[], Any]) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        work()
    return caught.value


def test_single_submits_stop_at_the_limit_and_go_on_when_it_is_lifted(digits: Relay) -> None:
    jobs = [digits.submit("double", n) for n in range(10)]
    full = refused(lambda: digits.submit("double", 10))
    assert "the queue of model 'double' has 10 of at most 10 jobs" in str(full)
    assert full.retry_after > 0
    assert queued(digits) == 10
    time.sleep(1.1)
    assert jobs[0].cancel()
    digits.submit("double", 11)  # within a second of the cancel at the latest
    digits.limit_model("double", None)
    for n in range(5):
        digits.submit("double", n)
    assert queued(digits) == 15
    digits.limit_model("double", 15)
    refused(lambda: digits.submit("double", 0))


def test_another_client_heeds_it_and_notices_that_it_was_lifted(digits: Relay, settings: Settings) -> None:
    with Relay(settings=settings) as other:
        for n in range(10):
            (digits, other)[n % 2].submit("double", n)
        for relay in (digits, other):
            assert _eventually_refused(relay, within=4) <= 1
        assert 10 <= queued(digits) <= 12, "overshot by what the other has submitted within a second"
        digits.limit_model("double", None)
        deadline = time.monotonic() + 5
        while True:
            try:
                other.submit("double", 0)
                break
            except QueueFull:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def _eventually_refused(relay: Relay, within: float) -> int:
    """How many jobs were taken before the first that was refused."""
    time.sleep(1.1)  # the counts of a second ago are not used any more
    for taken in range(100):
        try:
            relay.submit("double", taken)
        except QueueFull:
            return taken
    raise AssertionError("never refused")


def test_two_clients_overshoot_by_no_more_than_the_room_that_both_found(digits: Relay, settings: Settings) -> None:
    with Relay(settings=settings) as other:
        taken = {id(relay): 0 for relay in (digits, other)}
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            for relay in (digits, other):
                try:
                    relay.submit("double", 0)
                    taken[id(relay)] += 1
                except QueueFull:
                    time.sleep(0.01)
        assert 10 <= sum(taken.values()) == queued(digits) <= 20
        assert max(taken.values()) <= 10


def test_of_64_at_once_exactly_those_get_in_that_there_is_room_for(digits: Relay, settings: Settings) -> None:
    async def main() -> list[Any]:
        async with AsyncRelay(settings=settings) as relay:
            return await asyncio.gather(*(relay.submit("double", n) for n in range(64)), return_exceptions=True)

    told = asyncio.run(main())
    assert sum(isinstance(answer, QueueFull) for answer in told) == 54
    assert sum(not isinstance(answer, BaseException) for answer in told) == 10
    assert queued(digits) == 10


def test_the_limit_in_total(digits: Relay, settings: Settings) -> None:
    digits.register_model("other", handler="double")
    chosen = {**settings.model_dump(exclude_none=True), "max_queued": 12}
    with Relay(settings=Settings.load(**chosen)) as relay:
        relay.submit_batch("double", range(8))
        relay.submit_batch("other", range(3))
        assert "has 11 of at most 12 jobs (setting max_queued)" in str(
            refused(lambda: relay.submit_batch("other", range(2)))
        )
        relay.submit("double", 0)
        refused(lambda: relay.submit("double", 0))
        data = {"x": [1, 2, 3, 4], "y": ["a", "b", "a", "b"]}
        relay.train("digits", recipe="tabular-classification", dataset=data, target="y")
        assert queued(relay) == 12, "a training run is neither refused nor counted"


# --- batches ----------------------------------------------------------------------------------------------


def test_of_a_list_without_room_nothing_is_stored(digits: Relay) -> None:
    digits.submit_batch("double", range(6))
    for key in (None, "k"):
        full = refused(lambda key=key: digits.submit_batch("double", range(5), key=key))
        assert (full.batch, full.stored) == (None, 0)
    assert len(digits.batches()) == 1
    assert queued(digits) == 6
    whole = digits.submit_batch("double", range(4), key="k")
    assert digits.submit_batch("double", range(4), key="k").id == whole.id, "what is stored already needs no room"
    assert "11 never fit at once" in str(refused(lambda: digits.submit_batch("double", range(11))))


def test_a_list_whose_storing_breaks_off_gives_its_room_back(digits: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Exception):
        pass

    def extend(*_: Any) -> Any:
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(digits._core.jobs, "extend", extend)
        with pytest.raises(Broken) as held:
            digits.submit_batch("double", range(10))
    assert held.value is not None
    assert digits.submit_batch("double", range(10)).counts().total == 10


def test_a_stream_is_stored_as_far_as_there_is_room_and_says_so(digits: Relay) -> None:
    full = refused(lambda: digits.submit_batch("double", (n for n in range(25)), key="stream"))
    assert (full.stored, queued(digits)) == (10, 10)
    assert full.batch is not None
    batch = digits.batch(full.batch)
    assert (batch.counts().total, batch.counts().closed) == (10, False)
    assert f"The first 10 inputs are stored and run as batch {batch.id}, which is open" in str(full)
    again = refused(lambda: digits.submit_batch("double", (n for n in range(25)), key="stream"))
    assert (again.batch, again.stored) == (batch.id, 10)
    refused(lambda: digits.submit_batch("double", (n for n in range(25))))
    assert len(digits.batches()) == 1, "without any room not even the batch is"
    digits.limit_model("double", 100)
    whole = digits.submit_batch("double", (n for n in range(25)), key="stream")
    assert (whole.id, whole.counts().total, whole.counts().closed) == (batch.id, 25, True)
    assert batch.cancel() == 25


def test_an_asynchronous_stream_too(digits: Relay, settings: Settings) -> None:
    async def numbers() -> Any:
        for n in range(25):
            yield n

    async def main() -> tuple[QueueFull, int]:
        async with AsyncRelay(settings=settings) as relay:
            with pytest.raises(QueueFull) as caught:
                await relay.submit_batch("double", numbers())
            assert caught.value.batch is not None
            return caught.value, await (await relay.batch(caught.value.batch)).cancel()

    full, cancelled = asyncio.run(main())
    assert (full.stored, cancelled, queued(digits)) == (10, 10, 0)
    assert "a `key` would let the same inputs go on there" in str(full)


def test_inputs_in_the_object_store_are_not_left_there(digits: Relay, settings: Settings) -> None:
    large = b"x" * (settings.inline_limit + 1)
    digits.limit_model("double", 2)
    refused(lambda: digits.submit_batch("double", (large for _ in range(5))))
    refused(lambda: digits.submit("double", large))
    folder = Path(settings.artifacts_url.removeprefix("file://"))
    assert sum(path.is_file() for path in folder.rglob("*")) == 2


# --- the caller's own transaction -------------------------------------------------------------------------


def test_a_transaction_that_is_rolled_back_gives_its_room_back(digits: Relay, engine: Engine) -> None:
    for end in ("rollback", "close", "drop"):
        session = Session(engine)
        for n in range(10):
            digits.submit("double", n, session=session)
        refused(lambda session=session: digits.submit("double", 10, session=session))
        if end != "drop":
            getattr(session, end)()
        del session
        gc.collect()  # until then a session that was dropped holds its connection too
    with Session(engine) as session:
        for n in range(10):
            digits.submit("double", n, session=session)
        session.commit()
    refused(lambda: digits.submit("double", 0))
    assert queued(digits) == 10


def test_a_refusal_leaves_the_transaction_as_it_is(digits: Relay, engine: Engine) -> None:
    with Session(engine) as session:
        kept = [digits.submit("double", n, session=session) for n in range(9)]
        with session.begin_nested() as part:
            digits.submit("double", 9, session=session)
            refused(lambda: digits.submit("double", 10, session=session))
            part.rollback()
        session.commit()
    assert sorted(job.id for job in digits.jobs()) == sorted(job.id for job in kept)
    time.sleep(0.15)  # which of them a savepoint took back, the next count says
    digits.submit("double", 11)


def test_an_asynchronous_transaction_too(digits: Relay, settings: Settings) -> None:
    url = digits._core.db.engine.url
    driver = "sqlite+aiosqlite" if url.drivername == "sqlite" else "postgresql+psycopg"
    arguments = {} if url.drivername == "sqlite" else {"prepare_threshold": None}

    async def main() -> None:
        engine = create_async_engine(url.set(drivername=driver), connect_args=arguments)
        async with AsyncRelay(settings=settings) as relay:
            async with AsyncSession(engine) as session:
                for n in range(10):
                    await relay.submit("double", n, session=session)
                with pytest.raises(QueueFull):
                    await relay.submit("double", 10, session=session)
                await session.rollback()
            async with AsyncSession(engine) as session:
                await relay.submit("double", 0, session=session)
                await session.commit()
        await engine.dispose()

    asyncio.run(main())
    assert queued(digits) == 1


# --- with workers -----------------------------------------------------------------------------------------


def test_a_client_that_waits_as_told_gets_all_of_it_through(
    digits: Relay, start: Callable[..., Any], runs: Any
) -> None:
    """The loop of docs/applications.md."""
    start()
    digits.limit_model("double", 50)
    refusals, most = 0, 0
    while True:
        try:
            batch = digits.submit_batch("double", (n for n in range(200)), key="all")
            break
        except QueueFull as full:
            refusals += 1
            assert refusals < 60
            most = max(most, queued(digits))
            time.sleep(min(full.retry_after, 0.5))
    assert batch.wait(timeout=60).succeeded == 200
    assert sorted(runs.inputs()) == list(range(200))
    assert refusals > 0
    assert most <= 50


def test_a_batch_is_found_by_its_key(digits: Relay) -> None:
    batch = digits.submit_batch("double", range(3), key="k")
    store, model = digits._core.batches, digits._core.model("double").model
    found = store.of_key(model, "", "k")
    assert found is not None
    assert found == store.get(found.id)
    assert digits.batch(batch.id).id == batch.id
    assert store.of_key(model, "", "other") is None
    assert store.of_key(model, "tenant", "k") is None
