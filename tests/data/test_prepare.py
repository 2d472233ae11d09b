"""``fednorm data prepare``: replicas of official archives become folders that benchmarks read; faults are told."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow.parquet as pq
import pytest
import replicas
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from fednorm.cards import DATA
from fednorm.config import DataConfig
from fednorm.data import Domain, Split, load_federation
from fednorm.data.benchmarks import Loaded, Reader
from fednorm.data.prepare import RECIPES, Archive, prepare, preparing, writing
from fednorm.data.prepare.domainnet import FEDBN
from fednorm.errors import DataError, UnknownNameError

Members = Mapping[str, bytes]
S = 6


def read(name: str, directory: Path, **config: Any) -> Loaded:
    return DATA[name].read(Reader(DataConfig(name=name, dir=str(directory), **config), S))


def levels(split: Split) -> list[tuple[int, int]]:
    """Return each image's level and label."""
    images, labels = split.batch(torch.arange(len(split)))
    return list(zip(images[:, 0, 2, 2].tolist(), labels.tolist(), strict=True))


def domain(loaded: Loaded, name: str) -> Domain:
    return next(domain for domain in loaded.domains if domain.name == name)


def content_of(directory: Path) -> dict[str, str]:
    """Return every file of a folder by its digest."""
    files = sorted(path for path in directory.rglob("*.parquet"))
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas have not the published archives' sums; a test of the sums puts them back."""
    for recipe in RECIPES.values():
        plain = replace(recipe, archives=tuple(Archive(archive.name) for archive in recipe.archives))
        monkeypatch.setitem(preparing.RECIPES, recipe.name, plain)  # type: ignore[arg-type]


# Every recipe ---------------------------------------------------------------------------------------------------------

PACKED: dict[str, Callable[[Path], object]] = {
    "domainnet": lambda folder: _domainnet(folder),
    "officehome": lambda folder: replicas.zipped(folder / "OfficeHomeDataset_10072016.zip", replicas.officehome()),
    "camelyon17": lambda folder: replicas.tarred(folder / "camelyon17_v1.0.tar.gz", replicas.camelyon17()),
    "digits_five": lambda folder: replicas.zipped(folder / "Digit-Five.zip", replicas.digits_five()),
    "tiny_imagenet": lambda folder: replicas.zipped(folder / "tiny-imagenet-200.zip", replicas.tiny_imagenet()),
    "mini_imagenet": lambda folder: replicas.zipped(folder / "mini-imagenet.zip", replicas.mini_imagenet()),
    "core50": lambda folder: replicas.zipped(folder / "core50_128x128.zip", replicas.core50()),
    "clear10": lambda folder: [replicas.zipped(folder / name, own) for name, own in replicas.clear10().items()],
}
UNPACKED: dict[str, Callable[[], Members]] = {
    "domainnet": replicas.domainnet,
    "officehome": replicas.officehome,
    "camelyon17": replicas.camelyon17,
    "digits_five": replicas.digits_five,
    "tiny_imagenet": replicas.tiny_imagenet,
    "mini_imagenet": replicas.mini_imagenet,
    "core50": replicas.core50,
    "clear10": lambda: {name: x for members in replicas.clear10().values() for name, x in members.items()},
}

every_recipe = pytest.mark.parametrize("name", RECIPES)


def _domainnet(folder: Path) -> None:
    members = replicas.domainnet()
    for name in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"):
        replicas.zipped(folder / f"{name}.zip", {path: x for path, x in members.items() if path.startswith(f"{name}/")})
    replicas.unpacked(folder, {path: x for path, x in members.items() if path.endswith(".txt")})


@every_recipe
def test_packed_and_unpacked_become_the_same_folders_that_the_benchmark_reads(
    name: str, source: Path, out: Path, tmp_path: Path
) -> None:
    PACKED[name](source)
    written = prepare(name.replace("_", "-"), source, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(one.folder.name for one in written)
    replicas.unpacked(tmp_path / "bare", UNPACKED[name]())
    prepare(name, tmp_path / "bare", tmp_path / "other")
    assert content_of(out) == content_of(tmp_path / "other")
    loaded = read(name, out)
    federation = load_federation(DataConfig(name=name, dir=str(out)), image_size=S, seed=1)
    assert len(federation.training_clients) == len(loaded.domains)
    assert loaded.num_classes == len(loaded.class_names) == written[0].classes
    sums = json.loads((written[0].folder / "prepared.json").read_text())["archives"]
    assert all(len(entry["md5"]) == 32 and not entry["official"] for entry in sums)
    assert sums


@every_recipe
def test_what_is_there_is_not_written_over(name: str, source: Path, out: Path) -> None:
    PACKED[name](source)
    place = out / RECIPES[name].folders[-1]
    place.mkdir(parents=True)
    with pytest.raises(DataError, match=r"is there already, and nothing is written over\. Remove it"):
        prepare(name, source, out)
    assert list(out.iterdir()) == [place]


@every_recipe
def test_an_empty_source_is_told_what_it_should_hold(name: str, source: Path, out: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare(name, source, out)
    assert RECIPES[name].archives[0].name in str(error.value)
    assert RECIPES[name].source in str(error.value)
    assert not list(out.iterdir())


@every_recipe
def test_a_damaged_archive_leaves_nothing(name: str, source: Path, out: Path) -> None:
    PACKED[name](source)
    archive = max((path for path in source.iterdir() if path.suffix in (".zip", ".gz")), key=lambda p: p.stat().st_size)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged or incomplete"):
        prepare(name, source, out)
    assert not list(out.iterdir())


# Each data set --------------------------------------------------------------------------------------------------------


def test_domainnet_has_the_lists_splits_and_classes(source: Path, out: Path) -> None:
    _domainnet(source)
    prepare("domainnet", source, out)
    loaded = read("domainnet", out)
    assert loaded.class_names == ("aircraft_carrier", "bird")
    assert loaded.notes == ("DomainNet with 2 of its 345 classes.",)
    infograph = domain(loaded, "infograph")
    assert levels(infograph.train) == [(40, 0), (41, 0), (42, 0), (50, 1), (51, 1), (52, 1)]
    assert levels(infograph.test) == [(43, 0), (53, 1)]


def test_domainnet_in_part_is_numbered_anew(source: Path, out: Path) -> None:
    _domainnet(source)
    prepare("domainnet", source, out, domains=["sketch", "clipart"], classes=["bird"])
    loaded = read("domainnet", out)
    assert [domain.name for domain in loaded.domains] == ["clipart", "sketch"]
    assert (loaded.num_classes, loaded.class_names) == (1, ("bird",))
    assert levels(domain(loaded, "sketch").train) == [(210, 0), (211, 0), (212, 0)]
    assert len(FEDBN) == 10
    with pytest.raises(DataError, match="There is no class feather"):
        prepare("domainnet", source, out.parent / "more", classes=["fedbn"])
    with pytest.raises(DataError, match="There is no domain photo; there are clipart"):
        prepare("domainnet", source, out.parent / "more", domains=["photo"])


def test_officehome_is_split_by_class_with_a_fixed_seed(source: Path, out: Path) -> None:
    PACKED["officehome"](source)
    (written,) = prepare("officehome", source, out)
    assert written.domains == dict.fromkeys(("art", "clipart", "product", "real_world"), (8, 2))
    assert "split 80/20" in written.notes[0]
    loaded = read("officehome", out)
    assert loaded.class_names == ("Alarm_Clock", "Backpack")
    real = domain(loaded, "real_world")
    assert sorted(levels(real.train) + levels(real.test)) == [(150 + 10 * k + i, k) for k in (0, 1) for i in range(5)]
    assert [label for _, label in levels(real.test)] == [0, 1]


def test_camelyon17_has_its_metadata_s_hospitals_and_splits(source: Path, out: Path) -> None:
    PACKED["camelyon17"](source)
    (written,) = prepare("camelyon17", source, out)
    assert written.domains["hospital_0"] == (3, 1)
    assert written.domains["hospital_2"] == (8, 2)
    assert written.notes == ("hospital_2 has no split of its own: 80/20, stratified by class, by split seed 0.",)
    loaded = read("camelyon17", out)
    assert loaded.class_names == ("normal", "tumor")
    assert levels(domain(loaded, "hospital_3").train) == [(60, 0), (61, 1), (62, 0)]
    held = load_federation(
        DataConfig(name="camelyon17", dir=str(out), held_out="hospital_2"), image_size=S, seed=1
    ).clients[-1]
    assert (held.domain, len(held.train), len(held.test)) == ("hospital_2", 0, 10)  # all of it, as WILDS


def test_digits_five_has_every_form_of_matlab_file(source: Path, out: Path) -> None:
    PACKED["digits_five"](source)
    written = prepare("digits-five", source, out)
    assert [(one.folder.name, one.train, one.test) for one in written] == [
        (name, 5, 2) for name in ("mnist", "svhn", "usps", "syn", "mnistm")
    ]
    for name in ("digits_five", "digits"):
        loaded = read(name, out)
        assert loaded.title.startswith("Digits-Five (")
        for one in loaded.domains:
            assert one.train.targets.tolist() == [3, 1, 0, 9, 2], one.name
            assert one.test.targets.tolist() == [5, 0], one.name
    rows = pq.read_table(out / "svhn/train-00000-of-00001.parquet").column("image").to_pylist()
    mats = replicas.digits_five()
    first = np.asarray(Image.open(io.BytesIO(rows[0]["bytes"])))
    assert np.array_equal(first, loadmat(io.BytesIO(mats["Digit-Five/svhn_train_32x32.mat"]))["X"][..., 0])
    rows = pq.read_table(out / "usps/train-00000-of-00001.parquet").column("image").to_pylist()
    cells = loadmat(io.BytesIO(mats["Digit-Five/usps_28x28.mat"]))["dataset"]
    own = np.asarray(Image.open(io.BytesIO(rows[1]["bytes"])))
    assert np.array_equal(own, np.rint(cells[0][0][1, 0] * 255).astype(np.uint8))


def test_digits_five_lacks_no_domain(source: Path, out: Path) -> None:
    PACKED["digits_five"](source)
    prepare("digits-five", source, out, domains=["usps", "mnist"])
    assert sorted(path.name for path in out.iterdir()) == ["mnist", "usps"]
    with pytest.raises(DataError, match="Data set 'svhn' is not in"):
        read("digits_five", out)
    assert read("digits_five", out, domains=("mnist", "usps")).title == "of Digits-Five (mnist, usps)"


def test_tiny_imagenet_is_tested_on_its_validation_images(source: Path, out: Path) -> None:
    PACKED["tiny_imagenet"](source)
    (written,) = prepare("tiny-imagenet", source, out)
    assert (written.train, written.test) == (9, 3)
    loaded = read("tiny_imagenet", out)
    assert loaded.class_names == ("cat (n02124075)", "goldfish", "cat (n03000134)")
    (one,) = loaded.domains
    assert levels(one.train) == [(10 * k + i, k) for k in range(3) for i in range(3)]
    assert levels(one.test) == [(100, 0), (101, 1), (102, 2)]


def test_mini_imagenet_has_a_sixth_of_each_class_to_test_on(source: Path, out: Path) -> None:
    PACKED["mini_imagenet"](source)
    prepare("mini-imagenet", source, out)
    loaded = read("mini_imagenet", out)
    assert loaded.class_names == ("n001", "n002", "n011", "n012", "n021", "n022")
    (one,) = loaded.domains
    assert levels(one.test) == [(0, 0), (0, 1), (40, 2), (40, 3), (80, 4), (80, 5)]
    assert len(one.train) == 30


def test_core50_as_files_and_as_one_array_is_the_same(source: Path, out: Path, tmp_path: Path) -> None:
    PACKED["core50"](source)
    prepare("core50", source, out)
    loaded = read("core50", out)
    assert [one.name for one in loaded.domains] == ["s01", "s02"]
    assert loaded.class_names[:6] == (*(f"plug_adapter_{k}" for k in range(1, 6)), "mobile_phone_1")
    assert levels(domain(loaded, "s02").train) == [(51 + k, k) for k in range(50)]
    assert levels(domain(loaded, "s01").test) == levels(domain(loaded, "s02").test)
    assert levels(domain(loaded, "s01").test) == [(101 + k, k) for k in range(50)]
    replicas.unpacked(tmp_path / "array", replicas.core50_array())
    prepare("core50", tmp_path / "array", tmp_path / "other")
    other = read("core50", tmp_path / "other")
    for first, second in zip(loaded.domains, other.domains, strict=True):
        assert levels(first.train) == levels(second.train)
        assert levels(first.test) == levels(second.test)


def test_a_pickle_that_would_call_something_is_refused(source: Path, out: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "called"),)

    replicas.unpacked(source, {**replicas.core50_array(), "paths.pkl": pickle.dumps([Evil()])})
    with pytest.raises(DataError, match=r"paths\.pkl is no list of texts \(it asks for posix\.mkdir\)"):
        prepare("core50", source, out)
    assert not (tmp_path / "called").exists()


def test_clear10_has_its_buckets_in_the_order_of_time(source: Path, out: Path) -> None:
    PACKED["clear10"](source)
    (written,) = prepare("clear10", source, out)
    assert written.domains == {"bucket_01": (4, 2), "bucket_02": (4, 2), "bucket_10": (4, 2)}
    loaded = read("clear10", out)
    assert [one.name for one in loaded.domains] == ["bucket_01", "bucket_02", "bucket_10"]
    assert loaded.class_names == ("BACKGROUND", "baseball")
    assert levels(domain(loaded, "bucket_10").train) == [(200, 0), (201, 0), (205, 1), (206, 1)]


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_another_archive_than_the_published_one_is_refused(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    PACKED["tiny_imagenet"](source)
    with pytest.raises(DataError, match=r"has MD5 [0-9a-f]{32}, and the published archive has 90528d7ca1a48142e341f4e"):
        prepare("tiny-imagenet", source, out)
    assert not list(out.iterdir())
    recipe = RECIPES["tiny_imagenet"]
    own = hashlib.md5((source / "tiny-imagenet-200.zip").read_bytes()).hexdigest()
    known = replace(recipe, archives=(Archive("tiny-imagenet-200.zip", own),))
    monkeypatch.setitem(preparing.RECIPES, "tiny_imagenet", known)  # type: ignore[arg-type]
    (written,) = prepare("tiny-imagenet", source, out)
    (entry,) = json.loads((written.folder / "prepared.json").read_text())["archives"]
    assert entry == {"name": "tiny-imagenet-200.zip", "bytes": entry["bytes"], "md5": own, "official": True}


def test_an_archive_may_be_the_source_itself(source: Path, out: Path) -> None:
    path = replicas.zipped(source / "renamed.zip", replicas.officehome())
    (written,) = prepare("officehome", path, out)
    assert written.train == 32
    (source / "renamed.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match=r"is no archive that is read; expected one that ends with \.zip"):
        prepare("officehome", source / "renamed.rar", out.parent / "more")


def test_a_missing_file_of_a_list_is_named(source: Path, out: Path) -> None:
    _domainnet(source)
    (source / "clipart_train.txt").write_text("clipart/bird/none.jpg 1\n")
    with pytest.raises(DataError, match=r"has no file clipart/bird/none\.jpg"):
        prepare("domainnet", source, out)
    (source / "clipart_train.txt").write_text("clipart/bird/none.jpg one\n")
    with pytest.raises(DataError, match=r"clipart_train\.txt, line 1 is 'clipart/bird/none\.jpg one'; expected DOMAIN"):
        prepare("domainnet", source, out)
    (source / "clipart_train.txt").write_text("clipart/bird/a.jpg 0\nclipart/cat/b.jpg 0\n")
    with pytest.raises(DataError, match="line 2: class 0 is 'cat' and 'bird'"):
        prepare("domainnet", source, out)
    assert not list(out.iterdir())


def test_columns_that_are_missing_and_numbers_that_are_none(source: Path, out: Path) -> None:
    root = source / "camelyon17_v1.0"
    replicas.unpacked(source, replicas.camelyon17())
    text = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_text(text.replace("center", "hospital"))
    with pytest.raises(DataError, match=r"metadata\.csv has no column center; expected patient, node"):
        prepare("camelyon17", source, out)
    (root / "metadata.csv").write_text(text.replace("004", "four", 1))
    with pytest.raises(DataError, match=r"metadata\.csv, line 2 is not of whole numbers"):
        prepare("camelyon17", source, out)


def test_matlab_files_that_do_not_fit_together(source: Path, out: Path) -> None:
    replicas.unpacked(source, replicas.digits_five())
    path = source / "Digit-Five/svhn_test_32x32.mat"
    savemat(path, {"X": np.zeros((32, 32, 3, 4), dtype=np.uint8), "y": np.zeros((3, 1))})
    with pytest.raises(DataError, match="there are 4 images and 3 labels"):
        prepare("digits-five", source, out)
    savemat(path, {"X": np.zeros((32, 32, 3, 4), dtype=np.uint8)})
    with pytest.raises(DataError, match=r"svhn_test_32x32\.mat has no variable y"):
        prepare("digits-five", source, out)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        prepare("digits-five", source, out)
    assert not list(out.iterdir())


def test_a_full_disk_leaves_nothing(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PACKED["digits_five"](source)
    wrote = []

    def full(self: Any) -> None:
        if self.folder.name == "usps":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        wrote.append(self.folder.name)
        flush(self)

    flush = writing._Shards._flush
    monkeypatch.setattr(writing._Shards, "_flush", full)
    with pytest.raises(DataError, match=r"Cannot write to .*No space left on device\. Nothing half-made was kept"):
        prepare("digits-five", source, out)
    assert "svhn" in wrote
    assert not list(out.iterdir())


def test_folders_take_their_place_together(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PACKED["digits_five"](source)
    move = os.replace

    def refuse(here: Path, there: Path) -> None:
        if Path(there).name == "usps":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        move(here, there)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DataError, match="Cannot write to"):
        prepare("digits-five", source, out)
    assert not list(out.iterdir())


def test_what_a_kill_left_is_thrown_away_and_two_do_not_meet(source: Path, out: Path) -> None:
    PACKED["officehome"](source)
    replicas.unpacked(out / ".officehome.part" / "officehome", {"train-0.part": b"half"})
    with (
        filelock.FileLock(out / ".officehome.lock"),
        pytest.raises(DataError, match="Another process is preparing officehome"),
    ):
        prepare("officehome", source, out)
    prepare("officehome", source, out)
    assert [path.name for path in out.iterdir()] == ["officehome"]
    assert {path.suffix for path in (out / "officehome").iterdir()} == {".parquet", ".json"}


def test_many_images_become_several_shards(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GROUP_ROWS", 4)
    monkeypatch.setattr(writing, "SHARD_BYTES", 600)
    PACKED["officehome"](source)
    prepare("officehome", source, out)
    names = sorted(path.name for path in (out / "officehome").glob("train-*"))
    assert len(names) > 2
    assert names[0] == f"train-00000-of-{len(names):05d}.parquet"
    assert sum(len(one.train) for one in read("officehome", out).domains) == 32


def test_members_with_names_that_lead_elsewhere_write_nothing(source: Path, out: Path, tmp_path: Path) -> None:
    members = {**replicas.officehome(), "../../escaped.jpg": b"x", "/tmp/escaped-fednorm.jpg": b"x"}
    replicas.zipped(source / "OfficeHomeDataset_10072016.zip", members)
    prepare("officehome", source, out)
    assert not list(tmp_path.rglob("escaped*"))


def test_unknown_names_and_parts_that_are_none(source: Path, out: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"No recipe prepares 'office-home'\. Did you mean 'officehome'"):
        prepare("office-home", source, out)
    with pytest.raises(UnknownNameError, match="'cifar10-c' needs no preparing: fednorm explain cifar10-c says"):
        prepare("cifar10-c", source, out)
    with pytest.raises(DataError, match="Tiny-ImageNet has no domains to choose among"):
        prepare("tiny-imagenet", source, out, domains=["a"])
    with pytest.raises(DataError, match="CORe50 is prepared with all of its classes"):
        prepare("core50", source, out, classes=["a"])
    with pytest.raises(DataError, match="does not exist"):
        prepare("core50", source / "nowhere", out)
    assert not out.exists()


@every_recipe
@pytest.mark.parametrize("damage", ["cut", "a page"])
def test_a_damaged_image_is_named_and_leaves_nothing(name: str, damage: str, source: Path, out: Path) -> None:
    """The last image of each set: it is found whatever has been written before."""
    members = dict(UNPACKED[name]())
    images = [path for path in members if path.lower().endswith((".png", ".jpg", ".jpeg"))]
    if not images:
        pytest.skip("its images are arrays")
    last = next(path for path in reversed(images) if not path.startswith("tiny-imagenet-200/test/"))
    content = members[last]
    replicas.unpacked(source, members | {last: content[: len(content) // 2] if damage == "cut" else b"<html>gone"})
    with pytest.raises(DataError) as error:
        prepare(name, source, out)
    assert last in str(error.value)
    assert ": the image cannot be " in str(error.value)
    assert RECIPES[name].source in str(error.value)
    assert not list(out.iterdir())


def test_an_image_that_ends_in_another_way_is_looked_at(source: Path, out: Path) -> None:
    """Bytes after a JPEG file's end, as cameras write, and another format than its name says."""
    members = dict(replicas.officehome())
    first, second, *_ = (path for path in members if path.endswith(".jpg"))
    members |= {first: replicas.image(7, "JPEG") + b"\0\0more", second: replicas.image(9, "BMP")}
    replicas.unpacked(source, members)
    (written,) = prepare("officehome", source, out)
    assert (written.train, written.test) == (32, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,label\nn0010000000.jpg", "train.csv, line 2 has no label. Is it all there"),
        ("filename,label\n,n01\n", "train.csv, line 2 has no filename"),
        ("file,label\na.jpg,n01\n", "train.csv has no column filename; expected filename, label"),
        ('filename,label\n"' + "a" * 140_000, "train.csv is no table after line 1 (field larger"),
    ],
)
def test_a_list_that_was_cut_is_told_by_its_line(text: str, message: str, source: Path, out: Path) -> None:
    replicas.unpacked(source, replicas.mini_imagenet() | {"train.csv": text.encode()})
    with pytest.raises(DataError) as error:
        prepare("mini_imagenet", source, out)
    assert message in str(error.value)


def test_a_list_of_a_bucket_that_is_missing_is_called_missing(source: Path, out: Path) -> None:
    members = dict(UNPACKED["clear10"]())
    del members["train/labeled_metadata/1/baseball.json"]
    replicas.unpacked(source, members)
    with pytest.raises(
        DataError, match=r"has no file train/labeled_metadata/1/baseball\.json\. Is it all there\?"
    ) as error:
        prepare("clear10", source, out)
    assert "JSON" not in str(error.value)


def test_an_empty_image_is_named(source: Path, out: Path) -> None:
    members = dict(replicas.officehome())
    members["OfficeHomeDataset_10072016/Art/Backpack/00002.jpg"] = b""
    replicas.zipped(source / "OfficeHomeDataset_10072016.zip", members)
    with pytest.raises(DataError, match=r"Art/Backpack/00002\.jpg is empty"):
        prepare("officehome", source, out)
    assert zipfile.is_zipfile(source / "OfficeHomeDataset_10072016.zip")
