"""The process of one run: from the row of its job to the registered model, or to the error that says why not.

Started by the worker (`launcher`); on several devices by torch's elastic launcher, once for each. It ends with 0 when
everything that was to be written is written; any other end is the launcher's to record. When the launcher is gone it
ends at once, and another worker goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog
import torch

from torchrelay.broker import Broker
from torchrelay.settings import Settings
from torchrelay_storage import values
from torchrelay_storage.artifacts import Artifacts, load_large
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, RelayError, Unreachable
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import DEFAULT_BACKOFF, Backoff
from torchrelay_storage.run_spec import RunSpec, read_spec
from torchrelay_storage.run_writer import RunHold, RunWriter
from torchrelay_storage.runs import RunStore
from torchrelay_worker import logs
from torchrelay_worker.exits import EXIT_LOST, EXIT_UNREACHABLE, EXIT_USAGE
from torchrelay_worker.training.checkpoints import Checkpoints, Snapshot, read_snapshot
from torchrelay_worker.training.errors import is_mate_lost, is_out_of_memory, may_retry, out_of_memory, recorded
from torchrelay_worker.training.gate import Gate
from torchrelay_worker.training.loop import Training
from torchrelay_worker.training.materials import make_recipe, prepare
from torchrelay_worker.training.randomness import set_deterministic
from torchrelay_worker.training.registration import register
from torchrelay_worker.training.reporter import Reporter
from torchrelay_worker.training.sources import Sources
from torchrelay_worker.training.task import End, Ended, Task
from torchrelay_worker.training.team import Team
from torchrelay_worker.training.watchdog import Watchdog

log = structlog.get_logger("torchrelay.training")

LEASH_SECONDS = 1.0  # between two looks whether the parent is still there


class Process:
    """One run, in this process."""

    def __init__(self, settings: Settings, arguments: argparse.Namespace, leaving: threading.Event) -> None:
        self._settings = settings
        self._arguments = arguments
        self._leaving = leaving
        self._hold = RunHold(arguments.job, arguments.chunk, arguments.token, arguments.worker)
        self._name = show(Kind.JOB, arguments.job)
        self._database = Database(settings.database_url)
        self._artifacts = Artifacts(settings.artifacts_url)
        self._writer = RunWriter(self._database, self._hold)
        self._runs = RunStore(self._database)
        self._failures = 0
        self._reporter: Reporter | None = None

    def run(self) -> int:
        """Train, register, and return the exit code."""
        try:
            self._run()
        except BaseException as error:  # the recipe is an author's code: whatever it raises is the run's failure
            return self._fail(error)
        finally:
            self._database.dispose()
        return 0

    def _run(self) -> None:
        job = JobStore(self._database).get([self._hold.job], with_input=True).get(self._hold.job)
        if job is None or job.input is None:
            return  # purged: nobody waits for it
        self._failures = job.failures
        spec = read_spec(values.decode(load_large(self._artifacts, job.input)))
        set_deterministic(spec.deterministic)
        recipe = make_recipe(spec, self._settings)
        with Team(self._arguments.device, spec.precision) as team, self._folder(team) as folder:
            writer = self._writer if team.is_first else None
            self._reporter = Reporter(writer)
            self._take_up(self._reporter)
            with self._reporter, Watchdog(self._reporter.ended, recipe.step_timeout):
                sources = Sources(self._settings, team)
                recipe.fetch = sources.fetch
                with self._checkpoints(spec, team, folder) as checkpoints:
                    restored = self._restored(checkpoints, team, folder)
                    task = prepare(spec, recipe, sources, restored)
                    ended = self._train(task, team, checkpoints, restored)
                if team.is_first:
                    self._end(task, ended, folder)

    # --- before -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _folder(self, team: Team) -> Iterator[Path]:
        """A local folder for this run's files, the same in all its processes; what earlier ones left is removed."""
        folder = self._settings.home / "runs" / f"{self._name}-{self._hold.token}"
        if team.is_first:
            for old in folder.parent.glob(f"{self._name}-*/"):
                shutil.rmtree(old, ignore_errors=True)
            folder.mkdir(mode=0o700, parents=True)
        team.wait()
        try:
            yield folder
        finally:
            if team.is_first:
                shutil.rmtree(folder, ignore_errors=True)

    def _take_up(self, reporter: Reporter) -> None:
        """Begin with the numbers that are known, so that a run which goes on does not seem to have lost them."""
        row = self._runs.get(self._hold.job)
        reporter.begin(row.steps, row.epochs, 0, row.step, row.epoch)

    @contextlib.contextmanager
    def _checkpoints(self, spec: RunSpec, team: Team, folder: Path) -> Iterator[Checkpoints | None]:
        if not team.is_first:
            yield None
            return
        assert self._reporter is not None
        with Checkpoints(
            self._writer, self._artifacts, folder, spec.checkpoints,
            job=self._hold.job, token=self._hold.token, flush=self._reporter.flush,
        ) as checkpoints:  # fmt: skip
            yield checkpoints

    def _restored(self, checkpoints: Checkpoints | None, team: Team, folder: Path) -> Snapshot | None:
        """Return the checkpoint from which the run goes on, the same in all its processes; None: from the beginning."""
        snapshot = None
        if checkpoints is not None:
            rows = self._runs.checkpoints(self._hold.job)
            snapshot = checkpoints.restore(rows)
            if self._hold.token > 1:
                checkpoints.sweep(rows)
            self._writer.rewind(snapshot.step if snapshot is not None else 0)
        if team.agree(int(snapshot is not None)) and snapshot is None:
            snapshot = read_snapshot(folder / "restored")
        return snapshot

    # --- training -----------------------------------------------------------------------------------------

    def _train(self, task: Task, team: Team, checkpoints: Checkpoints | None, restored: Snapshot | None) -> Ended:
        assert self._reporter is not None
        gate = Gate.open(self._arguments.gate) if self._arguments.gate is not None else None
        training = Training(
            task, team, self._reporter, checkpoints, restored=restored, gate=gate, leaving=self._leaving
        )
        if team.is_first:
            self._reporter.order = self._writer.start(
                split=task.split,
                dataset_sha256=task.data["dataset_sha256"] or "",
                steps=training.steps,
                epochs=training.epochs,
            )
            how = f"goes on from step {restored.step}" if restored is not None else "starts"
            print(
                f"run {self._name} {how}: {task.spec.recipe} on {team.world} x {team.device.type}, "
                f"{len(task.train)} examples to train on, {len(task.validation)} held out, {training.steps} steps",
                flush=True,
            )
        return training.train()

    def _end(self, task: Task, ended: Ended, folder: Path) -> None:
        assert self._reporter is not None
        if ended.end is End.LOST:
            print(f"run {self._name} was taken from this worker, or cancelled", flush=True)
        elif ended.end is End.LEFT:
            self._reporter.enter("")
            with contextlib.suppress(Unreachable):
                self._reporter.flush()
            back = self._writer.hand_back()
            print(f"run {self._name} {'rests' if back else 'was taken from this worker, or cancelled'}", flush=True)
        else:
            self._reporter.enter("exporting")
            self._reporter.flush()
            version = register(
                task, ended, folder / "export", writer=self._writer, runs=self._runs, artifacts=self._artifacts
            )
            if version is not None:
                print(f"run {self._name} has registered {version.ref}", flush=True)
                self._publish()

    # --- when it fails ------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> int:
        """Record why the run failed; return the exit code."""
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if not alone and is_mate_lost(error):
            print(f"another process of the run is gone: {error}", file=sys.stderr, flush=True)
            return EXIT_LOST
        if is_out_of_memory(error):
            phase = self._reporter.phase if self._reporter is not None else "preparing"
            error = out_of_memory(error, f"while {phase}").with_traceback(error.__traceback__)
        if isinstance(error, RelayError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        backoff: Backoff = self._arguments.backoff
        retry_in = backoff.wait(self._failures) if may_retry(error) else None
        try:
            self._writer.fail(recorded(error), retry_in=retry_in)
        except Unreachable as away:
            print(f"the failure was not recorded: {away}", file=sys.stderr, flush=True)
            return EXIT_UNREACHABLE
        self._publish()
        return 0 if alone else EXIT_LOST  # the launcher ends the others, which wait for this one

    def _publish(self) -> None:
        """Wake who waits for the run."""
        broker = Broker(self._settings)
        broker.publish_ended([self._hold.chunk])
        broker.close()


def follow_launcher() -> None:
    """End this process at once when the launcher closes our standard input, which its death does too.

    Under torch's elastic launcher the parent is that one, and can die by itself.
    """
    parent = os.getppid()

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.getppid() == parent:
                readable, _, _ = select.select([0], [], [], LEASH_SECONDS)
                if readable and not os.read(0, 4096):
                    break
        os._exit(EXIT_LOST)

    threading.Thread(target=wait, name="leash", daemon=True).start()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read what the launcher passes."""
    parser = argparse.ArgumentParser(prog="torchrelay_worker.training.process", description="started by the worker")
    parser.add_argument("--job", type=int, required=True)
    parser.add_argument("--chunk", type=int, required=True)
    parser.add_argument("--token", type=int, required=True)
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--gate", type=Path, default=None)
    parser.add_argument("--backoff", type=Backoff.decode, default=DEFAULT_BACKOFF)
    parser.add_argument("--log-level", choices=logs.LEVELS, default="warning")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The process."""
    arguments = parse(argv)
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    follow_launcher()
    faulthandler.enable()
    logs.configure(arguments.log_level)
    structlog.contextvars.bind_contextvars(job=show(Kind.JOB, arguments.job))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first use of cuBLAS; it asks for it
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        settings = Settings.load()
        process = Process(settings, arguments, leaving)
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return process.run()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch down in order takes most of a second, for which the next run would wait
