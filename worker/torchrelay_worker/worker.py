"""The inner process: Celery's consumer and the device. Started by the supervisor, and ends when that is gone.

Starts and stops everything, in order. Not here: the heartbeat and being replaced (`supervisor`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

import structlog
import torch

from torchrelay.announcer import Announcer, AnnouncerThread
from torchrelay.broker import Broker, make_app
from torchrelay.settings import Settings
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, RelayError, SchemaMismatch, Unreachable
from torchrelay_storage.registry import Registry
from torchrelay_worker import logs
from torchrelay_worker.arguments import parse, resolve_device
from torchrelay_worker.blackbox import BlackBox
from torchrelay_worker.exits import EXIT_LOST, EXIT_RECYCLE, EXIT_USAGE
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.pipeline.consumer import Consumer
from torchrelay_worker.pipeline.device import DeviceLost
from torchrelay_worker.pipeline.pipeline import Pipeline, Road, Setup
from torchrelay_worker.pipeline.silence import Silence
from torchrelay_worker.recycling import Recycling
from torchrelay_worker.reports import Reports, follow_supervisor, wait_to_go
from torchrelay_worker.training.catalog import Recipes
from torchrelay_worker.training.gate import Gate
from torchrelay_worker.training.lanes import Lanes
from torchrelay_worker.training.launcher import Launcher, Site

log = structlog.get_logger("torchrelay.worker")

FLUSH_SECONDS = 5.0  # to record what ran before the device was lost
CELERY_SECONDS = 5.0  # that Celery has to end after the pipeline; a silent Redis would hold it for ever
GARBAGE = 20_000  # new containers after which Python looks for cycles among them, instead of 700
LAST_WORDS = 2_000  # characters: one write that a pipe takes whole


def _gate(settings: Settings, arguments: argparse.Namespace) -> contextlib.AbstractContextManager[Gate | None]:
    """Return the gate by which inference goes before the run on the device that they share, or None where none do."""
    if arguments.train != "also":
        return contextlib.nullcontext()
    return Gate.make(settings.home / "gates" / str(arguments.worker_id))


def _training(
    settings: Settings,
    arguments: argparse.Namespace,
    database: Database,
    broker: Broker,
    *,
    device: torch.device,
    gate: Gate | None,
) -> dict[str, Any]:
    """Return what a worker that trains adds to the setup of its pipeline."""
    if arguments.train == "no":
        return {}
    lanes = Lanes(Registry(database), Recipes(settings.recipes))
    with contextlib.suppress(Unreachable):  # else once it is back; who sees this worker ready may train by its recipes
        lanes.names()
    site = Site(
        settings, arguments.worker_id, str(device), arguments.torch_threads,
        gate.path if gate is not None else None, arguments.grace, arguments.log_level,
    )  # fmt: skip
    return {
        "lanes": lanes,
        "launcher": Launcher(database, site, broker.publish_ended),
        "gate": gate,
    }


def _spare_the_collector() -> None:
    """Let Python look for cycles seldom, and not in what is imported: torch alone is half a million objects.

    Each job makes a few containers, none of which is in a cycle; at 100,000 jobs a second a third of the time went into
    looking. Models come later and are not frozen, so that those that are unloaded can be collected.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE, 20, 20)


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run the worker until a signal ends it; return the exit code."""
    database = Database(settings.database_url)
    with contextlib.suppress(RelayError):  # the supervisor has checked it; away now, it is waited for
        database.check()
    device = resolve_device(arguments.device)
    _spare_the_collector()
    if arguments.torch_threads:
        torch.set_num_threads(arguments.torch_threads)
    broker = Broker(settings)
    ended = threading.Event()

    def fatal(error: BaseException) -> None:
        reports.last(f"{type(error).__name__}: {error}"[:LAST_WORDS])
        if isinstance(error, DeviceLost):
            pipeline.recorder.flush(FLUSH_SECONDS)
        sys.stderr.flush()
        os._exit(EXIT_LOST)

    with AnnouncerThread(Announcer(database, broker)) as announcer, _gate(settings, arguments) as gate:
        training = _training(settings, arguments, database, broker, device=device, gate=gate)
        setup = Setup(
            database=database,
            artifacts=Artifacts(settings.artifacts_url),
            handlers=Handlers(settings.handlers),
            weights_folder=settings.home / "weights",
            device=device,
            worker=arguments.worker_id,
            inline_limit=settings.inline_limit,
            models=() if arguments.train == "only" else arguments.models,
            threads=arguments.threads,
            max_loaded=arguments.max_loaded,
            grace=arguments.grace,
            box=BlackBox(arguments.black_box_fd),
            **training,
        )
        road = Road(wake=announcer.wake, publish=broker.publish_ended, is_up=broker.is_up)
        reports = Reports(arguments.report_fd)
        pipeline = Pipeline(setup, road, fatal)

        def stop() -> None:
            pipeline.stop()
            if not ended.wait(CELERY_SECONDS):
                log.info("celery_did_not_end")
                os._exit(EXIT_RECYCLE if keeper.wanted else 0)

        consumer = Consumer(
            make_app(settings, worker=True),
            pipeline.intake,
            pipeline.serving.names,
            name=f"{arguments.name}@{socket.gethostname()}",
            shutting_down=stop,
        )
        silence = Silence(
            pipeline.intake,
            consumer,
            served=pipeline.serving.names,
            depths=broker.depths,
            seconds=settings.silent_after,
        )
        keeper = Recycling(
            recorded=lambda: pipeline.recorder.recorded,
            silent=silence.look,
            stop=stop,
            is_stopping=lambda: pipeline.is_stopping,
            must_wait=lambda: pipeline.recorder.is_waiting,
            max_jobs=arguments.max_jobs,
            max_memory=arguments.max_memory,
        )
        pipeline.opened = consumer.opened
        pipeline.serving.added = consumer.added
        reports.start(pipeline.report)
        try:
            with pipeline, keeper:
                consumer.run()
        except SystemExit:  # it was asked to end before Celery had its own handler
            if not keeper.wanted:
                raise
        finally:
            ended.set()
            reports.close()
    broker.close()
    database.dispose()
    return EXIT_RECYCLE if keeper.wanted else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The process."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until Celery has its own handler
    logs.configure(arguments.log_level)
    structlog.contextvars.bind_contextvars(worker=arguments.name)
    arguments.worker_id = wait_to_go()
    if arguments.worker_id is None:
        return 0
    follow_supervisor()
    try:
        return run(Settings.load(), arguments)
    except (InvalidInput, SchemaMismatch) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread in a forward that does not return would let the interpreter abort as it ends
