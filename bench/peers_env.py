"""The peers' own environments, and asking a peer: a script of bench/peers/ run by the peers' Python, never by ours.

`requirements.txt` is installed into .venv-peers, `requirements-NAME.txt` into .venv-NAME; anew when the file changes.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg
import redis as redis_client
from psycopg import sql

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
DEFAULT = "peers"
INSTALL_SECONDS = 900.0
STOP_SECONDS = 40.0  # a script ends its workers within 15 s each
TAIL = 15  # lines of a failure
REDIS_DATABASE = 1  # of the server that is handed over; ours use 0

_made: dict[str, Path | str] = {}  # an environment's Python, or why there is none


class PeerFailed(RuntimeError):
    """A peer does not install, cannot run here, crashed, or took too long. Its text is the table's."""


def python_of(environment: str = DEFAULT) -> Path:
    """Return the Python of an environment, which is made first if it is missing or its requirements have changed."""
    if environment not in _made:
        try:
            _made[environment] = _make(environment)
        except (OSError, subprocess.SubprocessError) as error:
            _made[environment] = f"{environment} does not install: {error}"
    python = _made[environment]
    if isinstance(python, str):
        raise PeerFailed(python)
    return python


def _make(environment: str) -> Path:
    requirements = PEERS / ("requirements.txt" if environment == DEFAULT else f"requirements-{environment}.txt")
    folder = ROOT / f".venv-{environment}"
    python, stamp = folder / "bin" / "python", folder / ".requirements"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest and python.exists():
        return python
    print(f"Installing {requirements.name} into {folder.name} (once) ...", file=sys.stderr, flush=True)
    venv.create(folder, clear=True, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    if done.returncode:
        raise OSError(_last_lines(done.stderr or done.stdout))
    stamp.write_text(digest)  # last: an install that was cut off is taken up again
    return python


def environment_of(peer: str) -> str:
    """Return the environment of a peer: its own if it has one, else that of its kind (`minilm_NAME` serves a model)."""
    kind, _, name = peer.rpartition("_")
    if (PEERS / f"requirements-{name}.txt").exists():
        return name
    return "serving" if kind else DEFAULT


def ask(
    peer: str,
    measure: str,
    *,
    redis: str | None = None,
    postgres: str | None = None,
    jobs: int,
    processes: int = 1,
    settings: Mapping[str, str] | None = None,
    environment: str | None = None,
    seconds: float = 180.0,
) -> dict[str, Any]:
    """Run `bench/peers/PEER_peer.py MEASURE` and return its figures, with its version, settings and what it keeps.

    Args:
        redis: the URL of a Redis. The peer gets database 1 of it, empty before and after.
        postgres: the URL of any database of a PostgreSQL. The peer gets a new one, dropped afterwards.
        settings: of the peer, instead of those that it holds to be its best.
        environment: where it runs, if not where `environment_of` says.
        seconds: after which it is ended, and has failed.
    Raises:
        PeerFailed: it does not install, cannot run here, crashed or took too long.
    """
    command = [str(python_of(environment or environment_of(peer))), str(PEERS / f"{peer}_peer.py"), measure]
    command += ["--jobs", str(jobs), "--processes", str(processes)]
    for key, value in (settings or {}).items():
        command += ["--setting", f"{key}={value}"]
    with ExitStack() as stack:
        if redis is not None:
            command += ["--redis", stack.enter_context(_own_redis(redis))]
        if postgres is not None:
            command += ["--postgres", stack.enter_context(_own_database(postgres, f"peer_{peer}"))]
        return _run(peer, command, seconds)


def _run(peer: str, command: list[str], seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=PEERS, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        out.seek(0)
        err.seek(0)
        said, complaints = out.read(), err.read()
    answer = _answer(said)
    if code == 0 and answer is not None:
        return answer
    if code is None:
        raise PeerFailed(f"{peer} took more than {seconds:g} s: {_last_lines(complaints)}")
    if answer is not None and "error" in answer:
        raise PeerFailed(f"{peer}: {answer['error']}")
    raise PeerFailed(f"{peer} ended with {code}: {_last_lines(complaints or said)}")


def _answer(said: str) -> dict[str, Any] | None:
    lines = said.strip().splitlines()
    with suppress(ValueError):
        found = json.loads(lines[-1]) if lines else None
        return found if isinstance(found, dict) else None
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a script that still runs, in order; then whatever of its family is left, by pid."""
    if process.poll() is not None:
        return
    family = _family(process)
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    for member in {*family, *_family(process)}:
        with suppress(psutil.NoSuchProcess):
            member.kill()  # psutil looks first whether the pid is still the same process's
    process.wait(STOP_SECONDS)


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


@contextmanager
def _own_redis(url: str) -> Iterator[str]:
    own = urlunsplit(urlsplit(url)._replace(path=f"/{REDIS_DATABASE}"))
    with redis_client.Redis.from_url(own) as client:
        client.flushdb()
        try:
            yield own
        finally:
            with suppress(redis_client.RedisError):  # an error inside is what counts
                client.flushdb()


@contextmanager
def _own_database(url: str, name: str) -> Iterator[str]:
    own, identifier = urlunsplit(urlsplit(url)._replace(path=f"/{name}")), sql.Identifier(name)
    drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(identifier)
    with psycopg.connect(url, autocommit=True) as server:
        server.execute(drop)
        server.execute(sql.SQL("CREATE DATABASE {}").format(identifier))
        try:
            yield own
        finally:
            with suppress(psycopg.Error):
                server.execute(drop)


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TAIL:])
