"""Files that a client uploads for training runs, and URIs that it may name instead. Not here: what the files hold.

A file is named after its content, so the same content twice is one artifact and travels once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from torchrelay_storage.artifacts import Artifacts, file_sha256
from torchrelay_storage.errors import InvalidInput, NotFound

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class Upload:
    """A file and where it belongs.

    Attributes:
        sha256: of the file; None where it was named by its URI.
        local: the file that is still to be uploaded; None: it was named by its URI.
        size: bytes of the file.
    """

    uri: str
    sha256: str | None = None
    local: Path | None = None
    size: int = 0

    def send(self, artifacts: Artifacts) -> None:
        """Write it to the object store, unless it is there. Raises InvalidInput, Unreachable."""
        if self.local is None or artifacts.size(self.uri) == self.size:
            return
        uri, sha256 = artifacts.put_file(self.uri.removeprefix(f"{artifacts.url}/"), self.local)
        if sha256 != self.sha256:
            artifacts.delete([uri])
            raise InvalidInput(f"{self.local} was changed while it was uploaded; submit again when it is at rest")


def prepare(artifacts: Artifacts, folder: str, name: str, file: Path) -> Upload:
    """Return where a local file belongs: `folder/HASH/name`. It is read once. Raises OSError."""
    size, sha256 = file.stat().st_size, file_sha256(file)
    return Upload(f"{artifacts.url}/{folder}/{sha256[:16]}/{name}", sha256, file, size)


def is_uri(source: object) -> bool:
    """Whether a string is a URI, and not the path of a local file."""
    return isinstance(source, str) and _URI.match(source) is not None


def refusal(artifacts: Artifacts, uri: str, roots: Sequence[str]) -> str | None:
    """Return why runs cannot read this URI; None where they can, as far as is known here. Raises Unreachable."""
    places = [artifacts.url, *roots]
    if not inside(uri, places):
        return (
            f"{uri} lies outside of what runs may read ({', '.join(places)}); pass what is local, which is uploaded, "
            "or have the operator add a URL to the setting `datasets`"
        )
    if inside(uri, [artifacts.url]):
        try:
            missing = artifacts.size(uri) is None
        except NotFound:  # a path that the store writes nothing under
            missing = True
        if missing:
            return f"there is nothing at {uri}; pass what is local, which is uploaded"
    return None


def inside(uri: str, places: Sequence[str]) -> bool:
    """Whether a URI names something below one of these URLs. It is data: it may not climb out by dots or escapes."""
    if any(ord(character) <= 0x20 for character in uri):  # urlsplit would leave some of them out without a word
        return False
    try:
        parts = urlsplit(uri)
    except ValueError:
        return False
    if parts.query or parts.fragment:
        return False
    path = [unquote(segment) for segment in parts.path.split("/")[1:]]
    if not path or any(segment in ("", ".", "..") or set(segment) & set("/\\\0") for segment in path):
        return False
    for place in places:
        root = urlsplit(place)
        below = [unquote(segment) for segment in root.path.split("/") if segment]
        same = root.scheme == parts.scheme and _host(root.netloc) == _host(parts.netloc)
        if same and len(path) > len(below) and path[: len(below)] == below:
            return True
    return False


def _host(netloc: str) -> str:
    return "" if netloc == "localhost" else netloc
