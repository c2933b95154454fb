"""Datasets as tables: what each format gives, and which column and row are named where one is malformed."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from torchrelay_storage.errors import InvalidDataset
from torchrelay_storage.run_spec import Format
from torchrelay_worker.training import pictures
from torchrelay_worker.training.data import Table, read
from torchrelay_worker.training.pictures import Pictures


def csv(folder: Path, text: str | bytes, format: Format = "csv") -> Table:
    path = folder / "data"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read(path, format)


def refused(call: Any, *, column: str | None = None, row: int | None = None, says: str = ".") -> InvalidDataset:
    with pytest.raises(InvalidDataset, match=says) as caught:
        call()
    assert (caught.value.column, caught.value.row) == (column, row), str(caught.value)
    return caught.value


# --- CSV ----------------------------------------------------------------------------------------------------


def test_a_csv_column_is_what_it_looks_like(tmp_path: Path) -> None:
    table = csv(tmp_path, "n,x,b,t,code\n1,0.5,true,null,007\n2,1e3,False,NA,12\n3, 7 ,true,,9\n")
    assert table.columns == ("n", "x", "b", "t", "code")
    assert len(table) == 3
    assert table.column("n").dtype == np.int64
    assert table.column("x").tolist() == [0.5, 1000.0, 7.0]
    assert table.column("b").tolist() == [True, False, True]
    assert table.column("t") == ["null", "NA", None]  # zero in German, Namibia; only what is empty is missing
    assert table.column("code") == ["007", "12", "9"]
    assert table.texts("n") == ["1", "2", "3"]
    assert table.numbers("b").tolist() == [1, 0, 1]


def test_quotes_newlines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    table = csv(tmp_path, b'\xef\xbb\xbftext,n\r\n"one, two\nthree",1\r\n"""quoted""",2\r\n')
    assert table.texts("text") == ["one, two\nthree", '"quoted"']
    assert table.column("n").tolist() == [1, 2]


def test_tsv_is_separated_by_tabs(tmp_path: Path) -> None:
    assert csv(tmp_path, "a\tb\n1,5\tx\n", "tsv").column("a") == ["1,5"]


@pytest.mark.parametrize("missing", ["", "NaN", "NA", "null", "?"])
def test_a_missing_number_is_named(tmp_path: Path, missing: str) -> None:
    table = csv(tmp_path, f"a,bmi\n1,2.5\n2,{missing}\n3,1\n")
    assert np.isnan(table.column("bmi")[1])
    refused(lambda: table.numbers("bmi"), column="bmi", row=1, says="nothing, or NaN")


def test_a_text_and_an_infinity_among_numbers_are_named(tmp_path: Path) -> None:
    table = csv(tmp_path, "a,b\n1,1\n2,inf\nabc,3\n")
    refused(lambda: table.numbers("a"), column="a", row=2, says="text 'abc' in row 2")
    refused(lambda: table.numbers("b"), column="b", row=1, says="infinite")


def test_a_row_of_another_width_is_named(tmp_path: Path) -> None:
    refused(lambda: csv(tmp_path, "a,b\n1,2\n3,4\n5\n6,7\n"), row=2, says="1 fields where the header has 2")
    many = "a,b\n" + "1,2\n" * 300_000
    refused(lambda: csv(tmp_path, many + "1,2,3\n"), row=300_000, says="3 fields")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "empty"),
        (b"a,b\n", "empty"),
        (b"\n", "cannot be read"),
        (b"a,b\n1,\xff\n", "UTF8"),
        (b"a,a\n1,2\n", "'a'"),
    ],
)
def test_what_is_no_csv_is_refused(tmp_path: Path, text: bytes, says: str) -> None:
    with pytest.raises(InvalidDataset, match=says):
        csv(tmp_path, text)


def test_a_column_that_is_not_there_tells_near_names(tmp_path: Path) -> None:
    table = csv(tmp_path, "age,target\n1,2\n")
    refused(lambda: table.column("targt"), column="targt", says="did you mean 'target'")
    refused(lambda: table.column("zzz"), column="zzz", says="it has 'age', 'target'")


# --- labels -------------------------------------------------------------------------------------------------


def test_labels_keep_their_type() -> None:
    assert Table({"y": np.array([0, 2, 1], dtype=np.uint8)}).classes("y") == [0, 2, 1]
    assert Table({"y": [1.0, 2.0]}).classes("y") == [1, 2]
    assert Table({"y": ["b", "a"]}).classes("y") == ["b", "a"]
    assert Table({"y": np.array(["b", "a"])}).classes("y") == ["b", "a"]
    assert all(type(label) is bool for label in Table({"y": [True, False]}).classes("y"))


def test_what_is_no_label_is_named() -> None:
    refused(lambda: Table({"y": ["a", None]}).classes("y"), column="y", row=1, says="label is missing")
    refused(lambda: Table({"y": [1, None, 2]}).classes("y"), column="y", row=1, says="label is missing")
    refused(lambda: Table({"y": [1.0, 0.5]}).classes("y"), column="y", row=1, says="use the recipe regression")
    refused(lambda: Table({"y": np.zeros((2, 3))}).classes("y"), column="y", says="one label a row")


# --- JSON Lines ---------------------------------------------------------------------------------------------


def jsonl(folder: Path, *rows: Any) -> Table:
    return csv(folder, "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "jsonl")


def test_json_lines_have_types_and_may_miss_keys(tmp_path: Path) -> None:
    table = jsonl(tmp_path, {"a": 1, "t": "2020-01-01"}, "", {"a": 2.5, "t": "x", "more": [[1, 2], [3, 4]]})
    assert table.columns == ("a", "t", "more")
    assert table.column("a").tolist() == [1.0, 2.5]
    assert table.column("t") == ["2020-01-01", "x"]
    refused(lambda: table.column("more"), column="more", row=0, says="misses a list")
    assert jsonl(tmp_path, {"p": [[1, 2], [3, 4]]}).column("p").shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("rows", "column", "row", "says"),
    [
        (['{"a": 1}', "{a}"], None, 1, "row 1 .line 2. is no JSON"),
        (['{"a": NaN}'], None, 0, "no JSON"),
        (["[1]"], None, 0, "no JSON object"),
        ([{"a": 1}, {"a": 2}, {"a": "x"}], "a", 2, "'x' in row 2"),
        ([{"a": {"b": 1}}], "a", None, "type struct"),
        ([{"a": -1}, {"a": 2**63}], "a", 1, "row 1"),
        ([""], None, None, "empty"),
        (['"\xff"'.encode("latin-1").decode("latin-1")], None, 0, "no JSON object"),
    ],
)
def test_what_is_no_json_lines_is_named(
    tmp_path: Path, rows: list[Any], column: str | None, row: int, says: str
) -> None:
    def look() -> None:
        table = jsonl(tmp_path, *rows)
        for name in table.columns:
            table.column(name)

    refused(look, column=column, row=row, says=says)


def test_ragged_rows_are_named(tmp_path: Path) -> None:
    table = jsonl(tmp_path, {"p": [[1, 2], [3, 4]]}, {"p": [[1, 2], [3, 4]]}, {"p": [[1, 2], [3]]})
    refused(lambda: table.column("p"), column="p", row=2, says="ragged")
    refused(lambda: Table({"p": [np.zeros(3), np.zeros(4)]}), column="p", row=1, says="ragged")
    refused(lambda: Table({"p": [["a"], ["b"]]}).column("p"), column="p", says="lists of texts")


# --- Parquet ------------------------------------------------------------------------------------------------


def test_parquet_has_types(tmp_path: Path) -> None:
    columns = {
        "i": pa.array([1, None, 3], pa.int32()),
        "c": pa.array(["a", "b", "a"]).dictionary_encode(),
        "d": pa.array([1, 2, 3]).cast(pa.decimal128(21, 2)),
        "when": pa.array([0, 1, None], pa.date32()),
        "l": pa.array([[1, 2]] * 3, pa.list_(pa.float32(), 2)),
        "none": pa.nulls(3),
        "b": pa.array([True, None, False]),
    }
    path = tmp_path / "day=3.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=1)
    table = read(path, "parquet")
    assert table.columns == tuple(columns)
    assert np.isnan(table.column("i")[1])
    assert table.column("c") == ["a", "b", "a"]
    assert table.column("d").tolist() == [1.0, 2.0, 3.0]
    assert table.column("when") == ["1970-01-01", "1970-01-02", None]
    assert table.column("l").shape == (3, 2)
    assert table.column("none") == [None] * 3
    refused(lambda: table.numbers("b"), column="b", row=1)
    refused(lambda: csv(tmp_path, b"PAR1 and nothing else", "parquet"), says="cannot be read as parquet")


def test_pictures_in_parquet_are_unpacked_when_they_are_asked_for(tmp_path: Path) -> None:
    cells = [{"bytes": png((4, 3), 7), "path": "a.png"}, {"bytes": b"no picture", "path": "b.png"}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "p.parquet")
    column = read(tmp_path / "p.parquet", "parquet").column("image")
    assert isinstance(column, Pictures)
    assert column[0].tolist() == [[7] * 4] * 3
    refused(lambda: column[1], column="image", row=1, says="row 1 of column 'image'")


# --- NumPy --------------------------------------------------------------------------------------------------


def npz(folder: Path, **arrays: Any) -> Table:
    np.savez(folder / "d.npz", **arrays)
    return read(folder / "d.npz", "npz")


def test_npz_arrays_are_columns(tmp_path: Path) -> None:
    table = npz(tmp_path, image=np.ones((5, 8, 8), dtype=">f4"), label=np.arange(5), name=np.array(list("abcde")))
    assert table.column("image").shape == (5, 8, 8)
    assert table.column("image").dtype == np.float32
    assert table.column("image").dtype.isnative
    assert table.column("name") == list("abcde")
    refused(lambda: table.numbers("image"), column="image", says=r"shape \[8, 8\]")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_in_no_npz_is_named(tmp_path: Path) -> None:
    ragged = np.empty(2, dtype=object)
    ragged[:] = [[1], [1, 2]]
    refused(lambda: npz(tmp_path, ok=np.ones(2), bad=ragged), column="bad", says="never unpickled")
    refused(lambda: npz(tmp_path, a=np.ones(2), b=np.ones(3)), column="b", says="3 rows where column 'a' has 2")
    refused(lambda: npz(tmp_path, a=np.ones(2), b=np.float64(1)), column="b", says="single value")
    refused(lambda: npz(tmp_path, a=np.ones(2, dtype=complex)), column="a", says="complex128")
    refused(lambda: npz(tmp_path), says="no columns")
    refused(lambda: csv(tmp_path, b"not a zip", "npz"), says="no .npz file")
    np.save(tmp_path / "one.npy", np.ones(3))
    refused(lambda: read(tmp_path / "one.npy", "npz"), says="no .npz file")


# --- pictures -----------------------------------------------------------------------------------------------


def png(size: tuple[int, int], level: Any = 0, mode: str = "L", format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, level).save(file, format)
    return file.getvalue()


def zipped(folder: Path, files: dict[str, bytes]) -> Table:
    with zipfile.ZipFile(folder / "p.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return read(folder / "p.zip", "pictures")


def test_a_zip_of_classes_is_a_table_of_pictures(tmp_path: Path) -> None:
    files = {
        "pets/dog/1.jpg": png((4, 4), (250, 0, 0), "RGB", "JPEG"),
        "pets/cat/2.png": png((4, 3), 9),
        "pets/cat/.hidden": b"",
        "__MACOSX/pets/cat/2.png": b"",
        "pets/cat/Thumbs.db": b"",
    }
    table = zipped(tmp_path, files)
    assert table.columns == ("image", "label")
    assert table.split_column is None
    assert table.classes("label") == ["cat", "dog"]
    images = table.column("image")
    assert isinstance(images, Pictures)
    assert [image.shape for image in images] == [(3, 4), (4, 4, 3)]
    assert images[0].tolist() == [[9] * 4] * 3
    assert images[-1].dtype == np.uint8
    assert len(images[0:2]) == 2


def test_train_and_validation_folders_are_a_split(tmp_path: Path) -> None:
    table = zipped(tmp_path, {f"{part}/{c}/1.png": png((4, 4)) for part in ("train", "val") for c in "ab"})
    assert table.split_column == "split"
    assert table.texts("split") == ["train", "train", "validation", "validation"]
    assert table.classes("label") == ["a", "b", "a", "b"]
    assert "split" not in table.without("split")
    assert table.without("split").split_column is None


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no pictures"),
        ({"a.png": b""}, "a.png lies elsewhere"),
        ({"train/x/1.png": b"", "x/1.png": b""}, "lies elsewhere"),
        ({"x/notes.txt": b""}, "x/notes.txt is no picture"),
    ],
)
def test_files_that_lie_elsewhere_are_named(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    with pytest.raises(InvalidDataset, match=says):
        zipped(tmp_path, files)


def test_a_damaged_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png((20_000, 20_000), mode="1")
    images = zipped(tmp_path, {"a/1.png": png((4, 4)), "a/2.png": png((9, 9))[:40], "a/3.png": bomb}).column("image")
    assert len(images[0]) == 4
    refused(lambda: images[1], column="image", row=1, says="a/2.png")
    refused(lambda: images[2], column="image", row=2, says="more than 50000000 pixels")
    monkeypatch.setattr(pictures, "MAX_FILE", 10)
    refused(lambda: images[0], column="image", row=0, says="more than 10 bytes")
    refused(lambda: csv(tmp_path, b"no zip", "pictures"), says="no zip file")


def test_a_damaged_zip_entry_is_named(tmp_path: Path) -> None:
    zipped(tmp_path, {"a/1.png": png((64, 64), 3)})
    data = bytearray((tmp_path / "p.zip").read_bytes())
    data[60] ^= 0xFF
    (tmp_path / "p.zip").write_bytes(data)
    images = read(tmp_path / "p.zip", "pictures").column("image")
    refused(lambda: images[0], column="image", row=0, says="a/1.png")


# --- any ----------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), min_size=1), min_size=1))
def test_texts_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    lines = "\n".join('"' + text.replace('"', '""') + '"' for text in texts)
    table = csv(tmp_path_factory.mktemp("csv"), f"t\n{lines}\n")
    assert table.texts("t") == texts


def test_lists_that_mix_types_name_the_row() -> None:
    refused(lambda: Table({"a": [1, 2, "x"]}), column="a", row=2)
    refused(lambda: Table({"a": 5}), column="a", says="int")
    refused(lambda: Table({}), says="no columns")
    refused(lambda: Table({"a": [object()]}), column="a", row=0)
    assert Table({"a": [np.float32(1.5), np.int64(2)]}).column("a").tolist() == [1.5, 2.0]
