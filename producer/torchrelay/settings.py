"""Every setting, once: from `TORCHRELAY_*`, from `torchrelay.toml`, from arguments; the last is the strongest.

Not here: what a setting does (each is read by the module that needs it), and options of single jobs (`Options`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from torchrelay_storage.errors import InvalidInput

PREFIX = "TORCHRELAY_"
CONFIG = "TORCHRELAY_CONFIG"  # another file than ./torchrelay.toml; empty: no file at all
FILE = "torchrelay.toml"

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """The settings, checked. `Settings.load(...)` is the way to get them: its errors name the setting and its source.

    Paths are relative to the working directory. A URL's password never shows in a repr; print URLs by `safe_url`.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True)

    # Where things are. None stands for the embedded default under `home`.
    home: Path = Path(".torchrelay")  # the folder of the embedded database, Redis and artifacts
    database: str | None = Field(default=None, repr=False)  # sqlite:///path or postgresql://user:password@host/name
    broker: str | None = Field(default=None, repr=False)  # redis://, rediss:// or redis+socket:///path
    artifacts: str | None = Field(default=None, repr=False)  # file:///folder, s3://bucket/prefix or memory://

    # Limits of what a client may store.
    inline_limit: int = Field(default=65_536, ge=1024)  # bytes; larger values become artifacts
    max_input_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)  # bytes of one encoded input
    max_metadata_bytes: int = Field(default=16_384, ge=2)  # bytes of one job's metadata as JSON
    max_queued: int | None = Field(default=None, ge=0)  # jobs of all models that may wait; None: any number

    # Workers.
    handlers: dict[str, str] = Field(default_factory=dict)  # name -> "module:Class", beside the entry points
    heartbeat: Seconds = 2.0  # seconds between two beats
    stale_after: Seconds = 10.0  # seconds without a beat after which a worker counts as gone

    # Training.
    recipes: dict[str, str] = Field(default_factory=dict)  # name -> "module:Class", beside the entry points
    datasets: list[str] = Field(default_factory=list)  # URLs beside the artifact store that runs may read, and below

    # The road.
    window: Seconds = 2.0  # seconds of work of a model that are announced and not begun, held by workers or in Redis
    announce_again: Seconds = 10.0  # seconds after which an announced chunk that nobody claimed is announced anew
    visibility_timeout: Seconds = 60.0  # seconds after which Celery gives a message to another worker; guards no work
    silent_after: Seconds = 30.0  # seconds that messages may wait for an idle worker before it consumes anew

    # Keeping.
    retention_days: Annotated[float, Field(ge=0)] = 30.0  # days that ended jobs are kept; 0: for ever

    @classmethod
    def load(cls, **arguments: Any) -> Settings:
        """Read the settings; an argument that is None counts as not passed.

        Raises:
            InvalidInput: a setting is unknown or has a bad value, or the file cannot be read; the message says which.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            raise InvalidInput(_explain(error, given)) from None
        except ValueError as error:  # a JSON value in the environment that is none
            raise InvalidInput(f"a {PREFIX}* variable cannot be read: {error}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The first is the strongest."""
        return init_settings, _File(settings_cls), env_settings

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("database", "broker", "artifacts")
    @classmethod
    def _empty_is_none(cls, url: str | None) -> str | None:
        return url or None

    @field_validator("broker")
    @classmethod
    def _is_redis(cls, url: str | None) -> str | None:
        if url and urlsplit(url).scheme not in ("redis", "rediss", "redis+socket"):
            raise ValueError("it must begin with redis://, rediss:// or redis+socket://")
        return url

    @field_validator("datasets")
    @classmethod
    def _are_stores(cls, urls: list[str]) -> list[str]:
        for url in urls:
            parts = urlsplit(url)
            is_folder = parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/")
            is_bucket = parts.scheme == "s3" and bool(parts.netloc)
            if not (is_folder or is_bucket) or parts.query or parts.fragment:
                raise ValueError("each must be file:///a/folder, s3://bucket or s3://bucket/prefix")
        return urls

    @model_validator(mode="after")
    def _beats_before_stale(self) -> Settings:
        if self.stale_after < 2 * self.heartbeat:
            raise ValueError("stale_after must be at least twice the heartbeat, or one late beat counts as a death")
        return self

    @property
    def is_embedded(self) -> bool:
        """Whether the broker is the embedded one, which `torchrelay up` starts."""
        return self.broker is None

    @property
    def socket(self) -> Path:
        """The embedded Redis's unix socket. Not under `home`: a socket's path may have a hundred bytes only."""
        name = hashlib.sha256(os.fsencode(self.home.resolve())).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"torchrelay-{os.getuid()}-{name}" / "redis.sock"

    @property
    def database_url(self) -> str:
        """The database's URL, with its password."""
        return self.database or f"sqlite:///{self.home / 'torchrelay.db'}"

    @property
    def broker_url(self) -> str:
        """The broker's URL as Celery reads it, with its password."""
        return self.broker or f"redis+socket://{self.socket}"

    @property
    def artifacts_url(self) -> str:
        """The object store's URL."""
        return self.artifacts or f"file://{quote(str(self.home / 'artifacts'))}"

    def as_environment(self) -> dict[str, str]:
        """Return the variables under which another process has exactly these settings, whatever file lies about."""
        environment = {CONFIG: ""}
        for name, value in self.model_dump(mode="json", exclude_none=True).items():
            environment[PREFIX + name.upper()] = value if isinstance(value, str) else json.dumps(value)
        return environment


class _File(PydanticBaseSettingsSource):
    """`torchrelay.toml` in the working directory, or the file that TORCHRELAY_CONFIG names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Part of the interface; `__call__` reads all fields at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return read_file()


def config_file() -> Path | None:
    """Return the file of settings that applies here, or None."""
    named = os.environ.get(CONFIG)
    if named is not None:
        return Path(named).expanduser() if named else None
    return Path(FILE) if Path(FILE).is_file() else None


def read_file() -> dict[str, Any]:
    """Return what the file of settings says. Raises InvalidInput if it cannot be read."""
    path = config_file()
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the settings file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path} is not TOML: {error}") from error


def _explain(error: ValidationError, arguments: dict[str, Any]) -> str:
    in_file = read_file()
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if name in arguments:
            source = "an argument"
        elif name in in_file:
            source = str(config_file())
        else:
            source = PREFIX + name.upper() if name else "together"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, list(Settings.model_fields), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(Settings.model_fields)}"
            lines.append(f"unknown setting {name!r} ({source}){hint}")
        else:
            lines.append(f"setting {name!r} ({source}): {problem['msg']}" if name else f"settings: {problem['msg']}")
    return "\n".join(lines)


_SECRET = ("password", "secret", "token", "key", "credential")


def safe_url(url: str) -> str:
    """Return the URL with its password, and what in its query looks like a secret, replaced by `***`."""
    try:
        parts = urlsplit(url)
        userinfo, at, host = parts.netloc.rpartition("@")
        user, colon, _ = userinfo.partition(":")
        query = urlencode(
            [
                (name, "***" if any(word in name.lower() for word in _SECRET) else value)
                for name, value in parse_qsl(parts.query, keep_blank_values=True)
            ],
            safe="*/:,",
        )
    except ValueError:
        return "***"
    slashes = "//" if "://" in url else ""
    login = f"{user}{':***' if colon else ''}{at}"
    return f"{parts.scheme}:{slashes}{login}{host}{parts.path}{'?' if query else ''}{query}"
