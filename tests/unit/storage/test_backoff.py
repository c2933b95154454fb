"""How long a failed job waits, and which policies are none."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay_storage.errors import InvalidInput
from torchrelay_storage.options import DEFAULT_BACKOFF, MAX_FACTOR, MAX_SECONDS, Backoff, Options

policies = st.builds(
    Backoff,
    seconds=st.floats(0, MAX_SECONDS),
    factor=st.floats(1, MAX_FACTOR),
    longest=st.floats(0, MAX_SECONDS),
    jitter=st.booleans(),
)


@given(policies, st.integers(0, 10_000))
def test_a_wait_is_within_its_limits(policy: Backoff, failures: int) -> None:
    policy.validate()
    assert 0 <= policy.wait(failures) <= policy.longest + 1e-9


@given(policies, st.integers(0, 200))
def test_without_jitter_the_waits_grow_up_to_the_longest(policy: Backoff, failures: int) -> None:
    policy = Backoff(policy.seconds, policy.factor, policy.longest, jitter=False)
    waits = [policy.wait(n) for n in (0, failures, failures + 1)]
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(min(policy.seconds, policy.longest))


@given(policies)
def test_what_is_encoded_is_decoded(policy: Backoff) -> None:
    assert Backoff.decode(policy.encode()) == policy


def test_what_a_later_release_has_added_is_left_out() -> None:
    assert Backoff.decode('{"seconds":3,"shape":"linear"}') == Backoff(seconds=3)


def test_it_doubles_from_one_second_to_five_minutes() -> None:
    plain = Backoff(jitter=False)
    assert [plain.wait(n) for n in (0, 1, 2, 8, 9, 10_000)] == [1, 2, 4, 256, 300, 300]
    assert Backoff(seconds=5e-324, factor=42.0, jitter=False).wait(10_000) == 300
    assert DEFAULT_BACKOFF.jitter


def test_jitter_draws_from_nothing_to_the_limit() -> None:
    seen: list[tuple[float, float]] = []

    def draw(least: float, most: float) -> float:
        seen.append((least, most))
        return most

    assert Backoff(seconds=2, factor=3, longest=10).wait(1, draw) == 6
    assert seen == [(0.0, 6)]
    rng = random.Random(17)
    waits = [Backoff(seconds=8).wait(0, rng.uniform) for _ in range(1000)]
    assert min(waits) < 1
    assert max(waits) > 7
    assert sum(waits) / len(waits) == pytest.approx(4, abs=0.4)


def test_no_wait_and_a_constant_one() -> None:
    assert Backoff(seconds=0).wait(50) == 0
    assert [Backoff(seconds=5, factor=1, jitter=False).wait(n) for n in (0, 50)] == [5, 5]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("seconds", -1),
        ("seconds", float("nan")),
        ("seconds", "1"),
        ("seconds", True),
        ("seconds", MAX_SECONDS * 2),
        ("factor", 0.5),
        ("factor", MAX_FACTOR + 1),
        ("factor", None),
        ("longest", float("inf")),
        ("longest", -0.1),
        ("jitter", 1),
    ],
)
def test_a_bad_policy_is_named(name: str, bad: Any) -> None:
    policy = Backoff(**{name: bad})
    with pytest.raises(InvalidInput, match=f"backoff: {name}"):
        policy.validate()
    with pytest.raises(InvalidInput, match=f"backoff: {name}"):
        Options(backoff=policy).validate()


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(InvalidInput, match="backoff must be a Backoff"):
        Options(backoff={"seconds": 1}).validate()  # type: ignore[arg-type]
    assert Options(backoff=Backoff(seconds=2)).validate().backoff == Backoff(seconds=2)
