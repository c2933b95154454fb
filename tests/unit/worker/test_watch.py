"""Deadlines of what runs now: the first counts, and each new one is told."""

from __future__ import annotations

from torchrelay_worker.pipeline.watch import LATE_SECONDS, Watch
from worker_fakes import Clock


def test_the_first_deadline_counts() -> None:
    clock, told = Clock(), list[tuple[float | None, float | None]]()
    watch = Watch(clock, lambda deadline, late: told.append((deadline, late)))
    assert (watch.left(), watch.reason()) == (None, None)
    long = watch.begin(100.0, "loading a model")
    short = watch.begin(5.0, "a device batch", grace=0.25)
    assert watch.left() == 5.25
    assert watch.reason() == "a device batch has overrun its limit of 5 s"
    clock.now += 6
    assert watch.left() == -0.75
    watch.end(short)
    assert watch.left() == 94.0
    watch.end(long)
    assert told == [(200.0, 150.0), (105.25, 102.75), (200.0, 150.0), (None, None)]


def test_a_next_part_has_its_own_time() -> None:
    clock = Clock()
    watch = Watch(clock)
    with watch.running(5.0) as key:
        clock.now += 4
        watch.renew(key, 5.0)
        assert watch.left() == 5.0
        watch.renew(key + 1, 1.0)
        assert watch.left() == 5.0
    assert watch.left() is None


def test_what_nobody_wants_has_little_time_left() -> None:
    clock, late = Clock(), list[float | None]()
    watch = Watch(clock, lambda deadline, at: late.append(at))
    key = watch.begin(600.0, "a device batch")
    watch.cut(key, 5.0, "all of its jobs were cancelled")
    assert (watch.left(), watch.reason()) == (5.0, "all of its jobs were cancelled")
    clock.now += 3
    watch.cut(key, 5.0, "again")  # asked twice a second: the first counts
    assert (watch.left(), watch.reason()) == (2.0, "all of its jobs were cancelled")
    assert (late[-1] or 0) <= clock.now, "a replacement is needed soon"
    watch.end(key)
    watch.cut(key, 5.0)
    assert watch.left() is None


def test_late_is_half_of_the_time_and_no_instant() -> None:
    clock, late = Clock(), list[float | None]()
    watch = Watch(clock, lambda deadline, at: late.append(at))
    watch.end(watch.begin(10.0))
    watch.begin(0.1)
    assert late == [105.0, None, 100.0 + LATE_SECONDS], "a short limit is no reason to start a process"
