"""Markdown documents as tests see them: their fenced blocks, the marker above a block, and their links.

A block is run, in a folder that looks like the project's root, when an HTML comment with its name stands on the line
above its fence:

    <!-- test: submit -->                  run it: ```python as a script, ```bash (or sh, console) by bash
    <!-- test: model file=shout.py -->     write it to that file before anything is run
    <!-- test: submit prints -->           (on a ```text block) the block named so printed exactly this
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_MARKER = re.compile(r"<!--\s*test:\s*(?P<name>[\w-]+)(?:\s+file=(?P<file>\S+))?(?P<prints>\s+prints)?\s*-->")
_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>[\w-]*)\s*$")
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it is, and what its marker says of it."""

    line: int
    language: str
    text: str
    name: str | None = None
    file: str | None = None
    prints: bool = False

    @property
    def commands(self) -> str:
        """The text as bash reads it: of a console's transcript, what stands behind `$`."""
        if self.language != "console":
            return self.text
        return "".join(line[2:] for line in self.text.splitlines(keepends=True) if line.startswith("$ "))


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks in their order. Raises ValueError for a marker that stands above no block."""
    found: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    number, marker = 0, None
    while number < len(lines):
        line = lines[number]
        number += 1
        if fence := _FENCE.match(line.strip()):
            start, body = number, []
            while number < len(lines) and lines[number].strip() != fence["fence"]:
                body.append(lines[number])
                number += 1
            number += 1
            text = "".join(f"{one}\n" for one in body)
            if marker is None:
                found.append(Block(start, fence["language"], text))
            else:
                told = marker["name"], marker["file"], bool(marker["prints"])
                found.append(Block(start, fence["language"], text, *told))
            marker = None
            continue
        if marker is not None:
            raise ValueError(f"{path.name}:{number}: the marker above stands over no fenced block")
        marker = _MARKER.fullmatch(line.strip())
        if marker is None and line.strip().startswith("<!-- test"):
            raise ValueError(f"{path.name}:{number}: a marker that nobody understands: {line}")
    return found


def links(path: Path) -> list[str]:
    """Return the targets of all links outside fenced blocks."""
    text = re.sub(r"^(`{3,}).*?^\1\s*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [match["target"] for match in _LINK.finditer(text)]


def anchors(path: Path) -> set[str]:
    """Return the anchors that a document's headings give."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}
