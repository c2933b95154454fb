"""Starts a claimed run as a process of its own, keeps its log, and ends it where that must be.

The run's process writes its own progress, checkpoints and end; what is left for here is what a dead process cannot do.
Not here: what happens inside (`process`), and which runs are claimed (`pipeline.intake`).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from torchrelay.settings import Settings
from torchrelay_storage import values
from torchrelay_storage.chunk_store import Claimed
from torchrelay_storage.database import Database
from torchrelay_storage.errors import RelayError, Unreachable
from torchrelay_storage.ids import Kind, show
from torchrelay_storage.job_error import JobError
from torchrelay_storage.options import Backoff
from torchrelay_storage.run_spec import RunSpec, read_spec
from torchrelay_storage.run_writer import RunHold, RunWriter

log = structlog.get_logger("torchrelay.launcher")

LOOK_SECONDS = 0.25
HELD_SECONDS = 1.0  # between two looks whether the run is still ours: a cancelled one is ended within that and the next
CANCEL_SECONDS = 5.0  # that a run has to end in by itself after it was cancelled or lost, before it is killed
READY_BYTES = 65_536  # of the log, shipped at a time
TAIL_LINES = 15  # of the log, kept with the error of a run whose process was lost
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Site:
    """Where runs are started: what every run's process is told.

    Attributes:
        device: `cpu`, `cuda:0`; a run on several devices takes those of the machine from the first on.
        threads: torch's, on a CPU; None: as torch chooses.
        gate: the file by which inference on the same device goes first; None: the device is the run's alone.
        grace: seconds that a run has for its checkpoint when the worker ends.
    """

    settings: Settings
    worker: int
    device: str
    threads: int | None = None
    gate: Path | None = None
    grace: float = 30.0
    log_level: str = "warning"


def command(site: Site, hold: RunHold, devices: int, backoff: Backoff | None = None) -> list[str]:
    """Return the command line of a run's process; with several devices torch's elastic launcher starts one for each."""
    module = ["-m", "torchrelay_worker.training.process"]
    arguments = ["--job", str(hold.job), "--chunk", str(hold.chunk), "--token", str(hold.token)]
    arguments += ["--worker", str(hold.worker), "--device", site.device, "--log-level", site.log_level]
    if site.threads is not None:
        arguments += ["--threads", str(max(1, site.threads // devices))]
    if site.gate is not None:
        arguments += ["--gate", str(site.gate)]
    if backoff is not None:
        arguments += ["--backoff", backoff.encode()]
    if devices == 1:
        return [sys.executable, *module, *arguments]
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices), "--max-restarts", "0"]
    return [sys.executable, *elastic, *module, *arguments]


@dataclass(slots=True)
class _Started:
    """A run that is under way here."""

    hold: RunHold
    claimed: Claimed
    ending: threading.Event = field(default_factory=threading.Event)  # the worker ends: checkpoint and hand back
    thread: threading.Thread | None = None


class Launcher:
    """The runs of this worker, one at a time. Thread-safe."""

    def __init__(
        self,
        database: Database,
        site: Site,
        publish: Callable[[Sequence[int], Sequence[int]], object] = lambda chunks, batches: None,
        *,
        slots: int = 1,
    ) -> None:
        """Make it.

        Args:
            publish: wakes who waits for these chunks.
            slots: runs at a time.
        """
        self._database = database
        self._site = site
        self._publish = publish
        self._slots = slots
        self._lock = threading.Lock()
        self._runs: dict[int, _Started] = {}
        self._closing = False
        self.changed: Callable[[], object] = lambda: None  # called when there is room for another run

    def has_room(self) -> bool:
        """Whether a run can be started."""
        with self._lock:
            return not self._closing and len(self._runs) < self._slots

    def chunks(self) -> frozenset[int]:
        """Return the chunks of the runs that are under way here."""
        with self._lock:
            return frozenset(self._runs)

    def shown(self) -> list[str]:
        """Return the ids of the runs that are under way here, as users see them."""
        with self._lock:
            return [show(Kind.JOB, run.hold.job) for run in self._runs.values()]

    def start(self, claimed: Claimed) -> None:
        """Start a claimed run. Returns at once."""
        if not claimed.jobs:
            return
        hold = RunHold(claimed.jobs[0].id, claimed.chunk, claimed.token, self._site.worker)
        run = _Started(hold, claimed)
        name = show(Kind.JOB, hold.job)
        run.thread = threading.Thread(target=self._follow, args=(run,), name=f"run {name}", daemon=True)
        with self._lock:
            self._runs[claimed.chunk] = run
            if self._closing:
                run.ending.set()
        run.thread.start()

    def ask_to_end(self) -> None:
        """Have all runs write a checkpoint and hand themselves back. Returns at once."""
        with self._lock:
            self._closing = True
            runs = list(self._runs.values())
        for run in runs:
            run.ending.set()

    def stop(self) -> None:
        """The same, and wait for it: no longer than the grace and a moment."""
        self.ask_to_end()
        until = time.monotonic() + self._site.grace + CANCEL_SECONDS
        with self._lock:
            threads = [run.thread for run in self._runs.values() if run.thread is not None]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    # --- one run, on a thread of its own ------------------------------------------------------------------

    def _follow(self, run: _Started) -> None:
        writer = RunWriter(self._database, run.hold)
        try:
            self._run(run, writer)
        except Exception:
            log.exception("run_not_followed", job=show(Kind.JOB, run.hold.job))
        finally:
            with self._lock:
                self._runs.pop(run.hold.chunk, None)
            self._publish([run.hold.chunk], [])
            self.changed()

    def _run(self, run: _Started, writer: RunWriter) -> None:
        try:
            spec = read_spec(values.decode(run.claimed.jobs[0].input))
        except RelayError as error:
            writer.fail(JobError(type(error).__name__, str(error)), retry_in=None)
            return
        if run.ending.is_set():
            writer.hand_back()
            return
        with _Child(self._site, run.hold, spec, run.claimed.backoff) as child:
            end = self._watch(run, writer, child)
            child.ship(writer)
            if end is not None:
                _patiently(lambda: end(writer, child))

    def _watch(self, run: _Started, writer: RunWriter, child: _Child) -> Callable[[RunWriter, _Child], object] | None:
        """Wait for the process to end; return what is left to be recorded of it, or None."""
        started = time.monotonic()
        look_at, kill_at = started + HELD_SECONDS, float("inf")
        asked = cut = False
        while child.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(LOOK_SECONDS)  # its place is the next run's as soon as it has ended
            now = time.monotonic()
            if run.ending.is_set() and not asked:
                asked, kill_at = True, now + self._site.grace
                child.terminate()
            if now >= look_at:
                look_at = now + HELD_SECONDS
                child.ship(writer)
                if not asked and _is_lost(writer):
                    asked, kill_at = True, now + CANCEL_SECONDS
                    child.terminate()
            if run.claimed.timeout is not None and now - started > run.claimed.timeout and not cut:
                cut, kill_at = True, now
            if now >= kill_at:
                child.kill()
                child.process.wait()
        if cut:
            return _over_time
        if child.process.returncode == 0:
            return _left_open
        return _handed_back if asked else _lost


class _Child:
    """The run's process and its log. A context manager: at its end the process is gone."""

    def __init__(self, site: Site, hold: RunHold, spec: RunSpec, backoff: Backoff | None = None) -> None:
        folder = site.settings.home / "runs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / f"{show(Kind.JOB, hold.job)}-{hold.token}.log"
        self.failures = 0
        self._shipped = 0
        self._tail: list[str] = []
        with self.path.open("wb") as output:
            self.process = subprocess.Popen(
                command(site, hold, spec.devices, backoff),
                stdin=subprocess.PIPE,  # its end of file tells the process that we are gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(site),
                process_group=0,  # a signal for the worker's group is not one for the run
            )
        log.info("run_started", job=show(Kind.JOB, hold.job), recipe=spec.recipe, pid=self.process.pid)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.path.with_suffix(""), ignore_errors=True)  # what a killed process left of its own files

    def terminate(self) -> None:
        """Ask it to end in its own order."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and what it started at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ship(self, writer: RunWriter) -> None:
        """Write what the process has logged since the last call; what cannot be written now comes with the next."""
        with self.path.open("rb") as file:
            while True:
                file.seek(self._shipped)
                data = file.read(READY_BYTES)
                whole = data if self.process.poll() is not None else data[: data.rfind(b"\n") + 1]
                if not whole:
                    if len(data) < READY_BYTES:
                        return
                    whole = data  # one line longer than all that is read at a time
                lines = [line for line in whole.decode(errors="replace").splitlines() if line.strip()]
                try:
                    if lines:
                        writer.log([(time.time(), line) for line in lines])
                except RelayError:
                    return
                self._shipped += len(whole)
                self._tail = [*self._tail, *lines][-TAIL_LINES:]

    def tail(self) -> str:
        """Return the last lines of the log."""
        return "\n".join(self._tail)

    def how(self) -> str:
        """Return how the process ended."""
        code = self.process.returncode
        if code >= 0:
            return f"ended with exit code {code}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = " (killed by somebody, or by the system for its memory)" if -code == signal.SIGKILL else ""
            return f"was ended by {name}{hint}"
        return f"was ended by signal {-code}"


def _environment(site: Site) -> Mapping[str, str]:
    environment = {**os.environ, **site.settings.as_environment(), "HF_HUB_OFFLINE": "1"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = environment.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(round(site.grace))
    environment["PYTHONUNBUFFERED"] = "1"
    if site.threads is not None:
        environment["OMP_NUM_THREADS"] = str(site.threads)
    return environment


def _is_lost(writer: RunWriter) -> bool:
    try:
        return not writer.is_held()
    except Unreachable:
        return False  # nobody knows; the token decides at the next write


# --- what is left to be recorded ---------------------------------------------------------------------------


def _left_open(writer: RunWriter, child: _Child) -> None:
    if writer.is_held():  # it said that all was written, and it was not
        writer.died(JobError("WorkerLost", "the run's process ended without recording an end", child.tail()),
                    retry_in=_backoff())  # fmt: skip


def _handed_back(writer: RunWriter, child: _Child) -> None:
    writer.hand_back()


def _over_time(writer: RunWriter, child: _Child) -> None:
    writer.fail(JobError("Timeout", "the run took longer than its `timeout`; its last checkpoint is kept: raise the "
                         "timeout and retry it to go on from there", child.tail()), retry_in=None)  # fmt: skip


def _lost(writer: RunWriter, child: _Child) -> None:
    message = f"the run's process {child.how()}; it goes on from its last checkpoint while attempts are left"
    if not writer.died(JobError("WorkerLost", message, child.tail()), retry_in=_backoff()):
        log.warning("run_lost", job=show(Kind.JOB, writer.hold.job), how=child.how())


def _backoff() -> float:
    return random.uniform(0.5, 1.5) * FIRST_BACKOFF


def _patiently(record: Callable[[], object]) -> None:
    """Record it, again and again while the database is away: until the worker counts as gone, and is rescued anyway."""
    until = time.monotonic() + LONGEST_BACKOFF
    while True:
        try:
            record()
            return
        except Unreachable as error:
            if time.monotonic() > until:
                log.warning("run_end_not_recorded", reason=str(error), effect="it is rescued once the worker is stale")
                return
            time.sleep(1.0)
