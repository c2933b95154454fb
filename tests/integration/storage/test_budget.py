"""`failures` alone spends `max_attempts`: hand-backs, lost workers and guilty mates cost nothing; on both databases."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from integration.storage.job_scene import Scene
from torchrelay_storage.database import Database
from torchrelay_storage.lost import Evidence
from torchrelay_storage.options import Backoff
from torchrelay_storage.states import End, JobState

AT_ONCE = Backoff(seconds=0)


def test_ten_rolling_restarts_spend_nothing(database: Database) -> None:
    scene = Scene(database)
    jobs = scene.submit(4, max_attempts=1)
    for _ in range(10):
        claimed = scene.claim(jobs[0])
        assert [job.failures for job in claimed.jobs] == [0] * 4
        assert scene.chunks.hand_back([(claimed.chunk, claimed.token)], scene.worker) == 1
        scene.fleet.stop(scene.worker, "it was asked to end")
        scene.worker = scene.hire()
    scene.finish(scene.claim(jobs[0]))
    assert {scene.row(job).state for job in jobs} == {JobState.SUCCEEDED}
    assert {scene.row(job).failures for job in jobs} == {0}
    assert [scene.outcomes(job) for job in jobs] == [["succeeded"]] * 4
    scene.check()


@pytest.mark.parametrize("known", [True, False])
def test_an_innocent_mate_keeps_its_budget(database: Database, known: bool) -> None:
    """A poison job in a chunk of four, all of which may fail once: it alone fails."""
    scene = Scene(database)
    jobs = scene.submit(4, max_attempts=1, backoff=AT_ONCE)
    poison = jobs[2]
    for _ in range(12):
        left = [job for job in jobs if scene.row(job).finished_at is None]
        if not left:
            break
        scene.ripen()
        [claimed] = scene.chunks.claim_next([scene.version.model], scene.worker, 1)
        if claimed.suspect:
            assert scene.chunks.run_alone(claimed.chunk, claimed.token, scene.worker)
        held = [job.id for job in claimed.jobs]
        assert [job.failures for job in claimed.jobs] == [0] * len(held)
        if poison in held:
            scene.die(Evidence(frozenset(held)) if known else None)
        else:
            scene.finish(claimed)
    rows = [scene.row(job) for job in jobs]
    assert [row.state for row in rows] == [JobState.SUCCEEDED] * 2 + [JobState.FAILED] + [JobState.SUCCEEDED]
    assert [row.failures for row in rows] == [0, 0, 1, 0]
    scene.check()


# What may befall the chunk of one job and a mate, and whether it counts as a failure of the job.
FREE_OF_CHARGE = ("hand_back", "stopped", "silent", "knew_nothing", "did_not_run", "ran", "mate_ran")
SPENDS = ("failed", "ran_alone", "not_loaded")


@given(events=st.lists(st.sampled_from(FREE_OF_CHARGE + SPENDS), max_size=12), most=st.integers(1, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_failures_are_what_counts_and_nothing_else(database: Database, events: list[str], most: int) -> None:
    scene = Scene(database)
    job, mate = scene.submit(2, max_attempts=most, backoff=AT_ONCE)
    failures, tries = 0, 0
    for drawn in events:
        claimed = scene.claim(job)
        mine = frozenset({job})
        may_be_alone = claimed.suspect and len(claimed.jobs) == 1
        event = "ran" if drawn == "ran_alone" and not may_be_alone else drawn
        if event == "hand_back":
            scene.chunks.hand_back([(claimed.chunk, claimed.token)], scene.worker)
        elif event in ("stopped", "silent"):
            if event == "stopped":
                scene.fleet.stop(scene.worker)
            scene.grow_old()
            scene.chunks.rescue(60)
            scene.worker = scene.hire()
        elif event in ("knew_nothing", "did_not_run"):
            scene.die(None if event == "knew_nothing" else Evidence())
        elif event in ("ran", "mate_ran"):
            scene.die(Evidence(mine if event == "ran" else frozenset({mate})))
        elif event == "ran_alone":
            assert scene.chunks.run_alone(claimed.chunk, claimed.token, scene.worker)
            scene.die(Evidence(mine))
        elif event == "not_loaded":
            scene.die(Evidence(versions=frozenset({scene.version.id})))
        else:
            last = failures + 1 >= most
            scene.finish(claimed, End.FAILED if last else End.OPEN, jobs=[job])
        failures += event in SPENDS
        tries += event in ("stopped", "silent", "knew_nothing", "ran", *SPENDS)
        row = scene.row(job)
        assert row.failures == failures <= most
        assert (row.state is JobState.FAILED) == (failures == most)
        if row.finished_at is not None:
            break
    outcomes = scene.outcomes(job)
    assert outcomes.count("failed") == failures, "each failure is a try in the history"
    assert len(outcomes) == tries
    assert scene.row(mate).failures <= most
    scene.check()
    if scene.row(job).finished_at is None:  # whatever befell it, it runs
        scene.finish(scene.claim(job), jobs=[job])
        assert scene.row(job).state is JobState.SUCCEEDED
