"""The inner process: Celery's consumer and the device. Started by the supervisor, and ends when that is gone.

Starts and stops everything, in order. Not here: the heartbeat and being replaced (`supervisor`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson
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
from torchrelay_worker.exits import EXIT_LOST, EXIT_USAGE
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.pipeline.consumer import Consumer
from torchrelay_worker.pipeline.device import DeviceLost
from torchrelay_worker.pipeline.pipeline import Pipeline, Road, Setup
from torchrelay_worker.training.catalog import Recipes
from torchrelay_worker.training.gate import Gate
from torchrelay_worker.training.lanes import Lanes
from torchrelay_worker.training.launcher import Launcher, Site

log = structlog.get_logger("torchrelay.worker")

REPORT_SECONDS = 0.5
FLUSH_SECONDS = 5.0  # to record what ran before the device was lost
CELERY_SECONDS = 5.0  # that Celery has to end after the pipeline; a silent Redis would hold it for ever
ORPHAN_SECONDS = 8.0  # that a worker has to end in after its supervisor: less than `stale_after`


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:1`. Raises InvalidInput if this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise InvalidInput(f"device {name!r}: this torch ({torch.__version__}) finds no CUDA device")
            index = device.index if device.index is not None else 0
            if index >= torch.cuda.device_count():
                raise InvalidInput(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"device {name!r} cannot be used: {error}") from error
    return device


class Reports:
    """Tells the supervisor each half second that this process answers, and until when what it runs may run."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def start(self, left: Callable[[], float | None], stats: Callable[[], Any]) -> None:
        """Report until `close`, or until nobody reads."""

        def report() -> None:
            while self._write({"left": left(), "stats": stats()}) and not self._closing.wait(REPORT_SECONDS):
                pass

        threading.Thread(target=report, name="reports", daemon=True).start()

    def alone(self, chunk: int | None) -> None:
        """Say which chunk is the only one that runs, before it does."""
        self._write({"alone": chunk})

    def _write(self, report: dict[str, Any]) -> bool:
        try:
            with self._lock:
                self._file.write(orjson.dumps(report) + b"\n")
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End the thread."""
        self._closing.set()


def follow_supervisor() -> None:
    """End this process when the supervisor closes our standard input, which its death does too."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        log.info("supervisor_gone")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(EXIT_LOST)

    threading.Thread(target=wait, name="leash", daemon=True).start()


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


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run the worker until a signal ends it; return the exit code."""
    database = Database(settings.database_url)
    with contextlib.suppress(RelayError):  # the supervisor has checked it; away now, it is waited for
        database.check()
    device = resolve_device(arguments.device)
    if arguments.torch_threads:
        torch.set_num_threads(arguments.torch_threads)
    broker = Broker(settings)
    ended = threading.Event()

    def fatal(error: BaseException) -> None:
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
            **training,
        )
        road = Road(wake=announcer.wake, publish=broker.publish_ended, is_up=broker.is_up)
        reports = Reports(arguments.report_fd)
        pipeline = Pipeline(setup, road, fatal, reports.alone)

        def stop() -> None:
            pipeline.stop()
            if not ended.wait(CELERY_SECONDS):
                log.info("celery_did_not_end")
                os._exit(0)

        consumer = Consumer(
            make_app(settings, worker=True),
            pipeline.intake,
            pipeline.serving.names,
            name=f"{arguments.name}@{socket.gethostname()}",
            shutting_down=stop,
        )
        pipeline.opened = consumer.opened
        pipeline.serving.added = consumer.added
        reports.start(pipeline.watch.left, pipeline.stats)
        try:
            with pipeline:
                consumer.run()
        finally:
            ended.set()
            reports.close()
    broker.close()
    database.dispose()
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read what the supervisor passes."""
    parser = argparse.ArgumentParser(prog="torchrelay_worker.worker", description="started by the supervisor")
    parser.add_argument("--worker-id", type=int, required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--models", type=lambda text: [m for m in text.split(",") if m] or None, default=None)
    parser.add_argument("--train", choices=("no", "also", "only"), default="no")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-threads", type=int, default=None)
    parser.add_argument("--max-loaded", type=int, default=None)
    parser.add_argument("--grace", type=float, default=30.0)
    parser.add_argument("--log-level", choices=logs.LEVELS, default="warning")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The process."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until Celery has its own handler
    logs.configure(arguments.log_level)
    structlog.contextvars.bind_contextvars(worker=arguments.name)
    follow_supervisor()
    try:
        return run(Settings.load(), arguments)
    except (InvalidInput, SchemaMismatch) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
