"""Parquet files of drawn schemas: every Arrow type of a column is read rightly or refused in a sentence."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednorm.config import DataConfig
from fednorm.data import load_federation
from fednorm.data.columns import ImageTable
from fednorm.data.folders import read_folder
from fednorm.data.source import align_classes, count_classes
from fednorm.errors import DataError

NAMES = ["cat", "dog", "fox", "owl"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(value: int) -> bytes:
    """Return a one-coloured bitmap of 1 x 1 pixel, written by hand because it is quick."""
    header = b"BM" + (58).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    info = (40).to_bytes(4, "little") + (1).to_bytes(4, "little") * 2 + (1 << 0).to_bytes(2, "little")
    return header + info + (24).to_bytes(2, "little") + bytes(24) + bytes([value] * 3) + b"\0"


def write(
    path: Path,
    labels: Any,
    *,
    names: Sequence[str] | None = None,
    column: str = "label",
    images: Any = None,
    metadata: bytes | None = None,
    **columns: Any,
) -> Path:
    """Write a file whose image of row i has the grey level i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = pa.array([{"bytes": picture(i), "path": None} for i in range(len(labels))], STRUCT)
    table = pa.table({"image": images, column: labels, **columns})
    if names is not None:
        feature = {"names": list(names), "_type": "ClassLabel"}
        metadata = json.dumps({"info": {"features": {column: feature}}}).encode()
    pq.write_table(table.replace_schema_metadata({b"huggingface": metadata} if metadata else None), path)
    return path


def folder(root: Path, train: Any, test: Any, **options: Any) -> Any:
    write(root / "d/train.parquet", train, **options)
    write(root / "d/test.parquet", test, **options)
    return read_folder(root, "d", 1, root / "cache")


@pytest.mark.parametrize(
    "labels",
    [
        *(pa.array([0, 1, 1, 0], getattr(pa, kind)()) for kind in ("int8", "uint8", "int16", "uint32", "uint64")),
        pa.array([False, True, True, False]),
        pa.array([0, 1, 1, 0]).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([1, 0, 0, 1], pa.int8()), pa.array([1, 0], pa.uint8())),
    ],
    ids=lambda labels: str(labels.type)[:30],
)
@pytest.mark.parametrize("column", ["label", "labels", "fine_label"])
def test_whole_numbers_of_every_type_are_labels(tmp_path: Path, labels: pa.Array, column: str) -> None:
    source = folder(tmp_path, labels, labels, column=column)
    assert source.labels.tolist() == [0, 1, 1, 0] * 2
    assert source.labels.dtype == np.int64
    assert source.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_are_class_names(tmp_path: Path, kind: pa.DataType) -> None:
    source = folder(tmp_path, pa.array(["owl", "cat", "dog", "cat"]).cast(kind), pa.array(["dog", "owl"]).cast(kind))
    assert source.class_names == ("cat", "dog", "owl")
    assert source.labels.tolist() == [2, 0, 1, 0, 1, 2]
    with pytest.raises(DataError, match=r"test\.parquet, row 1: label 'Cat' is none of the classes.*: cat, owl"):
        folder(tmp_path, pa.array(["owl", "cat"]).cast(kind), pa.array(["cat", "Cat"]).cast(kind))


def test_texts_that_are_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    texts = pa.array([str(k) for k in range(11)])
    assert folder(tmp_path, texts, texts).labels.tolist() == [*range(11)] * 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0.0, 1.0]), "must hold integers 0 to K - 1 or the classes' names.*it is double"),
        (pa.array([[0], [1]]), "it is list"),
        (pa.array([{"a": 0}, {"a": 1}]), "it is struct"),
        (pa.array([datetime.date(2020, 1, 1)] * 2), "it is date32"),
        (pa.array([decimal.Decimal(1)] * 2), "it is decimal128"),
        (pa.array([b"a", b"b"]), "it is binary"),
        (pa.nulls(2), "row 0: the label is missing"),
        (pa.array(["a", None]), "row 1: the label is missing"),
        (pa.array(["a", None]).dictionary_encode(), "row 1: the label is missing"),
        (pa.array([1, -1]), "row 1: label -1 is outside 0 to K - 1. It stands for a label that is kept secret"),
        (pa.array([1, 2**64 - 1], pa.uint64()), f"row 1: label {2**64 - 1} is outside"),
    ],
    ids=lambda value: str(value.type)[:20] if isinstance(value, pa.Array) else "",
)
def test_other_labels_are_refused_in_a_sentence(tmp_path: Path, labels: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=rf"train\.parquet.*{message}"):
        folder(tmp_path, labels, labels)


def test_names_decide_in_every_shard(tmp_path: Path) -> None:
    root = tmp_path / "d"
    write(root / "train-00000-of-00003.parquet", [0, 1, 2, 3], names=NAMES)
    write(root / "train-00001-of-00003.parquet", [0, 1, 2, 3], names=NAMES[::-1])
    write(root / "train-00002-of-00003.parquet", ["dog", "owl"])
    write(root / "test.parquet", [0, 1, 2, 3], names=["dog", "cat", "owl", "fox"])
    source = read_folder(tmp_path, "d", 1)
    assert source.class_names == tuple(NAMES)
    assert source.labels.tolist() == [0, 1, 2, 3, 3, 2, 1, 0, 1, 3, 1, 0, 3, 2]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0], ["cat", "dog", "fox", "ant"], r"'owl' only in .*'ant' only in .*test\.parquet"),
        ([0], [*NAMES, "ant"], r"names 5 classes and .* names 4.*'ant' only in"),
        ([0], None, "gives no class names.*which class its label 0 is, is not said"),
        (["ant"], None, "row 0: label 'ant' is none of the classes"),
        ([0], ["cat", "dog", "fox", "fox"], "names class 'fox' of column 'label' twice"),
    ],
)
def test_other_names_are_refused(tmp_path: Path, labels: list[Any], names: list[str] | None, message: str) -> None:
    write(tmp_path / "d/train.parquet", [0, 1], names=NAMES)
    write(tmp_path / "d/test.parquet", labels, names=names)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path, "d", 1)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), num_files=st.integers(1, 3))
def test_any_numbering_of_the_same_names_gives_the_same_classes(
    data: st.DataObject, num_files: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, expected = tmp_path_factory.mktemp("names"), []
    for domain in ("a", "b"):
        for name in [*(f"train-{i:05d}-of-{num_files:05d}" for i in range(num_files)), "test"]:
            order = data.draw(st.permutations(NAMES))
            classes = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
            kind = data.draw(st.sampled_from([pa.int64(), pa.uint8(), pa.dictionary(pa.int8(), pa.int32())]))
            # One row more in every file, so that no two are equal byte for byte.
            extra = pa.array([f"{domain}{name}"] * len(classes))
            labels = pa.array([order.index(name) for name in classes], pa.int64())
            labels = labels.dictionary_encode() if pa.types.is_dictionary(kind) else labels.cast(kind)
            write(root / domain / f"{name}.parquet", labels, names=order, extra=extra)
            expected += classes
    sources, notes = align_classes([read_folder(root, domain, 1, root / "cache") for domain in ("a", "b")])
    got = [source.class_names[label] for source in sources for label in source.labels]
    assert got == expected
    assert sources[0].class_names == sources[1].class_names
    assert notes == ()


def test_a_data_set_without_names_beside_a_named_one_is_said(tmp_path: Path) -> None:
    for name, names in (("a", NAMES), ("b", None), ("c", ["0", "1", "2", "3"])):
        for split in ("train", "test"):
            write(tmp_path / f"{name}/{split}.parquet", [0, 1, 2, 3], names=names)
    config = {"name": "folders", "dir": str(tmp_path)}
    federation = load_federation(DataConfig(**config, domains=("b", "a")), image_size=1, seed=1)
    assert "b does not name its classes: its labels are taken to mean those of a." in federation.notes
    assert load_federation(DataConfig(**config, domains=("b", "c")), image_size=1, seed=1).notes == ()
    with pytest.raises(DataError, match="not the same"):
        load_federation(DataConfig(**config, domains=("a", "c")), image_size=1, seed=1)


@pytest.mark.parametrize("top", [2**31, 2**40, 2**63 - 2])
def test_labels_that_are_ids_are_a_gap_at_once(tmp_path: Path, top: int) -> None:
    source = folder(tmp_path, [top, 2, 0, top], [top, 0])
    with pytest.raises(DataError, match=rf"go up to {top}, but no image has label 1, 3, 4, .*, and {top - 10} more\."):
        count_classes([source])


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (b"{not JSON", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"info": ' * 50_000 + b"1" + b"}" * 50_000, "cannot be read"),
        (b"[1]", "cannot be read"),
        (b'{"info": 5}', "cannot be read"),
        (b'{"info": {"features": [1]}}', "cannot be read"),
        (b'{"info": {"features": {"label": {"names": {"0": "a"}}}}}', "names of column 'label'"),
        (b'{"info": {"features": {"label": {"names": [[1], null]}}}}', "names of column 'label'"),
    ],
    ids=range(9),
)
def test_unreadable_metadata_are_refused_in_a_sentence(tmp_path: Path, metadata: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"train\.parquet.*{reason}"):
        folder(tmp_path, [0, 1], [0, 1], metadata=metadata)


@pytest.mark.parametrize("metadata", [b"{}", b'{"info": {}}', b'{"info": {"features": {"label": 7, "x": null}}}'])
def test_metadata_that_name_no_classes_are_none(tmp_path: Path, metadata: bytes) -> None:
    assert folder(tmp_path, [0, 1], [0, 1], metadata=metadata).class_names == ()


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.large_binary())]), pa.struct([("bytes", pa.binary(58))])],
    ids=str,
)
def test_image_bytes_of_every_binary_type_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    contents: list[Any] = [picture(7), picture(9)]
    if pa.types.is_struct(kind):
        contents = [{"bytes": content} for content in contents]
    source = folder(tmp_path, [0, 1], [0, 1], images=pa.array(contents, kind))
    assert source.images[:, 1, 0, 0].tolist() == [7, 9, 7, 9]


@pytest.mark.parametrize(
    "images",
    [
        pa.array(["a.png", "b.png"]),
        pa.array([{"bytes": "text"}] * 2),
        pa.array([{"bytes": [1, 2]}] * 2),
        pa.array([{"path": "a"}] * 2),
        pa.array([[[1, 2]], [[3]]]),
        pa.array([1, 2]),
        pa.nulls(2),
    ],
    ids=lambda images: str(images.type)[:20],
)
def test_other_images_are_refused_in_a_sentence(tmp_path: Path, images: pa.Array) -> None:
    with pytest.raises(DataError, match=r"train\.parquet: column 'image' must be a struct with a field 'bytes'"):
        folder(tmp_path, [0, 1], [0, 1], images=images)


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        (pa.array(["cam", "web"]).dictionary_encode(), ["cam", "web"]),
        (pa.array(["cam", "web"], pa.large_string()), ["cam", "web"]),
        (pa.array([7, 8], pa.uint8()), ["7", "8"]),
        (pa.array([1.5, 2.5]), "must hold the domains' names as text, or whole numbers; it is double"),
        (pa.array([["a"], ["b"]]), "it is list"),
        (pa.array([True, False]), "it is bool"),
        (pa.array(["cam", None]), "row 1: domain None"),
        (pa.array(["cam", " "]), "row 1: domain ' ' is none of a name"),
        (pa.array(["cam", "\x1b[2J"]), "row 1: domain .* is none of a name"),
        (pa.array(["cam", "x" * 10**6]), "row 1: domain 'xxxxxxxxxxxxxxxxxxxx...' is none of a name"),
    ],
)
def test_domains_of_every_type(tmp_path: Path, domain: pa.Array, expected: Any) -> None:
    if isinstance(expected, list):
        assert folder(tmp_path, [0, 1], [0, 1], domain=domain).domains.tolist() == expected * 2
        return
    with pytest.raises(DataError, match=rf"train\.parquet.*{expected}"):
        folder(tmp_path, [0, 1], [0, 1], domain=domain)


def test_domains_that_the_metadata_name(tmp_path: Path) -> None:
    features = {"domain": {"names": ["cam", "web"], "_type": "ClassLabel"}}
    metadata = json.dumps({"info": {"features": features}}).encode()
    assert folder(tmp_path, [0, 1], [0, 1], metadata=metadata, domain=[1, 0]).domains.tolist() == ["web", "cam"] * 2
    assert folder(tmp_path, [0, 1], [0, 1], metadata=metadata, domain=["web", "cam"]).domains[0] == "web"
    for values in ([0, 2], [0, -1], ["cam", "dslr"]):
        with pytest.raises(DataError, match=r"row 1: domain .* is none of cam, web"):
            folder(tmp_path, [0, 1], [0, 1], metadata=metadata, domain=values)


def test_a_column_is_found_by_its_declared_type_or_the_rename_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    features = {"picture": {"_type": "Image"}, "digit": {"_type": "ClassLabel", "names": ["a", "b"]}}
    images = pa.array([{"bytes": picture(3)}])
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(pa.table({"picture": images, "digit": [1]}).replace_schema_metadata(metadata), path)
    table = ImageTable(path)
    assert table.labels()[0].tolist() == [1]
    assert table.class_names == ("a", "b")
    assert len(list(table.images())) == 1
    pq.write_table(pa.table({"image": images, "Label": [1]}), path)
    with pytest.raises(DataError, match=r"Rename it: table\.rename_columns\(\{'Label': 'label'\}\)"):
        ImageTable(path)
    pq.write_table(pa.Table.from_arrays([images, pa.array([1]), pa.array([0])], ["image", "label", "label"]), path)
    with pytest.raises(DataError, match="has 2 columns named 'label'"):
        ImageTable(path)


def test_no_rows_are_refused(tmp_path: Path) -> None:
    empty = pa.array([], pa.int64())
    write(tmp_path / "d/train.parquet", empty)
    write(tmp_path / "d/test.parquet", [0])
    with pytest.raises(DataError, match=r"d has no training images: train\.parquet hold no rows"):
        read_folder(tmp_path, "d", 1)


def test_images_of_different_sizes_are_resized(tmp_path: Path, write_file: Any) -> None:
    for split in ("train", "test"):
        images = [np.full((height, width, 3), 40 * height, np.uint8) for height, width in ((1, 1), (2, 5), (6, 3))]
        write_file(tmp_path / f"d/{split}.parquet", images, [0, 1, 0])
    source = read_folder(tmp_path, "d", 4)
    assert [set(image.ravel().tolist()) for image in source.images[:3]] == [{40}, {80}, {240}]


def test_a_footer_that_announces_other_rows_is_refused(tmp_path: Path) -> None:
    table = ImageTable(write(tmp_path / "x.parquet", [0, 1, 2]))
    for announced in (2, 4):
        table.num_rows = announced
        with pytest.raises(DataError, match=rf"x\.parquet announces {announced} rows and holds 3"):
            table.labels()
        with pytest.raises(DataError, match=rf"x\.parquet announces {announced} rows and holds 3"):
            list(table.images())
    table.num_rows = 10**15
    with pytest.raises(DataError, match=r"1,000,000,000,000,000 rows, would take 21\.3 PiB of memory"):
        table.labels()


def test_a_pointer_of_git_lfs_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(DataError, match=r"pointer of Git LFS.*git lfs pull"):
        ImageTable(path)


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**63 - 1), st.integers(0, 3), st.floats(), st.text(max_size=3),
    st.binary(max_size=3), st.lists(st.integers(0, 3), max_size=2), st.dates(), st.just({"bytes": picture(5)}),
)  # fmt: skip
_NAMES = st.sampled_from(["image", "img", "label", "labels", "fine_label", "domain", "extra", ""])
_COLUMNS = st.dictionaries(_NAMES, st.lists(_VALUES, min_size=2, max_size=2), max_size=5)
_JSON = st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=2))
_FEATURES = st.dictionaries(
    _NAMES, _JSON | st.fixed_dictionaries({"_type": st.sampled_from(["Image", "ClassLabel"]), "names": _JSON})
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(columns=_COLUMNS, features=_FEATURES, good=st.sets(st.sampled_from(["image", "label"])))
def test_any_schema_is_read_or_refused(
    columns: dict[str, list[Any]],
    features: dict[str, Any],
    good: set[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    arrays = {}
    for name, values in columns.items():
        with contextlib.suppress(pa.ArrowException, OverflowError):
            arrays[name] = pa.array(values)
    if "image" in good:
        arrays["image"] = pa.array([{"bytes": picture(1)}, {"bytes": picture(2)}], STRUCT)
    if "label" in good:
        arrays["label"] = pa.array([0, 1])
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path = tmp_path_factory.getbasetemp() / "schema.parquet"
    try:
        pq.write_table(pa.table(arrays).replace_schema_metadata(metadata), path)
    except pa.ArrowException:
        return  # what cannot be written cannot be read
    with contextlib.suppress(DataError):
        table = ImageTable(path)
        labels, names = table.labels()
        assert labels.dtype == np.int64
        assert labels.min() >= 0
        assert not names or labels.max() < len(names)
        domains = table.domains()
        assert domains is None or (len(domains) == 2 and all(domains))
        assert len(list(table.images())) == 2


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp() / "damaged.parquet", [0, 1, 2, 3], names=NAMES, domain=["a", "b"] * 2)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        table = ImageTable(path)
        assert len(table.labels()[0]) == table.num_rows
        domains = table.domains()
        assert domains is None or len(domains) == table.num_rows
        assert len(list(table.images())) == table.num_rows
