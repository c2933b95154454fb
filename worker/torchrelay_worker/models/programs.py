"""Reads torch.export programs (.pt2) without running what a stranger may have put into one.

`torch.export.load` unpickles parts of the archive, evaluates expressions as Python, calls any function below `torch` or
`operator` that the graph names, and loads native libraries that lie in the archive. A program that comes from
`torch.export.save` needs none of it, so an archive that asks for it is refused before it is loaded.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch

from torchrelay_storage.errors import Corrupt

_MEMBERS = re.compile(
    r"models/model\.json|data/(weights|constants)/\w+(\.json)?|data/sample_inputs/model\.pt|extra/.*"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment"
)
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")  # not custom_obj_, opaque_obj_: objects that were pickled

# What a graph may call. `torch.ops.load_library`, `torch.os.system` and `operator.call` are what it may not.
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|prim|quantized|quantized_decomposed|torchvision)"
    r"\.((?!__)\w+|__i?(and|or|xor|[lr]shift)__)\.(?!__)\w+"
    r"|torch\.ops\.higher_order\.(?!_)\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_|xor|index)"
    r"|math\.[a-z]\w*|torch\.(sym_\w+|_sym_\w+)"
)
# A size is arithmetic on sizes with functions of sympy, whose names begin with a capital. What is not: other calls,
# attributes, dunder names, quotes but around a symbol's name.
_SYMBOL = re.compile(r"'\w+'")
_NO_SIZE = re.compile(r"__|[^\w\s+\-*/%(),<>=!&|~.]|\.(?!\d)|\)\s*\(|\b(?!floor\b|ceiling\b)[a-z_]\w*\s*\(")
_TREES = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})

_alone = threading.Lock()


def load_program(path: Path) -> torch.nn.Module:
    """Return the module of a torch.export program, on the CPU.

    Raises:
        Corrupt: the file is no such program, or asks for more than PyTorch's operators on tensors.
    """
    try:
        _check(path)
        with _alone, _weights_only():
            return torch.export.load(str(path)).module()
    except Corrupt:
        raise
    except Exception as error:
        raise Corrupt(f"{path.name} cannot be read as a torch.export program: {error}") from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """Have torch.load refuse pickled code even where torch.export asks it not to."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check(path: Path) -> None:
    from torch.export.pt2_archive import PT2ArchiveReader  # seconds, which a start without a program need not pay

    with PT2ArchiveReader(str(path)) as archive:  # torch's own reader: another one might see other members
        names = archive.get_file_names()
        strange = next((name for name in names if not _MEMBERS.fullmatch(name)), None)
        if strange is not None or len(set(names)) != len(names):
            raise Corrupt(f"{path.name} holds {strange or 'a member twice'}, which no plain torch.export program has")
        for name in _CONFIGS:
            for payload in orjson.loads(archive.read_bytes(name))["config"].values():
                if not _PAYLOAD.fullmatch(payload["path_name"]):
                    raise Corrupt(f"{path.name} holds the pickled object {payload['path_name']}; only tensors are read")
        for part in _dicts(orjson.loads(archive.read_bytes("models/model.json"))):
            _check_part(path, part)


def _check_part(path: Path, part: dict[str, Any]) -> None:
    target, expression = part.get("target"), part.get("expr_str")
    if "inputs" in part and target is not None and not _TARGET.fullmatch(str(target)):
        raise Corrupt(f"{path.name} calls {target}, which is no operator on tensors; export it without")
    if expression is not None and _NO_SIZE.search(_SYMBOL.sub("0", str(expression))):
        raise Corrupt(f"{path.name} holds a size that is no arithmetic: {str(expression)[:80]!r}")
    for name in ("in_spec", "out_spec"):
        for node in _dicts(orjson.loads(part[name])) if isinstance(part.get(name), str) and part[name] else ():
            if "type" in node and node["type"] not in _TREES:
                raise Corrupt(f"{path.name} takes or returns a {node['type']}; export it with tuples, lists or dicts")


def _dicts(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from _dicts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _dicts(value)
