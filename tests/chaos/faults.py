"""How each fault of the schedule is made. It returns when that began and ended, and None where it met nothing.

Faults of different servers and processes overlap; two of one server wait for each other. Not here: when (`schedule`).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import redis

from chaos import checker
from chaos.journal import Journal
from chaos.schedule import POISON_KINDS, WORKERS, Fault
from torchrelay_storage.errors import RelayError

if TYPE_CHECKING:
    from chaos.system import System

MEET_SECONDS = 6.0  # in which a fault that needs something to hit finds it
POINT_SECONDS = 15.0  # in which a named point is reached
POISON_BASE = 900_000_000  # above all numbers of the clients
POISON_TIMEOUT = 3.0  # seconds: the limit of a job that hangs

# Holds a transaction on a SQLite file until its standard input ends, or it is killed.
# All of Redis at one moment, as a snapshot of its own is: key by key, what moves meanwhile would be torn apart.
SNAPSHOT = """
    local found = {}
    for _, key in ipairs(redis.call('KEYS', '*')) do
        table.insert(found, key)
        table.insert(found, redis.call('DUMP', key))
    end
    return found
"""

_WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE leases SET expires_at = expires_at WHERE name = 'nobody'")
connection.execute("INSERT INTO chaos_orders VALUES ('never')")
print("holds", flush=True)
sys.stdin.read()
"""


def roll_back(client: redis.Redis, snapshot: Sequence[bytes]) -> None:
    """Let Redis hold what it held when a snapshot was taken, and nothing else."""
    with client.pipeline() as pipeline:
        pipeline.flushall()
        for key, data in zip(snapshot[::2], snapshot[1::2], strict=True):
            pipeline.restore(key, 0, data)
        pipeline.execute()


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that was made. Times are on the wall clock.

    Attributes:
        hit: worker's name, where one was hit.
        poison: number in the input of a job that was made for it.
    """

    fault: Fault
    began: float
    ended: float
    hit: str | None = None
    poison: int | None = None


class Injector:
    """Makes faults. Thread-safe: each fault has a thread of its own."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.bullets = system.folder / "faults"
        self.bullets.mkdir(exist_ok=True)
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._journal = Journal(system.folder / "client-poison.jsonl")
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let faults that last end now, and those that wait for something to hit give up."""
        self._stopping.set()

    def make(self, fault: Fault) -> Injected | None:
        """Make a fault and wait for its end."""
        if fault.kind.startswith("at "):
            return self._at_point(fault)
        if fault.kind in POISON_KINDS:
            return self._poison(fault)
        return getattr(self, f"_{fault.kind.replace(' ', '_')}")(fault)  # type: ignore[no-any-return]

    # --- what many need -------------------------------------------------------------------------------------

    def _meet(self, look: Callable[[], Any], seconds: float = MEET_SECONDS) -> Any:
        """Return what `look` finds, as soon as it does; None where it does not."""
        until = time.monotonic() + seconds
        while not (found := look()) and time.monotonic() < until and not self._stopping.wait(0.02):
            pass
        return found

    def _last(self, fault: Fault) -> None:
        self._stopping.wait(fault.lasts)

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        with self._locks[what]:
            yield

    def _hurt(self, fault: Fault, name: str, family: Sequence[psutil.Process], number: signal.Signals) -> Injected:
        began = time.time()
        _signal(family, number)
        return Injected(fault, began, began, name)

    # --- workers --------------------------------------------------------------------------------------------

    def _worker(self, fault: Fault) -> str:
        return WORKERS[fault.target % len(WORKERS)]

    def _leader(self, fault: Fault) -> str:
        with suppress(Exception):  # the database may be away
            statement = "SELECT w.name FROM leases l JOIN workers w ON w.id = l.holder WHERE l.name = 'maintenance'"
            for (name,) in checker.rows(self.system.direct_database, statement):
                return str(name)
        return self._worker(fault)

    def _hit(self, fault: Fault, name: str, part: str, number: signal.Signals) -> Injected | None:
        with self._alone(name):
            family = self._meet(lambda: self.system.processes(name).get(part))
            return self._hurt(fault, name, family, number) if family else None

    def _kill_worker(self, fault: Fault) -> Injected | None:
        return self._hit(fault, self._worker(fault), "all", signal.SIGKILL)

    def _kill_leader(self, fault: Fault) -> Injected | None:
        return self._hit(fault, self._leader(fault), "all", signal.SIGKILL)

    def _kill_inner_process(self, fault: Fault) -> Injected | None:
        return self._hit(fault, self._worker(fault), "inner", signal.SIGKILL)

    def _kill_supervisor(self, fault: Fault) -> Injected | None:
        return self._hit(fault, self._worker(fault), "supervisor", signal.SIGKILL)

    def _end_worker(self, fault: Fault) -> Injected | None:
        return self._hit(fault, self._worker(fault), "supervisor", signal.SIGTERM)

    def _stop(self, fault: Fault, name: str, part: str) -> Injected | None:
        with self._alone(name):
            family = self._meet(lambda: self.system.processes(name).get(part))
            if not family:
                return None
            stopped = self._hurt(fault, name, family, signal.SIGSTOP)
            try:
                self._last(fault)
            finally:
                _signal(family, signal.SIGCONT)
            return Injected(fault, stopped.began, time.time(), name)

    def _stop_worker(self, fault: Fault) -> Injected | None:
        return self._stop(fault, self._worker(fault), "all")

    def _stop_leader(self, fault: Fault) -> Injected | None:
        return self._stop(fault, self._leader(fault), "all")

    def _stop_inner_process(self, fault: Fault) -> Injected | None:
        return self._stop(fault, self._worker(fault), "inner")

    def _clock_jump(self, fault: Fault) -> Injected:
        name, began = self._worker(fault), time.time()
        path = self.bullets / f"clock-{name}"
        with self._alone(path.name):
            path.write_text(str(fault.size))
            self._last(fault)
            path.unlink()
        return Injected(fault, began, time.time(), name)

    def _kill_client(self, fault: Fault) -> Injected | None:
        client = self._meet(lambda: self.system.client(fault.target))
        return self._hurt(fault, "", [client], signal.SIGKILL) if client else None

    # --- points ---------------------------------------------------------------------------------------------

    def _at_point(self, fault: Fault) -> Injected | None:
        point = fault.kind.removeprefix("at ")
        bullet, spent = self.bullets / point, self.bullets / "log"
        with self._alone(point):
            bullet.touch()
            if not self._meet(lambda: not bullet.exists(), POINT_SECONDS):
                with suppress(FileNotFoundError):
                    bullet.unlink()
                    return None
            lines = self._meet(lambda: [x for x in _log(spent) if x["point"] == point], 2.0) or []
        if not lines:
            return None
        at = lines[-1]["at"]
        return Injected(fault, at, at, lines[-1]["name"])

    # --- Redis ----------------------------------------------------------------------------------------------

    def _kill_redis(self, fault: Fault) -> Injected:
        with self._alone("redis"):
            began = time.time()
            self.system.redis.kill()
            self._last(fault)
            self.system.redis.start()
            return Injected(fault, began, time.time())

    def _stop_redis(self, fault: Fault) -> Injected:
        with self._alone("redis"):
            began = time.time()
            self.system.redis.pause()
            self._last(fault)
            self.system.redis.resume()
            return Injected(fault, began, time.time())

    def _flush_redis(self, fault: Fault) -> Injected:
        with self._alone("redis"):
            began = time.time()
            self.system.redis.flush()
            return Injected(fault, began, began)

    def _in_a_queue(self, fault: Fault, take: Callable[[redis.Redis, str], Any]) -> Injected | None:
        """Take something out of a queue that holds something: of the model that the fault names, where it does."""
        with self._alone("redis"), self.system.redis.client() as client:

            def look() -> bool:
                keys = sorted(key for key in client.scan_iter("torchrelay.*") if client.type(key) == "list")
                return any(take(client, key) for key in keys[fault.target % max(1, len(keys)) :] + keys)

            if not self._meet(look):
                return None
            began = time.time()
            return Injected(fault, began, began)

    def _lose_a_queue(self, fault: Fault) -> Injected | None:
        return self._in_a_queue(fault, lambda client, key: client.delete(key))

    def _lose_a_message(self, fault: Fault) -> Injected | None:
        return self._in_a_queue(fault, lambda client, key: client.lpop(key))

    def _roll_redis_back(self, fault: Fault) -> Injected:
        with self._alone("redis"), redis.Redis(port=self.system.redis.port, socket_timeout=5) as client:
            snapshot: Any = client.eval(SNAPSHOT, 0)
            self._last(fault)
            began = time.time()
            roll_back(client, snapshot)
            return Injected(fault, began, began)

    # --- the database ---------------------------------------------------------------------------------------

    def _kill_database(self, fault: Fault) -> Injected:
        assert self.system.postgres is not None
        with self._alone("database"):
            began = time.time()
            self.system.postgres.kill()
            self._last(fault)
            self.system.postgres.start()
            return Injected(fault, began, time.time())

    def _stop_database(self, fault: Fault) -> Injected:
        assert self.system.postgres is not None
        with self._alone("database"):
            began = time.time()
            self.system.postgres.pause()
            self._last(fault)
            self.system.postgres.resume()
            return Injected(fault, began, time.time())

    def _hold(self, fault: Fault, *, kill: bool) -> Injected | None:
        path = self.system.direct_database.removeprefix("sqlite:///")
        with self._alone("database"):
            command = [sys.executable, "-S", "-c", _WRITER, path]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            with subprocess.Popen(command, env={}, **pipes) as process:
                assert process.stdout is not None
                held = process.stdout.readline() == b"holds\n"
                began = time.time()
                self._last(fault)
                if kill:
                    process.kill()
                process.communicate()
            return Injected(fault, began, time.time()) if held else None

    def _lock_database(self, fault: Fault) -> Injected | None:
        return self._hold(fault, kill=False)

    def _kill_writer(self, fault: Fault) -> Injected | None:
        return self._hold(fault, kill=True)

    # --- the network ----------------------------------------------------------------------------------------

    def _switch(self, fault: Fault, server: str, switch: str) -> Injected:
        with self._alone(f"proxy of {server}"):
            began = time.time()
            method = getattr(self.system.proxies[server], switch)
            method(True)
            self._last(fault)
            method(False)
            return Injected(fault, began, time.time(), self.system.behind_proxy)

    def _cut(self, fault: Fault, server: str) -> Injected:
        began = time.time()
        self.system.proxies[server].cut()
        return Injected(fault, began, began, self.system.behind_proxy)

    def _cut_redis(self, fault: Fault) -> Injected:
        return self._cut(fault, "redis")

    def _swallow_redis(self, fault: Fault) -> Injected:
        return self._switch(fault, "redis", "swallow")

    def _slow_redis(self, fault: Fault) -> Injected:
        return self._switch(fault, "redis", "delay")

    def _cut_database(self, fault: Fault) -> Injected:
        return self._cut(fault, "database")

    def _swallow_database(self, fault: Fault) -> Injected:
        return self._switch(fault, "database", "swallow")

    def _slow_database(self, fault: Fault) -> Injected:
        return self._switch(fault, "database", "delay")

    def _refuse_database(self, fault: Fault) -> Injected:
        return self._switch(fault, "database", "refuse")

    # --- poison ---------------------------------------------------------------------------------------------

    def _poison(self, fault: Fault) -> Injected | None:
        """Submit a job that takes its worker down, in the middle of innocents of the same batch."""
        n, do = POISON_BASE + 100 * fault.number, fault.kind
        guilty = n + 3
        model = ("quick", "steady")[fault.target % 2]
        op = f"poison/{fault.number}"
        numbers = list(range(n, n + 8))
        self._journal.write(asked=op, what="batch", model=model, jobs=numbers, do={str(guilty): do})
        began = time.time()
        timeout = POISON_TIMEOUT if do == "hang" else None
        inputs = [{"n": i, "do": do if i == guilty else ""} for i in numbers]

        def submit() -> bool:
            with suppress(RelayError):
                # The same key until it is told that it is stored, as the clients do it.
                self.system.relay.submit_batch(model, inputs, key=op, max_attempts=3, priority=7, timeout=timeout)
                return True
            return False

        if not self._meet(submit, 30.0):
            return None
        self._journal.write(op=op, outcome="committed")
        return Injected(fault, began, began, poison=guilty)


def _signal(family: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _log(path: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
