"""The codec: what goes in comes out, in value, type, shape and dtype; and bad bytes are Corrupt, never a crash."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import subprocess
import sys
import uuid
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchrelay_storage import tensors, values
from torchrelay_storage.errors import Corrupt, InvalidInput, RelayError
from torchrelay_storage.values import decode, digest, encode, encode_many, media_type

quick = settings(max_examples=60, deadline=None)

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060"
                    "000000050001a5f645400000000049454e44ae426082")  # fmt: skip
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.sampled_from(["null", "", " ", "\x00", "\u2028"])
)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))


numpy_dtypes = [np.dtype(name) for name, _ in tensors.DTYPES.values() if name is not None]
torch_dtypes = [getattr(torch, name) for _, name in tensors.DTYPES.values()]
shapes: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (3, 0, 2), (2, 3, 4), (1, 1, 1, 1)]


@st.composite
def any_array(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype = draw(st.sampled_from(numpy_dtypes))
    array = draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
    return draw(st.sampled_from([array, array.T, array[..., ::-1] if array.ndim else array]))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits, NaN and denormals too; 0 or 1 for bool."""
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def same(a: Any, b: Any) -> bool:
    """Equal in value and type, all the way down; NaNs bit by bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return bool(a == b)


# ------------------------------------------------------------------ JSON


@quick
@given(nested(scalars))
def test_json_comes_back_and_is_stored_as_its_own_text(value: Any) -> None:
    data = encode(value)
    assert data[0] > 0x20
    assert same(decode(data), value)
    assert same(json.loads(data), value)  # so any reader of JSON understands the row
    assert media_type(data) == "application/json"


@quick
@given(st.lists(nested(scalars | st.binary(max_size=5)), max_size=6))
def test_many_are_encoded_as_each_is(several: list[Any]) -> None:
    assert encode_many(several) == [encode(value) for value in several]
    assert encode_many(tuple(several)) == encode_many(several)


@pytest.mark.parametrize("wide", [2**64, -(2**63) - 1, [10**400], {"a": [1, 2**64 + 1, {"b": None}]}])
def test_ints_beyond_64_bits_are_exact(wide: Any) -> None:
    assert same(decode(encode(wide)), wide)
    assert same(decode(memoryview(encode(wide))), wide)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float64("nan"), np.float32("inf")])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [None, x], lambda x: {"a": [1.5, {"b": (x,)}]}])
def test_nan_and_infinity_are_refused(bad: float, wrap: Callable[[float], Any]) -> None:
    with pytest.raises(InvalidInput, match="NaN and Infinity"):
        encode(wrap(bad))
    with pytest.raises(InvalidInput, match=r"value 1 of 2: .*NaN and Infinity"):
        encode_many([None, wrap(bad)])


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


Point = namedtuple("Point", "x y")
ID = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ((1, (2,)), [1, [2]]),
        (Point(1, 2), [1, 2]),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (Counter("aab"), {"a": 2, "b": 1}),
        ({Color.RED: Level.HIGH}, {"red": 3}),
        ([Color.RED, Level.HIGH], ["red", 3]),
        (ID, str(ID)),
        ([ID, b"x"], [str(ID), b"x"]),
        (np.float32(1.5), 1.5),
        (np.float64(0.1), 0.1),
        (np.int8(-3), -3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.bytes_(b"x"), b"x"),
        ({"a": [np.float16(0.5)]}, {"a": [0.5]}),
    ],
)
def test_what_is_nearly_json_is_read_as_json(value: Any, read: Any) -> None:
    assert same(decode(encode(value)), read)


@dataclasses.dataclass
class Settings:
    x: int = 1


LOOP: list[Any] = []
LOOP.append(LOOP)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({1, 2}, "type set cannot be stored; pass a list"),
        (Settings(), "pass dataclasses.asdict"),
        (datetime.datetime(2026, 1, 1), "pass its .isoformat"),
        (datetime.date(2026, 1, 1), "pass its .isoformat"),
        (datetime.timedelta(1), "pass its .total_seconds"),
        (range(3), "type range"),
        (object(), "accepted are None, bool"),
        (Settings, "type type"),
        (1j, "type complex"),
        ({1: "a"}, "key of type int"),
        ({None: "a"}, "key of type NoneType"),
        ("\ud800", "lone surrogate"),
        ([10**5000], "cannot be written as JSON"),
        (LOOP, "nested more than 250 deep, or holds itself"),
        (deep(260), "nested more than 250 deep"),
        (np.array([None]), "dtype object"),
        (np.array(["a"]), "dtype <U1"),
        (np.array(["2026"], "M8[Y]"), r"dtype datetime64\[Y\]"),
        (np.zeros(2, np.complex128), "dtype complex128"),
        (np.zeros(2, np.longdouble), "dtype float128|dtype longdouble"),
        (np.zeros(2, "i4,f4"), "dtype"),
        (np.longdouble(1), "type numpy"),
        (np.timedelta64(1, "ns"), "type numpy"),
        (np.ma.masked_array([1, 2], [0, 1]), "masked"),
        (torch.zeros(2, dtype=torch.complex128), "dtype torch.complex128"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_what_to_do(value: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        encode(value)
    with pytest.raises(InvalidInput, match="value 0 of 1"):
        encode_many([value])


def test_a_refusal_says_where() -> None:
    with pytest.raises(InvalidInput, match=r"at value\['rows'\]\[2\]\['when'\]: a value of type set"):
        encode({"rows": [1, b"", {"when": set()}]})
    with pytest.raises(InvalidInput, match=r"at value\['x'\]: arrays of dtype complex128"):
        encode({"x": np.zeros(1, complex)})


# ------------------------------------------------------------------ bytes and pictures


@quick
@given(st.binary())
def test_bytes_come_back(value: bytes) -> None:
    for given_as in (value, bytearray(value), memoryview(value)):
        assert same(decode(encode(given_as)), value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (PNG, "image/png"),
        (JPEG, "image/jpeg"),
        (PNG[:7], "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_pictures_are_known_by_their_signature(value: bytes, kind: str) -> None:
    assert media_type(encode(value)) == kind
    assert decode(encode(value)) == value


# ------------------------------------------------------------------ arrays and tensors


@quick
@given(any_array())
def test_arrays_come_back(array: np.ndarray[Any, Any]) -> None:
    data = encode(array)
    back = decode(data)
    assert same(back, np.ascontiguousarray(array).reshape(array.shape))
    assert back.flags.writeable
    assert data[0] == values.ARRAY
    if array.nbytes:
        # What stands behind the tag is a file that safetensors itself reads.
        assert same(safetensors.numpy.load(data[1:])["0"], back)


@pytest.mark.parametrize("dtype", numpy_dtypes, ids=str)
@pytest.mark.parametrize("shape", shapes, ids=str)
def test_every_dtype_and_byte_order_of_arrays(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    array = (np.arange(math.prod(shape)) % 2).astype(dtype).reshape(shape)
    assert same(decode(encode(array)), array)
    assert same(decode(encode(array.astype(dtype.newbyteorder(">")))), array)
    as_tensor = decode(encode(array), tensors="torch")
    assert isinstance(as_tensor, torch.Tensor)
    assert same(decode(encode(as_tensor), tensors="numpy"), array)


@pytest.mark.parametrize("dtype", torch_dtypes, ids=str)
@pytest.mark.parametrize("shape", shapes, ids=str)
def test_every_dtype_of_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(dtype, shape)
    data = encode(tensor)
    back = decode(data)
    assert same(back, tensor)
    assert data[0] == values.TENSOR
    assert media_type(data) == "application/x-safetensors"
    if tensor.numel():
        assert same(safetensors.torch.load(data[1:])["0"], tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(12)[::3],
        torch.zeros(1).expand(5),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        torch.nn.Parameter(torch.ones(2, 2)),
        torch.ones(2, requires_grad=True) * 2,
    ],
)
def test_views_and_gradients(tensor: torch.Tensor) -> None:
    back = decode(encode(tensor))
    assert type(back) is torch.Tensor
    assert not back.requires_grad
    assert torch.equal(back, tensor.detach())
    back += 1  # it is writable, and nobody else's
    assert torch.equal(decode(encode(tensor)), tensor.detach())


def test_matrices_and_maps_come_back_as_arrays(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "m", np.int32, "w+", shape=(2, 2))
    assert same(decode(encode(mapped)), np.zeros((2, 2), np.int32))
    mapped._mmap.close()  # type: ignore[attr-defined]


# ------------------------------------------------------------------ containers


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    dtype, shape, seed = draw(st.sampled_from(torch_dtypes)), draw(st.sampled_from(shapes)), draw(st.integers(0, 99))
    return random_tensor(dtype, shape, seed)


@quick
@given(nested(scalars | st.binary(max_size=9) | any_array().map(np.ascontiguousarray) | any_tensor()))
def test_containers_come_back(value: Any) -> None:
    data = encode(value)
    assert same(decode(data), value)
    assert digest(data) == digest(encode(decode(data)))


def test_containers_as_numpy_and_as_torch() -> None:
    value = {"a": [np.ones(2, np.float32), {"t": torch.ones(3)}], "raw": PNG, "n": 2**70}
    as_numpy, as_torch = decode(encode(value), tensors="numpy"), decode(encode(value), tensors="torch")
    assert isinstance(as_numpy["a"][1]["t"], np.ndarray)
    assert isinstance(as_torch["a"][0], torch.Tensor)
    assert as_numpy["raw"] == as_torch["raw"] == PNG
    assert as_numpy["n"] == 2**70
    assert media_type(encode(value)) == "application/x-torchrelay-container"


# ------------------------------------------------------------------ digests


@quick
@given(st.dictionaries(texts, scalars | st.binary(max_size=4) | any_array(), max_size=5))
def test_a_digest_does_not_see_the_order_of_keys(value: dict[str, Any]) -> None:
    turned = dict(reversed(value.items()))
    assert digest(encode(value)) == digest(encode(turned))
    assert digest(encode([value])) == digest(encode([turned]))


def test_a_digest_sees_everything_else() -> None:
    array = np.zeros(4, np.float32)
    different = [
        1, 1.0, True, "1", None, [], {}, [1], {"a": 1}, {"b": 1}, 2**64, 2**64 + 1, b"1", b"2", PNG,
        array, array + 1, array.reshape(2, 2), array.astype(np.int32), torch.zeros(4),
        [array], [array, None], [None, array], [array, array], [b"ab", b"c"], [b"a", b"bc"], {"a": array}, {"b": array},
        [torch.zeros(4)], [array.reshape(2, 2)],
    ]  # fmt: skip
    assert len({digest(encode(value)) for value in different}) == len(different)


# ------------------------------------------------------------------ references


def test_a_reference_comes_back() -> None:
    reference = values.Reference("file:///a/b", 70_000, "ab" * 32, "image/png")
    data = values.encode_reference(reference)
    assert decode(data) == values.as_reference(data) == reference
    assert media_type(data) == "image/png"
    assert values.as_reference(encode({"uri": "file:///a/b"})) is None
    with pytest.raises(InvalidInput):
        encode(reference)  # nobody may name an artifact that is not his


# ------------------------------------------------------------------ bad bytes

GOOD = [
    encode(value)
    for value in (
        {"a": [1, None, "x"]},
        2**70,
        PNG,
        np.arange(6, dtype=np.int16).reshape(2, 3),
        torch.ones(3, dtype=torch.bfloat16),
        {"a": [np.ones(2), b"xyz"], "t": torch.zeros(1), "n": 2**70},
    )
] + [values.encode_reference(values.Reference("memory:///x", 1, "00", "image/png"))]


def only_corrupt(data: bytes) -> None:
    for read in (decode, media_type, digest, lambda d: decode(d, tensors="torch")):
        with suppress(Corrupt):
            read(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([b"", *(bytes((tag,)) for tag in range(0x22))]))
def test_any_bytes_are_corrupt_or_a_value(data: bytes, tag: bytes) -> None:
    only_corrupt(tag + data)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(GOOD), st.data())
def test_changed_bytes_are_corrupt_or_a_value(good: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(good) - 1))
    cut = data.draw(st.integers(0, 3))
    only_corrupt(good[:at] + data.draw(st.binary(max_size=3)) + good[at + cut :])


@pytest.mark.parametrize("good", [good for good in GOOD if good[0] not in (values.PNG, values.JPEG, values.BYTES)])
def test_what_is_cut_short_or_goes_on_is_corrupt(good: bytes) -> None:
    number = good[0] in b"123456789"  # a number cut short is another number
    for end in range(len(good)):
        if not number:
            with pytest.raises(Corrupt):
                decode(good[:end])
    with pytest.raises(Corrupt):
        decode(good + b"!")


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\x00",
        b"\x1f{}",
        b"\n1",
        b"{",
        b"NaN",
        b"NaN ",
        b"[Infinity] ",
        b"\xff\xfe ",
        b"[" * 100_000 + b" ",
        b"[" * 100_000,
        b"\x06" + (2).to_bytes(8, "little") + b"[]" + encode(np.ones(1))[1:],
        b"\x06" + (2**63).to_bytes(8, "little") + b"[]",
        b"\x07[]",
        b'\x07{"uri":1,"size":1,"sha256":"","media_type":""}',
        b'\x07{"uri":"","size":true,"sha256":"","media_type":""}',
        b"\x04" + encode(torch.ones(1, dtype=torch.bfloat16))[1:],  # no NumPy array has this dtype
        b"\x04" + encode([np.ones(1), np.ones(1)]).partition(b"]}")[2],  # two where one belongs
    ],
)
def test_malformed(bad: bytes) -> None:
    with pytest.raises(Corrupt):
        decode(bad)


@pytest.mark.parametrize(
    ("value", "at"),
    [
        (None, [[["a"], "array"]]),
        ([1], [[[0], "array"]]),
        ([None], [[[1], "array"]]),
        ([None], [[[], "array"]]),
        ([None], [[[0, 0], "array"]]),
        ([None], [[[0], "pickle"]]),
        ([None], [[[0], "bytes"]]),
        ([None], [[0, "array"]]),
        ([None], [[[{}], "array"]]),
        ([None], []),
        ([None, None], [[[0], "array"], [[1], "array"]]),
        ({"a": None}, [[["b"], "array"]]),
    ],
)
def test_a_container_whose_skeleton_and_arrays_do_not_fit(value: Any, at: Any) -> None:
    skeleton = json.dumps({"value": value, "at": at}).encode()
    data = b"\x06" + len(skeleton).to_bytes(8, "little") + skeleton + encode(np.ones(1))[1:]
    with pytest.raises(Corrupt):
        decode(data)


# ------------------------------------------------------------------ without the libraries


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    found = tensors.library
    monkeypatch.setattr(tensors, "library", lambda name: None if name in missing else found(name))


def test_a_reader_without_torch_gets_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode([torch.ones(2), torch.ones(1, dtype=torch.bfloat16)])
    plain, lost = encode(torch.ones(2)), encode(torch.ones(1, dtype=torch.bfloat16))
    without(monkeypatch, "torch")
    assert same(decode(plain), np.ones(2, np.float32))
    for bad in (lost, data):
        with pytest.raises(RelayError, match="bfloat16, a dtype that NumPy does not have"):
            decode(bad)
    with pytest.raises(RelayError, match="torch is not installed"):
        decode(plain, tensors="torch")


def test_a_reader_without_numpy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    array, tensor, mixed = encode(np.ones(2)), encode(torch.ones(2)), encode([b"x", {"a": b"y"}])
    without(monkeypatch, "numpy")
    assert same(decode(tensor), torch.ones(2))
    assert decode(mixed) == [b"x", {"a": b"y"}]
    for data, how in ((array, None), (tensor, "numpy")):
        with pytest.raises(RelayError, match=r"torchrelay\[arrays\]"):
            decode(data, tensors=how)  # type: ignore[arg-type]
    with pytest.raises(RelayError, match="bfloat16, a dtype that NumPy does not have"):
        decode(encode(torch.ones(1, dtype=torch.bfloat16)), tensors="numpy")


def test_a_library_is_looked_for_by_name() -> None:
    assert tensors.library("torch") is torch
    assert tensors.library("no_such_library_at_all") is None


def test_neither_numpy_nor_torch_is_imported_before_a_value_needs_it() -> None:
    array = encode(np.arange(3, dtype=np.int8)).hex()
    code = f"""
import sys
from torchrelay_storage.values import decode, digest, encode, encode_many, media_type
for value in ({{"a": [1, None, 2**70]}}, b"x", [b"x", {{"b": b"y"}}]):
    assert decode(encode(value)) == value
    digest(encode(value))
encode_many([1, b"x"])
try:
    encode(set())
except Exception as error:
    assert type(error).__name__ == "InvalidInput"
assert not {{"numpy", "torch"}} & set(sys.modules)
assert decode(bytes.fromhex("{array}")).tolist() == [0, 1, 2]
assert "numpy" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
