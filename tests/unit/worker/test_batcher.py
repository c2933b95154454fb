"""The batcher: even batches, full batches, nobody starves. Property tests over arbitrary arrivals."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from torchrelay_worker.pipeline.batcher import LOAD_PATIENCE, WINDOW, Batcher, Buffer, Limits, cut


@dataclass(frozen=True)
class Input:
    n: int
    priority: int = 5
    length: int | None = None
    arrived: float = 0.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


limits = st.builds(
    Limits,
    size=st.integers(1, 16),
    wait=st.just(0.005),
    cost=st.none() | st.integers(1, 400),
    padding=st.floats(0, 0.5),
)
lengths = st.lists(st.integers(1, 128), max_size=120)


@given(lengths, limits)
def test_cut_keeps_every_input_within_the_limits(lengths: list[int], limits: Limits) -> None:
    items = [Input(n, length=length) for n, length in enumerate(lengths)]
    batches = [[items[i] for i in run] for run in cut(items, limits)]
    assert sorted(i.n for batch in batches for i in batch) == list(range(len(items)))
    for batch in batches:
        longest = max(i.length or 0 for i in batch)
        padded = longest * len(batch)
        assert 1 <= len(batch) <= limits.size
        assert len(batch) == 1 or limits.cost is None or padded <= limits.cost
        assert padded - sum(i.length or 0 for i in batch) <= limits.padding * padded + 1e-9
        assert [i.n for i in batch] == sorted(i.n for i in batch)
    firsts = [min(i.n for i in batch) for batch in batches]
    assert firsts == sorted(firsts)


@given(st.integers(0, 100), st.integers(1, 16))
def test_without_lengths_batches_are_full_and_in_order(n: int, size: int) -> None:
    batches = cut([Input(i) for i in range(n)], Limits(size))
    assert [i for batch in batches for i in batch] == list(range(n))
    assert all(len(batch) == size for batch in batches[:-1])


steps = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 60), min_size=1, max_size=40)) | st.just("next"), max_size=60
)


@given(steps, limits, st.booleans())
def test_a_buffer_loses_and_doubles_nothing_and_nobody_starves(
    steps: list[object], limits: Limits, has_length: bool
) -> None:
    buffer: Buffer[Input] = Buffer(limits)
    n, served, waiting = 0, [], {}

    def serve() -> None:
        before = buffer.priority()
        batch = buffer.next()
        assert batch
        assert max(i.priority for i in batch) == before == max(i.priority for i in waiting.values())
        for item in batch:
            del waiting[item.n]
            served.append(item)
        # Whoever is overtaken by inputs of its own priority was chosen from together with them.
        for left in waiting.values():
            newer = [s for s in batch if s.priority == left.priority and s.n > left.n]
            if not has_length:
                assert not newer
            if newer:
                equals = [o for o in [*waiting.values(), *batch] if o.priority == left.priority]
                assert sum(1 for o in equals if o.n <= max(i.n for i in newer)) <= WINDOW * limits.size

    for step in steps:
        if step == "next":
            if len(buffer):
                serve()
        else:
            priority, sizes = step  # type: ignore[misc]
            items = [Input(n + i, priority, size if has_length else None, float(n)) for i, size in enumerate(sizes)]
            n += len(items)
            waiting.update({i.n: i for i in items})
            buffer.put(items)
        assert len(buffer) == len(waiting)
    while len(buffer):
        serve()
    assert sorted(i.n for i in served) == list(range(n))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_an_odd_length_is_served_while_others_keep_coming(odd: list[int]) -> None:
    """A steady stream of short inputs, and a few of other lengths: none of these waits for more than one take."""
    buffer: Buffer[Input] = Buffer(Limits(4))
    buffer.put([Input(i, length=1000 + length) for i, length in enumerate(odd)])
    n = len(odd)
    left = set(range(n))
    for _ in range(4 * WINDOW * 2 + n):
        buffer.put([Input(n + i, length=10) for i in range(4)])
        n += 4
        left -= {i.n for i in buffer.next()}
    assert not left


def test_a_more_urgent_input_goes_before_what_is_already_cut() -> None:
    buffer: Buffer[Input] = Buffer(Limits(2))
    buffer.put([Input(i, 0, 10 * (i + 1)) for i in range(8)])
    buffer.next()
    buffer.put([Input(99, 9, 35)])
    assert 99 in [i.n for i in buffer.next()]
    assert [i.n for i in buffer.next()] == [5, 6]  # then the fullest again


def test_the_fullest_batch_is_next_and_the_older_of_equals() -> None:
    buffer: Buffer[Input] = Buffer(Limits(4, cost=100))
    buffer.put([Input(n, length=length) for n, length in enumerate([5, 20, 95, 20, 20, 20, 90])])
    assert [[i.n for i in buffer.next()] for _ in range(2)] == [[1, 3, 4, 5], [2]]
    buffer.put([Input(n, length=5) for n in range(7, 10)])
    assert [[i.n for i in buffer.next()] for _ in range(2)] == [[0, 7, 8, 9], [6]]
    assert not len(buffer)


def test_an_input_above_the_cost_runs_alone() -> None:
    batches = cut([Input(0, length=5), Input(1, length=500), Input(2, length=5)], Limits(32, cost=64))
    assert batches == [[0, 2], [1]]


def test_a_partial_batch_runs_at_once_when_idle_and_waits_for_mates_when_busy() -> None:
    clock = Clock()
    batcher: Batcher[Input] = Batcher(clock)
    batcher.put(1, Limits(4, wait=0.01), [Input(0)])
    assert batcher.next_batch(idle=False) is None
    batch = batcher.next_batch(idle=True)
    assert batch is not None
    assert [i.n for i in batch.items] == [0]
    batcher.put(1, Limits(4, wait=0.01), [Input(1)])
    clock.now = 0.02
    assert batcher.next_batch(idle=False) is not None
    batcher.put(1, Limits(4, wait=0.01), [Input(i, arrived=0.02) for i in range(5)])
    assert batcher.next_batch(idle=False) is not None  # a full one does not wait
    assert batcher.next_batch(idle=False) is None
    assert batcher.counts() == {1: 1}


def test_cost_makes_a_batch_full_too() -> None:
    batcher: Batcher[Input] = Batcher(Clock())
    batcher.put(1, Limits(32, wait=9, cost=100), [Input(0, length=60)])
    assert batcher.next_batch(idle=False) is None
    batcher.put(1, Limits(32, wait=9, cost=100), [Input(1, length=60)])
    assert batcher.next_batch(idle=False) is not None


def test_models_take_turns_by_urgency_then_age_then_fullness() -> None:
    clock = Clock()
    batcher: Batcher[Input] = Batcher(clock)
    order = []
    batcher.put(1, Limits(4), [Input(i, 5, arrived=0.0) for i in range(3)])
    batcher.put(2, Limits(4), [Input(i, 5, arrived=0.001) for i in range(4)])
    batcher.put(3, Limits(4), [Input(0, 9, arrived=0.002)])
    while (batch := batcher.next_batch(idle=True)) is not None:
        order.append(batch.version)
    assert order == [3, 2, 1]
    clock.now = 1.0
    batcher.put(2, Limits(4), [Input(i, 5, arrived=0.6) for i in range(4)])
    batcher.put(1, Limits(4), [Input(0, 5, arrived=0.5)])
    batch = batcher.next_batch(idle=True)
    assert batch is not None
    assert batch.version == 1


def test_models_on_the_device_go_first_but_not_for_ever() -> None:
    clock = Clock()
    batcher: Batcher[Input] = Batcher(clock)
    batcher.put(1, Limits(1), [Input(0, arrived=0.0)])
    batcher.put(2, Limits(1), [Input(i, arrived=0.5) for i in range(3)])
    clock.now = 1.0
    batch = batcher.next_batch(idle=True, resident={2})
    assert batch is not None
    assert batch.version == 2
    clock.now = LOAD_PATIENCE + 0.1
    batch = batcher.next_batch(idle=True, resident={2})
    assert batch is not None
    assert batch.version == 1


@given(lengths)
def test_discard_removes_what_is_unwanted_wherever_it_is(lengths: list[int]) -> None:
    batcher: Batcher[Input] = Batcher(Clock())
    items = [Input(n, length=length) for n, length in enumerate(lengths)]
    batcher.put(1, Limits(4), items)
    first = batcher.next_batch(idle=True)
    served = {i.n for i in first.items} if first else set()
    gone = {i.n for i in batcher.discard(lambda i: i.n % 2 == 0)}
    assert gone == {i.n for i in items if i.n % 2 == 0} - served
    rest = set()
    while (batch := batcher.next_batch(idle=True)) is not None:
        rest |= {i.n for i in batch.items}
    assert served | gone | rest == set(range(len(items)))
    assert not batcher.counts()


def test_shrink_remembers_size_or_cost() -> None:
    batcher: Batcher[Input] = Batcher(Clock())
    assert batcher.shrink(1, size=2, cost=None) is None
    batcher.put(1, Limits(8), [Input(i) for i in range(8)])
    batcher.shrink(1, size=3, cost=None)
    batch = batcher.next_batch(idle=True)
    assert batch is not None
    assert len(batch.items) == 3
    batcher.put(2, Limits(8), [Input(i, length=10) for i in range(8)])
    assert batcher.shrink(2, size=4, cost=40) == Limits(8, cost=40)
    assert batcher.limits(2) == Limits(8, cost=40)
    assert Limits(8).of([Input(0, length=3), Input(1, length=5)]) == 10
    assert Limits(8).of([Input(0)]) is None


def test_wait_returns_when_something_is_put_or_someone_pokes() -> None:
    batcher: Batcher[Input] = Batcher()
    for wake in (lambda: batcher.put(1, Limits(1), [Input(0)]), batcher.poke):
        done = threading.Event()

        def waiting(done: threading.Event = done) -> None:
            batcher.wait(30.0)
            done.set()

        thread = threading.Thread(target=waiting)
        thread.start()
        wake()
        assert done.wait(10)
        thread.join()
        batcher.next_batch(idle=True)


def test_wait_does_not_outlast_the_oldest_input() -> None:
    clock = Clock()
    batcher: Batcher[Input] = Batcher(clock)
    batcher.put(1, Limits(4, wait=0.01), [Input(0)])
    batcher.wait(30.0, idle=False)
    batcher.wait(30.0, idle=True)
