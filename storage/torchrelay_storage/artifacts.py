"""The object store for what is too large for a row: inputs, outputs, weights. A folder, an S3 bucket, or memory.

Knows bytes, paths and sha256; not what the bytes mean (`values` does), nor when they may go (retention does). Objects
are written whole or not at all and never changed: `store_large` puts the content's hash into the name, so a worker that
was given up for dead and writes after all can't touch what its successor wrote.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import LocalStore, MemoryStore, ObjectStore, S3Store

from torchrelay_storage import ids
from torchrelay_storage.errors import Corrupt, InvalidInput, NotFound, Unreachable
from torchrelay_storage.events import get_logger
from torchrelay_storage.values import Reference, as_reference, encode_reference, media_type

INLINE_LIMIT = 65_536  # bytes up to which a value stays in its row
PART = 16 * 1024 * 1024  # bytes of one request for a file; each must fit into REQUEST_TIMEOUT on a slow line
REQUEST_TIMEOUT = timedelta(seconds=120)
CONNECT_TIMEOUT = timedelta(seconds=3)
RETRY = timedelta(seconds=15)  # a store that is away is reported after this; obstore would go on for three minutes
DELETE_AT_ONCE = 1_000  # S3's limit for one request

_MAX_PARTS = 9_000  # S3 takes 10,000
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@=+-]{0,199}")  # no way up, nothing hidden, nothing to escape in a URI
_MISSING = (FileNotFoundError, exceptions.NotFoundError)
_REFUSED = (PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
_FAULTS = (OSError, exceptions.BaseError)

log = get_logger(__name__)


class Artifacts:
    """One object store. Cheap to make (it connects at the first use), safe to share between threads.

    Attributes:
        url: where it is, without a slash at the end; each artifact's URI begins with it.
    """

    def __init__(self, url: str, config: Mapping[str, str] | None = None) -> None:
        """Name the store.

        Arguments:
            url: `file:///folder` (made if missing), `s3://bucket` or `s3://bucket/prefix`, or `memory://` (for tests:
                gone with this object, shared with no other).
            config: S3 settings that are stronger than the usual AWS_* variables: `endpoint`, `region`,
                `access_key_id`, `secret_access_key`, `session_token`, `virtual_hosted_style_request`, .. An endpoint
                that begins with http:// is taken as it is, without TLS.

        Raises:
            InvalidInput: the url is none of these.
        """
        parts = urlsplit(url)
        self._config = dict(config or {})
        self._scheme = parts.scheme
        self._bucket, self._prefix = parts.netloc, ""
        self._memory = MemoryStore()
        if parts.query or parts.fragment:
            raise InvalidInput(f"the artifact store's url must have no ? or #, and {url!r} has; write them as %3F, %23")
        if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
            self._prefix = os.path.normpath(unquote(parts.path))
            self.url = "file://" + quote(self._prefix.rstrip("/"))
        elif parts.scheme == "s3" and parts.netloc:
            self._prefix = parts.path.strip("/")
            for segment in filter(None, self._prefix.split("/")):
                _check_segment(segment, url)
            self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        elif url.rstrip("/") == "memory:":
            self.url = "memory://"
        else:
            raise InvalidInput(
                f"the artifact store cannot be {url!r}; use file:///a/folder, s3://bucket/prefix or memory://"
            )

    def __repr__(self) -> str:
        return f"Artifacts({self.url!r})"  # never the config, which may hold a secret

    def put(self, path: str, data: bytes) -> str:
        """Write the bytes under this path and return the URI. What was there is replaced in one step.

        Raises:
            InvalidInput: the path could leave the store, or has characters that not every store takes.
            Unreachable: they could not be written.
        """
        path = _checked(path)
        with self._faults("write", path):
            obstore.put(self._store, path, data)
            self._sync(path)
        return self._uri(path)

    def put_file(self, path: str, local: Path | str) -> tuple[str, str]:
        """Write a local file under this path, in constant memory; return the URI and the sha256 of what was written.

        Raises:
            InvalidInput: there is no such file, or the path is not allowed.
            Unreachable: it could not be written.
        """
        path, local = _checked(path), Path(local)
        if not local.is_file():
            raise InvalidInput(f"there is no file {local}")
        sha256 = hashlib.sha256()
        with local.open("rb") as file, self._faults("write", path):
            size = os.fstat(file.fileno()).st_size
            part = max(PART, -(-size // _MAX_PARTS))
            pieces = _hashed(iter(lambda: file.read(part), b""), sha256.update)
            if size <= part:
                obstore.put(self._store, path, b"".join(pieces))
            else:
                obstore.put(self._store, path, pieces, chunk_size=part, max_concurrency=4)
            self._sync(path)
        return self._uri(path), sha256.hexdigest()

    def get(self, uri: str) -> bytes:
        """Return the bytes of an artifact of a value's size (`fetch` is for files).

        Raises:
            NotFound: it does not exist, or lies in another store.
            Unreachable: it could not be read.
        """
        path = self._path(uri)
        with self._faults("read", path):
            return bytes(obstore.get(self._store, path).bytes())

    def size(self, uri: str) -> int | None:
        """Return how many bytes an artifact has, without reading it; None: there is none, or none that may be read.

        Raises:
            NotFound: it lies in another store.
            Unreachable: the store could not be asked.
        """
        path = self._path(uri)
        with self._faults("ask about", path):
            try:
                return int(obstore.head(self._store, path)["size"])
            except (*_MISSING, *_REFUSED):  # S3 refuses to say what is missing to those who may not list
                return None

    def fetch(self, uri: str, to: Path | str, sha256: str | None = None) -> Path:
        """Copy an artifact to a local file, in constant memory, and return the file's path.

        The file appears whole or not at all. With a sha256, a file that is there already and has it is left as it is.

        Raises:
            Corrupt: its sha256 is another; nothing is left behind.
            NotFound, Unreachable: as `get`.
            OSError: the local file could not be written.
        """
        path, to = self._path(uri), Path(to)
        if sha256 is not None and to.is_file() and file_sha256(to) == sha256:
            return to
        to.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=to.parent, prefix=f".{to.name}.")
        try:
            found = hashlib.sha256()
            with os.fdopen(handle, "wb") as file:
                for piece in _hashed(self._pieces(path), found.update):
                    file.write(piece)
            if sha256 is not None and found.hexdigest() != sha256:
                raise Corrupt(
                    f"{uri} has the sha256 {found.hexdigest()}, and {sha256} was recorded: "
                    "it was changed or damaged; restore it, or register it anew"
                )
            os.replace(name, to)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return to

    def under(self, path: str) -> list[str]:
        """Return the URIs of all artifacts below this path; what is being written is not among them.

        Raises:
            InvalidInput: the path is not allowed.
            Unreachable: the store failed.
        """
        path = _checked(path)
        with self._faults("list", path):
            return [self._uri(item["path"]) for some in obstore.list(self._store, path) for item in some]

    def delete(self, uris: Iterable[str]) -> None:
        """Delete these artifacts. What is gone already is no error; what lies in another store is left, with a warning.

        Raises:
            Unreachable: the store failed; some may be deleted, and the same call may be made again.
        """
        paths = []
        for uri in uris:
            try:
                paths.append(self._path(uri))
            except NotFound:
                log.warning("artifact_elsewhere", uri=uri, store=self.url)
        for start in range(0, len(paths), DELETE_AT_ONCE):
            some = paths[start : start + DELETE_AT_ONCE]
            with self._faults("delete", some[0]):
                try:
                    obstore.delete(self._store, some)
                except _MISSING:  # a folder stops at the first that is missing
                    for path in some:
                        self._delete_one(path)

    def check(self) -> None:
        """Write, read and delete a small object. Raises Unreachable that says which of them failed and why."""
        path, data = f"check/{secrets.token_hex(8)}", secrets.token_bytes(8)
        uri = self.put(path, data)
        try:
            if self.get(uri) != data:
                raise Unreachable(f"the artifact store {self.url} gave back other bytes than were written")
        except NotFound as error:
            raise Unreachable(f"the artifact store {self.url} does not find what it has just taken") from error
        finally:
            self.delete([uri])

    @functools.cached_property
    def _store(self) -> ObjectStore:
        if self._scheme == "memory":
            return self._memory  # made in advance: two threads may get here at once, and would make two
        if self._scheme == "file":
            return LocalStore(self._prefix, mkdir=True, automatic_cleanup=True)
        config: Any = self._config
        try:
            return S3Store(
                self._bucket,
                prefix=self._prefix or None,
                config=config,
                client_options={
                    "allow_http": _endpoint(self._config).startswith("http://"),
                    "connect_timeout": CONNECT_TIMEOUT,
                    "timeout": REQUEST_TIMEOUT,
                },
                retry_config={"max_retries": 5, "retry_timeout": RETRY},
            )
        except exceptions.UnknownConfigurationKeyError as error:
            raise InvalidInput(f"the artifact store's configuration: {_first_line(error)}") from None

    def _pieces(self, path: str) -> Iterator[bytes]:
        """The object in parts, one request each, so that no time limit depends on its size."""
        with self._faults("read", path):
            size = obstore.head(self._store, path)["size"]
        for start in range(0, size, PART):
            with self._faults("read", path):
                piece = obstore.get_range(self._store, path, start=start, end=min(start + PART, size))
            yield bytes(piece)

    def _delete_one(self, path: str) -> None:
        with suppress(*_MISSING):
            obstore.delete(self._store, path)

    def _sync(self, path: str) -> None:
        """Have a folder's disk keep what was written: the row that will name it survives a power cut, so must it."""
        if self._scheme != "file":
            return
        file = Path(self._prefix, path)
        for place in (file, file.parent):
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _uri(self, path: str) -> str:
        return f"{self.url}/{path}"

    def _path(self, uri: str) -> str:
        """The path behind a URI of this store. A URI is data: it may not reach anything outside."""
        path = uri.removeprefix(f"{self.url}/")
        try:
            if path != uri:
                return _checked(path)
        except InvalidInput:
            pass
        raise NotFound(
            f"the artifact {uri} is not in the artifact store {self.url}; "
            "set `artifacts` to the store that it was written to"
        )

    @contextmanager
    def _faults(self, doing: str, path: str) -> Iterator[None]:
        """Turn the store's errors into ours."""
        try:
            yield
        except _FAULTS as error:
            if isinstance(error, _MISSING) and doing == "read":
                raise NotFound(
                    f"the artifact {self._uri(path)} does not exist (any more): retention has purged it, or it was "
                    "deleted by hand; submit the job again"
                ) from None
            if isinstance(error, _REFUSED):
                how = "check the AWS_* credentials" if self._scheme == "s3" else "check the folder's permissions"
            elif isinstance(error, _MISSING):
                how = "make the bucket, or check its name" if self._scheme == "s3" else "check the folder"
            else:
                how = "check the endpoint and the network" if self._scheme == "s3" else "check the folder and the disk"
            raise Unreachable(
                f"the artifact store {self.url} could not {doing} {path}: {_first_line(error)}; {how}"
            ) from error


def store_large(artifacts: Artifacts, encoded: bytes, path: str, limit: int = INLINE_LIMIT) -> bytes:
    """Return what goes into the row: the encoded value itself, or, where it has more than `limit` bytes, a reference.

    The artifact's name is `path` and the first digits of the content's sha256: equal content is written to one place,
    and other content never over it.

    Raises:
        InvalidInput, Unreachable: as `Artifacts.put`.
    """
    if len(encoded) <= limit or as_reference(encoded) is not None:
        return encoded
    sha256 = hashlib.sha256(encoded).hexdigest()
    uri = artifacts.put(f"{path}-{sha256[:16]}", encoded)
    return encode_reference(Reference(uri, len(encoded), sha256, media_type(encoded)))


def load_large(artifacts: Artifacts, data: bytes) -> bytes:
    """Return the encoded value that a row's bytes are or refer to.

    Raises:
        Corrupt: the artifact is not what was recorded about it.
        NotFound, Unreachable: as `Artifacts.get`.
    """
    reference = as_reference(data)
    if reference is None:
        return data
    encoded = artifacts.get(reference.uri)
    if len(encoded) != reference.size or hashlib.sha256(encoded).hexdigest() != reference.sha256:
        raise Corrupt(
            f"the artifact {reference.uri} is not what was recorded about it ({len(encoded)} of {reference.size} bytes,"
            " or another sha256): it was changed or damaged"
        )
    return encoded


def job_path(job: int, what: str) -> str:
    """Return the path for a part of a job, such as `jobs/2026-11-24/j_0c8ks4t2m1x7f/input`; the day is the id's."""
    day = datetime.fromtimestamp((ids.EPOCH_MS + (job >> ids.RANDOM_BITS)) / 1000, UTC).date()
    return f"jobs/{day.isoformat()}/{ids.show(ids.Kind.JOB, job)}/{what}"


def run_path(job: int, what: str) -> str:
    """Return the path for a part of a run, such as `runs/2026-11-24/j_0c8ks4t2m1x7f/checkpoints`, by the id's day."""
    return "runs/" + job_path(job, what).removeprefix("jobs/")


def model_path(name: str, version: int | str, file: str) -> str:
    """Return the path for a file of a model, such as `models/digits/3/weights.safetensors`, whatever the names hold."""
    return "/".join(("models", _plain(name), _plain(str(version)), _plain(file)))


def file_sha256(local: Path | str) -> str:
    """Return the sha256 of a local file, 64 hexadecimal digits. Raises OSError."""
    with Path(local).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashed(pieces: Iterable[bytes], update: Callable[[bytes], None]) -> Iterator[bytes]:
    for piece in pieces:
        update(piece)
        yield piece


def _plain(name: str) -> str:
    """A name as one segment of a path; where it had to be changed, with a hash, so that two names stay two."""
    if _SEGMENT.fullmatch(name):
        return name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100]
    return f"{readable or '_'}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:12]}"


def _checked(path: str) -> str:
    for segment in path.split("/"):
        _check_segment(segment, path)
    return path


def _check_segment(segment: str, whole: str) -> None:
    if not _SEGMENT.fullmatch(segment):
        raise InvalidInput(
            f"{whole!r} is no path of an artifact: its part {segment!r} must be 1 to 200 of A-Z a-z 0-9 . _ - @ = +, "
            "and not begin with a dot or a sign"
        )


def _endpoint(config: Mapping[str, str]) -> str:
    """The S3 endpoint that will be used, as obstore looks for it; empty: Amazon's."""
    names = ("aws_endpoint_url_s3", "endpoint_url_s3", "aws_endpoint_url", "endpoint_url", "aws_endpoint", "endpoint")
    given = {key.lower(): value for key, value in config.items()}
    here = {key.lower(): value for key, value in os.environ.items() if key.upper().startswith("AWS_ENDPOINT")}
    return next((found[name] for found in (given, here) for name in names if found.get(name)), "")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]  # obstore adds pages of debug output
