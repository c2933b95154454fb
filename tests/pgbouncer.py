"""A PgBouncer for tests: from PATH, else from Debian's package, unpacked into a cache folder of this user.

Nothing is installed and no root is needed: `apt-get download` and `dpkg-deb --extract`, with lists of packages of its
own where the system has none.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Self

import psycopg

from servers import UNPRIVILEGED, PostgresServer, Server

SECONDS = 180.0  # for a slow mirror
HELP = "install PgBouncer so that it is on PATH (Debian and Ubuntu: apt-get install pgbouncer; macOS: brew)"


class PgBouncerServer(Server):
    """A PgBouncer in transaction mode before a PostgreSQL: from PATH, else from Debian's package.

    It hands a client another session with each transaction, so that whoever relies on a session's state fails soon.
    """

    name = "pgbouncer"
    stop_signal = signal.SIGINT

    def __init__(self, postgres: PostgresServer, **options: str) -> None:
        super().__init__()
        self.postgres = postgres
        self.options = {"pool_mode": "transaction", "server_round_robin": "1", "default_pool_size": "20", **options}
        self._binary, self._libraries = find()

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database of the server behind it."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> Self:
        """Start it and wait until it answers."""
        if os.geteuid() == 0:  # it refuses to run as root, and as another it cannot enter every folder
            account = pwd.getpwnam(UNPRIVILEGED)
            self.user, self.group = account.pw_uid, account.pw_gid
            os.chown(self.folder, self.user, self.group)
            self._binary = Path(shutil.copy(self._binary, self.folder))
            if self._libraries is not None:
                self._libraries = Path(shutil.copytree(self._libraries, self.folder / "lib", dirs_exist_ok=True))
        return super().start()

    def _command(self) -> Sequence[str | Path]:
        options = {"listen_addr": "127.0.0.1", "listen_port": str(self.port), "unix_socket_dir": "",
                   "auth_type": "any", "max_client_conn": "1000", **self.options}  # fmt: skip
        lines = ["[databases]", f"* = host=127.0.0.1 port={self.postgres.port} user=postgres", "[pgbouncer]"]
        config = self.folder / "pgbouncer.ini"
        config.write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in options.items()), ""]))
        if self._libraries is None:
            return [self._binary, config]
        return ["env", f"LD_LIBRARY_PATH={self._libraries}", self._binary, config]

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


# --- where it comes from ----------------------------------------------------------------------------------------------


@cache
def find() -> tuple[Path, Path | None]:
    """Return the program, and the folder of the libraries that it needs beside the system's.

    Raises RuntimeError, which says what to do, where there is none.
    """
    paths = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    if found := shutil.which("pgbouncer", path=paths):
        return Path(found), None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = home / "torchrelay-tests" / "pgbouncer"
    if not _runs(cached):
        _fetch(cached)
    return _program(cached), _library_folder(cached)


def _program(root: Path) -> Path:
    return root / "usr" / "sbin" / "pgbouncer"


def _library_folder(root: Path) -> Path:
    return next((path.parent for path in sorted(root.glob("usr/lib/*/lib*.so*"))), root)


def _runs(root: Path) -> bool:
    if not _program(root).exists():
        return False
    environment = {**os.environ, "LD_LIBRARY_PATH": str(_library_folder(root))}
    asked = subprocess.run([_program(root), "-V"], env=environment, capture_output=True, check=False, timeout=SECONDS)
    return asked.returncode == 0


def _fetch(cached: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RuntimeError(f"there is no PgBouncer here, nor apt-get to fetch one: {HELP}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pgbouncer-", dir=cached.parent) as name:
        folder, root = Path(name), Path(name) / "root"
        try:
            options = _lists(folder)
            package = _download(folder, ["pgbouncer"], options)[0]
            depends = _run(["dpkg-deb", "--field", package, "Depends"], folder)
            libraries = re.findall(r"(?:^|, )(lib(?:event|c-ares|cares)[^ ,|]*)", depends)
            for path in [package, *_download(folder, libraries, options)]:
                _run(["dpkg-deb", "--extract", path, root], folder)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or error
            raise RuntimeError(f"Debian's package of PgBouncer cannot be had ({said}): {HELP}") from error
        if not _runs(root):
            raise RuntimeError(f"the PgBouncer of Debian's package does not run here: {HELP}")
        if not _runs(cached):  # somebody else may have been faster
            shutil.rmtree(cached, ignore_errors=True)
            root.rename(cached)


def _lists(folder: Path) -> list[str]:
    """Return the options by which apt-get finds the package: none, or lists of our own where the system has none."""
    if _run(["apt-cache", "policy", "pgbouncer"], folder).strip():
        return []
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    options = [f"-oDir::State::Lists={folder / 'lists'}", f"-oDir::Cache={folder / 'cache'}", "-oAPT::Sandbox::User="]
    _run(["apt-get", *options, "update"], folder)
    return options


def _download(folder: Path, packages: Sequence[str], options: Sequence[str]) -> list[Path]:
    before = set(folder.glob("*.deb"))
    _run(["apt-get", *options, "download", *packages], folder)
    return sorted(set(folder.glob("*.deb")) - before)


def _run(command: Sequence[str | Path], folder: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, check=True, timeout=SECONDS
    )
    return done.stdout
