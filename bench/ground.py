"""The ground that all subjects of a run stand on in turn: one Redis, one PostgreSQL with fsync on, one folder.

Whoever comes next finds Redis empty, a database of its own, and nothing left to be written of whoever was before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import system

from servers import PostgresServer, RedisServer
from torchrelay.settings import Settings
from torchrelay_storage.database import Database


class Ground:
    """The servers and how large the work on them is. A context manager.

    Attributes:
        seconds: for which a subject should work at a time.
        quick: two minutes for everything: few rounds, small tables.
    """

    def __init__(self, *, seconds: float, quick: bool) -> None:
        self.seconds = seconds
        self.quick = quick
        self.redis = RedisServer()
        # The tests' server has half of PostgreSQL's default.
        self.postgres = PostgresServer(durable=True, shared_buffers="128MB")
        self.folder = Path(tempfile.mkdtemp(prefix="torchrelay-bench-"))
        self._rates: dict[str, float] = {}
        self._templates: dict[str, str] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            stack.enter_context(self.redis)
            stack.enter_context(self.postgres)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    # --- how much -------------------------------------------------------------------------------------------

    def jobs(self, key: str, guess: float, *, most: int | None = None) -> int:
        """Return how many jobs keep a subject busy for `seconds`: at its known rate, the first time at a guessed one.

        The same number in every round, but for a guess that was off by more than half.
        """
        wanted = self._rates.get(key, guess) * self.seconds
        rounded = int(float(f"{max(wanted, 10.0):.1g}")) if wanted < 100 else int(float(f"{wanted:.2g}"))
        return min(rounded, most) if most is not None else rounded

    def took(self, key: str, guess: float, jobs: int, seconds: float) -> None:
        """Learn a subject's rate."""
        known, measured = self._rates.get(key, guess), jobs / max(seconds, 1e-6)
        self._rates[key] = known if known / 2 < measured < known * 2 else measured

    # --- a database of one's own ----------------------------------------------------------------------------

    def level(self) -> None:
        """Empty Redis, and have PostgreSQL write what it still has to."""
        self.redis.ensure().flush()
        self.postgres.ensure().execute("CHECKPOINT")

    @contextmanager
    def database(self, name: str) -> Iterator[str]:
        """Yield the URL of an empty PostgreSQL database, dropped in the end."""
        self.level()
        self.postgres.drop(name)
        url = self.postgres.create(name)
        try:
            yield url
        finally:
            with suppress(Exception):  # an error inside is what counts
                self.postgres.drop(name)

    @contextmanager
    def fresh(
        self, kind: str, template: str | None = None, *, keep: str | None = None, **settings: Any
    ) -> Iterator[Settings]:
        """Yield the settings of a system of ours without workers, on a new database of `sqlite` or `postgresql`.

        Args:
            template: what was kept under this name is copied, in the place of empty tables.
            keep: the database is not dropped, but kept under this name.
            settings: more of them.
        """
        self.level()
        name = f"bench_{uuid.uuid4().hex[:8]}"
        home = self.folder / name
        home.mkdir()
        url = self._create(kind, name, self._template(kind) if template is None else self._templates[template])
        kept = False
        try:
            yield self.settings(url, home, **settings)
            if keep is not None:
                self._templates[keep], kept = url, True
        finally:
            if not kept:
                self.forget(url)
            shutil.rmtree(home, ignore_errors=True)

    def settings(self, url: str, home: Path, **more: Any) -> Settings:
        """Return the settings of a system on this database and our Redis."""
        more.setdefault("handlers", system.HANDLERS)
        return Settings.load(
            home=home, database=url, broker=self.redis.url, artifacts=f"file://{home}/artifacts", **more
        )

    def has(self, template: str) -> bool:
        """Whether `fresh` has kept something under this name."""
        return template in self._templates

    @contextmanager
    def again(self, template: str) -> Iterator[Settings]:
        """Yield the settings of the very database that was kept under this name, and no copy."""
        self.level()
        home = self.folder / f"again_{uuid.uuid4().hex[:8]}"
        home.mkdir()
        try:
            yield self.settings(self._templates[template], home)
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def forget(self, url: str) -> None:
        """Drop a database of ours, whoever is connected to it."""
        if url.startswith("sqlite"):
            for suffix in ("", "-wal", "-shm"):
                Path(url.removeprefix("sqlite:///") + suffix).unlink(missing_ok=True)
        else:
            self.postgres.drop(url.rpartition("/")[2])

    def _template(self, kind: str) -> str:
        """An empty database with our tables: made once, copied in 60 ms."""
        if kind not in self._templates:
            url = self._create(kind, f"template_{kind}", None)
            database = Database(url)
            database.upgrade()
            database.dispose()
            self._templates[kind] = url
        return self._templates[kind]

    def _create(self, kind: str, name: str, template: str | None) -> str:
        if kind == "postgresql":
            return self.postgres.create(name, template.rpartition("/")[2] if template else "template0")
        path = self.folder / f"{name}.db"
        if template:
            shutil.copyfile(template.removeprefix("sqlite:///"), path)
            with path.open("rb") as file:
                os.fsync(file.fileno())  # else a subject pays for what the copy has left to write
        return f"sqlite:///{path}"
