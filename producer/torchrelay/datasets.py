"""Datasets on their way to a training run: a file, a folder of pictures, columns in memory, or a URI.

What is local is checked at a first sight, and packed into one file where it is many. Not here: packing (`packing`),
uploading (`uploads`), and reading datasets, which runs do (`torchrelay_worker.training.data`).
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from torchrelay import uploads
from torchrelay.packing import PICTURES, find_pictures, is_picture, pack_columns, pack_files
from torchrelay.uploads import Upload
from torchrelay_storage.artifacts import Artifacts
from torchrelay_storage.errors import InvalidDataset
from torchrelay_storage.run_spec import Dataset, Format

Source = Path | str | Mapping[str, Any]
"""A local file or folder, a URI, or columns: name -> array or list."""

FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".npz": "npz",
    ".zip": "pictures",
}
ACCEPTED = (
    f"a file that ends in {', '.join(FORMATS)}, a folder of pictures (CLASS/NAME.png), a dict of columns "
    "(name -> array or list), or the URI of such a file"
)
LOOK = 65_536  # bytes of a text file that are looked at


def store_dataset(artifacts: Artifacts, source: Source, roots: Sequence[str] = ()) -> Dataset:
    """Upload a dataset and return where it lies; a URI is checked, and nothing is copied.

    Args:
        source: a .csv, .tsv, .jsonl, .parquet or .npz file; a .zip file or a folder of pictures in folders named after
            their classes, which may stand in folders `train` and `validation`; columns, name -> array [n, ...] or list
            of n; or a URI of such a file in the artifact store or below one of `roots`.
        roots: URLs beside the artifact store that runs may read.

    Raises:
        InvalidDataset: it is none of these; the message names the file, the column or the row.
        Unreachable: the object store does not answer.
    """
    with opened(artifacts, source, roots) as (dataset, upload):
        upload.send(artifacts)
        return dataset


@contextmanager
def opened(artifacts: Artifacts, source: Source, roots: Sequence[str] = ()) -> Iterator[tuple[Dataset, Upload]]:
    """Check a dataset and pack it where it has to be; nothing is uploaded yet. Raises as `store_dataset`."""
    if isinstance(source, str) and uploads.is_uri(source):
        why = uploads.refusal(artifacts, source, roots)
        if why is not None:
            raise InvalidDataset(f"the dataset cannot be read: {why}")
        yield Dataset(uri=source, format=format_of(urlsplit(source).path)), Upload(source)
        return
    with tempfile.TemporaryDirectory(prefix="torchrelay-dataset-") as folder:
        try:
            file, format = _file(source, Path(folder))
            upload = uploads.prepare(artifacts, "datasets", f"data{file.suffix.lower()}", file)
        except OSError as error:
            raise InvalidDataset(f"the dataset cannot be read: {error}") from error
        yield Dataset(uri=upload.uri, format=format, sha256=upload.sha256), upload


def format_of(name: str) -> Format:
    """Return the format that a file's name tells. Raises InvalidDataset."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in FORMATS:
        raise InvalidDataset(f"{name!r} does not end as a dataset that runs read; pass {ACCEPTED}")
    return FORMATS[suffix]


def _file(source: object, folder: Path) -> tuple[Path, Format]:
    """The file to upload, packed in `folder` where the source is none."""
    if isinstance(source, Mapping):
        file = pack_columns(source, folder)
        return file, FORMATS[file.suffix]
    if not isinstance(source, str | os.PathLike) or not str(source):
        hint = "; pass frame.to_dict('list')" if hasattr(source, "to_dict") else ""
        raise InvalidDataset(f"a dataset cannot be {source!r:.80}, a {type(source).__name__}{hint}; pass {ACCEPTED}")
    path = Path(source).expanduser()
    if path.is_dir():
        return pack_files(find_pictures(path), folder / "data.zip"), "pictures"
    if not path.is_file():
        raise InvalidDataset(f"there is no file or folder {path}")
    format = format_of(path.name)
    _look(path, format)
    return path, format


def _look(path: Path, format: Format) -> None:
    """Refuse what is no such file at a first sight; whether all of it can be read, the run finds out."""
    with path.open("rb") as file:
        head = file.read(LOOK)
    if not head:
        raise InvalidDataset(f"{path} is empty")
    match format:
        case "parquet":
            if not head.startswith(b"PAR1"):
                raise InvalidDataset(f"{path} is no Parquet file")
        case "npz" | "pictures":
            if not zipfile.is_zipfile(path):
                raise InvalidDataset(f"{path} is no {'file of NumPy arrays' if format == 'npz' else 'zip file'}")
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if format == "pictures" and not any(map(is_picture, names)):
                raise InvalidDataset(f"{path} holds no pictures ({', '.join(sorted(PICTURES))})")
        case _:
            _look_at_text(path, head)


def _look_at_text(path: Path, head: bytes) -> None:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if len(head) < LOOK or error.start < LOOK - 4:  # else the look has cut a character in two
            raise InvalidDataset(
                f"{path} is no text in UTF-8: byte {error.start} cannot be read; save it as UTF-8"
            ) from None
    if b"\0" in head:
        raise InvalidDataset(f"{path} is no text: it holds NUL bytes; save it as UTF-8")
