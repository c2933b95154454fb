"""Every pair of a state and a move of `states`, legal and illegal, on both databases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import text

from torchrelay_storage.chunk_store import ChunkStore
from torchrelay_storage.database import Database
from torchrelay_storage.fleet import Fleet
from torchrelay_storage.job_store import JobStore
from torchrelay_storage.options import Options
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.registry import ModelVersion, Registry
from torchrelay_storage.states import CHUNK_MOVES, JOB_MOVES, ChunkState, End
from torchrelay_storage.submission import NewJob, Submission

ROOM = dict.fromkeys(range(10), 10)


class Scene:
    """One chunk of two jobs and a worker that beats."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.jobs = JobStore(database)
        self.chunks = ChunkStore(database)
        self.fleet = Fleet(database)
        self.version: ModelVersion = Registry(database).register("m", "h")
        self.worker = self.fleet.register("w", host="h", pid=1, device="cpu").id
        jobs = [NewJob(b"1"), NewJob(b"2")]
        placed = self.jobs.submit([Submission(self.version, Options(expires_in=3600), jobs)])[0]
        self.first, self.second = (p.job for p in placed)  # type: ignore[union-attr]
        self.chunk = self.first

    def put_chunk(self, state: ChunkState) -> None:
        """Write the state straight into the row, with what belongs to it."""
        owner = self.worker if state is ChunkState.CLAIMED else None
        end = int(End.SUCCEEDED) if state is ChunkState.DONE else int(End.OPEN)
        with self.database.write() as connection:
            connection.execute(
                text("UPDATE chunks SET state = :s, worker = :w, token = 7, announced_at = 1 WHERE id = :c"),
                {"s": int(state), "w": owner, "c": self.chunk},
            )
            connection.execute(text("UPDATE jobs SET state = :e"), {"e": end})

    def put_job(self, end: End) -> None:
        """Write the end straight into the first job's row; its chunk stays open through the second."""
        with self.database.write() as connection:
            connection.execute(text("UPDATE jobs SET state = :e WHERE id = :j"), {"e": int(end), "j": self.first})

    def chunk_state(self) -> ChunkState:
        with self.database.read() as connection:
            found = connection.execute(text("SELECT state FROM chunks WHERE id = :c"), {"c": self.chunk}).scalar_one()
        return ChunkState(found)

    def job_end(self) -> End:
        with self.database.read() as connection:
            found = connection.execute(text("SELECT state FROM jobs WHERE id = :j"), {"j": self.first}).scalar_one()
        return End(found)


def _rescue(scene: Scene) -> None:
    scene.fleet.stop(scene.worker)
    scene.chunks.rescue(60)


CHUNK_DO: dict[str, Callable[[Scene], object]] = {
    "announce": lambda s: s.chunks.announce(s.version.model, ROOM),
    "claim": lambda s: s.chunks.claim([s.chunk], s.worker),
    "hand_back": lambda s: s.chunks.hand_back([(s.chunk, 7)], s.worker),
    "rescue": _rescue,
    "recall": lambda s: s.chunks.recall(model=s.version.model),
    "settle": lambda s: s.jobs.cancel([s.first, s.second]),
}


def test_every_chunk_move_is_tried() -> None:
    assert CHUNK_DO.keys() == CHUNK_MOVES.keys()


@pytest.mark.parametrize("state", ChunkState)
@pytest.mark.parametrize("move", CHUNK_MOVES)
def test_chunk_moves(database: Database, move: str, state: ChunkState) -> None:
    scene = Scene(database)
    scene.put_chunk(state)
    sources, target = CHUNK_MOVES[move]
    CHUNK_DO[move](scene)
    assert scene.chunk_state() is (target if state in sources else state)


def _expire(scene: Scene) -> None:
    with scene.database.write() as connection:
        connection.execute(text("UPDATE chunks SET expires_at = 1"))
    scene.chunks.expire()


def _finish(end: End) -> Callable[[Scene], object]:
    def do(scene: Scene) -> None:
        with scene.database.write() as connection:
            connection.execute(text("UPDATE chunks SET state = 2, token = 7, worker = :w"), {"w": scene.worker})
        scene.jobs.finish([Outcome(scene.first, scene.chunk, 7, end, b"1", b"{}")], scene.worker)

    return do


JOB_DO: dict[tuple[str, End], Callable[[Scene], object]] = {
    ("finish", End.OPEN): _finish(End.OPEN),
    ("finish", End.SUCCEEDED): _finish(End.SUCCEEDED),
    ("finish", End.FAILED): _finish(End.FAILED),
    ("cancel", End.CANCELLED): lambda s: s.jobs.cancel([s.first]),
    ("expire", End.EXPIRED): _expire,
    ("retry", End.OPEN): lambda s: s.jobs.retry([s.first]),
}


def test_every_job_move_is_tried() -> None:
    assert JOB_DO.keys() == {(move, target) for move, (_, targets) in JOB_MOVES.items() for target in targets}


@pytest.mark.parametrize("end", End)
@pytest.mark.parametrize(("move", "target"), JOB_DO)
def test_job_moves(database: Database, move: str, target: End, end: End) -> None:
    scene = Scene(database)
    scene.put_job(end)
    JOB_DO[move, target](scene)
    assert scene.job_end() is (target if end in JOB_MOVES[move][0] else end)


@pytest.mark.parametrize("token", [6, 8])
def test_a_wrong_token_writes_nothing(database: Database, token: int) -> None:
    scene = Scene(database)
    scene.put_chunk(ChunkState.CLAIMED)
    finished = scene.jobs.finish([Outcome(scene.first, scene.chunk, token, End.SUCCEEDED, b"1")], scene.worker)
    assert finished.recorded == 0
    assert finished.dropped == {scene.chunk}
    assert scene.job_end() is End.OPEN
    assert scene.chunks.hand_back([(scene.chunk, token)], scene.worker) == 0


def test_another_worker_writes_nothing(database: Database) -> None:
    scene = Scene(database)
    scene.put_chunk(ChunkState.CLAIMED)
    stranger = scene.fleet.register("w", host="h", pid=2, device="cpu").id
    finished = scene.jobs.finish([Outcome(scene.first, scene.chunk, 7, End.SUCCEEDED, b"1")], stranger)
    assert finished.dropped == {scene.chunk}
    assert scene.job_end() is End.OPEN
