"""Pretrained weights on their way to a run of a transformers recipe: a zip file, the folder it is made of, or a URI.

Not here: uploading (`uploads`).
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchrelay import uploads
from torchrelay.packing import pack_files
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.errors import InvalidHyperparameter

NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
"""What the zip file holds; of a folder, nothing else is packed."""


@contextmanager
def opened(artifacts: Artifacts, source: str, roots: Sequence[str]) -> Iterator[uploads.Upload]:
    """Check weights, and pack a folder; nothing is uploaded yet.

    Raises:
        InvalidHyperparameter: there is no such file, folder or URI, it holds something else, or it may not be read.
    """
    if uploads.is_uri(source):
        why = uploads.refusal(artifacts, source, roots)
        if why is not None:
            raise _refused(why)
        yield uploads.Upload(source)
        return
    with tempfile.TemporaryDirectory(prefix="torchrelay-pretrained-") as folder:
        try:
            upload = uploads.prepare(
                artifacts, "pretrained", "model.zip", _file(Path(source).expanduser(), Path(folder))
            )
        except OSError as error:
            raise _refused(f"{source} cannot be read: {error}") from error
        yield upload


def _file(path: Path, folder: Path) -> Path:
    if path.is_dir():
        members = [(name, path / name) for name in NEEDED]
        missing = [name for name, member in members if not member.is_file()]
        if missing:
            raise _refused(f"the folder {path} has no {' and no '.join(missing)}")
        return pack_files(members, folder / "model.zip")
    if not path.is_file():
        raise _refused(f"there is no file or folder {path}")
    if not zipfile.is_zipfile(path):
        raise _refused(f"{path} is no zip file; pass one with {', '.join(NEEDED)}, or the folder that they are in")
    with zipfile.ZipFile(path) as archive:
        missing = [name for name in NEEDED if name not in archive.namelist()]
    if missing:
        raise _refused(f"{path} has no {' and no '.join(missing)} at its top")
    return path


def _refused(why: str) -> InvalidHyperparameter:
    return InvalidHyperparameter("pretrained", f"pretrained: {why}")
