"""The pipeline put together, in this process, on a real database and without Redis: a device that stands still."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from servers import wait_until
from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.pipeline import standstill
from torchrelay_worker.pipeline.pipeline import Pipeline, Road, Setup

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def test_a_device_that_stands_still_with_work_waiting_is_reported(
    settings: Settings, relay: Relay, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standstill, "STANDSTILL_SECONDS", 0.2)
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    relay.register_model("waits", handler="waits")
    fatal: list[BaseException] = []
    setup = Setup(
        database=database,
        artifacts=Artifacts(settings.artifacts_url),
        handlers=Handlers({"waits": "integration.inner_models:Waits"}),
        weights_folder=tmp_path / "weights",
        device=torch.device("cpu"),
        worker=Fleet(database).register("w", host="h", pid=1, device="cpu").id,
        inline_limit=settings.inline_limit,
        grace=5.0,
    )
    pipeline = Pipeline(setup, Road(is_up=lambda: False), fatal.append)
    go_on = threading.Event()
    next_batch = pipeline.batcher.next_batch

    def stuck(*arguments: Any) -> Any:
        if pipeline.batcher.counts():
            go_on.wait(30)
        return next_batch(*arguments)

    monkeypatch.setattr(pipeline.batcher, "next_batch", stuck)
    with pipeline:
        try:
            assert pipeline.report()["still"] is None
            job = relay.submit("waits", 3)
            wait_until(pipeline.batcher.counts, 20, "an input that waits")
            wait_until(lambda: pipeline.report()["still"], 20, "the report")
            assert "device" in str(pipeline.report()["still"])
        finally:
            go_on.set()
        assert job.result(timeout=20) == 6
        assert pipeline.report()["still"] is None
    assert not fatal
