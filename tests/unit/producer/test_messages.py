"""The messages, both ways."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay import messages
from torchrelay_storage import ids
from torchrelay_storage.errors import InvalidInput

numbers = st.integers(0, ids.LARGEST)


@given(numbers)
def test_a_chunk_survives_json(chunk: int) -> None:
    args = json.loads(json.dumps(messages.encode(chunk)))
    assert messages.decode(args) == chunk


@pytest.mark.parametrize(
    "args",
    [
        [],
        [1],
        [None],
        [{}],
        [{"v": 1}],
        [{"v": 1, "chunk": 5}],
        [{"v": 1, "chunk": "j_0000000000000"}],
        [{"v": 1, "chunk": "c_000"}],
        [{"v": 1, "chunk": "c_0000000000000"}, 2],
    ],
)
def test_what_is_no_message_is_refused(args: list[object]) -> None:
    with pytest.raises(InvalidInput):
        messages.decode(args)


def test_a_newer_version_says_what_to_upgrade() -> None:
    with pytest.raises(InvalidInput, match=r"version 2.*upgrade the worker"):
        messages.decode([{"v": 2, "chunk": "c_0000000000000"}])


def test_priorities_turn_round() -> None:
    assert [messages.redis_priority(p) for p in messages.PRIORITIES] == list(range(9, -1, -1))


def test_queues_are_named_after_models() -> None:
    assert messages.queue_name("digits") == "torchrelay.digits"
    assert messages.model_of("torchrelay.digits") == "digits"
    assert messages.model_of("celery") is None


@given(st.lists(numbers, max_size=5_000), st.lists(numbers, max_size=20))
def test_announcements_carry_everything_in_parts(chunks: list[int], batches: list[int]) -> None:
    parts = [messages.decode_ended(data) for data in messages.encode_ended(chunks, batches)]
    assert [c for part in parts for c in part.chunks] == chunks
    assert [b for part in parts for b in part.batches] == batches
    assert all(len(part.chunks) <= messages.ENDED_LIMIT for part in parts)
    assert bool(parts) == bool(chunks or batches)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"v": 2, "chunks": [1]}', b'{"v": 1, "chunks": ["x"]}'])
def test_an_announcement_that_cannot_be_read_says_nothing(data: bytes) -> None:
    assert messages.decode_ended(data) == messages.Ended()
