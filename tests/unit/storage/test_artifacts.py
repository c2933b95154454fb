"""The object store, on a folder, in memory and over the S3 protocol: whole or not at all, and no way out.

The S3 server here speaks what the client needs of the protocol. `TEST_S3_ENDPOINT=http://host:port` names a real one
to run the same tests on; it must have an empty bucket `bucket`, open to the credentials `S3_CONFIG` and to no others.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrelay_storage import artifacts as module
from torchrelay_storage import ids
from torchrelay_storage.artifacts import (
    Artifacts,
    file_sha256,
    job_path,
    load_large,
    model_path,
    store_large,
)
from torchrelay_storage.errors import Corrupt, InvalidInput, NotFound, Unreachable
from torchrelay_storage.values import as_reference, decode, encode, encode_reference, media_type


class S3Handler(BaseHTTPRequestHandler):
    """Objects of one bucket in a dict: put, get of a range, head, list, delete of many, uploads in parts."""

    objects: dict[str, bytes]
    parts: dict[str, dict[int, bytes]]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        _, bucket, *rest = unquote(url.path).split("/")
        key = "/".join(rest)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "AWS4-HMAC-SHA256 Credential=key/" not in self.headers.get("Authorization", ""):
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        if bucket != "bucket":
            return self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        if self.command == "POST" and "delete" in query:
            keys = re.findall("<Key>(.*?)</Key>", body.decode())
            for one in keys:
                self.objects.pop(unescape(one), None)
            deleted = "".join(f"<Deleted><Key>{one}</Key></Deleted>" for one in keys)
            return self.answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())
        if self.command == "POST" and "uploads" in query:
            upload = f"upload{len(self.parts)}"
            self.parts[upload] = {}
            text = f"<Bucket>bucket</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
            text = f"<InitiateMultipartUploadResult>{text}</InitiateMultipartUploadResult>"
            return self.answer(200, text.encode())
        if self.command == "PUT" and "uploadId" in query:
            self.parts[query["uploadId"][0]][int(query["partNumber"][0])] = body
            return self.answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        if self.command == "POST" and "uploadId" in query:
            pieces = self.parts.pop(query["uploadId"][0])
            self.objects[key] = b"".join(pieces[number] for number in sorted(pieces))
            text = f'<Key>{escape(key)}</Key><ETag>"whole"</ETag>'
            text = f"<CompleteMultipartUploadResult>{text}</CompleteMultipartUploadResult>"
            return self.answer(200, text.encode())
        if self.command == "PUT":
            self.objects[key] = body
            return self.answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        if self.command == "DELETE":
            self.objects.pop(key, None)
            return self.answer(204)
        if self.command == "GET" and "list-type" in query:
            names = [name for name in sorted(self.objects) if name.startswith(query["prefix"][0])]
            stamp = "<LastModified>2026-11-24T12:00:00.000Z</LastModified>"
            found = "".join(f"<Contents><Key>{escape(n)}</Key>{stamp}<Size>1</Size></Contents>" for n in names)
            return self.answer(200, f"<ListBucketResult>{found}</ListBucketResult>".encode())
        if key not in self.objects:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data = self.objects[key]
        stamp = {"ETag": '"x"', "Last_Modified": "Tue, 24 Nov 2026 12:00:00 GMT"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, data, **stamp)
        start, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        where = f"bytes {start}-{last}/{len(data)}"
        return self.answer(206, data[start : last + 1], Content_Range=where, **stamp)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do


S3_CONFIG = {"access_key_id": "key", "secret_access_key": "very-secret", "region": "us-east-1"}


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    if given_one := os.environ.get("TEST_S3_ENDPOINT"):
        yield given_one
        return
    handler = type("Handler", (S3Handler,), {"objects": {}, "parts": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="s3")
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    if request.param == "file":
        return Artifacts(f"file://{tmp_path}/a%20folder/artifacts/")
    if request.param == "memory":
        return Artifacts("memory://")
    endpoint = request.getfixturevalue("s3_endpoint")
    return Artifacts(f"s3://bucket/{tmp_path.name}", {**S3_CONFIG, "endpoint": endpoint})


def test_put_get_delete(store: Artifacts) -> None:
    uri = store.put("jobs/2026-11-24/j_1/input", b"\x00data")
    assert uri == f"{store.url}/jobs/2026-11-24/j_1/input"
    assert store.get(uri) == b"\x00data"
    assert store.size(uri) == 5
    assert store.put("jobs/2026-11-24/j_1/input", b"") == uri  # replaces
    assert store.get(uri) == b""
    store.delete([uri])
    assert store.size(uri) is None
    with pytest.raises(NotFound, match="not in the artifact store"):
        store.size("file:///elsewhere/a")
    with pytest.raises(NotFound, match="does not exist"):
        store.get(uri)


def test_delete_ignores_what_is_gone(store: Artifacts) -> None:
    uris = [store.put(f"some/o{i}", b"x") for i in range(12)]
    store.delete(uris[3:5])
    store.delete([f"{store.url}/never/was", *uris, *uris])
    store.delete([])
    for uri in uris:
        with pytest.raises(NotFound):
            store.get(uri)


def test_what_lies_under_a_path_is_listed_and_what_only_begins_like_it_is_not(store: Artifacts) -> None:
    below = {store.put(f"runs/a/{name}", b"x") for name in ("1/x", "1/y", "2/x")}
    store.put("runs/ab/1/x", b"x")
    assert set(store.under("runs/a")) == below
    assert store.under("runs/never") == []
    store.delete(store.under("runs/a"))
    assert store.under("runs/a") == []
    with pytest.raises(InvalidInput):
        store.under("../elsewhere")


def test_many_are_deleted_in_slices(store: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DELETE_AT_ONCE", 2)
    uris = [store.put(f"some/o{i}", b"x") for i in range(5)]
    store.delete(iter(uris))
    for uri in uris:
        with pytest.raises(NotFound):
            store.get(uri)


@pytest.mark.parametrize("size", [0, 1, 5_000_000, 13_000_001])
def test_files(store: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "PART", 6_000_000)  # so that the largest goes in parts, there and back
    local = tmp_path / "weights.safetensors"
    local.write_bytes(os.urandom(size))
    uri, sha256 = store.put_file("models/digits/1/weights", local)
    assert sha256 == file_sha256(local) == hashlib.sha256(local.read_bytes()).hexdigest()
    copy = store.fetch(uri, tmp_path / "cache" / "deep" / "copy", sha256)
    assert copy.read_bytes() == local.read_bytes() == store.get(uri)
    assert os.listdir(copy.parent) == ["copy"]


def test_a_file_that_is_there_is_not_fetched_again(store: Artifacts, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    uri = store.put("models/digits/1/weights", b"new")
    sha256 = hashlib.sha256(b"new").hexdigest()
    copy.write_bytes(b"old")
    store.fetch(uri, copy, sha256)
    assert copy.read_bytes() == b"new"
    store.delete([uri])
    assert store.fetch(uri, copy, sha256) == copy
    with pytest.raises(NotFound):
        store.fetch(uri, copy)  # without a sha256 nobody knows what is there
    assert copy.read_bytes() == b"new"


def test_a_changed_file_is_corrupt_and_leaves_nothing(store: Artifacts, tmp_path: Path) -> None:
    uri = store.put("models/digits/1/weights", b"changed")
    (tmp_path / "cache").mkdir()
    with pytest.raises(Corrupt, match="was recorded"):
        store.fetch(uri, tmp_path / "cache" / "copy", "00" * 32)
    assert os.listdir(tmp_path / "cache") == []


def test_put_file_without_a_file(store: Artifacts, tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(InvalidInput, match="there is no file"):
            store.put_file("a", missing)


def test_check(store: Artifacts) -> None:
    store.check()


@pytest.mark.parametrize("value", [list(range(40_000)), b"\x89PNG\r\n\x1a\n" + bytes(70_000), "x" * 100_000])
def test_large_values_go_to_the_store(store: Artifacts, value: object) -> None:
    encoded = encode(value)
    row = store_large(store, encoded, "jobs/2026-11-24/j_1/output")
    reference = as_reference(row)
    assert reference is not None
    assert len(row) < 500
    assert reference.uri.startswith(f"{store.url}/jobs/2026-11-24/j_1/output-")
    assert media_type(row) == media_type(encoded)
    assert decode(load_large(store, row)) == value
    assert store_large(store, row, "again") == row  # a reference is not put behind another
    assert store_large(store, encoded, "jobs/2026-11-24/j_1/output") == row


def test_small_values_stay(store: Artifacts) -> None:
    encoded = encode("x" * (65_536 - 2))
    assert store_large(store, encoded, "a/b") is encoded
    assert load_large(store, encoded) is encoded
    assert as_reference(store_large(store, encoded, "a/b", limit=65_535)) is not None


def test_other_content_never_replaces(store: Artifacts) -> None:
    """A worker given up for dead that writes after all does not touch what its successor wrote."""
    first = store_large(store, encode("first"), "jobs/2026-11-24/j_1/output", limit=0)
    store_large(store, encode("late"), "jobs/2026-11-24/j_1/output", limit=0)
    assert decode(load_large(store, first)) == "first"


def test_changed_values_are_corrupt(store: Artifacts) -> None:
    row = store_large(store, encode("x" * 100), "a/b", limit=0)
    reference = as_reference(row)
    assert reference is not None
    path = reference.uri.removeprefix(f"{store.url}/")
    for changed in (encode("y" * 100), encode("x" * 99)):
        store.put(path, changed)
        with pytest.raises(Corrupt, match="not what was recorded"):
            load_large(store, row)
    store.delete([reference.uri])
    with pytest.raises(NotFound, match="retention has purged it"):
        load_large(store, row)


BAD_PATHS = ["", "/", "/a", "a/", "a//b", "..", "../a", "a/../b", "./a", ".a", "a/.b", "a b", "a\\b", "a%2e", "a#1",
             "ü", "a\n", "a\0", "-a", "a" * 201, "~", "a?b", "a:b"]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS)
def test_no_path_leaves_the_store(store: Artifacts, path: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is no path of an artifact"):
        store.put(path, b"")
    with pytest.raises(InvalidInput, match="is no path of an artifact"):
        store.put_file(path, Path(__file__))
    uri = f"{store.url}/{path}"
    for read in (store.get, lambda uri: store.fetch(uri, tmp_path / "copy")):
        with pytest.raises(NotFound, match="is not in the artifact store"):
            read(uri)


@pytest.mark.parametrize(
    "uri", ["file:///etc/passwd", "s3://other/a", "memory://", "a", "", "file:///etc/../etc/passwd"]
)
def test_a_uri_reaches_nothing_outside(tmp_path: Path, uri: str) -> None:
    (tmp_path / "in").mkdir()
    store = Artifacts(f"file://{tmp_path}/in")
    outside = Artifacts(f"file://{tmp_path}/in2").put("a", b"secret")
    for other in (uri, outside, f"{store.url}/../in2/a", f"{store.url}/%2e%2e/in2/a"):
        with pytest.raises(NotFound, match="set `artifacts` to the store that it was written to"):
            store.get(other)
        with structlog.testing.capture_logs() as logs:
            store.delete([other])
        assert [entry["event"] for entry in logs] == ["artifact_elsewhere"]
    assert Artifacts(f"file://{tmp_path}/in2").get(outside) == b"secret"


MEMORY = Artifacts("memory://")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.text(max_size=20) | st.integers(0), st.text(max_size=20))
def test_any_name_of_a_model_is_a_path(name: str, version: str | int, file: str) -> None:
    path = model_path(name, version, file)
    assert MEMORY.put(path, b"x") == f"memory:///{path}"
    assert path.count("/") == 3


def test_names_that_look_alike_stay_apart() -> None:
    assert model_path("digits", 3, "weights.safetensors") == "models/digits/3/weights.safetensors"
    paths = {model_path(name, 1, "w") for name in ("a/b", "a-b", "a b", "a//b", "..", "../..", "", ".", "A")}
    assert len(paths) == 9


def test_a_jobs_path_has_the_day_of_its_id() -> None:
    day = 24 * 3600 * 1000
    job = (day * 327 + 5) << ids.RANDOM_BITS
    assert job_path(job, "input") == f"jobs/2026-11-24/{ids.show(ids.Kind.JOB, job)}/input"
    Artifacts("memory://").put(job_path(ids.draw(), "output"), b"")


@pytest.mark.parametrize(
    "url",
    ["", "artifacts", "/tmp/a", "http://x/y", "file://host/a", "file:a", "s3://", "s3:///a", "s3://b/../c", "memory://x",
     "s3://b/a?x=1", "file:///a#b"],
)  # fmt: skip
def test_urls_that_are_no_store(url: str) -> None:
    with pytest.raises(InvalidInput):
        Artifacts(url)


def test_one_store_has_one_url(tmp_path: Path) -> None:
    plain = Artifacts(f"file://{tmp_path}/x")
    for same in (f"file://{tmp_path}/x/", f"file://localhost{tmp_path}/x", f"file://{tmp_path}/y/../x//"):
        assert Artifacts(same).url == plain.url
    assert Artifacts("s3://b/").url == "s3://b"
    assert Artifacts("s3://b/c/d/").url == "s3://b/c/d"
    assert plain.get(Artifacts(f"file://{tmp_path}/x/").put("a", b"1")) == b"1"


def test_a_folder_holds_plain_files_and_no_empty_folders(tmp_path: Path) -> None:
    store = Artifacts(f"file://{tmp_path}")
    uri = store.put("jobs/2026-11-24/j_1/input", b"x")
    assert (tmp_path / "jobs/2026-11-24/j_1/input").read_bytes() == b"x"
    store.delete([uri])
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Artifacts(f"file://{tmp_path}/store")
    uri = store.put("a/b", b"old")
    monkeypatch.setattr(module, "PART", 6_000_000)
    local = tmp_path / "large"
    local.write_bytes(bytes(13_000_000))

    def fails(pieces: Iterator[bytes], update: Callable[[bytes], None]) -> Iterator[bytes]:
        yield next(pieces)
        raise OSError("the disk is gone")

    monkeypatch.setattr(module, "_hashed", fails)
    with pytest.raises(Unreachable, match=r"could not write a/b: the disk is gone; check the folder and the disk"):
        store.put_file("a/b", local)
    assert store.get(uri) == b"old"
    assert [path.name for path in (tmp_path / "store").rglob("*")] == ["a", "b"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = Artifacts(f"file://{tmp_path}/file/store")
    for use in (lambda: store.put("a", b""), lambda: store.get(f"{store.url}/a"), store.check):
        with pytest.raises(Unreachable, match="check the folder"):
            use()


def test_threads_share_a_store(store: Artifacts) -> None:
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for i in range(10):
                uri = store.put(f"shared/{i % 3}/{name}{i}", name.encode())
                assert store.get(uri) == name.encode()
                store.delete([uri])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


# ------------------------------------------------------------------ S3


def test_s3_from_the_environment(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    store = Artifacts("s3://bucket/environment")
    assert store.get(store.put("a", b"1")) == b"1"


def test_s3_with_wrong_credentials(s3_endpoint: str) -> None:
    store = Artifacts("s3://bucket", {**S3_CONFIG, "access_key_id": "other", "endpoint": s3_endpoint})
    for use in (
        lambda: store.put("a", b"1"),
        lambda: store.get("s3://bucket/a"),
        lambda: store.delete(["s3://bucket/a"]),
    ):
        with pytest.raises(Unreachable, match="check the AWS_\\* credentials") as caught:
            use()
        assert "very-secret" not in str(caught.value)


def test_s3_without_the_bucket(s3_endpoint: str) -> None:
    store = Artifacts("s3://nowhere", {**S3_CONFIG, "endpoint": s3_endpoint})
    with pytest.raises(Unreachable, match="make the bucket"):
        store.put("a", b"1")
    with pytest.raises(Unreachable, match="make the bucket"):
        store.check()


def test_s3_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY", module.timedelta(seconds=0))
    store = Artifacts("s3://bucket", {**S3_CONFIG, "endpoint": "http://127.0.0.1:9"})
    for use in (
        lambda: store.put("a", b"1"),
        lambda: store.get("s3://bucket/a"),
        lambda: store.delete(["s3://bucket/a"]),
    ):
        with pytest.raises(Unreachable, match="check the endpoint and the network") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_s3_settings_that_do_not_exist_and_secrets_that_do() -> None:
    store = Artifacts("s3://bucket", {"nonsense": "very-secret"})
    with pytest.raises(InvalidInput, match="nonsense") as caught:
        store.check()
    assert "very-secret" not in str(caught.value) + repr(store)
    assert repr(store) == "Artifacts('s3://bucket')"


def test_references_are_checked_before_anything_is_read(store: Artifacts) -> None:
    reference = as_reference(store_large(store, encode("x"), "a", limit=0))
    assert reference is not None
    elsewhere = encode_reference(module.Reference("file:///etc/passwd", 1, reference.sha256, "text/plain"))
    with pytest.raises(NotFound, match="is not in the artifact store"):
        load_large(store, elsewhere)
