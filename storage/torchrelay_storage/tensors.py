"""NumPy arrays, torch tensors and bytes as the entries of a safetensors file, and back. Not what they are part of: see
`values`.

Neither library is imported before a value needs it, and torch never by its name: this runs where both are missing.
"""

from __future__ import annotations

import functools
import importlib
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import safetensors

from torchrelay_storage.errors import Corrupt, InvalidInput, RelayError

Kind = Literal["bytes", "array", "tensor"]
Tensors = Literal["numpy", "torch"]

# safetensors' name of each dtype -> NumPy's (None: NumPy has none) and torch's.
DTYPES: dict[str, tuple[str | None, str]] = {
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
    "C64": ("complex64", "complex64"),  # read by safetensors 0.7 and newer
    "F8_E4M3": (None, "float8_e4m3fn"),
    "F8_E5M2": (None, "float8_e5m2"),
}
_FROM_NUMPY = {numpy: code for code, (numpy, _) in DTYPES.items() if numpy is not None}
_FROM_TORCH = {f"torch.{torch}": code for code, (_, torch) in DTYPES.items()}

_LENGTH = struct.Struct("<Q")
_deserialize: Any = safetensors.deserialize


@dataclass(frozen=True, slots=True)
class Leaf:
    """A part of a value that is not JSON: bytes, or one array or tensor.

    Attributes:
        kind: what it was.
        dtype: safetensors' name of its dtype, such as "F32"; "U8" for bytes.
        shape: () for a scalar.
        data: the elements, row-major, little endian.
    """

    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray


def leaf_of(value: Any) -> Leaf | None:
    """Return the value as a leaf, or None where it is no bytes, array or tensor.

    Raises:
        InvalidInput: it is one of a dtype or layout that cannot be stored.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        return Leaf("bytes", "U8", (len(data),), data)
    # Who has not loaded numpy or torch can't hold an array or tensor. A module that is still loading misses attributes.
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, getattr(torch, "Tensor", ())):
        return _tensor_leaf(value, torch)
    if numpy is not None and isinstance(value, getattr(numpy, "ndarray", ())):
        return _array_leaf(value, numpy)
    return None


def number_of(value: Any) -> bool | int | float | None:
    """Return a NumPy scalar as the Python number that it is, or None where it is no number, or one too wide."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, getattr(numpy, "generic", ())):
        return None
    scalar: Any = value
    if scalar.dtype.kind not in "biuf":
        return None
    number = scalar.item()
    return number if isinstance(number, bool | int | float) else None


def _array_leaf(array: Any, numpy: Any) -> Leaf:
    masked = sys.modules.get("numpy.ma")
    if masked is not None and isinstance(array, masked.MaskedArray):
        raise InvalidInput("a masked array would lose its mask; pass .filled(..), or its data and mask apart")
    dtype = _FROM_NUMPY.get(array.dtype.name)
    if dtype is None:
        raise InvalidInput(f"arrays of dtype {array.dtype} cannot be stored; {_accepted(_FROM_NUMPY)}")
    little = numpy.asarray(array, dtype=array.dtype.newbyteorder("<"))
    return Leaf("array", dtype, tuple(array.shape), little.tobytes())


def _tensor_leaf(tensor: Any, torch: Any) -> Leaf:
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        what = "meta" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        raise InvalidInput(f"a {what} tensor cannot be stored; pass a dense one, such as .to_dense() gives")
    dtype = _FROM_TORCH.get(str(tensor.dtype))
    if dtype is None:
        raise InvalidInput(f"tensors of dtype {tensor.dtype} cannot be stored; {_accepted(_FROM_TORCH)}")
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return Leaf("tensor", dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def _accepted(names: dict[str, str]) -> str:
    return f"accepted are {', '.join(names)}".replace("torch.", "")


def write(leaves: Sequence[Leaf]) -> list[bytes | bytearray]:
    """Return the parts of a safetensors file whose entries are named "0", "1", ..

    Written here because the library's writers take all NumPy or all torch, need the one that they take, and cost a
    torch tensor 45 µs; the format is a length, a JSON header and the data. Reading, where bytes may be bad, is left to
    the library.
    """
    header: dict[str, object] = {}
    end = 0
    for index, leaf in enumerate(leaves):
        start, end = end, end + len(leaf.data)
        header[str(index)] = {"dtype": leaf.dtype, "shape": leaf.shape, "data_offsets": (start, end)}
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return [_LENGTH.pack(len(text)), text, *(leaf.data for leaf in leaves)]


def read(data: bytes, kinds: Sequence[str]) -> list[Leaf]:
    """Return the entries of a safetensors file that `write` wrote, each as a leaf of the kind at its place.

    Raises:
        Corrupt: it is no such file, has other entries, or one that its kind cannot have.
    """
    try:
        entries = dict(_deserialize(data))
        leaves = []
        for index, kind in enumerate(kinds):
            entry = entries.pop(str(index))
            leaves.append(_checked(kind, entry["dtype"], entry["shape"], entry["data"]))
    except Corrupt:
        raise
    except Exception as error:  # the library's own error is not the only one that bad bytes bring about
        raise Corrupt(f"a stored array is damaged: {error}") from None
    if entries:
        raise Corrupt("a stored value holds more arrays than it names")
    return leaves


def _checked(kind: str, dtype: str, shape: list[int], data: bytearray) -> Leaf:
    in_numpy, in_torch = DTYPES.get(dtype, (None, None))
    if kind == "bytes" and dtype == "U8" and len(shape) == 1:
        return Leaf("bytes", dtype, tuple(shape), data)
    if kind == "array" and in_numpy is not None:
        return Leaf("array", dtype, tuple(shape), data)
    if kind == "tensor" and in_torch is not None:
        return Leaf("tensor", dtype, tuple(shape), data)
    raise Corrupt(f"a stored value has a part of kind {kind} and dtype {dtype}; a newer release may have written it")


def build(leaf: Leaf, tensors: Tensors | None) -> Any:
    """Return the bytes, array or tensor that a leaf from `read` stands for; `tensors` as in `values.decode`.

    Raises:
        RelayError: the library it needs is not installed, or has no such dtype.
        Corrupt: its shape is impossible.
    """
    if leaf.kind == "bytes":
        return bytes(leaf.data)
    in_numpy, in_torch = DTYPES[leaf.dtype]
    wanted = tensors or ("numpy" if leaf.kind == "array" else "torch")
    try:
        if wanted == "torch" and (torch := library("torch")) is not None:
            dtype = getattr(torch, in_torch)
            # frombuffer refuses an empty buffer.
            flat = torch.frombuffer(leaf.data, dtype=dtype) if leaf.data else torch.empty(0, dtype=dtype)
            return flat.reshape(leaf.shape)
        if in_numpy is not None and tensors != "torch" and (numpy := library("numpy")) is not None:
            return numpy.frombuffer(leaf.data, dtype=numpy.dtype(in_numpy).newbyteorder("<")).reshape(leaf.shape)
    except (ValueError, OverflowError, TypeError, RuntimeError) as error:
        raise Corrupt(f"a stored {leaf.kind} is damaged: {error}") from None
    if in_numpy is None:
        raise RelayError(
            f"this value holds a torch tensor of {in_torch}, a dtype that NumPy does not have; "
            "read it where torch is installed, as a tensor"
        )
    if tensors == "torch":
        raise RelayError("torch is not installed here; install it, or read the value with tensors='numpy'")
    raise RelayError("this value holds an array, and numpy is not installed here; pip install 'torchrelay[arrays]'")


@functools.cache
def library(name: str) -> Any:
    """Return the module, or None where it is not installed. By its name, so that nothing here depends on it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
