"""`Table`: a dataset as columns, read from CSV, TSV, JSON Lines, Parquet, NumPy or a zip of pictures; never a pickle.

Everything that is malformed is an InvalidDataset that names the column and the row. Rows are counted from 0 without the
header. Not here: what the columns mean (`recipes`), and which rows are trained on (`split`).
"""

from __future__ import annotations

import difflib
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from torchrelay_storage.errors import InvalidDataset
from torchrelay_storage.run_spec import Format
from torchrelay_worker.training import columns as typed
from torchrelay_worker.training.pictures import Pictures, read_zip

Label = int | str | bool
Column = np.ndarray[Any, Any] | list[Any] | Pictures


class Table:
    """Columns of equal length, by name. A column is looked at, and its faults are found, when it is asked for.

    Attributes:
        columns: their names, in the order of the file.
        split_column: the column that says train or validation for each row, where the format itself has one.
    """

    def __init__(self, columns: Mapping[str, Any], *, untyped: bool = False, split_column: str | None = None) -> None:
        """Make a table of NumPy arrays [n, ...], lists, Arrow arrays or `Pictures`.

        Args:
            untyped: columns of texts are those of a CSV file: what looks like numbers is numbers.

        Raises:
            InvalidDataset: there are no columns, they are of different lengths, or one mixes types.
        """
        self._columns = {name: typed.accept(name, values) for name, values in columns.items()}
        self._untyped = untyped
        self.columns = tuple(self._columns)
        self.split_column = split_column
        if not self._columns:
            raise InvalidDataset("the dataset has no columns")
        first = self.columns[0]
        self._length = len(self._columns[first])
        for name, values in self._columns.items():
            if len(values) != self._length:
                raise InvalidDataset(
                    f"column {name!r} has {len(values)} rows where column {first!r} has {self._length}", column=name
                )

    def __len__(self) -> int:
        return self._length

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def without(self, *names: str) -> Table:
        """Return the table without these columns, such as the one that only says how to split."""
        kept = {name: values for name, values in self._columns.items() if name not in names}
        split_column = self.split_column if self.split_column in kept else None
        return Table(kept, untyped=self._untyped, split_column=split_column)

    def column(self, name: str) -> Column:
        """Return a column as what it is.

        Returns:
            Numbers and booleans, also nested ones, as an array [n, ...], a missing number as NaN; texts and dates as a
            list of str, a missing one as None; pictures as `Pictures`.

        Raises:
            InvalidDataset: there is no such column; near names are told. Or a row of it has another shape.
        """
        found: Column = typed.natural(name, self._find(name), untyped=self._untyped)
        return found

    def numbers(self, name: str) -> np.ndarray[Any, Any]:
        """Return a column of finite numbers, int or float [n].

        Raises:
            InvalidDataset: there is no such column, or a row holds a text, NaN, an infinity or nothing.
        """
        return typed.numbers(name, self._find(name), untyped=self._untyped)

    def texts(self, name: str) -> list[str | None]:
        """Return a column as texts, exactly as they are written; None where one is missing.

        Raises:
            InvalidDataset: there is no such column, or it holds neither texts nor numbers.
        """
        return typed.texts(name, self._find(name), untyped=self._untyped)

    def classes(self, name: str) -> list[Label]:
        """Return a column of labels: whole numbers, texts or booleans.

        Raises:
            InvalidDataset: there is no such column, a label is missing, or it is no label, such as 0.5.
        """
        return typed.classes(name, self.column(name))

    def _find(self, name: str) -> Any:
        if name in self._columns:
            return self._columns[name]
        near = difflib.get_close_matches(name, self.columns, n=3, cutoff=0.5)
        shown = ", ".join(map(repr, self.columns[:20])) + (", …" if len(self.columns) > 20 else "")
        hint = f"did you mean {' or '.join(map(repr, near))}? It has {shown}" if near else f"it has {shown}"
        raise InvalidDataset(f"the dataset has no column {name!r}; {hint}", column=name)


# --- reading ----------------------------------------------------------------------------------------------


def read(path: Path, format: Format) -> Table:
    """Read a dataset.

    Args:
        path: a local file.
        format: what it is, whatever its name.

    Raises:
        InvalidDataset: it is not of this format, or it is malformed; a row at fault is named.
    """
    try:
        table = _READERS[format](path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file itself cannot be read
        raise InvalidDataset(f"the dataset cannot be read as {format}: {error}") from error
    if len(table) == 0:
        raise InvalidDataset("the dataset is empty: it has columns and no rows")
    return table


def _read_csv(path: Path) -> Table:
    return _separated(path, ",")


def _read_tsv(path: Path) -> Table:
    return _separated(path, "\t")


def _separated(path: Path, delimiter: str) -> Table:
    if path.stat().st_size == 0:
        raise InvalidDataset("the dataset is empty: the file has no bytes")
    wrong: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note)
    with pyarrow.csv.open_csv(path, parse_options=parse) as file:
        names = file.schema.names
    _refuse_twice(names)
    wrong.clear()
    # As texts: `007` must stay what it is, and a text between numbers must be found with its row.
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    # One thread: only then are malformed rows counted.
    one = pyarrow.csv.ReadOptions(use_threads=False)
    read = pyarrow.csv.read_csv(path, read_options=one, parse_options=parse, convert_options=convert)
    if wrong:
        first = wrong[0]
        row = None if first.number is None else first.number - 2  # it counts from 1, with the header
        raise InvalidDataset(
            f"row {row} has {first.actual_columns} fields where the header has {first.expected_columns}: "
            f"{first.text[:80]!r}; quote fields that hold the delimiter",
            row=row,
        )
    return Table({name: read.column(name) for name in names}, untyped=True)


def _read_parquet(path: Path) -> Table:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        _refuse_twice(names)
        read = file.read()
    return Table({name: read.column(name) for name in names})


def _read_jsonl(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except orjson.JSONDecodeError as error:
                raise InvalidDataset(
                    f"row {len(rows)} (line {number}) is no JSON: {error.msg}", row=len(rows)
                ) from None
            if not isinstance(row, dict):
                raise InvalidDataset(
                    f'row {len(rows)} (line {number}) is no JSON object such as {{"column": value}}', row=len(rows)
                )
            rows.append(row)
    if not rows:
        raise InvalidDataset("the dataset is empty: the file has no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table({name: [row.get(name) for row in rows] for name in names})


def _read_npz(path: Path) -> Table:
    if not zipfile.is_zipfile(path):
        raise InvalidDataset(
            "the dataset is no .npz file, or it is damaged; numpy.savez(FILE, column=array, …) writes one"
        )
    with np.load(path, allow_pickle=False) as file:
        return Table({name: _entry(file, name) for name in file.files})


def _entry(file: Any, name: str) -> np.ndarray[Any, Any]:
    try:
        array = file[name]
    except Exception as error:
        if "allow_pickle" in str(error):
            raise InvalidDataset(
                f"column {name!r} is an array of Python objects, which is never unpickled; make it an array of "
                "numbers or of texts (dtype <U…)",
                column=name,
            ) from None
        raise InvalidDataset(f"column {name!r} cannot be read: {error}", column=name) from error
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise InvalidDataset(f"column {name!r} is a single value, not an array [rows, …]; leave it out", column=name)
    return array


def _read_pictures(path: Path) -> Table:
    pictures, labels, parts = read_zip(path)
    columns: dict[str, Any] = {"image": pictures, "label": labels}
    if parts is not None:
        columns["split"] = parts
    return Table(columns, split_column=None if parts is None else "split")


def _refuse_twice(names: Sequence[str]) -> None:
    for name, n in Counter(names).items():
        if n > 1:
            raise InvalidDataset(f"{n} columns are named {name!r}; rename them", column=name)


_READERS = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "npz": _read_npz,
    "pictures": _read_pictures,
}
