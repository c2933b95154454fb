"""Which models are loaded: least recently used out, pins, errors that are kept; handlers; weights and their sha256."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from servers import wait_until
from torchrelay_storage.artifacts import Artifacts, file_sha256
from torchrelay_storage.errors import Corrupt, InvalidInput, ModelNotFound, NotFound
from torchrelay_storage.options import Backoff
from torchrelay_worker import Model
from torchrelay_worker.models import weights as weights_module
from torchrelay_worker.models.handlers import Handlers
from torchrelay_worker.models.residency import RETRY_SECONDS, LoadFailed, Residency, limits_of
from torchrelay_worker.models.weights import Weights, WeightsCache
from torchrelay_worker.pipeline.batcher import Limits
from worker_fakes import CPU, Clock, Versions, version


class Quiet(Model):
    """Loads."""

    loads = 0

    def load(self, weights: Weights, device: torch.device) -> None:
        type(self).loads += 1
        assert self.device == device


class Broken(Model):
    """Does not load."""

    tries = 0

    def load(self, weights: Weights, device: torch.device) -> None:
        type(self).tries += 1
        raise KeyError("layer.weight")


class Hungry(Model):
    """Loads once another has made room."""

    tries = 0

    def load(self, weights: Weights, device: torch.device) -> None:
        type(self).tries += 1
        if type(self).tries == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")


class Impatient(Quiet):
    """Says how it is tried again, and wrongly."""

    load_timeout = 7.0
    backoff = Backoff(seconds=-1)


class Found:
    """Handlers by name, without imports."""

    def find(self, name: str) -> type[Model]:
        return {"quiet": Quiet, "broken": Broken, "hungry": Hungry, "impatient": Impatient}[name]


def residency(tmp_path: Path, *versions: Any, clock: Clock | None = None, **options: Any) -> Residency:
    """A residency of these versions on the CPU."""
    found: Any = Found()
    registry: Any = Versions(*versions)
    cache = WeightsCache(Artifacts("memory://"), tmp_path)
    return Residency(registry, found, cache, CPU, clock=clock or Clock(), **options)


def quiet(*numbers: int) -> list[Any]:
    return [version(n, name=f"m{n}", handler="quiet") for n in numbers]


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    clock = Clock()
    it = residency(tmp_path, *quiet(1, 2, 3), clock=clock, max_loaded=2)
    for number in (1, 2, 1):
        clock.now += 1
        it.acquire(number)
        it.release(number)
    assert it.names() == ["m1@1", "m2@1"]
    clock.now += 1
    it.acquire(3)
    assert it.resident() == {1, 3}
    assert it.pin(2) is None
    assert it.limits(1) == Limits(32)
    assert it.limits(2) is None


def test_a_pinned_model_stays_until_it_is_released(tmp_path: Path) -> None:
    it = residency(tmp_path, *quiet(1, 2), max_loaded=1)
    it.acquire(1)
    loaded = threading.Event()
    thread = threading.Thread(target=lambda: (it.acquire(2), loaded.set()))
    thread.start()
    wait_until(lambda: it.is_waited_for, 10, "the wait for room")
    assert not loaded.is_set()
    it.release(1)
    assert loaded.wait(10)
    thread.join(10)
    assert it.resident() == {2}
    assert not it.is_waited_for


def test_no_room_is_an_error_after_a_while(tmp_path: Path) -> None:
    it = residency(tmp_path, *quiet(1, 2), max_loaded=1, room_seconds=0.05)
    it.acquire(1)
    with pytest.raises(LoadFailed, match="no room"):
        it.acquire(2)


def test_out_of_memory_makes_room(tmp_path: Path) -> None:
    Hungry.tries = 0
    it = residency(tmp_path, *quiet(1), version(2, name="h", handler="hungry"))
    it.acquire(1)
    it.release(1)
    it.acquire(2)
    assert it.resident() == {2}
    Hungry.tries = 0
    empty = residency(tmp_path, version(2, name="h", handler="hungry"))
    with pytest.raises(LoadFailed, match="memory is full"):
        empty.acquire(2)


def test_errors_are_kept_and_tried_again_later(tmp_path: Path) -> None:
    clock = Clock()
    Broken.tries = 0
    it = residency(tmp_path, version(1, name="b", handler="broken"), clock=clock)
    for _ in range(3):
        with pytest.raises(LoadFailed, match=r"b@1 cannot be loaded: KeyError"):
            it.acquire(1)
    assert Broken.tries == 1
    assert it.failures() == ["model b@1 cannot be loaded: KeyError: 'layer.weight'"]
    clock.now += RETRY_SECONDS + 1
    with pytest.raises(LoadFailed):
        it.acquire(1)
    assert Broken.tries == 2
    with pytest.raises(LoadFailed, match="no model version"):
        it.acquire(77)


def test_who_asks_is_told_of_a_loaded_model_once(tmp_path: Path) -> None:
    told: list[str] = []
    it = residency(tmp_path, *quiet(1), on_loaded=lambda r: told.append(r.version.ref))
    it.acquire(1)
    it.acquire(1)
    assert told == ["m1@1"]


def test_limits_come_from_the_class() -> None:
    class Long(Model):
        max_batch_size = 4
        max_wait_ms = 20
        max_batch_cost = 512

        def length(self, prepared: Any) -> int:
            return 1

    class NoLength(Model):
        max_batch_cost = 512

    assert limits_of(Long()) == Limits(4, 0.02, 512, 0.1)
    assert limits_of(NoLength()).cost is None


# --- handlers -----------------------------------------------------------------------------------------------


def test_handlers_come_from_entry_points_and_settings() -> None:
    handlers = Handlers({"mine": "torchrelay_worker.models.digits:Digits"})
    assert {"mine", "digits"} <= set(handlers.names())
    assert "mine" in handlers
    assert handlers.find("mine").__name__ == "Digits"


@pytest.mark.parametrize(
    ("name", "target", "error", "says"),
    [
        ("digit", None, ModelNotFound, "did you mean digits"),
        ("zzz", None, ModelNotFound, "there are: .*digits"),
        ("gone", "no.such.module:X", ModelNotFound, "cannot be imported: ModuleNotFoundError"),
        ("gone", "torchrelay_worker:Nothing", ModelNotFound, "AttributeError"),
        ("other", "pathlib:Path", InvalidInput, "not a subclass"),
    ],
)
def test_what_is_wrong_with_a_handler_is_said(name: str, target: str | None, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Handlers({name: target} if target else {}).find(name)


# --- weights ------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A small module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def saved(folder: Path, suffix: str) -> Path:
    """Weights of a Linear in a file of this kind."""
    from safetensors.torch import save_file

    net, path = Linear().eval(), folder / f"w{suffix}"
    if suffix == ".pt2":
        torch.export.save(torch.export.export(net, (torch.zeros(1, 2),)), str(path))
    elif suffix == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_state_dicts_are_read(tmp_path: Path, suffix: str) -> None:
    state = weights_module.local(saved(tmp_path, suffix)).state_dict()
    assert set(state) == {"layer.weight", "layer.bias"}
    Linear().load_state_dict(state)


def test_programs_are_read(tmp_path: Path) -> None:
    program = weights_module.local(saved(tmp_path, ".pt2")).program()
    assert program(torch.ones(1, 2)).shape == (1, 1)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "pwned",))

    torch.save({"a": Evil()}, tmp_path / "w.pt")
    torch.save([1], tmp_path / "list.pt")
    for name in ("w.pt", "list.pt"):
        with pytest.raises(Corrupt):
            Weights(tmp_path / name).state_dict()
    assert not (tmp_path / "pwned").exists()


def test_other_kinds_and_damage_are_typed_errors(tmp_path: Path) -> None:
    (tmp_path / "w.pt2").write_bytes(b"no program")
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    (tmp_path / "w.onnx").write_bytes(b"x")
    with pytest.raises(Corrupt):
        Weights(tmp_path / "w.pt2").program()
    with pytest.raises(Corrupt):
        Weights(tmp_path / "w.safetensors").state_dict()
    for call in (Weights(tmp_path / "w.onnx").state_dict, Weights(tmp_path / "w.pt").program, Weights().program):
        with pytest.raises(InvalidInput):
            call()
    with pytest.raises(InvalidInput):
        weights_module.local(tmp_path / "none")
    with pytest.raises(Corrupt):
        weights_module.local(tmp_path / "w.onnx", "0" * 64)


def test_the_cache_fetches_once_and_checks_each_time(tmp_path: Path) -> None:
    store = Artifacts("memory://")
    path = saved(tmp_path, ".safetensors")
    uri, sha256 = store.put_file("models/m/1/w.safetensors", path)
    assert sha256 == file_sha256(path)
    cache = WeightsCache(store, tmp_path / "cache")
    of = version(weights=uri, sha256=sha256, config={"a": 1})
    found = cache.fetch(of)
    assert found.config == {"a": 1}
    assert found.path is not None
    assert found.path.suffix == ".safetensors"
    found.path.write_bytes(b"damaged here")
    assert file_sha256(cache.fetch(of).path or Path()) == sha256  # fetched anew
    store.put("models/m/1/w.safetensors", b"changed there")
    found.path.unlink()
    with pytest.raises(Corrupt):
        cache.fetch(of)
    with pytest.raises(Corrupt, match="without a recorded sha256"):
        cache.fetch(version(weights=uri))
    with pytest.raises(NotFound):
        cache.fetch(version(weights="memory:///models/other", sha256=sha256))
    assert cache.fetch(version()).path is None


def test_what_an_author_sets_wrongly_is_said_when_the_model_is_loaded(tmp_path: Path) -> None:
    it = residency(tmp_path, version(1, handler="impatient"), version(2, handler="missing"), room_seconds=5.0)
    with pytest.raises(LoadFailed, match="backoff: seconds"):
        it.acquire(1)
    assert it.load_timeout(1) == 12.0
    assert it.load_timeout(2) == it.load_timeout(3) == Model.load_timeout + 5.0
