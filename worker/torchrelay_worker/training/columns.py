"""What a column of a dataset holds: numbers, texts, labels; and where it holds something else.

Not here: where columns come from (`data`), and pictures (`pictures`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrelay_storage.errors import InvalidDataset
from torchrelay_worker.training.pictures import Pictures

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""What stands for a missing number in a CSV file, in lower case. Among texts only the empty one is missing."""

_NUMBERS = "biuf"  # NumPy's kinds: booleans, ints, unsigned ints, floats


def accept(name: str, values: Any) -> Any:
    """Return values as one of the kinds that a `Table` keeps: an ndarray, an Arrow array, a list of str or `Pictures`.

    Raises:
        InvalidDataset: they are of another kind; the row that differs from those before it is named.
    """
    if isinstance(values, Pictures | pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, np.ndarray):
        return _array(name, values)
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InvalidDataset(f"column {name!r} is a {type(values).__name__}, not an array or list", column=name)
    if values and all(isinstance(value, np.ndarray) for value in values):
        return _array(name, _stacked(name, values))
    values = [v.item() if isinstance(v, np.generic) else v for v in values]
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        _name_the_odd(name, values)


def _array(name: str, values: np.ndarray[Any, Any]) -> Any:
    kind = values.dtype.kind
    if values.ndim == 0:
        raise InvalidDataset(f"column {name!r} is a single value, not an array [rows, …]", column=name)
    if kind in _NUMBERS:
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    if kind == "U" and values.ndim == 1:
        return values.tolist()
    if kind == "O":
        return accept(name, values.tolist())
    raise InvalidDataset(
        f"column {name!r} is an array of dtype {values.dtype} and {values.ndim} dimensions; it must hold numbers "
        "[rows, …] or texts [rows]",
        column=name,
    )


def _stacked(name: str, values: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    for row, value in enumerate(values):
        if value.shape != values[0].shape:
            raise InvalidDataset(
                f"column {name!r} is ragged: row {row} is of shape {list(value.shape)} where the first is of "
                f"{list(values[0].shape)}; all rows must be of one shape",
                column=name,
                row=row,
            )
    return np.stack(list(values))


def _name_the_odd(name: str, values: list[Any]) -> NoReturn:
    first = next(value for value in values if value is not None)
    for row, value in enumerate(values):
        try:
            pa.array([first, value])
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            raise InvalidDataset(
                f"column {name!r} holds {_shown(value)} in row {row}, where rows before it hold "
                f"{type(first).__name__}, such as {_shown(first)}",
                column=name,
                row=row,
            ) from None
    raise InvalidDataset(f"column {name!r} holds values of different types", column=name)


# --- as what they are -------------------------------------------------------------------------------------


def natural(name: str, values: Any, *, untyped: bool = False) -> Any:
    """Return numbers as an ndarray [n, ...] (missing: NaN), texts as a list (missing: None), pictures as they are.

    Raises:
        InvalidDataset: a row has another shape than the others, or holds something that is neither.
    """
    if isinstance(values, Pictures | np.ndarray | list):
        return values
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
        if isinstance(values, pa.ChunkedArray):  # more than one array can hold
            values = pa.concat_arrays(values.chunks)
    kind = values.type
    if pa.types.is_dictionary(kind):
        return natural(name, values.dictionary_decode(), untyped=untyped)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if untyped and (found := _parsed(values)) is not None:
            return found
        return _emptied(values) if untyped else values.to_pylist()
    if pa.types.is_null(kind):
        return [None] * len(values)
    if pa.types.is_decimal(kind):
        values, kind = values.cast(pa.float64()), pa.float64()
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        if values.null_count:
            values = values.cast(pa.uint8()) if pa.types.is_boolean(kind) else values
            return values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return values.to_numpy(zero_copy_only=False)
    if pa.types.is_temporal(kind):
        return values.cast(pa.string()).to_pylist()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _nested(name, values)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _pictures(name, values)
    if pa.types.is_struct(kind) and "bytes" in [kind.field(i).name for i in range(kind.num_fields)]:
        return _pictures(name, values.field("bytes"))  # as Hugging Face's datasets write pictures
    raise InvalidDataset(
        f"column {name!r} holds values of the type {kind}; it must hold numbers, texts, pictures or lists of numbers",
        column=name,
    )


def _emptied(values: pa.Array) -> list[str | None]:
    return [text or None for text in values.to_pylist()]


def _parsed(values: pa.Array) -> np.ndarray[Any, Any] | None:
    """Return texts as int64, float64 or bool if all that are there are such; None if they are texts."""
    texts = pc.utf8_trim_whitespace(values)
    lower = pc.utf8_lower(texts)
    missing = pc.is_in(lower, value_set=pa.array(sorted(MISSING)))
    kept = pc.if_else(missing, pa.scalar(None, texts.type), texts)
    if kept.null_count == len(kept):
        return None
    # A number with zeros in front is a name: a postcode, a telephone number.
    if pc.any(pc.match_substring_regex(kept, r"^[+-]?0\d")).as_py():
        return None
    for kind in (pa.int64(), pa.float64()):
        try:
            found = kept.cast(kind)
        except pa.ArrowInvalid:
            continue
        return (found.cast(pa.float64(), safe=False) if found.null_count else found).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    if not kept.null_count and pc.all(pc.is_in(lower, value_set=pa.array(["true", "false"]))).as_py():
        return pc.equal(lower, "true").to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    return None


def _nested(name: str, values: pa.Array) -> np.ndarray[Any, Any]:
    """Return lists of equal length, of any depth, as an array [n, length, ...]."""
    rows = len(values)
    shape = [rows]
    while (
        pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type)
    ):
        per_row = max(1, len(values) // max(1, rows))  # lists of this depth in one row
        if values.null_count:
            row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // per_row
            raise InvalidDataset(f"column {name!r} misses a list in row {row}", column=name, row=row)
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        odd = np.flatnonzero(lengths != lengths[0]) if rows else np.empty(0, dtype=np.int64)
        if len(odd):
            row = int(odd[0]) // per_row
            raise InvalidDataset(
                f"column {name!r} is ragged: a list in row {row} has {lengths[odd[0]]} values where the first has "
                f"{lengths[0]}; all rows must be of one shape",
                column=name,
                row=row,
            )
        shape.append(int(lengths[0]) if rows else 0)
        values = values.flatten()
    leaves = natural(name, values)
    if not isinstance(leaves, np.ndarray):
        raise InvalidDataset(f"column {name!r} holds lists of texts; it must hold lists of numbers", column=name)
    return leaves.reshape(shape)


def _pictures(name: str, values: pa.Array) -> Pictures:
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        raise InvalidDataset(f"column {name!r} misses a picture in row {row}", column=name, row=row)
    return Pictures([f"row {row} of column {name!r}" for row in range(len(values))], lambda i: values[i].as_py(), name)


# --- as what they must be ---------------------------------------------------------------------------------


def numbers(name: str, values: Any, *, untyped: bool = False) -> np.ndarray[Any, Any]:
    """Return finite numbers [n], int or float; booleans count as 0 and 1. Raises InvalidDataset with the row."""
    found = natural(name, values, untyped=untyped)
    if isinstance(found, list):
        found = _as_floats(name, found)
    if not isinstance(found, np.ndarray) or found.ndim != 1:
        raise InvalidDataset(f"column {name!r} must hold one number a row, not {_kind(found)}", column=name)
    if found.dtype.kind == "b":
        return found.astype(np.int64)
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        row = int(np.argmin(np.isfinite(found)))
        what = "nothing, or NaN," if math.isnan(found[row]) else "an infinite number"
        raise InvalidDataset(
            f"column {name!r} holds {what} in row {row}; fill it in, or leave the row out", column=name, row=row
        )
    return found


def _as_floats(name: str, values: list[Any]) -> np.ndarray[Any, Any]:
    found = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            found[row] = math.nan if value is None or value.strip().lower() in MISSING else float(value)
        except ValueError:
            raise InvalidDataset(
                f"column {name!r} holds the text {_shown(value)} in row {row}, where a number is expected",
                column=name,
                row=row,
            ) from None
    return found


def texts(name: str, values: Any, *, untyped: bool = False) -> list[str | None]:
    """Return texts as they are written, None where one is missing; numbers as texts. Raises InvalidDataset."""
    if untyped and isinstance(values, pa.Array | pa.ChunkedArray):
        return [text or None for text in values.to_pylist()]
    found = natural(name, values)
    if isinstance(found, list):
        return found
    if isinstance(found, np.ndarray) and found.ndim == 1:
        return [None if _is_nan(value) else as_text(value) for value in found.tolist()]
    raise InvalidDataset(f"column {name!r} must hold one text a row, not {_kind(found)}", column=name)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def as_text(value: float | bool) -> str:
    """Return a number as a text: 3.0 is `3`, True is `true`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def classes(name: str, found: Any) -> list[int | str | bool]:
    """Return labels: ints, texts or booleans. Raises InvalidDataset where one is missing or is no label."""
    if isinstance(found, list):
        if None in found:
            row = found.index(None)
            raise InvalidDataset(
                f"the label is missing in row {row} of column {name!r}; fill it in, or leave the row out",
                column=name,
                row=row,
            )
        return found
    if not isinstance(found, np.ndarray) or found.ndim != 1:
        raise InvalidDataset(f"column {name!r} must hold one label a row, not {_kind(found)}", column=name)
    if found.dtype.kind == "f":
        missing = ~np.isfinite(found)
        if missing.any():
            row = int(np.argmax(missing))
            raise InvalidDataset(
                f"the label is missing, or is not finite, in row {row} of column {name!r}; fill it in, or leave the "
                "row out",
                column=name,
                row=row,
            )
        broken = found != np.floor(found)
        if broken.any():
            row = int(np.argmax(broken))
            raise InvalidDataset(
                f"column {name!r} holds {found[row]:g} in row {row}, which is no class: classes are whole numbers or "
                "texts; to predict a number, use the recipe regression",
                column=name,
                row=row,
            )
        found = found.astype(np.int64)
    return found.tolist()  # type: ignore[no-any-return]


def _kind(values: Any) -> str:
    if isinstance(values, Pictures):
        return "pictures"
    if isinstance(values, np.ndarray):
        return f"arrays of shape {list(values.shape[1:])}"
    return "texts"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
