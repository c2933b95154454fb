"""A process that dies inside a transaction leaves nothing of it; on both databases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from integration.storage.doubt import lose_a_confirmation
from integration.storage.job_scene import Scene
from torchrelay_storage import faults
from torchrelay_storage.database import Database
from torchrelay_storage.job_reader import JobFilter
from torchrelay_storage.lost import Evidence
from torchrelay_storage.outcomes import Outcome
from torchrelay_storage.states import End


class Killed(BaseException):
    """As a process is: nothing on its way catches it."""


@pytest.fixture
def scene(database: Database) -> Iterator[Scene]:
    scene = Scene(database)
    yield scene
    scene.check()


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Return a function that lets the process die at a point; it returns the points that were reached."""

    def kill(point: str) -> list[str]:
        seen: list[str] = []

        def hook(reached: str) -> None:
            seen.append(reached)
            if reached == point:
                raise Killed(reached)

        monkeypatch.setattr(faults, "hook", hook)
        return seen

    return kill


def dies_and_leaves_nothing(scene: Scene, do: Callable[[], object]) -> None:
    before = scene.everything()
    with pytest.raises(Killed):
        do()
    assert scene.everything() == before
    scene.check()


def test_a_finish_is_whole_or_nothing(
    scene: Scene, killed_at: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = scene.submit(4)
    claimed = scene.claim(jobs[0])
    ends = [End.SUCCEEDED, End.FAILED, End.OPEN, End.OPEN]
    outcomes = [
        Outcome(job, claimed.chunk, claimed.token, end, b"1", b'{"type":"E","message":""}', retry_in=9.0 * i)
        for i, (job, end) in enumerate(zip(jobs, ends, strict=True))
    ]
    seen = killed_at("recording")
    dies_and_leaves_nothing(scene, lambda: scene.jobs.finish(outcomes, scene.worker))
    assert seen == ["recording"]
    monkeypatch.setattr(faults, "hook", None)
    assert scene.jobs.finish(outcomes, scene.worker).recorded == 4
    assert [scene.outcomes(job) for job in jobs] == [["succeeded"], ["failed"], ["failed"], ["failed"]]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("known", ["rescue", "nothing", "some"])
def test_what_frees_chunks_is_whole_or_nothing(
    scene: Scene, killed_at: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch, known: str, alone: bool
) -> None:
    [one], jobs = scene.submit(1), scene.submit(4)
    scene.claim(one)
    scene.die(None)
    (scene.claim_alone if alone else scene.claim)(one)
    scene.claim(jobs[0])
    if known == "rescue":
        scene.fleet.stop(scene.worker)

    def free() -> int:
        if known == "rescue":
            return scene.chunks.rescue(60).count
        evidence = Evidence(frozenset({one, jobs[1]})) if known == "some" else None
        return scene.chunks.give_up(scene.worker, "killed by SIGSEGV", evidence).count

    seen = killed_at("rescuing")
    dies_and_leaves_nothing(scene, free)
    assert seen == ["rescuing"]
    monkeypatch.setattr(faults, "hook", None)
    assert free() == 5
    assert scene.row(one).failures == int(alone and known != "rescue")  # a first silence is held against nobody


def test_the_next_transaction_of_the_same_thread_works(scene: Scene, killed_at: Callable[[str], list[str]]) -> None:
    """The connection went back to the pool without a transaction, and without a lock."""
    jobs = scene.submit(4)
    claimed = scene.claim(jobs[0])
    killed_at("recording")
    for _ in range(10):  # more often than there are connections
        with pytest.raises(Killed):
            scene.finish(claimed)
    assert scene.chunks.hand_back([(claimed.chunk, claimed.token)], scene.worker) == 1


def test_without_a_hook_a_point_is_passed() -> None:
    assert faults.hook is None
    for point in faults.POINTS:
        faults.reach(point)
    assert len(set(faults.POINTS)) == 9


@pytest.mark.parametrize("known", ["rescue", "nothing", "some"])
def test_a_blame_whose_confirmation_was_lost_counts_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    [one] = scene.submit(1)
    scene.claim(one)
    scene.die(None)
    scene.claim_alone(one)
    if known == "rescue":
        scene.fleet.stop(scene.worker)
    cut = lose_a_confirmation(scene.database, monkeypatch)
    if known == "rescue":
        scene.chunks.rescue(60)
    else:
        scene.chunks.give_up(scene.worker, "killed by SIGSEGV", Evidence() if known == "some" else None)
    assert cut == [True]
    once = (0, ["lost", "lost"]) if known == "rescue" else (1, ["lost", "failed"])
    assert (scene.row(one).failures, scene.outcomes(one)) == once
    assert scene.chunks.held(scene.worker) == []


def test_a_retry_of_all_whose_confirmation_was_lost_is_told_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = scene.submit(8)
    scene.jobs.cancel(jobs)
    cut = lose_a_confirmation(scene.database, monkeypatch)
    assert scene.jobs.retry_where(JobFilter()).count == 8
    assert cut == [True]
    assert len({scene.row(job).chunk for job in jobs}) == 2
