"""The whole system of a chaos run: real servers, workers that are started again as an orchestrator does it, clients.

Not here: faults (`faults`), and whether all went well (`checker`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import redis

from chaos import audit, checker
from chaos.operations import MODELS
from chaos.proxy import Proxy
from chaos.schedule import CLIENTS, WORKERS
from servers import PostgresServer, RedisServer
from torchrelay import Relay
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from training_runs import RECIPES, examples
from workers import TESTS, WorkerProcess

HANDLERS = {"answer": "chaos.models:Answer"}
CONFIG = {"quick": ({"seconds": 0.05}, 16), "steady": ({"seconds": 0.15}, 64)}  # and how many jobs travel together
TRAINER = WORKERS[-1]
BEHIND_PROXY = WORKERS[1]  # beside half of the clients
RESTART_SECONDS = 0.3  # after which an orchestrator starts a worker anew
SWEEP_SECONDS = 20.0  # within which a worker gives back what is past the visibility timeout
QUIET, LOUD = "quiet", "loud"  # the undisturbed training run's model, and the other's


@dataclass(slots=True)
class _Slot:
    """A worker's name, and the process that has it now."""

    name: str
    process: WorkerProcess | None = None
    starts: int = 0
    ended_at: float | None = None
    logs: list[Path] = field(default_factory=list)


class System:
    """A context manager: everything is started by it, and ended by it."""

    def __init__(self, seed: int, database: str, folder: Path, *, training: bool = True) -> None:
        self.seed = seed
        self.folder = folder
        self.training = training
        self.behind_proxy = BEHIND_PROXY
        self.redis = RedisServer()
        self.postgres = PostgresServer() if database == "postgresql" else None
        self.proxies: dict[str, Proxy] = {}
        self.restarts = 0
        self._slots = {name: _Slot(name) for name in WORKERS}
        self._clients: dict[int, subprocess.Popen[bytes]] = {}
        self._client_arguments: list[str] = []
        self._left: set[int] = set()  # clients that have not come to their end
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._stack = ExitStack()

    # --- start and end --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _start(self) -> None:
        enter = self._stack.enter_context
        enter(self.redis)
        self.proxies["redis"] = enter(Proxy(self.redis.port))
        if self.postgres is not None:
            enter(self.postgres)
            self.proxies["database"] = enter(Proxy(self.postgres.port))
            self.direct_database = self.postgres.create("torchrelay")
        else:
            self.direct_database = f"sqlite:///{self.folder / 'torchrelay.db'}"
        self.settings = self._settings(proxied=False)
        database = Database(self.direct_database)
        database.upgrade()
        audit.keep(database)
        database.dispose()
        self.relay = enter(Relay(settings=self.settings))
        for name in MODELS:
            config, size = CONFIG[name]
            self.relay.register_model(name, handler="answer", config=config, chunk_size=size)
        self._stack.callback(self._end)
        for slot in self._slots.values():
            self._launch(slot)
        keeper = threading.Thread(target=self._keep, name="orchestrator", daemon=True)
        keeper.start()
        self._stack.callback(keeper.join, 10.0)
        self._stack.callback(self._closing.set)
        self._wait_for_workers()

    def _settings(self, *, proxied: bool) -> Settings:
        broker, database = self.redis.url, self.direct_database
        if proxied:
            broker = broker.replace(str(self.redis.port), str(self.proxies["redis"].port))
            if self.postgres is not None:
                database = database.replace(str(self.postgres.port), str(self.proxies["database"].port))
        return Settings.load(
            home=self.folder / "home", database=database, broker=broker,
            artifacts=f"file://{self.folder / 'artifacts'}", handlers=HANDLERS, recipes=RECIPES,
            heartbeat=0.5, stale_after=4.0,
        )  # fmt: skip

    def _wait_for_workers(self) -> None:
        statement = "SELECT DISTINCT name FROM workers"
        until = time.monotonic() + 120
        while {name for (name,) in checker.rows(self.direct_database, statement)} < set(WORKERS):
            if time.monotonic() > until:
                raise TimeoutError(f"the workers did not start:\n{self.logs()}")
            time.sleep(0.1)

    def _end(self) -> None:
        processes = [slot.process for slot in self._slots.values() if slot.process is not None]
        for process in processes:
            for pid in [process.process.pid, *(child.pid for child in process.children)]:
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    psutil.Process(pid).resume()
            if process.process.poll() is None:
                process.process.terminate()
        for process in processes:
            with suppress(TimeoutError):
                process.stop(20)
        for client in self._clients.values():
            if client.poll() is None:
                client.kill()
            client.wait()

    # --- workers --------------------------------------------------------------------------------------------

    def _environment(self, name: str) -> dict[str, str]:
        path = [str(TESTS / "chaos" / "site"), str(TESTS), os.environ.get("PYTHONPATH", "")]
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "CHAOS_FAULTS": str(self.folder / "faults"),
            "CHAOS_FOLDER": str(self.folder),
            "CHAOS_RUNS": str(self.folder / "runs.txt"),
            "CHAOS_NAME": name,
            "OMP_NUM_THREADS": "1",
        }

    def _launch(self, slot: _Slot) -> None:
        slot.starts += 1
        arguments = ["--torch-threads", "1", "--grace", "5"]
        if self.training and slot.name == TRAINER:
            arguments += ["--train", "also"]
        log = self.folder / f"{slot.name}-{slot.starts}.log"
        slot.logs.append(log)
        settings = self._settings(proxied=slot.name == BEHIND_PROXY)
        slot.process = WorkerProcess(slot.name, tuple(arguments), settings, self._environment(slot.name), log)
        slot.ended_at = None

    def _keep(self) -> None:
        """Start anew what has ended, workers and clients, until the end."""
        while not self._closing.wait(0.1):
            for slot in self._slots.values():
                if slot.process is None or slot.process.process.poll() is None:
                    continue
                slot.ended_at = slot.ended_at or time.monotonic()
                if time.monotonic() - slot.ended_at > RESTART_SECONDS:
                    self.restarts += 1
                    self._launch(slot)
            with self._lock:
                for number in sorted(self._left):
                    code = self._clients[number].poll()
                    if code == 0:
                        self._left.discard(number)
                    elif code is not None:
                        self._clients[number] = self._start_client(number)

    def processes(self, name: str) -> Mapping[str, list[psutil.Process]]:
        """Return the processes of a worker that lives, the supervisor first: "all", "supervisor" and "inner"."""
        worker = self._slots[name].process
        if worker is None or worker.process.poll() is not None:
            return {}
        with suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(worker.process.pid)
            children = supervisor.children(recursive=True)
            inner = [child for child in children if "torchrelay_worker.worker" in " ".join(_command(child))]
            return {"all": [supervisor, *children], "supervisor": [supervisor], "inner": inner}
        return {}

    # --- clients --------------------------------------------------------------------------------------------

    def start_clients(self, jobs: int, until: float) -> None:
        """Let the clients submit so many jobs until then (on the wall clock); each goes on after its death."""
        self._client_arguments = ["--jobs", str(-(-jobs // len(CLIENTS))), "--until", str(until)]
        with self._lock:
            for number in CLIENTS:
                self._clients[number] = self._start_client(number)
                self._left.add(number)

    def _start_client(self, number: int) -> subprocess.Popen[bytes]:
        settings = self._settings(proxied=number % 2 == 1)
        command = [sys.executable, "-m", "chaos.clients", "--client", str(number), "--seed", str(self.seed)]
        with (self.folder / f"client-{number}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *self._client_arguments],
                env={**os.environ, **settings.as_environment(), **self._environment(f"c{number}")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def client(self, target: int) -> psutil.Process | None:
        """Return a client's process, if any is still at work."""
        with self._lock:
            left = sorted(self._left)
            if not left:
                return None
            process = self._clients[left[target % len(left)]]
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(process.pid) if process.poll() is None else None
        return None

    @property
    def clients_left(self) -> bool:
        """Whether a client has more to do."""
        with self._lock:
            return bool(self._left)

    def journals(self) -> list[Path]:
        """Return the paths of all journals."""
        return sorted(self.folder.glob("client-*.jsonl"))

    # --- training -------------------------------------------------------------------------------------------

    def train(self, name: str, seconds: float, epochs: int = 12) -> str:
        """Start a training run, a step of which takes so long, and return its job's id."""
        return self.relay.train(
            name, recipe="tiny", dataset=examples(), seed=5, epochs=epochs, dropout=0.3, momentum=0.9, augment=0.1,
            checkpoint_steps=6, max_attempts=50, seconds=seconds,
        ).id  # fmt: skip

    # --- what is left ---------------------------------------------------------------------------------------

    def messages(self) -> dict[str, int]:
        """Return the keys of Redis that hold messages, with how many; those of Celery that are not acknowledged too.

        But for those that are `ahead`.
        """
        with self.redis.client() as client:
            found = {}
            for key in client.scan_iter():
                kind = client.type(key)
                if kind == "list":
                    found[str(key)] = int(client.llen(key))
                elif key == "unacked":
                    found[str(key)] = int(client.hlen(key)) - self.ahead()
            return {key: n for key, n in found.items() if n}

    def ahead(self) -> int:
        """Return how many messages a process had popped that was killed while its clock was ahead.

        Celery's visibility timeout is counted from that clock's time, so they come back an hour later. Their jobs were
        announced anew long before.
        """
        with self.redis.client() as client:
            tags = client.zrangebyscore("unacked_index", time.time() + 1.0, "+inf")
            return sum(bool(client.hexists("unacked", tag)) for tag in tags)

    def unfinished(self) -> int:
        """Return how many chunks are not done."""
        [(n,)] = checker.rows(self.direct_database, "SELECT count(*) FROM chunks WHERE state <> 3")
        return int(n)

    def settle(self, seconds: float) -> bool:
        """Wait until nothing is left to do; False where that does not come.

        Args:
            seconds: in which all jobs must have ended. What a process had popped when it was killed is given back once
                the visibility timeout is over, and may be there for so long beyond.
        """
        until = time.monotonic() + seconds
        ended = False
        while time.monotonic() < until:
            with suppress(redis.RedisError):
                if not self.unfinished():
                    if not self.messages():
                        return True
                    if not ended:
                        ended = True
                        until = time.monotonic() + self.settings.visibility_timeout + SWEEP_SECONDS
            time.sleep(0.2)
        return False

    def logs(self, most: int = 4000) -> str:
        """Return the ends of all workers' and clients' logs."""
        paths = [slot.logs[-1] for slot in self._slots.values() if slot.logs]
        paths += sorted(self.folder.glob("client-*.log"))
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-most:]}" for p in paths if p.exists())


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
