"""Programs are read, and nothing that was hidden in one runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

from torchrelay_storage.errors import Corrupt
from torchrelay_worker.models.programs import load_program

Member = Callable[[str, bytes], bytes]


class Net(torch.nn.Module):
    """Arithmetic on sizes, a constant, a dict as output: what ordinary programs have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.layer(x).reshape(x.shape[0] * 2) * 2
        return {"out": y.reshape(x.shape[0], -1) * self.scale + torch.tensor([0.5, 1.5]), "pairs": y[: x.shape[0]]}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    dynamic = {"x": {0: Dim("n", min=1, max=64)}}
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(3, 2),), dynamic_shapes=dynamic), str(path))
    return path


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def forged(program: Path, change: Member, more: dict[str, bytes] | None = None) -> Path:
    """A copy of the program, each member changed, with further members."""
    path = program.with_name("forged.pt2")
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in (more or {}).items():
            new.writestr(f"net/{name}", data)
    return path


def of_json(end: str, change: Callable[[Any], None]) -> Member:
    def member(name: str, data: bytes) -> bytes:
        if not name.endswith(end):
            return data
        tree = json.loads(data)
        change(tree)
        return json.dumps(tree).encode()

    return member


def test_a_program_is_read_and_runs_with_any_batch_size(program: Path) -> None:
    module = load_program(program)
    x = torch.ones(5, 2)
    assert module(x)["out"].shape == (5, 2)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("place", ["sample_inputs", "weight", "constant"])
def test_pickled_code_does_not_run(program: Path, place: str, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Evil(trace), buffer)

    def change(name: str, data: bytes) -> bytes:
        if place == "sample_inputs":
            return buffer.getvalue() if "sample_inputs" in name else data
        if name.endswith(f"model_{place}s_config.json"):
            config = json.loads(data)
            for payload in config["config"].values():
                payload["use_pickle"] = True
            return json.dumps(config).encode()
        return buffer.getvalue() if f"/{place}s/" in name and not name.endswith(".json") else data

    path = forged(program, change)
    with contextlib.suppress(Exception):
        torch.export.load(str(path))
    assert trace.exists(), "torch itself runs it, so that this test would see it"
    trace.unlink()
    with pytest.raises(Corrupt):
        load_program(path)
    assert not trace.exists()


def test_pickled_objects_are_refused(program: Path) -> None:
    def rename(config: Any) -> None:
        next(iter(config["config"].values()))["path_name"] = "opaque_obj_0"

    with pytest.raises(Corrupt, match="pickled object opaque_obj_0"):
        load_program(forged(program, of_json("model_constants_config.json", rename)))


@pytest.mark.parametrize("target", ["torch.os.system", "torch.ops.load_library", "_operator.call",
                                    "torch.ops.aten.__class__.mro", "torch.ops.aten.add.__init__"])  # fmt: skip
def test_a_graph_calls_nothing_but_operators(program: Path, target: str) -> None:
    def call(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = target

    with pytest.raises(Corrupt, match="no operator"):
        load_program(forged(program, of_json("models/model.json", call)))


@pytest.mark.parametrize("expression", ["__import__('os').system('true')", "exec('x')", "exec ('x')", "a.b", "x['y']"])
def test_sizes_are_arithmetic(program: Path, expression: str) -> None:
    def size(model: Any) -> None:
        def put(tree: Any) -> None:
            for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
                put(value)
            if isinstance(tree, dict) and "expr_str" in tree:
                tree["expr_str"] = expression

        put(model)

    with pytest.raises(Corrupt, match="no arithmetic"):
        load_program(forged(program, of_json("models/model.json", size)))


def test_native_libraries_are_refused(program: Path) -> None:
    with pytest.raises(Corrupt, match="aotinductor"):
        load_program(forged(program, lambda name, data: data, {"data/aotinductor/model/x.so": b"\x7fELF"}))
