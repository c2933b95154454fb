"""The files that a run reads, dataset and pretrained weights, as local copies. Not here: what they hold (`data`)."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from torchrelay.settings import Settings
from torchrelay.uploads import inside
from torchrelay_storage.artifacts import Artifacts, file_sha256
from torchrelay_storage.errors import InvalidInput
from torchrelay_storage.run_spec import Dataset
from torchrelay_worker.training.team import Team


class Sources:
    """Copies in a folder of this machine. The next run finds them there, and need not copy those with a sha256."""

    def __init__(self, settings: Settings, team: Team) -> None:
        self._folder = settings.home / "datasets"
        self._places = [settings.artifacts_url, *settings.datasets]
        self._team = team

    def dataset(self, dataset: Dataset) -> tuple[Path, str]:
        """Return the local copy of a dataset and its sha256: one process of a run fetches it, the others wait.

        Raises:
            Corrupt: it is not the dataset that was submitted.
            NotFound, Unreachable: its store has no such file, or does not answer.
            InvalidInput: its URI is one that runs may not read.
        """
        path = self._path(dataset.uri, dataset.sha256)
        if self._team.is_first:
            self._store(dataset.uri).fetch(dataset.uri, path, dataset.sha256)
        self._team.wait()
        return path, dataset.sha256 or file_sha256(path)

    def fetch(self, uri: str) -> Path:
        """Return the local copy of any other file: in all processes of a run at the same time. Raises as `dataset`."""
        return self.dataset(Dataset(uri=uri, format="npz"))[0]

    def _store(self, uri: str) -> Artifacts:
        for place in self._places:
            store = Artifacts(place)
            if inside(uri, [store.url]):
                return store
        raise InvalidInput(
            f"{uri} lies outside of what runs may read ({', '.join(self._places)}); set `datasets` where this worker "
            "runs as it is where the run was submitted"
        )

    def _path(self, uri: str, sha256: str | None) -> Path:
        suffix = PurePosixPath(urlsplit(uri).path).suffix
        return self._folder / f"{sha256 or hashlib.sha256(uri.encode()).hexdigest()}{suffix}"
