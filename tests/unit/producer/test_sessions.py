"""submit(session=...): the job exists if and only if the caller's transaction commits, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from sqlalchemy import Engine, Table, create_engine, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from servers import wait_until
from torchrelay import AsyncRelay, InvalidInput, JobNotFound, KeyConflict, Relay
from torchrelay.messages import queue_name
from torchrelay.settings import Settings


class Base(DeclarativeBase):
    """The application's own tables."""


class Order(Base):
    """An order, for which a job is submitted."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    job: Mapped[str | None]


@dataclass
class App:
    """An application with a database of its own, in which torchrelay's tables are too."""

    relay: Relay
    engine: Engine

    def announced(self) -> int:
        return sum(self.relay._core.broker.depths(queue_name("double")).values())


def engine_url(settings: Settings) -> str:
    return settings.database_url.replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture
def app(settings: Settings) -> Iterator[App]:
    engine = create_engine(engine_url(settings))
    Base.metadata.create_all(engine)
    with Relay(settings=settings) as relay:
        relay.register_model("double", handler="double", chunk_size=4)
        yield App(relay, engine)
    engine.dispose()


def test_exactly_the_committed_jobs_exist(app: App) -> None:
    kept, lost = [], []
    for n in range(100):
        with Session(app.engine) as session:
            job = app.relay.submit("double", {"n": n}, session=session)
            session.add(Order(id=n, job=job.id))
            if n % 2:
                session.commit()
                kept.append(job.id)
            else:
                session.rollback()
                lost.append(job.id)
    assert sorted(job.id for job in app.relay.jobs(limit=1000)) == sorted(kept)
    for name in lost:
        with pytest.raises(JobNotFound):
            app.relay.job(name)
    with Session(app.engine) as session:
        assert session.scalar(select(func.count()).select_from(Order)) == 50


def test_it_is_announced_at_the_commit_and_not_before(app: App) -> None:
    with Session(app.engine) as session:
        app.relay.submit("double", {"n": 1}, session=session)
        assert app.relay._core.announcer.flush(1)
        assert app.announced() == 0
        session.commit()
        wait_until(lambda: app.announced() == 1)
        app.relay.submit("double", {"n": 2}, session=session)
        session.rollback()
        assert not session.info["torchrelay.pending"]
        app.relay.submit("double", {"n": 3}, session=session)
        session.commit()
        wait_until(lambda: app.announced() == 2)


def test_a_savepoint_takes_its_job_with_it(app: App) -> None:
    with Session(app.engine) as session, session.begin():
        session.add(Order(id=1))
        kept = app.relay.submit("double", {"n": 1}, session=session)
        nested = session.begin_nested()
        lost = app.relay.submit("double", {"n": 2}, session=session)
        nested.rollback()
        with session.begin_nested():
            also = app.relay.submit("double", {"n": 3}, session=session)
        assert app.relay._core.announcer.flush(1)
        assert app.announced() == 0  # releasing a savepoint commits nothing
    assert {job.id for job in app.relay.jobs()} == {kept.id, also.id}
    assert lost.id not in {kept.id, also.id}
    wait_until(lambda: app.announced() == 2)


def test_a_key_within_a_transaction(app: App) -> None:
    with Session(app.engine) as session:
        job = app.relay.submit("double", {"n": 1}, key="k", session=session)
        with pytest.raises(KeyConflict):
            app.relay.submit("double", {"n": 2}, key="k", session=session)
        other = app.relay.submit("double", {"n": 3}, session=session)  # the transaction goes on
        session.commit()
        assert app.relay.submit("double", {"n": 1}, key="k", session=session) == job
        session.commit()
    assert {j.id for j in app.relay.jobs()} == {job.id, other.id}


def test_a_scoped_session_is_one_too(app: App) -> None:
    scoped = scoped_session(sessionmaker(app.engine))
    job = app.relay.submit("double", {"n": 1}, session=scoped)
    scoped.commit()
    scoped.remove()
    assert app.relay.job(job.id).input() == {"n": 1}


def test_what_is_read_before_is_part_of_the_transaction(app: App) -> None:
    with Session(app.engine) as session:
        session.add(Order(id=1))
        session.flush()
        assert session.get(Order, 1) is not None
        app.relay.submit("double", {"n": 1}, session=session)
        session.rollback()
        assert session.get(Order, 1) is None
    assert app.relay.jobs() == []


def test_another_database_is_refused(app: App) -> None:
    engine = create_engine("sqlite://")
    with Session(engine) as session, pytest.raises(InvalidInput, match=r"share a database|no torchrelay tables"):
        app.relay.submit("double", {"n": 1}, session=session)
    engine.dispose()
    assert app.relay.jobs() == []


@pytest.mark.parametrize("driver", ["first", "second"])
def test_an_async_session(settings: Settings, app: App, driver: str) -> None:
    drivers = {
        "sqlite": ("sqlite+aiosqlite", "sqlite+aiosqlite"),
        "postgresql": ("postgresql+psycopg", "postgresql+asyncpg"),
    }
    scheme, _, rest = settings.database_url.partition("://")
    url = f"{drivers[scheme][driver == 'second']}://{rest}"
    table = Order.__table__
    assert isinstance(table, Table)

    async def main() -> list[str]:
        engine = create_async_engine(url)
        kept = []
        async with AsyncRelay(settings=settings) as relay:
            sessions = async_sessionmaker(engine)
            for n in range(20):
                async with sessions() as session:
                    session.add(Order(id=n))
                    job = await relay.submit("double", {"n": n}, key=str(n), session=session)
                    if n % 2:
                        await session.commit()
                        kept.append(job.id)
            scoped = async_scoped_session(sessions, asyncio.current_task)
            kept.append((await relay.submit("double", {"n": 0}, session=scoped)).id)
            await scoped.commit()
            await scoped.remove()
            with pytest.raises(InvalidInput, match="AsyncSession"):
                await relay.submit("double", {"n": 0}, session=Session(app.engine))  # type: ignore[arg-type]
        await engine.dispose()
        return kept

    assert sorted(asyncio.run(main())) == sorted(job.id for job in app.relay.jobs())
    wait_until(lambda: app.announced() > 0)
    with pytest.raises(InvalidInput, match="AsyncRelay takes"):
        app.relay.submit("double", {}, session=AsyncSession())  # type: ignore[arg-type]
