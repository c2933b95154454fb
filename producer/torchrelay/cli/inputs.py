"""Inputs from the command line: JSON text, files, standard input, JSON Lines. Not here: what a model makes of them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from torchrelay_storage.errors import InvalidInput

NPY = b"\x93NUMPY"


def read_value(text: str) -> Any:
    """Return the input that an option names.

    JSON text is itself. `@file` is the file's content: a .json file as JSON, a .txt file as text, a .npy file as an
    array, everything else (pictures too) as bytes. `-` is JSON from standard input.

    Raises:
        InvalidInput: it is not JSON, or the file cannot be read.
    """
    if text == "-":
        return parse(_stdin().read(), "standard input")
    if not text.startswith("@"):
        return parse(text.encode(errors="surrogateescape"), "the input",
                     hint='; text needs quotes of its own: \'"text"\', a file an @: @file.png')  # fmt: skip
    path = Path(text[1:]).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"the input file {path} cannot be read: {error.strerror}") from error
    suffix = path.suffix.lower()
    if suffix == ".json":
        return parse(data, str(path))
    if suffix == ".txt":
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{path} is not UTF-8 text: {error}") from error
    if suffix == ".npy" or data.startswith(NPY):
        return _array(data, path)
    return data


def parse(data: bytes, name: str, hint: str = "") -> Any:
    """Return what JSON says. Raises InvalidInput that names the place."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"{name} is not JSON: {error}{hint}") from None


def read_object(text: str | None, what: str) -> dict[str, Any] | None:
    """Return the JSON object that an option names, as `read_value` does. Raises InvalidInput for anything else."""
    if text is None:
        return None
    value = read_value(text)
    if not isinstance(value, dict):
        raise InvalidInput(f'{what} must be a JSON object, such as {{"a": 1}}, not {json.dumps(value)[:40]}')
    return value


@contextmanager
def lines(source: str) -> Iterator[tuple[Iterator[Any], int | None]]:
    """Yield the values of a JSON Lines file (`-`: standard input) as a stream, and how many there are if that is known.

    Empty lines are left out. A file is read twice: a bad line in it is found before anything is stored. That of a pipe
    is found when the stream comes to it.

    Raises:
        InvalidInput: no such file, or a line that is not JSON; the message has its number.
    """
    if source == "-":
        yield _values(_stdin(), "standard input"), None
        return
    path = Path(source).expanduser()
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidInput(f"the file {path} cannot be read: {error.strerror}") from error
    with file:
        total = None
        if file.seekable():
            total = sum(1 for _ in _values(file, str(path)))
            file.seek(0)
        yield _values(file, str(path)), total


def _values(file: IO[bytes], name: str) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield parse(line, f"line {number} of {name}")


def _stdin() -> IO[bytes]:
    return sys.stdin.buffer


def _array(data: bytes, path: Path) -> Any:
    try:
        import numpy
    except ImportError:
        raise InvalidInput(f"{path} is an array, which needs numpy: `pip install 'torchrelay[arrays]'`") from None
    try:
        return numpy.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise InvalidInput(f"{path} is not a NumPy array that can be read: {error}") from error
