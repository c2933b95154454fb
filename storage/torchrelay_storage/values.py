"""Inputs and outputs as stored bytes, and back. Not for messages or metadata, which are JSON and nothing else.

A JSON value is stored as its own UTF-8 text, so that psql and every language read it. Every other kind has one tag
byte in front that no JSON text begins with:

    0x01 bytes      the bytes
    0x02 PNG        the bytes of a picture, recognised by their signature; they come back as the bytes they were
    0x03 JPEG       likewise
    0x04 array      one NumPy array: a safetensors file with the entry "0"
    0x05 tensor     one torch tensor, likewise; where it was and whether it wanted a gradient is not kept
    0x06 container  a dict or list with bytes, arrays or tensors inside: length of the skeleton (8 bytes, little
                    endian), the skeleton, JSON {"value": .., "at": [[path, kind], ..]}, and a safetensors file with
                    the entries "0", "1", .. in the order of "at"
    0x07 reference  JSON that says where the real bytes are (`artifacts.store_large`)

What comes back equals what went in, except that tuples become lists, NumPy scalars the Python numbers that they are
(`np.asarray(x)` keeps the dtype), UUIDs and enum members their text or value, big-endian arrays little-endian ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from operator import itemgetter
from typing import Any, NoReturn

import orjson

from torchrelay_storage import tensors as arrays
from torchrelay_storage.errors import Corrupt, InvalidInput
from torchrelay_storage.tensors import Leaf, Tensors

Stored = bytes | bytearray | memoryview
Path = tuple[str | int, ...]  # the keys and indexes that lead to a part of a value

BYTES, PNG, JPEG, ARRAY, TENSOR, CONTAINER, REFERENCE = 1, 2, 3, 4, 5, 6, 7
MAX_DEPTH = 250  # orjson writes 254 levels, and a container's skeleton takes one

_SPACE = 0x20
_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", PNG), (b"\xff\xd8\xff", JPEG))
_MEDIA_TYPES = {
    BYTES: "application/octet-stream",
    PNG: "image/png",
    JPEG: "image/jpeg",
    ARRAY: "application/x-safetensors",
    TENSOR: "application/x-safetensors",
    CONTAINER: "application/x-torchrelay-container",
}
_LENGTH = struct.Struct("<Q")
# What orjson.dumps returns holds on to the buffer that it grew in, 4 KB for a value of ten bytes: many that are kept
# take 400 MB per 100,000, and most of the time goes into those pages. `memoryview(x).tobytes()` is the quickest copy.
_trimmed = memoryview

_TOGETHER = 1 << 20  # bytes that are decoded at once: they are copied for it
_FIRST = itemgetter(0)

_ACCEPTED = (
    "accepted are None, bool, int, finite float, str, bytes, NumPy arrays, torch tensors, "
    "and dicts (with string keys), lists and tuples of these"
)
# What to pass instead, by the name of the type, else of its module.
_HINTS = {
    "set": "; pass a list",
    "frozenset": "; pass a list",
    "range": "; pass a list",
    "generator": "; pass a list",
    "datetime": "; pass its .isoformat()",
    "timedelta": "; pass its .total_seconds()",
    "decimal": "; pass str(x) or float(x)",
    "PIL": "; pass the bytes of its PNG or JPEG file",
    "pandas": "; pass its .to_numpy() or .to_dict()",
}


@dataclass(frozen=True, slots=True)
class Reference:
    """Where the encoded bytes of a large value are, and what they must be.

    Attributes:
        uri: the artifact's.
        size: bytes of the artifact.
        sha256: of these bytes, 64 hexadecimal digits.
        media_type: what `media_type` says of them, so that nobody fetches them to learn it.
    """

    uri: str
    size: int
    sha256: str
    media_type: str


def encode(value: object) -> bytes:
    """Return the bytes that are stored for this value.

    Raises:
        InvalidInput: it holds something that cannot be stored; the message says where, what, and what is accepted.
    """
    try:
        data = _trimmed(orjson.dumps(value, None, _OPTIONS)).tobytes()
    except TypeError:
        return _encode_any(value)
    # orjson writes NaN and Infinity as null, without a word. Few values hold a null, so to look for one is cheap.
    if b"null" in data and not _is_finite(value):
        return _encode_any(value)
    return data


def encode_many(values: Sequence[object]) -> list[bytes]:
    """Return `encode` of each: the bulk path, with next to no work in Python for values that are plain JSON.

    Raises:
        InvalidInput: as `encode`; the message says which value by its index.
    """
    dumps, options, trimmed = orjson.dumps, _OPTIONS, _trimmed
    try:
        encoded = [trimmed(dumps(value, None, options)).tobytes() for value in values]
    except TypeError:
        encoded = []
    if len(encoded) == len(values):
        nulls = (value for value, data in zip(values, encoded, strict=True) if b"null" in data)
        if all(map(_is_finite, nulls)):
            return encoded
    encoded = []
    for index, value in enumerate(values):
        try:
            encoded.append(encode(value))
        except InvalidInput as error:
            raise InvalidInput(f"value {index} of {len(values)}: {error}") from None
    return encoded


def encode_reference(reference: Reference) -> bytes:
    """Return the bytes that stand in a row for a value which lies in the object store."""
    return bytes((REFERENCE,)) + orjson.dumps(asdict(reference))


def decode(data: Stored, *, tensors: Tensors | None = None) -> Any:
    """Return the value behind stored bytes.

    Arguments:
        tensors: as what arrays and tensors come back: all as "numpy" arrays, all as "torch" tensors (on the CPU), or,
            by default, each as what it was; a tensor where torch is not installed as a NumPy array. They are new,
            writable, and share memory with nothing.

    A reference comes back as `Reference`; `artifacts.load_large` gets what is behind it.

    Raises:
        Corrupt: the bytes are not what `encode` writes.
        RelayError: the library for an array or tensor is not installed, or has no such dtype.
    """
    if data and data[0] >= _SPACE:
        try:
            return orjson.loads(data) if data[-1] != _SPACE else _load_wide(data)
        except ValueError as error:
            raise Corrupt(f"a stored value is not JSON: {error}") from None
    data = bytes(data)
    tag = _tag(data)
    if tag == REFERENCE:
        return _reference(data)
    if tag == CONTAINER:
        value, leaves = _container(data)
        for path, leaf in leaves:
            _put(value, path, arrays.build(leaf, tensors))
        return value
    if tag in (ARRAY, TENSOR):
        (leaf,) = arrays.read(data[1:], ["array" if tag == ARRAY else "tensor"])
        return arrays.build(leaf, tensors)
    return data[1:]


def decode_many(stored: Sequence[bytes]) -> list[Any] | None:
    """Return the values behind many small stored JSON values, at a fraction of what `decode` of each costs.

    Returns:
        None: one of them is something else, is damaged, or they are large; `decode` each to learn more.
    """
    if not stored or sum(map(len, stored)) > _TOGETHER or min(map(_FIRST, stored)) < _SPACE:
        return None
    joined = b"[%b]" % b",".join(stored)
    try:
        # A space before a comma marks ints beyond 64 bits, which orjson would turn into floats.
        found = orjson.loads(joined) if b" ," not in joined and joined[-2] != _SPACE else []
    except ValueError:
        return None
    return found if len(found) == len(stored) else None


def media_type(data: Stored) -> str:
    """Return the media type of a stored value, such as `application/json` or `image/png`; of what a reference is to.

    Raises:
        Corrupt: it has no known tag, or is a damaged reference. Nothing else of it is looked at.
    """
    if data and data[0] >= _SPACE:
        return "application/json"
    tag = _tag(data)
    return _MEDIA_TYPES[tag] if tag != REFERENCE else _reference(bytes(data)).media_type


def as_reference(data: Stored) -> Reference | None:
    """Return the reference that these stored bytes are, or None where they are the value itself. Raises Corrupt."""
    return _reference(bytes(data)) if data and data[0] == REFERENCE else None


def digest(data: Stored) -> bytes:
    """Return the sha256 (32 bytes) of what a stored value means: the order of a dict's keys makes no difference.

    Raises:
        Corrupt: as `decode`.
    """
    data = bytes(data)
    if data and data[0] >= _SPACE:
        return hashlib.sha256(_dump(decode(data), sort=True)).digest()
    if _tag(data) != CONTAINER:
        return hashlib.sha256(data).digest()
    value, leaves = _container(data)
    total = hashlib.sha256(bytes((CONTAINER,)) + _dump(value, sort=True))
    for path, leaf in sorted(leaves, key=lambda place: orjson.dumps(place[0])):
        total.update(orjson.dumps([path, leaf.kind, leaf.dtype, leaf.shape]))
        total.update(leaf.data)
    return total.digest()


# ------------------------------------------------------------------ to bytes


def _encode_any(value: object) -> bytes:
    """Every kind, walked in Python; also what orjson refuses, such as large ints and NumPy scalars."""
    leaves: list[tuple[Path, Leaf]] = []
    plain = _plain(value, (), leaves)
    if not leaves:
        return _dump(plain)
    path, first = leaves[0]
    if path:
        skeleton = _dump({"value": plain, "at": [[path, leaf.kind] for path, leaf in leaves]})
        head = (bytes((CONTAINER,)), _LENGTH.pack(len(skeleton)), skeleton)
        return b"".join((*head, *arrays.write([leaf for _, leaf in leaves])))
    if first.kind == "bytes":
        tag = next((tag for signature, tag in _SIGNATURES if first.data.startswith(signature)), BYTES)
        return bytes((tag,)) + first.data
    return b"".join((bytes((ARRAY if first.kind == "array" else TENSOR,)), *arrays.write([first])))


def _is_finite(value: object) -> bool:
    """Whether no float in a value that orjson has accepted is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, Enum) or _is_finite(value.value)


def _plain(value: object, path: Path, leaves: list[tuple[Path, Leaf]]) -> object:
    """Return the value as plain JSON types, with None in the place of each leaf, which goes to `leaves`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, path, leaves)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _refusal(path, "NaN and Infinity are not JSON; pass None, or an array that holds them")
        return float(value)
    if isinstance(value, dict | list | tuple):
        if len(path) >= MAX_DEPTH:
            raise _refusal(path, f"it is nested more than {MAX_DEPTH} deep, or holds itself")
        if not isinstance(value, dict):
            return [_plain(item, (*path, index), leaves) for index, item in enumerate(value)]
        plain = {}
        for key, item in value.items():
            name = key.value if isinstance(key, Enum) else key
            if not isinstance(name, str):
                raise _refusal(path, f"a dict has a key of type {type(key).__name__}; keys must be strings")
            plain[str.__str__(name)] = _plain(item, (*path, str.__str__(name)), leaves)
        return plain
    if isinstance(value, uuid.UUID):
        return str(value)
    try:
        leaf = arrays.leaf_of(value)
    except InvalidInput as error:
        raise _refusal(path, str(error)) from None
    if leaf is not None:
        leaves.append((path, leaf))
        return None
    number = arrays.number_of(value)
    if number is not None:
        return _plain(number, path, leaves)
    kind = type(value)
    module = kind.__module__.partition(".")[0]
    hint = _HINTS.get(kind.__name__) or _HINTS.get(module, "")
    if hasattr(kind, "__dataclass_fields__"):
        hint = "; pass dataclasses.asdict(x)"
    name = kind.__name__ if module == "builtins" else f"{module}.{kind.__name__}"
    raise _refusal(path, f"a value of type {name} cannot be stored{hint}; {_ACCEPTED}")


def _refusal(path: Path, why: str) -> InvalidInput:
    where = "".join(f"[{part!r}]" for part in path[:8]) + ("[…]" if len(path) > 8 else "")
    return InvalidInput(f"at value{where}: {why}" if path else why)


def _dump(plain: object, sort: bool = False) -> bytes:
    """JSON text of plain types. A space behind it says: ints beyond 64 bits inside, which orjson reads as floats."""
    try:
        return orjson.dumps(plain, None, orjson.OPT_SORT_KEYS if sort else 0)
    except TypeError:
        pass
    try:
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort)
        return text.encode() + b" "
    except UnicodeEncodeError:
        raise InvalidInput("a string holds a lone surrogate, which is no Unicode text; pass bytes instead") from None
    except ValueError as error:  # an int of more digits than Python turns into text
        raise InvalidInput(f"an int cannot be written as JSON: {error}") from None


# ------------------------------------------------------------------ from bytes


def _tag(data: Stored) -> int:
    if not data:
        raise Corrupt("a stored value is empty")
    if data[0] not in _MEDIA_TYPES and data[0] != REFERENCE:
        raise Corrupt(f"a stored value has the unknown tag {data[0]}; a newer release may have written it")
    return data[0]


def _load_wide(data: Stored) -> Any:
    """JSON with ints beyond 64 bits. Raises ValueError."""
    try:
        return json.loads(bytes(data).decode(), parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _container(data: bytes) -> tuple[Any, list[tuple[list[str | int], Leaf]]]:
    """The skeleton of a container, with None in the place of each leaf, and the leaves by their paths."""
    try:
        begin = 1 + _LENGTH.size
        end = begin + _LENGTH.unpack(data[1:begin])[0]
        skeleton = decode(data[begin:end])
        value, at = skeleton["value"], [(list(path), str(kind)) for path, kind in skeleton["at"]]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, struct.error):
        raise Corrupt("the skeleton of a stored container is damaged") from None
    leaves = arrays.read(data[end:], [kind for _, kind in at])
    return value, [(path, leaf) for (path, _), leaf in zip(at, leaves, strict=True)]


def _put(value: Any, path: list[str | int], leaf: object) -> None:
    try:
        for part in path[:-1]:
            value = value[part]
        if value[path[-1]] is None:
            value[path[-1]] = leaf
            return
    except (KeyError, IndexError, TypeError):
        pass
    raise Corrupt("the skeleton of a stored container has no place for one of its arrays")


def _reference(data: bytes) -> Reference:
    try:
        reference = Reference(**orjson.loads(data[1:]))
        texts = (reference.uri, reference.sha256, reference.media_type)
        if all(isinstance(text, str) for text in texts) and type(reference.size) is int:
            return reference
    except (TypeError, ValueError):
        pass
    raise Corrupt("a stored reference to an artifact is damaged")
