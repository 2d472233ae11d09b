from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from fednorm.config import DataConfig
from fednorm.data import load_federation
from fednorm.data.digits_mini import DOMAINS, FONTS, _patch, _photo, _scans, plans, read_digits_mini
from fednorm.data.source import Source
from fednorm.errors import DataError

DIGEST = """
import hashlib, sys
from pathlib import Path
from fednorm.data.digits_mini import read_digits_mini
source = read_digits_mini(28, Path(sys.argv[1]))
print(hashlib.sha256(source.images.tobytes() + source.labels.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def source(shared_cache: Path) -> Source:
    return read_digits_mini(28, shared_cache)


@pytest.mark.slow
def test_another_process_generates_the_same_arrays(source: Source, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run(
        [sys.executable, "-c", DIGEST, str(tmp_path / "fresh")], cwd=root, env=env, check=True, capture_output=True
    )
    own = hashlib.sha256(source.images.tobytes() + source.labels.tobytes()).hexdigest()
    assert out.stdout.decode().strip() == own


def test_every_scan_is_used_once_and_keeps_its_label() -> None:
    scans = [plan.scan for plan in plans() if plan.scan >= 0]
    assert sorted(scans) == list(range(1797))
    target = load_digits().target
    assert all(plan.label == target[plan.scan] for plan in plans() if plan.scan >= 0)


def test_the_files_read_are_what_scikit_learn_loads() -> None:
    bunch = load_digits()
    images, labels = _scans()
    assert np.array_equal(images, bunch.images / 16)
    assert np.array_equal(labels, bunch.target)
    for name in ("china.jpg", "flower.jpg"):
        assert np.array_equal(_photo(name), load_sample_image(name))


@pytest.mark.parametrize("content", [None, b"", b"no digits"])
def test_a_sample_file_that_is_not_there_or_damaged_is_named(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = ModuleSpec("sklearn", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("fednorm.data.digits_mini.find_spec", lambda _: spec)
    for file, read in (("data/digits.csv.gz", _scans.__wrapped__), ("images/china.jpg", _photo.__wrapped__)):
        if content is not None:
            path = tmp_path / "datasets" / file
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        with pytest.raises(DataError, match=rf"needs .*{Path(file).name}"):
            read(*([] if "csv" in file else ["china.jpg"]))


def test_sizes_and_classes(source: Source) -> None:
    assert source.images.shape == (4197, 3, 28, 28)
    assert source.domains is not None
    sizes = {"scans": (400, 199), "photo": (400, 199), "fonts": (800, 400), "street": (800, 400), "faint": (400, 199)}
    for domain in source.split_domains(DOMAINS):
        assert (len(domain.train), len(domain.test)) == sizes[domain.name]
        for split in (domain.train, domain.test):
            counts = np.bincount(split.labels[split.index].numpy(), minlength=10)
            assert counts.min() >= 0.8 * counts.mean()


def test_no_two_images_are_equal(source: Source) -> None:
    digests = Counter(hashlib.sha256(image.tobytes()).digest() for image in source.images)
    assert max(digests.values()) == 1


def test_train_and_test_use_other_fonts() -> None:
    for domain in ("fonts", "street"):
        assert not set(FONTS[domain, True]) & set(FONTS[domain, False])
    used = [font for fonts in FONTS.values() for font in fonts]
    assert len(used) == len(set(used))


def test_train_and_test_patches_come_from_other_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    sixth = np.searchsorted([k * 640 // 6 for k in range(1, 6)], np.arange(640), side="right")
    columns = np.tile(sixth[None, :, None], (427, 1, 3))
    monkeypatch.setattr("fednorm.data.digits_mini._photo", lambda _: (40 * columns).astype(np.uint8))
    seen: dict[bool, set[float]] = {True: set(), False: set()}
    for plan in plans():
        if plan.domain == "photo":
            patch = _patch(plan)
            assert patch.min() == patch.max(), "a patch crosses a stripe's border"
            seen[plan.train].add(float(patch[0, 0, 0]) / 40)
    assert seen == {True: {0, 1, 3, 4}, False: {2, 5}}


def test_photographs_are_of_the_expected_size() -> None:
    assert _photo("china.jpg").shape == _photo("flower.jpg").shape == (427, 640, 3)


def test_the_domains_look_as_described(source: Source) -> None:
    assert source.domains is not None
    by_domain = {name: source.images[source.domains == name].astype(np.float64) for name in DOMAINS}
    for name in ("scans", "faint"):
        assert np.ptp(by_domain[name], axis=1).max() == 0, "grey"
    for name in ("photo", "fonts", "street"):
        assert np.ptp(by_domain[name], axis=1).mean() > 5, "coloured"
    contrast = {name: images.std(axis=(1, 2, 3)).mean() for name, images in by_domain.items()}
    assert contrast["faint"] < 0.3 * contrast["scans"]
    border, middle = by_domain["faint"][:, 0, :2].mean(), by_domain["faint"][:, 0, 10:18, 10:18].mean()
    assert border > middle, "dark on light"


def test_a_run_s_seed_does_not_change_the_data(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDNORM_CACHE", str(shared_cache))
    first, second = (load_federation(DataConfig(name="digits_mini"), image_size=28, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(first.clients[0].train.images, second.clients[0].train.images)
    assert first.title == "digits-mini (scans, photo, fonts, street, faint)"
    assert any("not Digits-Five" in note for note in first.notes)


@pytest.mark.slow
def test_another_size_is_resized_from_28(source: Source, tmp_path: Path) -> None:
    other = read_digits_mini(20, tmp_path).images
    original = Image.fromarray(source.images[1234].transpose(1, 2, 0))
    expected = np.asarray(original.resize((20, 20), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert other.shape == (4197, 3, 20, 20)
    np.testing.assert_array_equal(other[1234], expected)
