"""What is wrong with this installation, and how to mend it: each part is tried, and each check says what to do.

A check is a function of the patient; it never raises. Not here: how the findings are printed (`cli.stack`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from torchrelay.broker import connect
from torchrelay.embedded import holder
from torchrelay.settings import PREFIX, Settings, config_file, safe_url
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.database import Database
from torchrelay_storage.errors import RelayError, Unreachable
from torchrelay_storage.fleet import Fleet, WorkerRow
from torchrelay_storage.registry import ModelRow, Registry

OLDEST_REDIS = (6, 0)
CLOCKS_APART = 2.0  # seconds; torchrelay itself uses the database's clock only, so this spoils log files and not jobs
MEMORY_SHARE = 0.8  # of maxmemory
PROBE_SECONDS = 60.0  # for a cold `import torch`

_TORCH = """
import json, torch
cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "cuda": cuda, "mps": torch.backends.mps.is_available(),
                  "threads": torch.get_num_threads()}))
"""


class Grade(StrEnum):
    """How a part is."""

    OK = "ok"
    WARNING = "warning"  # works, but look at it
    FAILED = "failed"
    SKIPPED = "skipped"  # not needed here, or not to be known because of another failure


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. `fix` says what to do; `unreachable`: the part does not answer at all."""

    part: str
    grade: Grade
    says: str
    fix: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    unreachable: bool = False


class Patient:
    """What is examined. Each thing is asked for once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def database(self) -> Database:
        """The database. Raises Unreachable where the embedded one does not exist yet."""
        if self.settings.database is None and not (self.settings.home / "torchrelay.db").exists():
            raise Unreachable(f"there is no database in {self.settings.home} yet")
        return Database(self.settings.database_url)

    @cached_property
    def redis(self) -> dict[str, Any]:
        """What Redis says of itself. Raises redis.RedisError or OSError."""
        client = connect(self.settings)
        try:
            return dict(client.info())
        finally:
            client.close()

    @cached_property
    def workers(self) -> list[WorkerRow]:
        """The workers that are alive."""
        return [worker for worker in Fleet(self.database).workers(self.settings.stale_after) if worker.alive]

    @cached_property
    def models(self) -> list[ModelRow]:
        """The registered models."""
        return Registry(self.database).models()


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield the finding of every check, in an order in which the first failure is the one to mend first."""
    patient = Patient(settings)
    for part, check in CHECKS:
        try:
            yield check(patient)
        except RelayError as error:
            yield Finding(part, Grade.SKIPPED if part in AFTER_DATABASE else Grade.FAILED, str(error),
                          _FIXES.get(part), unreachable=isinstance(error, Unreachable))  # fmt: skip
        except Exception as error:  # whatever a part raises is a finding, not the end of the examination
            yield Finding(part, Grade.FAILED, f"{type(error).__name__}: {_first_line(error)}", _FIXES.get(part))


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 0 where nothing failed, 3 where a part that failed does not answer, else 1."""
    failed = [finding for finding in findings if finding.grade is Grade.FAILED]
    if not failed:
        return 0
    return 3 if any(finding.unreachable for finding in failed) else 1


# --- the checks --------------------------------------------------------------------------------------------


def check_settings(patient: Patient) -> Finding:
    """Where the settings come from. (Bad ones end the program before.)"""
    file = config_file()
    variables = sorted(name for name in os.environ if name.startswith(PREFIX) and name != f"{PREFIX}CONFIG")
    sources = ([str(file)] if file else []) + variables
    says = f"from {', '.join(sources)}" if sources else "the defaults"
    settings = patient.settings
    return Finding("settings", Grade.OK, f"{says}; home {settings.home}", details={
        "file": str(file) if file else None, "variables": variables, "home": str(settings.home),
        "database": safe_url(settings.database_url), "broker": safe_url(settings.broker_url),
        "artifacts": safe_url(settings.artifacts_url),
    })  # fmt: skip


def check_database(patient: Patient) -> Finding:
    """Does it answer, and does its schema fit this code?"""
    database = patient.database
    current, head = database.revision()
    database.check()
    started = time.monotonic()
    database.now()
    took = time.monotonic() - started
    says = f"{database.safe_url}, schema {current}, answers in {took * 1000:.1f} ms"
    return Finding("database", Grade.OK, says, details={"schema": current, "code": head, "answer_s": round(took, 4)})


def check_clock(patient: Patient) -> Finding:
    """Does this machine's clock agree with the database's?"""
    before = time.time()
    there = patient.database.now()
    apart = there - (before + time.time()) / 2
    says = f"{abs(apart):.2f} s {'ahead of' if apart < 0 else 'behind'} the database's"
    if abs(apart) > CLOCKS_APART:
        return Finding("clock", Grade.WARNING, says, "set the machine's clock by NTP; jobs go by the database's, but a "
                       "`not_before` computed here, and log files, will be off", {"apart_s": apart})  # fmt: skip
    return Finding("clock", Grade.OK, says, details={"apart_s": round(apart, 3)})


def check_redis(patient: Patient) -> Finding:
    """Does it answer, and is it new enough?"""
    import redis

    url = safe_url(patient.settings.broker_url)
    try:
        info = patient.redis
    except (redis.RedisError, OSError) as error:
        if patient.settings.is_embedded and holder(patient.settings.home) is None:
            # Not a fault: nobody has started it. What was done before can be read all the same.
            return Finding("redis", Grade.WARNING, "the embedded one does not run now; what is submitted waits in SQL",
                           "`torchrelay up` starts it; to use another, set TORCHRELAY_BROKER")  # fmt: skip
        fix = _FIXES["redis"]
        says = f"{url} does not answer ({_first_line(error).rstrip('.')}); what is submitted waits in SQL"
        return Finding("redis", Grade.FAILED, says, fix, unreachable=True)
    version, name = _version(info)
    says = f"{name} {version} at {url}"
    details = {"server": name, "version": version}
    if _numbers(str(info.get("redis_version", "0"))) < OLDEST_REDIS:
        return Finding("redis", Grade.WARNING, says, "torchrelay is tested with Redis 6.2 and later; upgrade", details)
    return Finding("redis", Grade.OK, says, details=details)


def check_eviction(patient: Patient) -> Finding:
    """A Redis that evicts throws messages away."""
    info = _info(patient)
    if info is None:
        return Finding("eviction", Grade.SKIPPED, "Redis does not answer")
    policy = str(info.get("maxmemory_policy", "unknown"))
    if policy == "noeviction":
        return Finding("eviction", Grade.OK, policy, details={"policy": policy})
    return Finding("eviction", Grade.FAILED, f"{policy}: when its memory is full, Redis throws queued work away",
                   "set `maxmemory-policy noeviction` in redis.conf (at once: `redis-cli CONFIG SET maxmemory-policy "
                   "noeviction`)", {"policy": policy})  # fmt: skip


def check_memory(patient: Patient) -> Finding:
    """Is there room left?"""
    info = _info(patient)
    if info is None:
        return Finding("memory", Grade.SKIPPED, "Redis does not answer")
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    details = {"used_bytes": used, "max_bytes": most}
    says = f"{used / 1e6:.1f} MB used" + (f" of {most / 1e6:.1f} MB" if most else ", no limit set")
    if most and used > MEMORY_SHARE * most:
        return Finding("memory", Grade.WARNING, says, "raise `maxmemory`, or find out what else lives in this Redis: "
                       "torchrelay's part does not grow with the backlog", details)  # fmt: skip
    return Finding("memory", Grade.OK, says, details=details)


def check_artifacts(patient: Patient) -> Finding:
    """Write, read and delete a small object."""
    if patient.settings.artifacts is None and not patient.settings.home.exists():
        return Finding("artifacts", Grade.SKIPPED, "the folder is made when it is first needed")
    Artifacts(patient.settings.artifacts_url).check()
    return Finding("artifacts", Grade.OK, f"{safe_url(patient.settings.artifacts_url)} can be written and read")


def check_workers(patient: Patient) -> Finding:
    """Is there anybody to do the work?"""
    alive, waiting = patient.workers, sum(model.waiting for model in patient.models)
    details = {"alive": [worker.name for worker in alive], "waiting": waiting}
    if alive:
        return Finding("workers", Grade.OK, f"{len(alive)} alive: {', '.join(w.name for w in alive)}", details=details)
    fix = "start one with `torchrelay worker`"
    if patient.settings.is_embedded:
        fix = "`torchrelay up` starts one, together with Redis"
    if waiting:
        return Finding("workers", Grade.FAILED, f"none is alive, jobs that wait: {waiting}", fix, details)
    return Finding("workers", Grade.WARNING, "none is alive; nothing waits", fix, details)


def check_models(patient: Patient) -> Finding:
    """Can each registered model be served by somebody?"""
    if not patient.models:
        return Finding("models", Grade.WARNING, "none is registered yet",
                       "`torchrelay models register NAME --handler HANDLER --weights FILE` adds one")  # fmt: skip
    known = {point.name for point in entry_points(group="torchrelay.models")} | set(patient.settings.handlers)
    troubles, details = [], {}
    for model in patient.models:
        version = model.newest
        served = [w.name for w in patient.workers if w.models is None or version.name in w.models]
        trouble = None
        if version.handler not in known:
            trouble = f"{version.ref}: the handler {version.handler!r} is not installed on this machine"
        elif patient.workers and not served:
            trouble = f"{version.ref}: no worker that is alive serves it"
        elif version.paused:
            trouble = f"{version.ref} is paused; `torchrelay resume {version.name}` ends that"
        details[version.ref] = {"handler": version.handler, "served_by": served, "trouble": trouble}
        if trouble:
            troubles.append(trouble)
    if troubles:
        return Finding("models", Grade.WARNING, "; ".join(troubles), "on the workers' machines, install the package "
                       "with the handler or name it in the setting `handlers`, and see that a worker's --models "
                       "names the model", details)  # fmt: skip
    return Finding("models", Grade.OK, ", ".join(model.newest.ref for model in patient.models), details=details)


def check_torch(_patient: Patient) -> Finding:
    """Is torch here, and which devices does it see? In a process of its own: this one never imports it."""
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", Grade.SKIPPED, "not installed; only workers need it", "install the torch build for the "
                       "machine's device (the README says how), then `pip install 'torchrelay[worker]'`")  # fmt: skip
    try:
        probe = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, check=False,
                               timeout=PROBE_SECONDS, stdin=subprocess.DEVNULL)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding("torch", Grade.FAILED, f"`import torch` takes over {PROBE_SECONDS:.0f} s", "reinstall torch")
    if probe.returncode != 0:
        says = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
        return Finding("torch", Grade.FAILED, f"`import torch` fails: {says}", "reinstall torch for this machine")
    found = json.loads(probe.stdout.splitlines()[-1])
    devices = [f"cuda:{i} ({name})" for i, name in enumerate(found["cuda"])] + (["mps"] if found["mps"] else [])
    says = f"{found['version']}, devices: {', '.join([*devices, 'cpu'])}"
    return Finding("torch", Grade.OK, says, details=found)


def check_stack(patient: Patient) -> Finding:
    """Does `torchrelay up` run here?"""
    if not patient.settings.is_embedded:
        return Finding("up", Grade.SKIPPED, "not used: a broker is configured")
    owner = holder(patient.settings.home)
    if owner is None:
        return Finding("up", Grade.SKIPPED, "`torchrelay up` does not run in this folder")
    return Finding("up", Grade.OK, f"runs as process {owner}", details={"pid": owner})


CHECKS: tuple[tuple[str, Callable[[Patient], Finding]], ...] = (
    ("settings", check_settings),
    ("database", check_database),
    ("clock", check_clock),
    ("up", check_stack),
    ("redis", check_redis),
    ("eviction", check_eviction),
    ("memory", check_memory),
    ("artifacts", check_artifacts),
    ("workers", check_workers),
    ("models", check_models),
    ("torch", check_torch),
)

# Where the database fails, its own check says so; these then have nothing to add.
AFTER_DATABASE = frozenset({"clock", "workers", "models"})

_FIXES = {
    "database": "see that the server runs, that TORCHRELAY_DATABASE names it, and that `torchrelay db upgrade` was run "
    "(`torchrelay up` makes the embedded one)",
    "redis": "see that the server runs, and that TORCHRELAY_BROKER names it",
    "artifacts": "see that TORCHRELAY_ARTIFACTS names a place that this user may write to",
}


def _info(patient: Patient) -> dict[str, Any] | None:
    import redis

    try:
        return patient.redis
    except (redis.RedisError, OSError):
        return None


def _version(info: dict[str, Any]) -> tuple[str, str]:
    if "valkey_version" in info:
        return str(info["valkey_version"]), "Valkey"
    return str(info.get("redis_version", "of unknown version")), "Redis"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
