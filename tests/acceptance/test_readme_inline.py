"""The README's application example, in the test of an application: the same code on an InlineRelay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import torchrelay
from documents import blocks
from torchrelay.testing import InlineRelay, assert_submitted

ROOT = Path(__file__).parents[2]


def test_the_application_example_runs_inline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [example] = [block for block in blocks(ROOT / "README.md") if block.name == "application"]
    made: list[InlineRelay] = []

    def relay() -> InlineRelay:
        made.append(InlineRelay(models={"digits": lambda input: {"label": 7, "of": len(input["pixels"])}}))
        return made[-1]

    monkeypatch.setattr(torchrelay, "Relay", relay)
    # What the example closes at its end is looked into first.
    looked: list[int] = []
    close: Callable[[InlineRelay], None] = InlineRelay.close

    def look_and_close(self: InlineRelay) -> None:
        looked.append(len(assert_submitted(self, "digits", count=1001)))
        assert_submitted(self, "digits", count=1, key="order-17", priority=7)
        close(self)

    monkeypatch.setattr(InlineRelay, "close", look_and_close)
    exec(compile(example.text, "README.md", "exec"), {})
    assert looked == [1001]
    printed = capsys.readouterr().out
    assert "{'label': 7, 'of': 64}" in printed
    assert "succeeded=1000" in printed
