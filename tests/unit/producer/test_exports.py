"""What `import torchrelay` gives, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import torchrelay
from torchrelay.testing import AsyncInlineRelay, InlineRelay
from torchrelay_storage import errors

PUBLIC = {
    "AsyncBatch", "AsyncJob", "AsyncRelay", "AsyncRun", "Attempt", "Backoff", "Batch", "BatchNotFound", "Corrupt",
    "Counts", "InvalidDataset", "InvalidHyperparameter", "InvalidInput", "Job", "JobCancelled", "JobExpired",
    "JobFailed", "JobNotFound", "JobState", "KeyConflict", "ModelNotFound", "NotFound", "QueueFull", "RecipeNotFound",
    "Relay", "RelayError", "Run", "SchemaMismatch", "Settings", "StorageFull", "Unreachable", "WaitTimeout",
}  # fmt: skip


def test_the_public_names_are_exactly_these() -> None:
    assert set(torchrelay.__all__) == PUBLIC
    assert torchrelay.__all__ == sorted(torchrelay.__all__)
    assert all(getattr(torchrelay, name).__name__ == name for name in PUBLIC)
    assert set(dir(torchrelay)) >= PUBLIC
    assert not hasattr(torchrelay, "Nothing")


def test_every_error_is_exported() -> None:
    tree = {
        name
        for name, member in vars(errors).items()
        if isinstance(member, type) and issubclass(member, errors.RelayError) and not name.startswith("_")
    }
    assert tree <= PUBLIC


def methods(kind: type) -> dict[str, str]:
    """The public methods of a class: name -> parameters and what they default to, without types."""
    return {
        name: str([(p.name, p.kind, p.default) for p in inspect.signature(member).parameters.values()])
        for name in dir(kind)
        if not name.startswith("_") and callable(member := getattr(kind, name))
    }


@pytest.mark.parametrize(
    ("plain", "twin"),
    [
        (torchrelay.Relay, torchrelay.AsyncRelay),
        (torchrelay.Job, torchrelay.AsyncJob),
        (torchrelay.Batch, torchrelay.AsyncBatch),
        (torchrelay.Run, torchrelay.AsyncRun),
        (InlineRelay, AsyncInlineRelay),
    ],
)
def test_the_twins_have_the_same_members(plain: type, twin: type) -> None:
    assert methods(plain) == methods(twin)
    assert {name for name in dir(plain) if not name.startswith("_")} == {
        name for name in dir(twin) if not name.startswith("_")
    }


def test_the_client_imports_neither_torch_nor_numpy_nor_celery_nor_the_orm_nor_what_only_runs_need() -> None:
    code = (
        "import sys, torchrelay, torchrelay.pytest_plugin\n"
        "assert 'torchrelay_storage' not in sys.modules\n"
        "torchrelay.Relay, torchrelay.AsyncRelay\n"
        "heavy = {'torch', 'numpy', 'celery', 'kombu', 'sqlalchemy.orm', 'jsonschema'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import torchrelay.testing, torchrelay.broker\n"
        "torchrelay.broker.make_app(torchrelay.Settings.load(broker='redis://localhost'))\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
