"""Inputs and outputs as stored bytes, and back. Not for messages or metadata, which are JSON and nothing else.

A JSON value is stored as its own UTF-8 text, so that psql and every language read it. Every other kind has one tag
byte in front that no JSON text begins with:

    0x01 bytes      the bytes
    0x02 PNG        the bytes of a picture, recognised by their signature; they come back as the bytes they were
    0x03 JPEG       likewise
    0x04 array      one NumPy array, as a safetensors file with the tensor "0"
    0x05 tensor     one torch tensor, likewise; where it was, and whether it wanted a gradient, is not kept
    0x06 container  a dict or list with bytes, arrays or tensors inside: length of the skeleton (8 bytes, little endian),
                    skeleton (JSON {"value": .., "at": [[path, kind], ..]}), safetensors file with the tensors "0", "1", ..
    0x07 reference  JSON that says where the real bytes are (`artifacts.store_large`)

What comes back is equal to what went in, except that tuples become lists, NumPy scalars the Python numbers they are
(`np.asarray(x)` keeps the dtype), UUIDs and enum members their text or value, big-endian arrays little-endian ones.
Neither numpy nor torch is imported before a value needs it, and torch never by its name: this runs without both.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import struct
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Literal, NoReturn

import orjson
import safetensors

from torchrelay_storage.errors import Corrupt, InvalidInput, RelayError

Tensors = Literal["numpy", "torch"]
Stored = bytes | bytearray | memoryview

BYTES, PNG, JPEG, ARRAY, TENSOR, CONTAINER, REFERENCE = 1, 2, 3, 4, 5, 6, 7
MAX_DEPTH = 250  # orjson writes 254 levels; a container's skeleton and its "value" take one

_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_SPACE = 0x20
_TAGS = {BYTES, PNG, JPEG, ARRAY, TENSOR, CONTAINER, REFERENCE}
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

# safetensors' name of each dtype -> NumPy's (None: NumPy has none) and torch's.
_DTYPES: dict[str, tuple[str | None, str]] = {
    "BOOL": ("bool", "bool"),
    "U8": ("uint8", "uint8"),
    "I8": ("int8", "int8"),
    "U16": ("uint16", "uint16"),
    "I16": ("int16", "int16"),
    "U32": ("uint32", "uint32"),
    "I32": ("int32", "int32"),
    "U64": ("uint64", "uint64"),
    "I64": ("int64", "int64"),
    "F16": ("float16", "float16"),
    "BF16": (None, "bfloat16"),
    "F32": ("float32", "float32"),
    "F64": ("float64", "float64"),
    "C64": ("complex64", "complex64"),
    "F8_E4M3": (None, "float8_e4m3fn"),
    "F8_E5M2": (None, "float8_e5m2"),
}
_FROM_NUMPY = {numpy: code for code, (numpy, _) in _DTYPES.items() if numpy is not None}
_FROM_TORCH = {f"torch.{torch}": code for code, (_, torch) in _DTYPES.items()}

_ACCEPTED = (
    "accepted are None, bool, int, finite float, str, bytes, NumPy arrays, torch tensors, "
    "and dicts (with string keys), lists and tuples of these"
)
# What to pass instead, by the name of the type's module or of the type.
_HINTS = {
    "set": "; pass a list",
    "frozenset": "; pass a list",
    "datetime": "; pass its .isoformat()",
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


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A part of a value that is not JSON."""

    path: tuple[str | int, ...]
    kind: Literal["bytes", "array", "tensor"]
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    data: bytes  # row-major, little endian


# ------------------------------------------------------------------ encode


def encode(value: object) -> bytes:
    """Return the bytes that are stored for this value.

    Raises:
        InvalidInput: it holds something that cannot be stored; the message says where, what, and what is accepted.
    """
    try:
        data = orjson.dumps(value, None, _OPTIONS)
    except TypeError:
        return _encode_any(value)
    # orjson writes NaN and Infinity as null, without a word. Few values hold a null, so looking for one is cheap.
    if b"null" in data and not _is_finite(value):
        return _encode_any(value)
    return data


def encode_many(values: Sequence[object]) -> list[bytes]:
    """Return `encode` of each: the bulk path, with next to no work in Python for values that are plain JSON.

    Raises:
        InvalidInput: as `encode`; the message says which value by its index.
    """
    dumps, options = orjson.dumps, _OPTIONS
    try:
        encoded = [dumps(value, None, options) for value in values]
    except TypeError:
        pass
    else:
        if not any(b"null" in data for data in encoded) or _is_finite(values):
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


def _encode_any(value: object) -> bytes:
    """Every kind, walked in Python: also what orjson refuses, such as large ints and NumPy scalars."""
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        return bytes((_tag_of_bytes(data),)) + data
    leaves: list[_Leaf] = []
    plain = _plain(value, (), leaves)
    if not leaves:
        return _dump(plain)
    if not leaves[0].path:
        tag = bytes((ARRAY if leaves[0].kind == "array" else TENSOR,))
        return b"".join((tag, *_safetensors(leaves)))
    skeleton = _dump({"value": plain, "at": [[leaf.path, leaf.kind] for leaf in leaves]})
    return b"".join((bytes((CONTAINER,)), _LENGTH.pack(len(skeleton)), skeleton, *_safetensors(leaves)))


def _tag_of_bytes(data: bytes) -> int:
    for signature, tag in _SIGNATURES:
        if data.startswith(signature):
            return tag
    return BYTES


def _is_finite(value: object) -> bool:
    """Whether no float in a value that orjson has accepted is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, Enum) or _is_finite(value.value)


def _plain(value: object, path: tuple[str | int, ...], leaves: list[_Leaf]) -> object:
    """Return the value as plain JSON types, with None in the place of each leaf, which goes to `leaves`."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, Enum):
        return _plain(value.value, path, leaves)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            _refuse(path, "NaN and Infinity are not JSON; pass None, or an array that holds them")
        return float(value)
    if isinstance(value, dict | list | tuple):
        if len(path) >= MAX_DEPTH:
            _refuse(path, f"it is nested more than {MAX_DEPTH} deep, or holds itself")
        if not isinstance(value, dict):
            return [_plain(item, (*path, index), leaves) for index, item in enumerate(value)]
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                _refuse(path, f"a dict has a key of type {type(key).__name__}; keys must be strings")
            name = str.__str__(key.value if isinstance(key, Enum) else key)
            plain[name] = _plain(item, (*path, name), leaves)
        return plain
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        leaves.append(_Leaf(path, "bytes", "U8", (len(data),), data))
        return None
    if isinstance(value, uuid.UUID):
        return str(value)
    # Who has no numpy or torch loaded can't hold an array or tensor. Half-loaded modules miss attributes: hence getattr.
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if torch is not None and isinstance(value, getattr(torch, "Tensor", ())):
        leaves.append(_tensor_leaf(value, path, torch))
        return None
    if numpy is not None and isinstance(value, getattr(numpy, "ndarray", ())):
        leaves.append(_array_leaf(value, path, numpy))
        return None
    if numpy is not None and isinstance(value, getattr(numpy, "generic", ())):
        number: object = value.item()  # type: ignore[attr-defined]
        if value.dtype.kind in "biuf" and isinstance(number, bool | int | float):  # type: ignore[attr-defined]
            return _plain(number, path, leaves)
    kind = type(value)
    module = kind.__module__.partition(".")[0]
    hint = _HINTS.get(kind.__name__) or _HINTS.get(module, "")
    if hasattr(kind, "__dataclass_fields__"):
        hint = "; pass dataclasses.asdict(x)"
    name = kind.__name__ if module == "builtins" else f"{module}.{kind.__name__}"
    _refuse(path, f"a value of type {name} cannot be stored{hint}; {_ACCEPTED}")


def _array_leaf(array: Any, path: tuple[str | int, ...], numpy: Any) -> _Leaf:
    masked = sys.modules.get("numpy.ma")
    if masked is not None and isinstance(array, masked.MaskedArray):
        _refuse(path, "a masked array would lose its mask; pass .filled(..), or data and mask apart")
    dtype = _FROM_NUMPY.get(array.dtype.name)
    if dtype is None:
        _refuse(path, f"arrays of dtype {array.dtype} cannot be stored; {_dtypes(_FROM_NUMPY)}")
    plain = numpy.asarray(array, dtype=array.dtype.newbyteorder("<"))
    return _Leaf(path, "array", dtype, tuple(array.shape), plain.tobytes())


def _tensor_leaf(tensor: Any, path: tuple[str | int, ...], torch: Any) -> _Leaf:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        what = "meta" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        _refuse(path, f"a {what} tensor cannot be stored; pass a dense one, such as .to_dense()")
    dtype = _FROM_TORCH.get(str(tensor.dtype))
    if dtype is None:
        _refuse(path, f"tensors of dtype {tensor.dtype} cannot be stored; {_dtypes(_FROM_TORCH)}")
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return _Leaf(path, "tensor", dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def _dtypes(names: dict[str, str]) -> str:
    return f"accepted are {', '.join(names)}".replace("torch.", "")


def _safetensors(leaves: Sequence[_Leaf]) -> list[bytes]:
    """Return the parts of a safetensors file.

    Written here because the library's writers take all NumPy or all torch, need the one they take, and cost a torch
    tensor 45 µs; the format is a length, a JSON header and the data. Reading, where bytes may be bad, is the library's.
    """
    header: dict[str, object] = {}
    end = 0
    for index, leaf in enumerate(leaves):
        start, end = end, end + len(leaf.data)
        header[str(index)] = {"dtype": leaf.dtype, "shape": leaf.shape, "data_offsets": (start, end)}
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return [_LENGTH.pack(len(text)), text, *(leaf.data for leaf in leaves)]


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


def _refuse(path: tuple[str | int, ...], why: str) -> NoReturn:
    where = "".join(f"[{part!r}]" for part in path[:8]) + ("[…]" if len(path) > 8 else "")
    raise InvalidInput(f"at value{where}: {why}" if path else why)


# ------------------------------------------------------------------ decode


def decode(data: Stored, *, tensors: Tensors | None = None) -> Any:
    """Return the value behind stored bytes.

    Arguments:
        tensors: as what arrays and tensors come back: all as "numpy" arrays, all as "torch" tensors (on the CPU), or,
            by default, each as what it was; a tensor where torch cannot be imported as a NumPy array. Both are new,
            writable, and theirs alone.

    A reference comes back as `Reference`; `artifacts.load_large` gets what is behind it.

    Raises:
        Corrupt: the bytes are not what `encode` writes.
        RelayError: the library for an array or tensor is missing, or has no such dtype.
    """
    if data and data[0] >= _SPACE:
        try:
            return orjson.loads(data) if data[-1] != _SPACE else _load_wide(data)
        except ValueError as error:
            raise Corrupt(f"a stored value is not JSON: {error}") from None
    data = bytes(data)
    tag = data[0] if data else 0
    if tag in (BYTES, PNG, JPEG):
        return data[1:]
    if tag in (ARRAY, TENSOR):
        parts = _parts(data, 1)
        if len(parts) != 1 or "0" not in parts:
            raise Corrupt("a stored array is not one safetensors tensor")
        return _build("array" if tag == ARRAY else "tensor", *parts["0"], tensors)
    if tag == CONTAINER:
        value, places, parts = _container(data)
        for path, kind, name in places:
            _put(value, path, _build(kind, *parts[name], tensors))
        return value
    if tag == REFERENCE:
        return _reference(data)
    raise Corrupt(f"a stored value has the unknown tag {tag}" if data else "a stored value is empty")


def media_type(data: Stored) -> str:
    """Return the media type of a stored value, such as `application/json` or `image/png`; of what a reference is to.

    Raises:
        Corrupt: the bytes are not what `encode` writes (only the first is looked at, and a reference whole).
    """
    tag = data[0] if data else 0
    if tag >= _SPACE:
        return "application/json"
    if tag == REFERENCE:
        return _reference(bytes(data)).media_type
    if tag not in _TAGS:
        raise Corrupt(f"a stored value has the unknown tag {tag}" if data else "a stored value is empty")
    return _MEDIA_TYPES[tag]


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
    if not data or data[0] != CONTAINER:
        return hashlib.sha256(data).digest()
    value, places, parts = _container(data)
    total = hashlib.sha256(bytes((CONTAINER,)) + _dump(value, sort=True))
    for path, kind, name in sorted(places, key=lambda place: orjson.dumps(place[0])):
        dtype, shape, raw = parts[name]
        total.update(orjson.dumps([path, kind, dtype, shape]))
        total.update(raw)
    return total.digest()


def _load_wide(data: Stored) -> Any:
    """JSON with ints beyond 64 bits. Raises ValueError."""
    try:
        return json.loads(bytes(data).decode(), parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parts(data: bytes, start: int) -> dict[str, tuple[str, list[int], bytearray]]:
    """The tensors of the safetensors file that begins at `start`: dtype, shape and data by name."""
    try:
        parts = safetensors.deserialize(data[start:])
        return {name: (part["dtype"], part["shape"], part["data"]) for name, part in parts}
    except Exception as error:
        raise Corrupt(f"a stored array is damaged: {error}") from None


def _container(
    data: bytes,
) -> tuple[Any, list[tuple[list[str | int], str, str]], dict[str, tuple[str, list[int], bytearray]]]:
    """Skeleton, places of its leaves (path, kind, tensor's name) and tensors of a container."""
    try:
        begin = 1 + _LENGTH.size
        end = begin + _LENGTH.unpack(data[1:begin])[0]
        skeleton = decode(data[begin:end])
        value = skeleton["value"]
        places = [(list(path), str(kind), str(index)) for index, (path, kind) in enumerate(skeleton["at"])]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, struct.error):
        raise Corrupt("the skeleton of a stored container is damaged") from None
    parts = _parts(data, end)
    if len(parts) != len(places) or any(name not in parts for _, _, name in places):
        raise Corrupt("a stored container has lost some of its arrays")
    return value, places, parts


def _put(value: Any, path: list[str | int], leaf: object) -> None:
    try:
        for part in path[:-1]:
            value = value[part]
        if value[path[-1]] is not None:
            raise KeyError
        value[path[-1]] = leaf
    except (KeyError, IndexError, TypeError):
        raise Corrupt("the skeleton of a stored container has no place for one of its arrays") from None


def _reference(data: bytes) -> Reference:
    try:
        reference = Reference(**orjson.loads(data[1:]))
        texts = (reference.uri, reference.sha256, reference.media_type)
        if all(isinstance(text, str) for text in texts) and type(reference.size) is int:
            return reference
    except (TypeError, ValueError):
        pass
    raise Corrupt("a stored reference to an artifact is damaged")


def _build(kind: str, dtype: str, shape: list[int], raw: bytearray, tensors: Tensors | None) -> Any:
    """The bytes, array or tensor of one safetensors entry."""
    in_numpy, in_torch = _DTYPES.get(dtype, (None, None))
    if in_torch is None or kind not in ("bytes", "array", "tensor") or (kind == "array" and in_numpy is None):
        raise Corrupt(f"a stored {kind} has dtype {dtype}, which no {kind} has; a newer release may have written it")
    if kind == "bytes":
        if dtype != "U8" or len(shape) != 1:
            raise Corrupt("stored bytes are damaged")
        return bytes(raw)
    wanted = tensors or ("numpy" if kind == "array" else "torch")
    torch = _library("torch") if wanted == "torch" else None
    numpy = _library("numpy") if torch is None and in_numpy is not None and tensors != "torch" else None
    try:
        if torch is not None:
            native = getattr(torch, in_torch, None)
            if native is None:
                raise RelayError(
                    f"this torch has no dtype {in_torch}, which a stored tensor has; install a newer torch"
                )
            # An empty buffer is refused by frombuffer.
            flat = torch.frombuffer(raw, dtype=native) if raw else torch.empty(0, dtype=native)
            return flat.reshape(shape)
        if numpy is not None:
            return numpy.frombuffer(raw, dtype=numpy.dtype(in_numpy).newbyteorder("<")).reshape(shape)
    except (ValueError, OverflowError, TypeError, RuntimeError) as error:
        raise Corrupt(f"a stored {kind} is damaged: {error}") from None
    if in_numpy is None:
        raise RelayError(
            f"this value holds a torch tensor of {in_torch}, a dtype that NumPy does not have; "
            "read it where torch is installed, as a tensor"
        )
    missing = "torch" if tensors == "torch" else "numpy"
    how = "install torch" if missing == "torch" else "pip install 'torchrelay[arrays]'"
    raise RelayError(f"this value holds an array, and {missing} is not installed here; {how} to read it")


@functools.cache
def _library(name: str) -> Any:
    """The module, or None where it is not installed. By its name, so that nothing here depends on it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
