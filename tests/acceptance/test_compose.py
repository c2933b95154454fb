"""docker-compose.yml without Docker: the specification's schema, no secrets, and our services' commands as processes.

What is not tried here: the images of Redis and PostgreSQL, and that the Dockerfiles build.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from servers import PostgresServer, RedisServer, wait_until

ROOT = Path(__file__).parents[2]
FILES = ["docker-compose.yml", "docker-compose.gpu.yml"]
PASSWORD = "correct0horse0battery"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

_VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}")


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """Fill in `${NAME}`, `${NAME:-default}` and `${NAME:?message}` as Compose does; KeyError for what is required."""

    def fill(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        found = variables.get(name)
        if found or (found is not None and not (operator or "").startswith(":")):
            return found
        if (operator or "").endswith("?"):
            raise KeyError(f"{name}: {rest}")
        return rest or ""

    if isinstance(value, str):
        return _VARIABLE.sub(fill, value)
    if isinstance(value, list):
        return [interpolate(item, variables) for item in value]
    if isinstance(value, dict):
        return {name: interpolate(item, variables) for name, item in value.items()}
    return value


def load(name: str = FILES[0]) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return parsed


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services as Compose sees them with a .env that holds a password."""
    filled: dict[str, Any] = interpolate(load(), {"POSTGRES_PASSWORD": PASSWORD})["services"]
    return filled


# --- the files ------------------------------------------------------------------------------------------------------


def check_jsonschema(path: Path) -> subprocess.CompletedProcess[str]:
    # The package brings the specification's schema; nothing is downloaded.
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", FILES)
def test_the_file_follows_the_compose_specification(name: str) -> None:
    done = check_jsonschema(ROOT / name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_finds_what_the_specification_does_not_know(tmp_path: Path) -> None:
    wrong = load()
    wrong["services"]["worker"]["restarts"] = "always"
    (tmp_path / "wrong.yml").write_text(yaml.safe_dump(wrong))
    assert check_jsonschema(tmp_path / "wrong.yml").returncode == 1


def test_a_password_is_asked_for_and_none_is_in_a_file() -> None:
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD"):
        interpolate(load(), {})
    for name in FILES:
        for service, definition in load(name)["services"].items():
            for variable, value in definition.get("environment", {}).items():
                if re.search("PASSWORD|SECRET|TOKEN|KEY", variable):
                    assert value.startswith("${"), f"{name}: {service} has a literal {variable}"
                if "://" in value and (password := urlsplit(value).password):
                    assert password.startswith("${"), f"{name}: {service} has a literal password in {variable}"
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert example["POSTGRES_PASSWORD"] == ""
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_every_variable_of_the_files_is_in_the_example() -> None:
    example = set(re.findall(r"^#? ?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    for name in FILES:
        used = {match[0] for match in _VARIABLE.findall((ROOT / name).read_text())}
        assert used <= example


def test_what_must_hold_for_nothing_to_be_lost(services: dict[str, Any]) -> None:
    redis = shlex.join(services["redis"]["command"])
    assert "--maxmemory-policy noeviction" in redis
    assert "--appendonly yes" in redis
    volumes = load()["volumes"]
    for name in ("redis", "postgres", "worker", "trainer"):
        assert services[name]["healthcheck"]["test"]
        assert services[name]["restart"] == "unless-stopped"
        assert services[name]["volumes"][0].split(":")[0] in volumes
    worker = services["worker"]
    assert worker["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert worker["depends_on"]["redis"]["condition"] == "service_healthy"
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    # What would keep `--scale worker=4` from working.
    assert not {"container_name", "hostname", "ports"} & worker.keys()


def test_nothing_is_published_to_the_outside(services: dict[str, Any]) -> None:
    assert not [name for name, service in services.items() if "ports" in service]


def test_the_images_are_built_from_what_is_there(services: dict[str, Any]) -> None:
    dockerfiles = {service["build"]["dockerfile"] for service in services.values() if "build" in service}
    assert dockerfiles == {"deploy/Dockerfile.producer", "deploy/Dockerfile.worker"}
    shipped = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in dockerfiles:
        text = (ROOT / name).read_text()
        assert re.findall(r"^USER (\w+)$", text, re.MULTILINE) == ["torchrelay"], f"{name} runs as root"
        for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
            assert source == "." or source in shipped
    assert not re.search("torch(?!relay)", _instructions("deploy/Dockerfile.producer"))
    for path in shipped:
        assert (ROOT / path).exists()


def _instructions(name: str) -> str:
    return "\n".join(line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))


# --- our services, as processes -------------------------------------------------------------------------------------


@pytest.fixture
def environment(
    services: dict[str, Any], postgres_server: PostgresServer, redis_url: str, redis_server: RedisServer, tmp_path: Path
) -> Iterator[dict[str, str]]:
    """The environment of our services, with the two servers where the containers would be."""
    ours = services["worker"]["environment"]
    assert services["migrate"]["environment"] == services["cli"]["environment"] == ours
    server = postgres_server.ensure()
    told = services["postgres"]["environment"]
    user, database = told["POSTGRES_USER"], told["POSTGRES_DB"]
    server.execute("CREATE ROLE {} LOGIN", user)  # as the image does at its first start
    server.execute("CREATE DATABASE {} OWNER {}", database, user)
    assert told["POSTGRES_PASSWORD"] == urlsplit(ours["TORCHRELAY_DATABASE"]).password == PASSWORD
    places = {
        "@postgres:5432/": f"@127.0.0.1:{server.port}/",
        "//redis:6379/": f"//127.0.0.1:{redis_server.port}/",
        "/var/lib/torchrelay": str(tmp_path / "volume"),
    }
    moved = {}
    for name, value in ours.items():
        for old, new in places.items():
            value = value.replace(old, new)  # noqa: PLW2901
        moved[name] = value
    yield {**os.environ, **moved, "TORCHRELAY_HOME": str(tmp_path / "volume"), "PATH": PATH}
    server.ensure().drop(database)
    server.execute("DROP ROLE {}", user)


def run(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=90, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def alive(environment: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    listed = run(["torchrelay", "workers", "--json"], environment, folder)
    assert listed.returncode == 0, listed.stderr
    rows: list[dict[str, Any]] = json.loads(listed.stdout)
    return [row for row in rows if row["alive"]]


def test_the_services_run(services: dict[str, Any], environment: dict[str, str], tmp_path: Path) -> None:
    """`migrate` ends well, also a second time; two workers and a trainer come alive and healthy, and end in order."""
    for _ in range(2):
        migrated = run(services["migrate"]["command"], environment, tmp_path)
        assert migrated.returncode == 0, migrated.stderr
    helped = run(services["cli"]["command"], environment, tmp_path)
    assert helped.returncode == 0
    assert "Usage" in helped.stdout

    kind, *healthcheck = services["worker"]["healthcheck"]["test"]
    assert kind == "CMD"
    early = run(healthcheck, environment, tmp_path)
    assert early.returncode == 1, early.stderr

    log_path = tmp_path / "worker.log"
    workers: list[subprocess.Popen[bytes]] = []

    def all_alive() -> bool:
        assert all(process.poll() is None for process in workers), log_path.read_text()
        return len(alive(environment, tmp_path)) == len(workers)

    try:
        with log_path.open("wb") as log:
            for name in ("worker", "worker", "trainer"):  # as --profile train --scale worker=2
                workers.append(
                    subprocess.Popen(
                        services[name]["command"],
                        env=environment,
                        cwd=tmp_path,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        wait_until(all_alive, 90, "two workers and a trainer alive")
        rows = alive(environment, tmp_path)
        assert len({row["name"] for row in rows}) == 3
        assert sorted((row["models"] for row in rows), key=repr) == [None, None, []]
        assert {row["host"] for row in rows} == {socket.gethostname()}
        healthy = run(healthcheck, environment, tmp_path)
        assert healthy.returncode == 0, healthy.stderr
        for process in workers:
            process.terminate()
        assert [process.wait(60) for process in workers] == [0, 0, 0], log_path.read_text()
        assert alive(environment, tmp_path) == []
    finally:
        for process in workers:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the group that we made for it
                process.wait()


def test_a_worker_without_its_database_is_unhealthy(services: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        url = f"postgresql://torchrelay@127.0.0.1:{closed.getsockname()[1]}/torchrelay"
        environment = {**os.environ, "PATH": PATH, "TORCHRELAY_DATABASE": url}
        done = run(services["worker"]["healthcheck"]["test"][1:], environment, tmp_path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
