"""The window and the turns, through real workers: what is urgent goes next, and nobody waits for a large batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import text

from servers import wait_until
from torchrelay import Relay
from torchrelay.broker import Broker

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
URGENT, SINGLE = 1_000_001, 1_000_002


def redis_bytes(broker: Broker) -> int:
    return int(broker.redis.info("memory")["used_memory"])


@ON_SQLITE
def test_a_window_is_in_redis_whatever_waits(relay: Relay) -> None:
    relay.register_model("double", handler="double")
    broker = relay._core.broker
    relay.submit_batch("double", range(10))
    before = redis_bytes(broker)
    batch = relay.submit_batch("double", range(100_000))
    assert batch.counts().queued == 100_000
    wait_until(lambda: sum(broker.depths("torchrelay.double").values()) > 0, 10, "the window")
    assert sum(broker.depths("torchrelay.double").values()) <= 64
    assert redis_bytes(broker) - before < 1_000_000


@ON_SQLITE
def test_urgent_jobs_run_next_and_late_ones_soon(relay: Relay, start: Callable[..., Any], runs: Any) -> None:
    relay.register_model("slow", handler="slow", config={"seconds": 0.02}, chunk_size=16)
    start()
    low = relay.submit_batch("slow", range(10_000), priority=0)
    wait_until(lambda: len(runs.inputs()) > 100, 60, "the batch running")
    relay.submit("slow", URGENT, priority=9).result(timeout=60)
    seen = runs.inputs()
    at = seen.index(URGENT)
    # What the worker held when it came: two chunks, and the device batches that were under way.
    assert at - 100 < 400, f"{at} jobs ran before it"
    assert low.counts().open > 5_000
    single = relay.submit("slow", SINGLE, priority=0)
    single.result(timeout=60)
    assert low.counts().open > 3_000, "it did not wait for the batch before it"
    other = relay.submit_batch("slow", range(20_000, 20_400), priority=0)
    assert other.wait(timeout=90).succeeded == 400
    assert low.counts().open > 1_000, "two batches proceed side by side"
    low.cancel()


@ON_SQLITE
def test_a_model_that_had_no_room_is_asked_for_as_soon_as_it_has(relay: Relay, start: Callable[..., Any]) -> None:
    relay.register_model("double", handler="double")  # with room all the time, and nothing to do
    relay.register_model("slow", handler="slow", config={"seconds": 0.005}, chunk_size=8)
    start()
    relay.submit("slow", 0).result(timeout=60)
    batch = relay.submit_batch("slow", range(8 * 200))  # two device batches are held at first, for a few ms
    assert batch.wait(timeout=60).succeeded == 8 * 200
    ends = text("SELECT finished_at FROM jobs WHERE batch IS NOT NULL ORDER BY finished_at")
    seen = relay._core.db.query(lambda connection: connection.execute(ends).scalars().all())
    gaps = [after - before for before, after in pairwise(seen)]
    assert max(gaps) < 0.6, "Redis was asked for the other model alone, for a second"
