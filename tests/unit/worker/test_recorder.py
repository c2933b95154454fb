"""The recorder with fake stores: one transaction for several batches, patience, refused tokens, large outputs."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from servers import wait_until
from torchrelay_storage import values
from torchrelay_storage.artifacts import load_large
from torchrelay_storage.errors import InvalidInput, Unreachable
from torchrelay_storage.states import End
from torchrelay_worker.pipeline.ledger import Work
from torchrelay_worker.pipeline.recorder import TOGETHER, Ran
from worker_fakes import Line, Plus, Store, chunk


def held(line: Line, number: int, n: int, **options: Any) -> list[Work]:
    """Works of a chunk that is held."""
    [hold] = line.ledger.claim([chunk(number, range(n), **options)])
    hold.resident = line.residency.pin(1)
    return [Work(hold, job.id, job.failures) for job in hold.claimed.jobs]


def test_batches_that_wait_share_a_transaction() -> None:
    line = Line(Plus())
    for number in range(1, 4):
        line.recorder.put(Ran(done=[(work, 1) for work in held(line, number, 5)]))
    line.recorder.start()
    assert line.recorder.stop(20)
    assert line.store.transactions == [15]
    assert len(line.ledger) == 0
    assert line.recorder.recorded == 15
    assert sorted(c for chunks, _ in line.published for c in chunks) == [1, 2, 3]


def test_a_transaction_does_not_grow_without_bound() -> None:
    line = Line(Plus())
    for number in range(1, 4):
        line.recorder.put(Ran(done=[(work, 1) for work in held(line, number, TOGETHER - 1)]))
    line.recorder.start()
    assert line.recorder.stop(20)
    assert line.store.transactions == [TOGETHER - 1] * 3


def test_results_are_kept_while_the_database_is_away() -> None:
    line = Line(Plus(), Store())
    line.store.faults = [Unreachable("away")] * 3
    with line:
        outcomes = line.run(chunk(1, [1, 2]))
    assert [values.decode(o.output or b"") for o in outcomes.values()] == [2.0, 3.0]


def test_stop_gives_up_on_a_database_that_stays_away() -> None:
    line = Line(Plus(), Store())
    line.store.faults = [Unreachable("away")] * 10_000
    line.recorder.start()
    line.recorder.put(Ran(done=[(work, 1) for work in held(line, 1, 1)]))
    assert not line.recorder.stop(0.1)
    assert not line.store.outcomes


def test_a_refused_token_drops_the_chunk() -> None:
    line = Line(Plus())
    line.store.refused = {1}
    works = held(line, 1, 8)
    line.recorder.start()
    line.recorder.put(Ran(done=[(work, 1) for work in works[:4]]))
    assert line.recorder.flush(20)
    assert len(line.ledger) == 0
    assert not works[5].is_wanted
    line.recorder.put(Ran(done=[(work, 1) for work in works[4:]]))
    assert line.recorder.stop(20)
    assert line.store.transactions == [4]


def test_large_outputs_become_artifacts() -> None:
    class Wide(Plus):
        def decode(self, output: Any) -> Any:
            return "x" * 5_000

    line = Line(Wide(), inline_limit=1_000)
    with line:
        [outcome] = line.run(chunk(1, [1])).values()
    assert outcome.output is not None
    assert len(outcome.output) < 1_000
    assert values.decode(load_large(line.artifacts, outcome.output)) == "x" * 5_000


def test_decode_fails_for_its_own_job_only() -> None:
    class Picky(Plus):
        def decode(self, output: Any) -> Any:
            if output == 2:
                raise KeyError("no such label")
            return {1, 2} if output == 3 else float(output)

    with Line(Picky()) as line:
        outcomes = line.run(chunk(1, range(4), max_attempts=3))
    assert [o.end for _, o in sorted(outcomes.items())] == [End.SUCCEEDED, End.OPEN, End.FAILED, End.SUCCEEDED]
    error = json.loads(outcomes[102].error or b"")
    assert error["type"] == "BadOutput"
    assert "set" in error["message"]


def test_failures_are_tried_again_until_the_attempts_are_spent() -> None:
    line = Line(Plus())
    first, last = held(line, 1, 1), held(line, 2, 1, failures=2)
    refused = held(line, 3, 1)
    line.recorder.put(Ran(failed=[(first[0], ValueError("x")), (last[0], ValueError("x"))]))
    line.recorder.put(Ran(failed=[(refused[0], InvalidInput("never"))]))
    line.recorder.start()
    assert line.recorder.stop(20)
    ends = {job: o.end for job, o in line.store.outcomes.items()}
    assert ends == {100: End.OPEN, 200: End.FAILED, 300: End.FAILED}
    assert 0.0 <= line.store.outcomes[100].retry_in <= 1.0


def test_an_unexpected_fault_is_fatal() -> None:
    line = Line(Plus())
    line.store.faults = [RuntimeError("a bug")]
    line.recorder.start()
    line.recorder.put(Ran(done=[(work, 1) for work in held(line, 1, 1)]))
    assert line.lost.wait(20)
    assert str(line.fatal[0]) == "a bug"


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_is_nothing(n: int) -> None:
    line = Line(Plus())
    line.recorder.start()
    line.recorder.put(Ran())
    assert line.recorder.stop(20)
    assert line.store.transactions == []


def test_what_it_holds_is_known_until_it_is_recorded() -> None:
    line = Line(Plus())
    line.store.faults = [Unreachable("away")] * 1_000_000
    works = held(line, 1, 2)
    line.recorder.put(Ran(done=[(work, 1) for work in works]))
    assert line.recorder.holds() == {works[0].hold}
    line.recorder.start()
    wait_until(lambda: line.recorder._busy, 10, "its try")
    assert line.recorder.holds() == {works[0].hold}
    line.store.faults = []
    assert line.recorder.stop(20)
    assert line.recorder.holds() == set()


def test_decode_is_the_authors_code_too() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Hangs(Plus):
        def decode(self, output: Any) -> Any:
            inside.set()
            assert go_on.wait(20)
            return output

    with Line(Hangs()) as line:
        line.put(chunk(1, [1], timeout=5.0))
        assert inside.wait(20)
        assert line.box.read().jobs == {100}
        assert 4.0 < (line.watch.left() or 0) <= 5.0
        go_on.set()
        line.store.wait_for(1)
        wait_until(lambda: line.watch.left() is None and not line.box.read().jobs, 10, "the end")
