"""A job that takes longer than Redis's visibility timeout runs once (what celery/celery#5935 is about)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chaos.journal import answer
from torchrelay import Relay
from torchrelay.settings import Settings

VISIBILITY = 3.0  # seconds
LONG = 12.0  # seconds that a job takes: four times as long


@pytest.mark.timeout(180)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_long_job_runs_exactly_once(settings: Settings, worker: Callable[..., Any], tmp_path: Path) -> None:
    chosen = {**settings.model_dump(exclude_none=True), "visibility_timeout": VISIBILITY}
    path = tmp_path / "runs.txt"
    with Relay(settings=Settings.load(**chosen)) as relay:
        relay.register_model("long", handler="long", config={"seconds": LONG}, chunk_size=1)
        for _ in range(2):  # the second would take what comes back
            worker(
                environment={"CHAOS_RUNS": str(path), "TORCHRELAY_VISIBILITY_TIMEOUT": str(VISIBILITY)},
                handlers={"long": "chaos.models:Long"},
            )
        jobs = [relay.submit("long", {"n": n}) for n in range(4)]
        assert [job.result(timeout=120) for job in jobs] == [answer(n) for n in range(4)]
    assert sorted(path.read_text().split()) == ["0", "1", "2", "3"]
