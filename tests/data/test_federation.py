from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fednorm.config import DataConfig
from fednorm.data import DATA, Federation, load_federation, pixels
from fednorm.errors import DataError, UnknownNameError

TEN = [str(digit) for digit in range(10)]


def _load(directory: Path, *, seed: int = 1, image_size: int = 8, **options: Any) -> Federation:
    return load_federation(DataConfig(dir=str(directory), **options), image_size=image_size, seed=seed)


def _rows(federation: Federation, domain: str) -> list[list[list[int]]]:
    return [
        [split.index.tolist() for split in (client.train, client.validation, client.test)]
        for client in federation.clients
        if client.domain == domain
    ]


def test_digits_are_those_that_the_folder_holds(tmp_path: Path, write_folder: Any) -> None:
    for name in ("usps", "mnistm", "cifar10", "mnist"):
        write_folder(tmp_path, name, num_classes=10, names=TEN)
    federation = _load(tmp_path, name="digits")
    assert federation.title == "digits (mnist, usps, mnistm)"
    assert federation.domains == ("mnist", "usps", "mnistm")
    assert federation.num_classes == 10
    assert any("share digits with mnist images of the same split" in note for note in federation.notes)
    assert _load(tmp_path, name="digits", domains=("usps", "mnist")).domains == ("usps", "mnist")


def test_digits_five_is_exactly_the_papers_five(tmp_path: Path, write_folder: Any) -> None:
    five = ("mnist", "svhn", "usps", "syn", "mnistm")
    for name in (*five, "streetdigits"):
        write_folder(tmp_path, name, names=["0", "1"])
    assert _load(tmp_path, name="digits", domains=five).title == "Digits-Five (mnist, svhn, usps, syn, mnistm)"
    six, four = _load(tmp_path, name="digits"), _load(tmp_path, name="digits", domains=five[:4])
    assert six.title.startswith("digits (")
    assert four.title.startswith("digits (")
    assert any("it is not SVHN" in note for note in six.notes)


def test_a_missing_domain_is_named_with_what_is_there(tmp_path: Path, write_folder: Any) -> None:
    write_folder(tmp_path, "mnist")
    with pytest.raises(DataError, match=r"'usps' is not in .*holds mnist\. Expected .*usps/train-\*\.parquet"):
        _load(tmp_path, name="digits", domains=("mnist", "usps"))
    with pytest.raises(DataError, match="has no domain 'cifar10'; its domains: mnist, usps"):
        _load(tmp_path, name="digits", domains=("cifar10",))
    with pytest.raises(DataError, match="names 'mnist' more than once"):
        _load(tmp_path, name="digits", domains=("mnist", "mnist"))


def test_missing_folder_and_unknown_benchmark(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data-dir DIR"):
        load_federation(DataConfig(name="digits"), image_size=8, seed=1)
    with pytest.raises(DataError, match="does not exist"):
        _load(tmp_path / "nowhere", name="digits")
    with pytest.raises(DataError, match=r"holds none of mnist, .*no data set"):
        _load(tmp_path, name="digits")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.parquet").touch()
    (tmp_path / "data/test.parquet").touch()
    with pytest.raises(DataError, match=r"is one itself: name its parent .*, and data as domain"):
        load_federation(DataConfig(name="digits", dir=str(tmp_path / "data")), image_size=8, seed=1)
    for name, reason in (("~nobody-of-that-name/x", "home directory"), ("x" * 5000, "too long"), ("\0", "")):
        with pytest.raises(DataError, match=rf"The data folder .*{reason}"):
            load_federation(DataConfig(name="digits", dir=name), image_size=8, seed=1)
    with pytest.raises(UnknownNameError, match="Did you mean 'digits'"):
        _load(tmp_path, name="digit")


def test_all_clients_of_a_domain_share_one_array(tmp_path: Path, write_folder: Any) -> None:
    write_folder(tmp_path, "cifar10", num_train=60, num_test=20)
    federation = _load(tmp_path, name="cifar10", clients_per_domain=10, validation=0.2)
    splits = [split for c in federation.clients for split in (c.train, c.validation, c.test)]
    assert len({split.images.data_ptr() for split in splits}) == 1
    assert all(split.images is splits[0].images and split.labels is splits[0].labels for split in splits)
    images, labels = federation.clients[3].train.batch(torch.tensor([1, 0]))
    where = federation.clients[3].train.index[[1, 0]]
    assert torch.equal(images, splits[0].images[where])
    assert torch.equal(labels, splits[0].labels[where])
    scaled = pixels(images)
    np.testing.assert_allclose(scaled.numpy(), (images.numpy().astype(np.float64) / 255 - 0.5) / 0.5, atol=1e-6)


def test_train_and_test_rows_never_mix(tmp_path: Path, write_folder: Any) -> None:
    write_folder(tmp_path, "cifar10", num_train=60, num_test=20)
    federation = _load(tmp_path, name="cifar10", clients_per_domain=4, validation=0.2)
    assert sorted(row for c in _rows(federation, "cifar10") for row in c[0] + c[1]) == list(range(60))
    assert sorted(row for c in _rows(federation, "cifar10") for row in c[2]) == list(range(60, 80))


def test_another_domain_or_seed(tmp_path: Path, write_folder: Any) -> None:
    for name in ("mnist", "usps"):
        write_folder(tmp_path, name, num_train=40)
    options: dict[str, Any] = {"name": "digits", "clients_per_domain": 2, "validation": 0.2}
    alone = _load(tmp_path, domains=("usps",), **options)
    both = _load(tmp_path, domains=("mnist", "usps"), **options)
    assert _rows(alone, "usps") == _rows(both, "usps")
    assert _rows(both, "usps") != _rows(_load(tmp_path, seed=2, **options), "usps")
    assert [client.partition_id for client in both.clients] == [0, 1, 2, 3]


def test_a_held_out_domain_comes_last_and_only_evaluates(tmp_path: Path, write_folder: Any) -> None:
    for name in ("mnist", "usps", "syn"):
        write_folder(tmp_path, name, num_train=40)
    federation = _load(tmp_path, name="digits", held_out="mnist", clients_per_domain=2, validation=0.1)
    assert federation.domains == ("usps", "syn", "mnist")
    *training, last = federation.clients
    assert len(training) == 4
    assert not any(client.held_out for client in training)
    assert (last.held_out, last.partition_id, len(last.train), len(last.validation), len(last.test)) == (
        True,
        4,
        0,
        0,
        10,
    )
    assert federation.training_clients == tuple(training)
    plain = _load(tmp_path, name="digits", clients_per_domain=2, validation=0.1)
    assert _rows(plain, "usps") == _rows(federation, "usps")
    with pytest.raises(DataError, match="held_out is 'cat', which is no domain of this run: mnist, usps, syn"):
        _load(tmp_path, name="digits", held_out="cat")
    with pytest.raises(DataError, match="leaves no domain to train on"):
        _load(tmp_path, name="digits", domains=("usps",), held_out="usps")


def test_merging_is_80_20_and_does_not_depend_on_the_seed(tmp_path: Path, write_folder: Any) -> None:
    for name in ("mnist", "mnistm"):
        write_folder(tmp_path, name, num_train=60, num_test=40)
    options: dict[str, Any] = {"name": "digits", "merge": True}
    pools = [{tuple(sorted(r)) for c in _rows(_load(tmp_path, seed=s, **options), "mnist") for r in c} for s in (1, 2)]
    assert pools[0] == pools[1]
    capped = _load(tmp_path, train_per_client=30, **options)
    assert [(len(c.train), len(c.test)) for c in capped.clients] == [(30, 20)] * 2
    (mnist,) = _rows(capped, "mnist")
    assert set(mnist[0]) <= set(max(pools[0], key=len))
    assert any("80/20" in note for note in capped.notes)
    assert any("of either split" in note for note in capped.notes)


def test_folders_are_any_folders(tmp_path: Path, write_folder: Any) -> None:
    write_folder(tmp_path, "cats", num_classes=3)
    write_folder(tmp_path, "rooms", num_classes=3, domain=["web", "cam"] * 10)
    federation = _load(tmp_path, name="folders", domains=("cats", "rooms"), image_size=6)
    assert federation.title == "folders (cats, rooms.cam, rooms.web)"
    assert (federation.num_classes, federation.image_size) == (3, 6)
    assert federation.clients[0].train.images.shape == (30, 3, 6, 6)
    assert _load(tmp_path, name="folders", domains=("rooms.web",)).domains == ("rooms.web",)
    with pytest.raises(DataError, match=r"needs data\.domains.*holds cats, rooms"):
        _load(tmp_path, name="folders")
    with pytest.raises(DataError, match="has no domain 'x'; its domains: cam, web"):
        _load(tmp_path, name="folders", domains=("rooms.x",))
    with pytest.raises(DataError, match="no column 'domain'"):
        _load(tmp_path, name="folders", domains=("cats.x",))


def test_the_configured_size_wins(tmp_path: Path, write_folder: Any) -> None:
    write_folder(tmp_path, "cats")
    config = DataConfig(name="folders", dir=str(tmp_path), domains=("cats",), image_size=5)
    federation = load_federation(config, image_size=9, seed=1)
    assert federation.image_size == federation.clients[0].train.images.shape[-1] == 5


def test_labels_of_several_folders_must_agree(tmp_path: Path, write_folder: Any, write_file: Any) -> None:
    write_folder(tmp_path, "a", names=["cat", "dog"])
    write_folder(tmp_path, "b", names=["dog", "cat"])
    write_folder(tmp_path, "c", num_classes=3)
    first, second = _load(tmp_path, name="folders", domains=("a", "b")).clients
    assert first.train.labels.tolist() == (1 - second.train.labels).tolist()
    write_folder(tmp_path, "other", names=["cat", "fox"])
    with pytest.raises(DataError, match=r"'dog' only in .*a, 'fox' only in .*other"):
        _load(tmp_path, name="folders", domains=("a", "other"))
    with pytest.raises(DataError, match=r"c/train-00000-of-00001\.parquet, row 2: label 2 is outside 0 to 1"):
        _load(tmp_path, name="folders", domains=("a", "c"))
    image = np.zeros((4, 4, 3), np.uint8)
    for split in ("train", "test"):
        write_file(tmp_path / f"gap/{split}-0.parquet", [image] * 2, [0, 2])
    with pytest.raises(DataError, match="labels of gap go up to 2, but no image has label 1"):
        _load(tmp_path, name="folders", domains=("gap",))
    assert _load(tmp_path, name="folders", domains=("gap", "c")).num_classes == 3


def test_pacs_and_office_take_their_domains_from_the_column(tmp_path: Path, write_folder: Any) -> None:
    write_folder(tmp_path, "pacs3", domain=["photo", "cartoon"] * 10)
    federation = _load(tmp_path, name="pacs")
    assert federation.title == "PACS (cartoon, photo)"
    assert any("without art_painting, sketch" in note for note in federation.notes)
    write_folder(tmp_path, "office_caltech10", domain=["dslr", "webcam"] * 10)
    assert _load(tmp_path, name="office_caltech10", domains=("webcam", "dslr")).domains == ("webcam", "dslr")
    with pytest.raises(DataError, match="has no domain 'amazon'; its domains: dslr, webcam"):
        _load(tmp_path, name="office_caltech10", domains=("amazon",))


def test_every_benchmark_says_what_it_is() -> None:
    assert {
        "digits_mini",
        "digits",
        "office_caltech10",
        "pacs",
        "cifar10",
        "cifar100",
        "cifar10_c",
        "camelyon17",
        "clear10",
        "core50",
        "digits_five",
        "domainnet",
        "mini_imagenet",
        "officehome",
        "tiny_imagenet",
        "folders",
        "image_folders",
    } == set(DATA.names)
    assert all(DATA[name].name == name and DATA[name].summary for name in DATA.names)


@pytest.mark.data
def test_real_small_folders(real_data: Path) -> None:
    """Sizes and per-channel means as the data's README gives them."""
    federation = _load(real_data, name="digits", domains=("usps", "streetdigits"), image_size=16)
    usps, street = federation.clients
    assert (len(usps.train), len(usps.test)) == (7291, 2007)
    assert (len(street.train), len(street.test)) == (621, 264)
    mean = usps.train.images[usps.train.index].double().mean() / 255
    assert mean == pytest.approx(0.2539, abs=5e-4)


@pytest.mark.data
def test_real_office(real_data: Path) -> None:
    federation = _load(real_data, name="office_caltech10", image_size=32)
    sizes = {client.domain: len(client.train) + len(client.test) for client in federation.clients}
    assert sizes == {"amazon": 958, "caltech10": 1123, "dslr": 157, "webcam": 295}
    assert federation.num_classes == 10


def test_the_digest_tells_other_data_apart(tmp_path: Path, write_folder: Any) -> None:
    for folder in ("one", "same"):
        write_folder(tmp_path / folder, "mnist", num_classes=10, names=TEN)
    one, same = (_load(tmp_path / folder, name="digits") for folder in ("one", "same"))
    assert one.digest() == same.digest()
    assert one.digest() != _load(tmp_path / "one", name="digits", train_per_client=3).digest()
    assert one.digest() != _load(tmp_path / "one", name="digits", validation=0.5).digest()
    client = one.clients[0]
    darker = replace(client, train=replace(client.train, images=client.train.images // 2))
    assert one.digest() != replace(one, clients=(darker,)).digest()
