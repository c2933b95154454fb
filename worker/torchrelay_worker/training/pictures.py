"""Pictures of a dataset, each unpacked when it is asked for, and the zip files that they come in.

Not here: how the bytes of one picture become an array, which serving does alike (`torchrelay_worker.models.images`).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, overload

import numpy as np

from torchrelay_storage.errors import InvalidDataset, InvalidInput

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
PARTS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
MAX_FILE = 256 * 2**20  # bytes of one file, unpacked: a zip of a few kilobytes may claim any number


class Pictures(Sequence[np.ndarray[Any, Any]]):
    """Pictures as uint8 arrays [height, width] or [height, width, 3]; several threads may ask for them.

    Attributes:
        names: of each picture, for messages.
        column: likewise.
    """

    def __init__(self, names: Sequence[str], load: Callable[[int], bytes], column: str = "image") -> None:
        self.names = names
        self.column = column
        self._load = load

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> np.ndarray[Any, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray[Any, Any]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """Return a picture. Raises InvalidDataset, with its name and row, if it is damaged or too large."""
        from torchrelay_worker.models.images import unpack

        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        try:
            return unpack(self._load(row))
        except InvalidInput as error:
            raise InvalidDataset(f"the picture {self.names[row]}: {error}", column=self.column, row=row) from error


def read_zip(path: Path) -> tuple[Pictures, list[str], list[str] | None]:
    """Return the pictures of a zip file of CLASS/NAME.png, their classes, and their parts if it has train/CLASS/…

    Raises:
        InvalidDataset: it is no zip file, it is empty, or a file in it lies elsewhere or is no picture.
    """
    try:
        archive = zipfile.ZipFile(path)  # kept open as long as there are pictures to load
    except (zipfile.BadZipFile, OSError) as error:
        raise InvalidDataset(f"the dataset is no zip file of pictures: {error}") from error
    names = sorted(entry.filename for entry in archive.infolist() if not entry.is_dir() and not _hidden(entry.filename))
    if not names:
        raise InvalidDataset("the dataset is empty: the zip file has no pictures")
    inner = [PurePosixPath(name).parts for name in names]
    if len({parts[0] for parts in inner}) == 1 and inner[0][0] not in PARTS and min(map(len, inner)) >= 3:
        inner = [parts[1:] for parts in inner]  # all in one folder, as when a folder itself was packed
    depth = 3 if all(len(parts) == 3 and parts[0] in PARTS for parts in inner) else 2
    for name, parts in zip(names, inner, strict=True):
        if PurePosixPath(name).suffix.lower() not in SUFFIXES:
            raise InvalidDataset(f"{name} is no picture ({', '.join(sorted(SUFFIXES))}); leave it out")
        if len(parts) != depth:
            raise InvalidDataset(
                f"{name} lies elsewhere; pictures must lie in CLASS/NAME.png, or all of them in train/CLASS/NAME.png "
                "and validation/CLASS/NAME.png"
            )
    lock = Lock()

    def load(index: int) -> bytes:
        name = names[index]
        try:
            if archive.getinfo(name).file_size > MAX_FILE:
                raise InvalidInput(f"it has more than {MAX_FILE} bytes")
            with lock:
                return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError) as error:
            raise InvalidInput(f"it cannot be read from the zip file: {error}") from error

    labels = [parts[depth - 2] for parts in inner]
    return Pictures(names, load), labels, [PARTS[parts[0]] for parts in inner] if depth == 3 else None


def _hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or any(part.startswith(".") for part in parts) or parts[-1] == "Thumbs.db"
