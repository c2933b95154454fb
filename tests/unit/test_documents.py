"""The reader of Markdown that the acceptance tests rely on sees what a person sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from documents import Block, anchors, blocks, links

TEXT = """\
# What it is, in short

See [the design](docs/design.md#layers) and [a site](https://example.org).

<!-- test: model file=models/shout.py -->
```python
SHOUT = "```"
```
<!-- test: application -->
```console
$ torchrelay list
a line of output
$ torchrelay \\
```
```python
untested = "[not a link](nowhere.md)"
```
<!-- test: application prints -->
```text
done
```
"""


def test_blocks_markers_links_and_anchors(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    model, application, untested, printed = blocks(path)
    assert model == Block(6, "python", 'SHOUT = "```"\n', "model", file="models/shout.py")
    assert (application.name, application.file, application.prints) == ("application", None, False)
    assert application.commands == "torchrelay list\ntorchrelay \\\n"
    assert untested.name is None
    assert printed == Block(19, "text", "done\n", "application", prints=True)
    assert links(path) == ["docs/design.md#layers", "https://example.org"]
    assert anchors(path) == {"what-it-is-in-short"}


@pytest.mark.parametrize(
    "text", ["<!-- test: lonely -->\n\ntext\n", "<!-- test lonely -->\n", "<!-- test: a b=c -->\n"]
)
def test_a_marker_that_would_test_nothing_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="marker"):
        blocks(tmp_path / "README.md")
