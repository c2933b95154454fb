"""What `import torchrelay` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import torchrelay
from torchrelay_storage import errors

PUBLIC = {
    "AsyncBatch", "AsyncJob", "AsyncRelay", "Batch", "BatchNotFound", "Corrupt", "Counts", "InvalidInput", "Job",
    "JobCancelled", "JobExpired", "JobFailed", "JobNotFound", "JobState", "KeyConflict", "ModelNotFound", "NotFound",
    "QueueFull", "Relay", "RelayError", "SchemaMismatch", "Settings", "Unreachable", "WaitTimeout",
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


def test_the_client_imports_neither_torch_nor_numpy_nor_celery_nor_the_orm() -> None:
    code = (
        "import sys, torchrelay, torchrelay.pytest_plugin\n"
        "assert 'torchrelay_storage' not in sys.modules\n"
        "torchrelay.Relay, torchrelay.AsyncRelay\n"
        "heavy = {'torch', 'numpy', 'celery', 'kombu', 'sqlalchemy.orm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import torchrelay.testing, torchrelay.broker\n"
        "torchrelay.broker.make_app(torchrelay.Settings.load(broker='redis://localhost'))\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
