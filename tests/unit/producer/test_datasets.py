"""Datasets: what is taken, what is refused and how it is named, and that the same content is one artifact."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchrelay import InvalidDataset, InvalidHyperparameter, InvalidInput, pretrained, uploads
from torchrelay.datasets import opened, store_dataset
from torchrelay.uploads import inside
from torchrelay_storage.artifacts import Artifacts


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(f"file://{tmp_path / 'artifacts'}")


def stored(tmp_path: Path) -> list[str]:
    """What lies in the object store."""
    root = tmp_path / "artifacts"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def picture(path: Path, content: bytes = b"\x89PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pictures(folder: Path) -> Path:
    for name in ("cat/1.png", "cat/2.JPG", "dog/1.webp"):
        picture(folder / name, name.encode())
    return folder


def names(artifacts: Artifacts, uri: str) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(artifacts.get(uri))).namelist()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.csv", b"x,y\n1,2\n", "csv"),
        ("a.CSV", b"x,y\n1,2\n", "csv"),
        ("a.tsv", b"x\ty\n", "tsv"),
        ("a.jsonl", b'{"x": 1}\n', "jsonl"),
        ("a.parquet", b"PAR1....PAR1", "parquet"),
    ],
)
def test_a_file_is_uploaded_under_its_content(
    artifacts: Artifacts, tmp_path: Path, name: str, content: bytes, format: str
) -> None:
    (tmp_path / name).write_bytes(content)
    dataset = store_dataset(artifacts, tmp_path / name)
    assert dataset.format == format
    assert dataset.sha256 is not None
    assert dataset.uri.startswith(f"{artifacts.url}/datasets/{dataset.sha256[:16]}/")
    assert artifacts.get(dataset.uri) == content
    assert store_dataset(artifacts, str(tmp_path / name)) == dataset
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f"b.{format}").write_bytes(content)
    assert store_dataset(artifacts, tmp_path / "other" / f"b.{format}") == dataset
    assert len(stored(tmp_path)) == 1


def test_what_is_there_is_not_uploaded_again(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    dataset = store_dataset(artifacts, tmp_path / "a.csv")
    assert artifacts.size(dataset.uri) == 4
    assert artifacts.size(f"{artifacts.url}/datasets/none") is None
    monkeypatch.setattr(Artifacts, "put_file", lambda *_: pytest.fail("it is there"))
    assert store_dataset(artifacts, tmp_path / "a.csv") == dataset


def test_a_file_that_changes_meanwhile_is_refused(artifacts: Artifacts, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x\n1\n")
    with opened(artifacts, path) as (_, upload):
        path.write_text("x\n2\n")
        with pytest.raises(InvalidInput, match="was changed while it was uploaded"):
            upload.send(artifacts)
    assert stored(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", "ü".encode("latin-1"), "no text in UTF-8: byte 0"),
        ("a.csv", "x,y".encode("utf-16-le"), "NUL bytes"),
        ("a.jsonl", b"\xff\xfe{", "no text in UTF-8"),
        ("a.parquet", b"x,y", "no Parquet file"),
        ("a.npz", b"x,y", "no file of NumPy arrays"),
        ("a.zip", b"x,y", "no zip file"),
        ("a.txt", b"x", r"does not end as a dataset.*\.csv, \.tsv"),
        ("a", b"x", "does not end as a dataset"),
    ],
)
def test_a_file_that_is_none_is_refused(
    artifacts: Artifacts, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidDataset, match=says) as caught:
        store_dataset(artifacts, tmp_path / name)
    assert name in str(caught.value)
    assert not (tmp_path / "artifacts").exists()


def test_a_character_at_the_edge_of_the_look_is_no_error(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x" * 65_535 + "ü\n", encoding="utf-8")
    assert store_dataset(artifacts, tmp_path / "a.csv").format == "csv"


@pytest.mark.parametrize("source", [None, 3, b"bytes", [1], "", object()])
def test_what_is_no_source_is_refused(artifacts: Artifacts, source: Any) -> None:
    with pytest.raises(InvalidDataset, match=r"a dataset cannot be .*a folder of pictures"):
        store_dataset(artifacts, source)


def test_a_missing_file_and_an_unreadable_one(artifacts: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match=r"no file or folder .*missing\.csv"):
        store_dataset(artifacts, tmp_path / "missing.csv")
    with pytest.raises(InvalidDataset, match="cannot be read"):
        store_dataset(artifacts, "x" * 5000 + ".csv")


# --- folders of pictures --------------------------------------------------------------------------------------------


def test_a_folder_is_packed_the_same_way_each_time(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pets")
    picture(folder / ".DS_Store")
    picture(folder / "cat" / ".hidden")
    picture(folder / ".git" / "config")
    dataset = store_dataset(artifacts, folder)
    assert dataset.format == "pictures"
    assert names(artifacts, dataset.uri) == ["cat/1.png", "cat/2.JPG", "dog/1.webp"]
    copy = pictures(tmp_path / "copy")
    os.utime(copy / "cat" / "1.png", (1, 1))
    (copy / "cat" / "1.png").chmod(0o600)
    assert store_dataset(artifacts, copy) == dataset
    picture(copy / "dog" / "2.png")
    assert store_dataset(artifacts, copy) != dataset


def test_folders_of_a_given_split(artifacts: Artifacts, tmp_path: Path) -> None:
    for part in ("train", "validation"):
        pictures(tmp_path / "pets" / part)
    dataset = store_dataset(artifacts, tmp_path / "pets")
    assert names(artifacts, dataset.uri)[2:4] == ["train/dog/1.webp", "validation/cat/1.png"]
    picture(tmp_path / "pets" / "val" / "cat" / "1.png")
    with pytest.raises(InvalidDataset, match=r"only be validation/.*pets/val is there"):
        store_dataset(artifacts, tmp_path / "pets")


def test_train_may_be_a_class(artifacts: Artifacts, tmp_path: Path) -> None:
    for name in ("train", "car", "plane"):
        picture(tmp_path / "vehicles" / name / "1.png")
    dataset = store_dataset(artifacts, tmp_path / "vehicles")
    assert names(artifacts, dataset.uri) == ["car/1.png", "plane/1.png", "train/1.png"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cat/notes.txt", r"cat/notes\.txt is no picture"),
        ("readme.md", r"readme\.md does not lie in a folder of its class"),
        ("cat/small/1.png", "cat/small is no picture"),
        ("fox/.hidden", "the class fox holds no picture"),
    ],
)
def test_what_is_no_picture_is_named(artifacts: Artifacts, tmp_path: Path, name: str, says: str) -> None:
    picture(pictures(tmp_path / "pets") / name)
    with pytest.raises(InvalidDataset, match=says):
        store_dataset(artifacts, tmp_path / "pets")


def test_an_empty_folder_and_a_zip_without_pictures(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    with pytest.raises(InvalidDataset, match="holds no pictures"):
        store_dataset(artifacts, tmp_path / "pets")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(InvalidDataset, match=r"a\.zip holds no pictures"):
        store_dataset(artifacts, tmp_path / "a.zip")


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pets")
    (folder / "dog" / "2.png").symlink_to(folder / "cat" / "1.png")
    assert "dog/2.png" in names(artifacts, store_dataset(artifacts, folder).uri)
    secret = picture(tmp_path / "secret.png")
    (folder / "dog" / "3.png").symlink_to(secret)
    with pytest.raises(InvalidDataset, match=r"dog/3\.png is a link that leads out of"):
        store_dataset(artifacts, folder)
    (folder / "dog" / "3.png").unlink()
    picture(tmp_path / "elsewhere" / "1.png")
    (folder / "fox").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidDataset, match="fox is a link that leads out of"):
        store_dataset(artifacts, folder)
    (tmp_path / "named").symlink_to(pictures(tmp_path / "really"))  # the folder itself may be one
    assert store_dataset(artifacts, tmp_path / "named").format == "pictures"


def test_a_large_folder_is_packed_in_constant_memory(artifacts: Artifacts, tmp_path: Path) -> None:
    for n in range(4):
        picture(tmp_path / "pets" / "cat" / f"{n}.png", os.urandom(16 << 20))
    tracemalloc.start()
    try:
        with opened(artifacts, tmp_path / "pets") as (dataset, upload):
            assert upload.size > 64 << 20
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dataset.format == "pictures"
    assert most < 16 << 20


# --- columns --------------------------------------------------------------------------------------------------------


def test_lists_become_json_lines(artifacts: Artifacts) -> None:
    columns = {"text": ["ü", None], "n": (1, np.int64(2)), "x": [0.5, np.float32(1.5)], "ok": [True, False],
               "v": [[1, 2], [3.5]]}  # fmt: skip
    dataset = store_dataset(artifacts, columns)
    assert dataset.format == "jsonl"
    assert [json.loads(line) for line in artifacts.get(dataset.uri).splitlines()] == [
        {"text": "ü", "n": 1, "x": 0.5, "ok": True, "v": [1, 2]},
        {"text": None, "n": 2, "x": 1.5, "ok": False, "v": [3.5]},
    ]
    assert store_dataset(artifacts, columns) == dataset


def test_arrays_become_npz_and_lists_beside_them_too(artifacts: Artifacts, tmp_path: Path) -> None:
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    columns = {"image": np.asfortranarray(image), "label": [3, 4], "name": np.array(["a", "ü"], dtype=object)}
    dataset = store_dataset(artifacts, columns)
    assert dataset.format == "npz"
    with np.load(io.BytesIO(artifacts.get(dataset.uri)), allow_pickle=False) as found:
        assert list(found) == ["image", "label", "name"]
        np.testing.assert_array_equal(found["image"], image)
        assert found["label"].tolist() == [3, 4]
        assert found["name"].tolist() == ["a", "ü"]
    assert store_dataset(artifacts, {**columns, "image": image}) == dataset
    np.savez(tmp_path / "a.npz", image=image)
    assert store_dataset(artifacts, tmp_path / "a.npz").format == "npz"


def test_tensors_are_arrays(artifacts: Artifacts) -> None:
    import torch

    dataset = store_dataset(artifacts, {"x": torch.ones(3, 2), "y": [0, 1, 0]})
    with np.load(io.BytesIO(artifacts.get(dataset.uri))) as found:
        assert found["x"].shape == (3, 2)
    with pytest.raises(InvalidDataset, match=r"column 'x' is no array: .*grad"):
        store_dataset(artifacts, {"x": torch.ones(3, requires_grad=True)})


@pytest.mark.parametrize(
    ("columns", "says", "place"),
    [
        ({}, "without columns", (None, None)),
        ({"a": []}, "without rows", (None, None)),
        ({"a": np.zeros((0, 3))}, "without rows", (None, None)),
        ({"a": [1, 2], "b": [1]}, "column 'b' has 1 rows, and 'a' has 2", ("b", None)),
        ({"a": np.zeros(2), "b": np.zeros(3)}, "column 'b' has 3 rows", ("b", None)),
        ({"a": "text"}, "column 'a' is a str", ("a", None)),
        ({"a": {1, 2}}, "column 'a' is a set", ("a", None)),
        ({"a": 3}, "column 'a' is a int", ("a", None)),
        ({1: [1]}, "named by strings", (None, None)),
        ({"": [1]}, "named by strings", (None, None)),
        ({"a": [1.0, float("nan")]}, "column 'a', row 1: nan is no number .*pass None", ("a", 1)),
        ({"a": [[1.0], [float("inf")]]}, "column 'a', row 1: inf", ("a", 1)),
        ({"a": [1], "b": [object()]}, "column 'b', row 0: a object cannot be stored", ("b", 0)),
        ({"a": [b"x"]}, "column 'a', row 0: a bytes", ("a", 0)),
        ({"a": [2**64]}, "column 'a', row 0: a int", ("a", 0)),
        ({"a": ["\ud800"]}, "row 0 cannot be stored", (None, 0)),
        ({"a": np.array(["x", None], dtype=object)}, "column 'a' holds Python objects, such as None", ("a", 1)),
        ({"a": np.array([[object()]], dtype=object)}, "column 'a' holds Python objects", ("a", None)),
        ({"a": np.zeros(3, dtype=complex)}, "column 'a' has the dtype complex128", ("a", None)),
        ({"a": np.zeros(3, dtype="datetime64[s]")}, "column 'a' has the dtype datetime64", ("a", None)),
        ({"a": np.float64(3)}, "column 'a' has no rows", ("a", None)),
        ({"a": np.zeros(2), "b": [[1], [1, 2]]}, "column 'b' is no array", ("b", None)),
    ],
)
def test_columns_that_cannot_be_stored_are_named(
    artifacts: Artifacts, tmp_path: Path, columns: Any, says: str, place: tuple[str | None, int | None]
) -> None:
    with pytest.raises(InvalidDataset, match=says) as caught:
        store_dataset(artifacts, columns)
    assert (caught.value.column, caught.value.row) == place
    assert not (tmp_path / "artifacts").exists()


def test_a_frame_is_told_how_to_be_passed(artifacts: Artifacts) -> None:
    class Frame:
        def to_dict(self, how: str) -> dict[str, list[int]]:
            return {"a": [1]}

    frame: Any = Frame()
    with pytest.raises(InvalidDataset, match=r"frame\.to_dict\('list'\)"):
        store_dataset(artifacts, frame)
    assert store_dataset(artifacts, frame.to_dict("list")).format == "jsonl"


def test_numpy_is_imported_for_arrays_only(tmp_path: Path) -> None:
    picture(tmp_path / "pets" / "cat" / "1.png")
    code = (
        "import sys\n"
        "from torchrelay.datasets import store_dataset\n"
        "from torchrelay_storage.artifacts import Artifacts\n"
        "artifacts = Artifacts('memory://')\n"
        "store_dataset(artifacts, {'a': [1, 2]})\n"
        f"store_dataset(artifacts, {str(tmp_path / 'pets')!r})\n"
        "assert not {'numpy', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- URIs -----------------------------------------------------------------------------------------------------------


def test_a_uri_of_the_store_or_below_a_root(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    there = store_dataset(artifacts, tmp_path / "a.csv").uri
    dataset = store_dataset(artifacts, there)
    assert (dataset.uri, dataset.format, dataset.sha256) == (there, "csv", None)
    roots = ["file:///data", "s3://bucket/sets"]
    assert store_dataset(artifacts, "file:///data/b.parquet", roots).format == "parquet"
    assert store_dataset(artifacts, "s3://bucket/sets/2026/pets.zip", roots).format == "pictures"
    with pytest.raises(InvalidDataset, match="there is nothing at"):
        store_dataset(artifacts, f"{artifacts.url}/datasets/none.csv")
    with pytest.raises(InvalidDataset, match="does not end as a dataset"):
        store_dataset(artifacts, "file:///data/b.pkl", roots)


@pytest.mark.parametrize(
    "uri",
    [
        "file:///etc/passwd.csv",
        "file:///data/../etc/a.csv",
        "file:///data/%2e%2e/etc/a.csv",
        "file:///data/.\n./etc/a.csv",
        "file:///data%2f..%2fetc/a.csv",
        "file:///data/a.csv?x",
        "file:///data/a.csv#x",
        "file:///data//a.csv",
        "file:///database/a.csv",
        "file://host/data/a.csv",
        "s3://bucket/a.csv",
        "s3://other/sets/a.csv",
        "s3://bucket/sets",
        "https://example.com/a.csv",
        "memory:///a.csv",
        "s3://[/a.csv",
    ],
)
def test_a_uri_outside_is_refused(artifacts: Artifacts, uri: str) -> None:
    with pytest.raises(InvalidDataset, match="lies outside of what runs may read"):
        store_dataset(artifacts, uri, ["file:///data", "s3://bucket/sets"])


def test_what_is_inside() -> None:
    assert inside("file:///data/my%20sets/a.csv", ["file:///data/my sets"])
    assert inside("file://localhost/data/a.csv", ["file:///data/"])
    assert inside("s3://bucket/a.csv", ["s3://bucket"])
    assert not inside("s3://bucket/", ["s3://bucket"])
    assert not inside("s3://bucket", ["s3://bucket"])


# --- pretrained weights ---------------------------------------------------------------------------------------------


def test_pretrained_weights_as_a_folder_a_zip_file_and_a_uri(artifacts: Artifacts, tmp_path: Path) -> None:
    def upload(source: str) -> uploads.Upload:
        with pretrained.opened(artifacts, source, ["file:///data"]) as found:
            found.send(artifacts)
            return found

    for name in (*pretrained.NEEDED, "README.md"):
        picture(tmp_path / "bert" / name, name.encode())
    sent = upload(str(tmp_path / "bert"))
    assert names(artifacts, sent.uri) == list(pretrained.NEEDED)
    assert sent.uri.startswith(f"{artifacts.url}/pretrained/")
    (tmp_path / "bert.zip").write_bytes(artifacts.get(sent.uri))
    assert upload(str(tmp_path / "bert.zip")).uri == sent.uri
    assert upload(sent.uri).uri == sent.uri
    assert upload("file:///data/bert.zip").local is None

    (tmp_path / "bert" / "tokenizer.json").unlink()
    (tmp_path / "a.csv").write_text("x")
    for source, says in (
        (str(tmp_path / "bert"), r"has no tokenizer\.json"),
        (str(tmp_path / "none"), "no file or folder"),
        (str(tmp_path / "a.csv"), "no zip file"),
        ("bert-base-uncased", "no file or folder bert-base-uncased"),
        ("https://example.com/bert.zip", "outside of what runs may read"),
        (f"{artifacts.url}/pretrained/none.zip", "nothing at"),
    ):
        with pytest.raises(InvalidHyperparameter, match=says) as caught:
            upload(source)
        assert caught.value.key == "pretrained"
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("bert/config.json", "{}")
    with pytest.raises(InvalidHyperparameter, match=r"no config\.json and no model\.safetensors"):
        upload(str(tmp_path / "b.zip"))
