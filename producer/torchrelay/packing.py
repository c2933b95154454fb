"""One file out of what is many: a folder of pictures as a zip file, columns in memory as .npz or JSON Lines.

The same content always gives the same bytes: sorted, stored without compression, with fixed times. Constant memory
beside what is passed; NumPy is imported only where arrays are. Not here: uploading (`datasets`).
"""

from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from torchrelay_storage.errors import InvalidDataset

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"})
PARTS = ("train", "validation")  # folders of classes, where the split is given

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can say
_LARGEST = 2**64  # what JSON readers take for a whole number ends here


# --- pictures -------------------------------------------------------------------------------------------------------


def find_pictures(folder: Path) -> list[tuple[str, Path]]:
    """Return the pictures of a folder, sorted by name: `CLASS/NAME.png`, or `train/CLASS/NAME.png`, and their files.

    Hidden files and folders are left out; everything else must be a picture in the folder of its class.

    Raises:
        InvalidDataset: it names the file or folder that is none, or that a link leads out of the folder.
    """
    root = folder.resolve()
    top = _visible(folder, root)
    split = any(place.name == PARTS[0] and any(map(Path.is_dir, _visible(place, root))) for place in top)
    classes: list[tuple[str, Path]] = []
    for place in top:
        if not split:
            classes.append((place.name, place))
        elif place.name in PARTS:
            classes += [(f"{place.name}/{part.name}", part) for part in _visible(place, root)]
        else:
            raise InvalidDataset(
                f"beside train/ there may only be validation/ in a folder of pictures, and {place} is there; "
                "move it away, or name it validation"
            )
    found: list[tuple[str, Path]] = []
    for name, place in classes:
        if not place.is_dir():
            raise InvalidDataset(
                f"{place} does not lie in a folder of its class: pictures lie as CLASS/NAME.png, or as "
                "train/CLASS/NAME.png and validation/CLASS/NAME.png; move it, or delete it"
            )
        pictures = _visible(place, root)
        for picture in pictures:
            if not picture.is_file() or not is_picture(picture.name):
                raise InvalidDataset(
                    f"{picture} is no picture: the folder of a class holds files that end in "
                    f"{', '.join(sorted(PICTURES))}, and nothing else; move it, or delete it"
                )
        if not pictures:
            raise InvalidDataset(f"the folder of the class {name} holds no picture: {place}")
        found += [(f"{name}/{picture.name}", picture) for picture in pictures]
    if not found:
        raise InvalidDataset(f"{folder} holds no pictures; they lie as CLASS/NAME.png")
    return sorted(found)


def is_picture(name: str) -> bool:
    """Whether a file's name says that it is a picture."""
    return PurePosixPath(name).suffix.lower() in PICTURES


def pack_files(files: Sequence[tuple[str, Path]], to: Path) -> Path:
    """Write a zip file with these names and files, and return its path."""
    with zipfile.ZipFile(to, "w") as archive:
        for name, path in files:
            entry = _entry(name)
            entry.file_size = path.stat().st_size  # says whether the entry needs the fields of a large one
            with path.open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return to


def _visible(folder: Path, root: Path) -> list[Path]:
    """What is in a folder and not hidden, by name. Raises InvalidDataset where a link leads out of `root`."""
    if not folder.is_dir():
        return []
    found = sorted((place for place in folder.iterdir() if not place.name.startswith(".")), key=lambda p: p.name)
    for place in found:
        if place.is_symlink() and not place.resolve().is_relative_to(root):
            raise InvalidDataset(f"{place} is a link that leads out of {root}; put the file itself there")
        try:
            place.name.encode()
        except UnicodeEncodeError:
            raise InvalidDataset(f"the name of {str(place)!r} is no Unicode text; rename it") from None
    return found


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_STORED
    entry.create_system = 3  # as on Unix, wherever this runs
    entry.external_attr = 0o644 << 16
    return entry


# --- columns --------------------------------------------------------------------------------------------------------


def pack_columns(columns: Mapping[str, Any], folder: Path) -> Path:
    """Write columns to a file in `folder` and return its path: .npz where one of them is an array, else .jsonl.

    Args:
        columns: name -> array [n, ...] or list of n; all of one n.

    Raises:
        InvalidDataset: it names the column, and of a list also the row, that cannot be stored.
    """
    for name in columns:
        if not isinstance(name, str) or not name or "\0" in name:
            raise InvalidDataset(f"columns are named by strings, not by {name!r}")
    for name, values in columns.items():
        if not _is_array(values) and (isinstance(values, str | bytes) or not isinstance(values, Sequence)):
            raise InvalidDataset(
                f"column {name!r} is a {type(values).__name__}; pass an array or a list with a value for each row",
                column=name,
            )
    if not columns:
        raise InvalidDataset("a dataset without columns; pass name -> array or list")
    if any(map(_is_array, columns.values())):
        arrays = {name: _array(name, values) for name, values in columns.items()}
        _check_lengths({name: len(values) for name, values in arrays.items()})
        return _write_arrays(arrays, folder / "data.npz")
    _check_lengths({name: len(values) for name, values in columns.items()})
    return _write_rows(columns, folder / "data.jsonl")


def _is_array(values: object) -> bool:
    return hasattr(values, "dtype") and hasattr(values, "shape")  # of NumPy, torch, pandas


def _check_lengths(lengths: Mapping[str, int]) -> None:
    first, length = next(iter(lengths.items()))
    for name, other in lengths.items():
        if other != length:
            raise InvalidDataset(
                f"column {name!r} has {other:,} rows, and {first!r} has {length:,}: all need the same", column=name
            )
    if length == 0:
        raise InvalidDataset("a dataset without rows")


def _array(name: str, values: Any) -> Any:
    """The column as a NumPy array of numbers or texts."""
    try:
        import numpy as np

        array = np.asarray(values)
    except ImportError:
        raise InvalidDataset("arrays need NumPy: pip install 'torchrelay[arrays]', or pass lists") from None
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors on a device, or with a gradient
        raise InvalidDataset(f"column {name!r} is no array: {error}", column=name) from None
    if array.ndim == 0:
        raise InvalidDataset(f"column {name!r} has no rows; pass an array [n, ...]", column=name)
    if array.dtype.kind == "O":  # as pandas keeps texts; objects would have to be pickled
        for row, value in enumerate(array.flat if array.ndim == 1 else [None]):
            if not isinstance(value, str):
                raise InvalidDataset(
                    f"column {name!r} holds Python objects, such as {value!r:.80}; pass numbers or texts only",
                    column=name,
                    row=row if array.ndim == 1 else None,
                )
        array = array.astype(np.str_)
    if array.dtype.kind not in "biufU":
        raise InvalidDataset(
            f"column {name!r} has the dtype {array.dtype}; pass whole numbers, floats, booleans or texts", column=name
        )
    return np.ascontiguousarray(array)


def _write_arrays(arrays: Mapping[str, Any], to: Path) -> Path:
    """As numpy.savez, with entries that depend on nothing but their content."""
    from numpy.lib import format

    with zipfile.ZipFile(to, "w") as archive:
        for name, array in arrays.items():
            with archive.open(_entry(f"{name}.npy"), "w", force_zip64=True) as file:
                format.write_array(file, array, allow_pickle=False)
    return to


def _write_rows(columns: Mapping[str, Sequence[Any]], to: Path) -> Path:
    with to.open("wb") as file:
        file.writelines(_rows(columns))
    return to


def _rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[bytes]:
    names = list(columns)
    for row, values in enumerate(zip(*columns.values(), strict=True)):
        line = {name: _cell(value, name, row) for name, value in zip(names, values, strict=True)}
        try:
            yield orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError as error:
            raise InvalidDataset(f"row {row} cannot be stored: {error}", row=row) from None


def _cell(value: Any, column: str, row: int) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int) and -_LARGEST // 2 <= value < _LARGEST:
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        raise InvalidDataset(
            f"column {column!r}, row {row}: {value} is no number to train on; pass None where a value is missing",
            column=column,
            row=row,
        )
    if isinstance(value, list | tuple):
        return [_cell(item, column, row) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        return _cell(value.item(), column, row)
    raise InvalidDataset(
        f"column {column!r}, row {row}: a {type(value).__name__} cannot be stored; pass numbers, texts, booleans, "
        "None, or lists of them",
        column=column,
        row=row,
    )
