"""What every scenario promises, on toy data; and what each adds to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fednorm.cards import SCENARIOS
from fednorm.cli.catalogue import run_explain
from fednorm.cli.listing import run_list
from fednorm.config import DataConfig
from fednorm.data.domain import Split
from fednorm.errors import ConfigError, DataError, UnknownNameError
from fednorm.streams.stream import Experience, PermutedSplit, Stream

Make = Callable[..., Stream]
NAMES = SCENARIOS.names
CLASS_INCREMENTAL = (
    "split",
    "split_cifar10",
    "split_cifar100",
    "split_core50",
    "split_digits",
    "split_mini_imagenet",
    "split_tiny_imagenet",
)
IN_TIME = ("domain_clear10",)  # of which no seed draws the order
SIZES = {
    "domain_clear10": (22, 22),
    "domain_core50": (150, 50),
    "split_cifar10": (30, 20),
    "split_cifar100": (300, 200),
    "split_core50": (150, 50),
    "split_mini_imagenet": (60, 40),
    "split_tiny_imagenet": (60, 40),
}  # training and test images of the toy folders
KEPT_INPUTS = ("random_labels", "permuted_labels", "permuted_pixels")

every_scenario = pytest.mark.parametrize("name", NAMES)


def labels(split: Split) -> torch.Tensor:
    return split.labels[split.index]


def rows(experience: Experience, split: str) -> set[int]:
    return set(getattr(experience, split).index.tolist())


def same(first: Split, second: Split) -> bool:
    return torch.equal(first.index, second.index) and torch.equal(labels(first), labels(second))


# Every scenario -------------------------------------------------------------------------------------------------------


def test_every_file_is_a_scenario_of_its_name() -> None:
    files = {path.stem for path in (Path(__file__).resolve().parents[2] / "scenarios").glob("[a-z]*.py")}
    assert files == set(NAMES)
    for name in NAMES:
        spec = SCENARIOS[name.replace("_", "-").upper()]
        assert spec.name == name
        assert spec.summary.endswith(".")
        assert spec.citation.arxiv
    with pytest.raises(UnknownNameError, match="Did you mean 'split_cifar10'"):
        SCENARIOS["split_cifar11"]


@every_scenario
def test_the_command_line_lists_and_explains_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_list("scenarios", as_json=True)
    listed = {row["name"]: row["summary"] for row in json.loads(capsys.readouterr().out)["scenarios"]}
    assert listed[name] == SCENARIOS[name].summary
    run_explain(name.replace("_", "-"), as_json=True)
    card = json.loads(capsys.readouterr().out)
    assert (card["what"], card["name"]) == ("scenario", name)
    assert card["options"] == SCENARIOS[name].options
    assert card["about"].startswith(f"{name}: ")


@pytest.mark.few(3)
@every_scenario
def test_the_same_seed_gives_the_same_stream(name: str, make: Make) -> None:
    assert make(name, 1).digest() == make(name, 1).digest()
    assert (make(name, 1).digest() != make(name, 2).digest()) == (name not in IN_TIME)


@every_scenario
def test_labels_are_in_range_and_experiences_numbered(name: str, make: Make) -> None:
    stream = make(name)
    assert [experience.number for experience in stream] == list(range(len(stream)))
    assert sorted(stream.class_order) == list(range(stream.num_classes))
    for experience in stream:
        for split in (experience.train, experience.test):
            assert set(labels(split).tolist()) <= set(experience.classes)
        assert set(experience.classes) <= set(range(stream.num_classes))
        assert experience.tasks_of(torch.arange(3)).tolist() == [experience.number] * 3


@every_scenario
def test_train_and_test_share_no_image_and_all_experiences_share_one_array(name: str, make: Make) -> None:
    stream = make(name)
    tested = set().union(*(rows(experience, "test") for experience in stream))
    trained = set().union(*(rows(experience, "train") for experience in stream))
    assert stream.memorization == (name == "random_labels")
    if not stream.memorization:
        assert not trained & tested
    first = stream.experiences[0].train.images
    for experience in stream:
        assert len(rows(experience, "train")) == len(experience.train)
        assert experience.train.images.data_ptr() == experience.test.images.data_ptr() == first.data_ptr()


@every_scenario
def test_every_image_is_somewhere(name: str, make: Make) -> None:
    stream = make(name)
    sizes = SIZES.get(name, (2800, 1397))
    trained = set().union(*(rows(experience, "train") for experience in stream))
    assert len(trained) == sizes[0]
    if name in KEPT_INPUTS:
        assert all(rows(experience, "train") == trained for experience in stream)
    else:
        assert sum(len(experience.train) for experience in stream) == sizes[0]
    if not stream.memorization:
        assert len(set().union(*(rows(experience, "test") for experience in stream))) == sizes[1]


@every_scenario
def test_limits_and_validation_cut_what_they_say(name: str, make: Make) -> None:
    options = {key: n for key, n in (("train_per_experience", 5), ("test_per_experience", 2)) if key in
               SCENARIOS[name].options}  # fmt: skip
    small = make(name, **options)
    assert {len(experience.train) for experience in small} == {5}
    if name == "random_labels":
        with pytest.raises(ConfigError, match="only memorised"):
            make(name, data={"validation": 0.5})
        return
    assert {len(experience.test) for experience in small} == {2}
    whole, held = make(name), make(name, data={"validation": 0.5})
    for before, after in zip(whole, held, strict=True):
        assert len(after.validation) == round(len(before.train) / 2)
        assert not rows(after, "train") & rows(after, "validation")
        assert rows(after, "train") | rows(after, "validation") == rows(before, "train")
        assert same(after.test, before.test)
        assert not len(before.validation)
    limited = make(name, data={"validation": 0.5}, **options)
    for one, other in zip(held, limited, strict=True):
        assert same(one.validation, other.validation)


@every_scenario
def test_wrong_options_are_refused(name: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=f"scenario {name} has no option 'epochs'"):
        make(name, epochs=3)
    with pytest.raises(ConfigError, match=r"scenario\.train_per_experience must be an integer of 0 or more; got '5'"):
        make(name, train_per_experience="5")
    with pytest.raises(ConfigError, match=r"data\.partition says what clients hold, and a stream has no clients"):
        make(name, data={"partition": "dirichlet"})
    with pytest.raises(UnknownNameError, match="cifar10"):
        make(name, data={"name": "cifar11"})


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("domain_")])
def test_the_number_of_experiences_is_one_or_more(name: str, make: Make) -> None:
    assert len(make(name, num_experiences=1)) == 1
    least = 0 if name == "split" else 1  # 0 is the usual number
    with pytest.raises(ConfigError, match=f"num_experiences must be an integer of {least} or more; got {least - 1}"):
        make(name, num_experiences=least - 1)


# Class-incremental ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_INCREMENTAL)
def test_classes_are_cut_into_tasks_that_labels_tell(name: str, make: Make) -> None:
    stream = make(name)
    ten = {"split_cifar100": 10, "split_mini_imagenet": 2, "split_tiny_imagenet": 2}  # classes each, of ten
    default = (10, ten[name]) if name in ten else (9, 0) if name == "split_core50" else (5, 2)
    assert (len(stream), stream.classes_per_task) == default
    for experience in stream:
        for split in (experience.train, experience.test):
            assert torch.equal(stream.task_of(labels(split)), experience.tasks_of(torch.arange(len(split))))
            assert set(labels(split).tolist()) == set(experience.classes)


@pytest.mark.parametrize("name", CLASS_INCREMENTAL)
def test_the_class_order_belongs_to_the_seed_alone(name: str, make: Make) -> None:
    stream, other = make(name, 1), make(name, 2)
    assert stream.class_order != other.class_order
    assert make(name, 1, num_experiences=2).class_order == stream.class_order
    assert make(name, 1, class_order="sorted").class_order == tuple(range(stream.num_classes))
    with pytest.raises(ConfigError, match=r"class_order must be one of shuffled, sorted; got 'random'"):
        make(name, class_order="random")


def test_a_label_is_its_class_place_in_the_order(make: Make) -> None:
    shuffled, original = make("split_cifar10", 4), make("split_cifar10", class_order="sorted", num_experiences=1)
    was = dict(zip(original.experiences[0].train.index.tolist(), labels(original.experiences[0].train).tolist(),
                   strict=True))  # fmt: skip
    for experience in shuffled:
        for row, label in zip(experience.train.index.tolist(), labels(experience.train).tolist(), strict=True):
            assert shuffled.class_order[label] == was[row]
        named = ", ".join(str(shuffled.class_order[k]) for k in experience.classes)
        assert experience.title == f"classes {named}"


def test_core50_begins_with_ten_objects_and_tests_each_image_once(make: Make) -> None:
    stream = make("split_core50")
    assert [len(experience.classes) for experience in stream] == [10, 5, 5, 5, 5, 5, 5, 5, 5]
    assert [len(experience.test) for experience in stream] == [10, 5, 5, 5, 5, 5, 5, 5, 5]
    assert [len(experience.train) for experience in stream] == [3 * len(experience.test) for experience in stream]
    assert {len(experience.test) for experience in make("domain_core50")} == {50}


def test_clear10_is_in_the_order_of_time(make: Make) -> None:
    assert [experience.domain for experience in make("domain_clear10", 7)] == ["bucket_01", "bucket_02"]


def test_cifar100_in_twenty(make: Make) -> None:
    stream = make("split_cifar100", num_experiences=20)
    assert (len(stream), stream.classes_per_task) == (20, 5)
    assert [len(experience.train) for experience in stream] == [15] * 20


def test_classes_that_cannot_be_cut_are_refused(make: Make) -> None:
    why = "every experience needs a class of its own. Set scenario.num_experiences to 10 or less"
    with pytest.raises(ConfigError, match=why):
        make("split_digits", num_experiences=11)


def test_any_data_can_be_split(toy_folder: Path, make: Make) -> None:
    own = {"name": "folders", "dir": str(toy_folder), "domains": ("cifar100",)}
    stream = make("split", data=own, classes_per_experience="50,30,20")
    assert [len(experience.classes) for experience in stream] == [50, 30, 20]
    assert [len(experience.train) for experience in stream] == [150, 90, 60]
    assert stream.class_order == make("split_cifar100").class_order
    assert make("split", num_experiences=5).digest() == make("split_digits").digest()
    same_data = {"name": "cifar10", "dir": str(toy_folder)}
    assert make("split", data=same_data).digest() == make("split_cifar10").digest()
    own["domains"] = ("cifar10", "cifar100")
    with pytest.raises(DataError, match=r"is several data sets; this scenario is made of one\. Name one with data"):
        make("split", data=own)
    with pytest.raises(ConfigError, match=r"take a scenario of any data: .*split"):
        make("split_digits", data=own)


# The others -----------------------------------------------------------------------------------------------------------


def test_domains_come_one_after_another(make: Make) -> None:
    given = make("domain_digits", domain_order="given")
    assert [experience.title for experience in given] == ["scans", "photo", "fonts", "street", "faint"]
    assert [len(experience.train) for experience in given] == [400, 400, 800, 800, 400]
    orders = {tuple(experience.title for experience in make("domain_digits", seed)) for seed in range(4)}
    assert len(orders) > 1
    two = make("domain_digits", domain_order="given", data={"domains": ("street", "scans")})
    assert [experience.title for experience in two] == ["street", "scans"]
    assert same(two.experiences[1].train, given.experiences[0].train)
    with pytest.raises(ConfigError, match="two domains or more"):
        make("domain_digits", data={"domains": ("street",)})
    with pytest.raises(ConfigError, match="a label does not tell its task"):
        given.task_of(torch.tensor([1]))


def test_domains_that_share_digits_are_told(tmp_path: Path, toy_folder: Path) -> None:
    for name in ("mnist", "mnistm", "usps"):
        shutil.copytree(toy_folder / "cifar10", tmp_path / name)

    def notes(*domains: str) -> str:
        config = DataConfig(name="digits", dir=str(tmp_path), domains=domains)
        stream = SCENARIOS["domain_digits"].stream(config, image_size=8, seed=1)
        assert {experience.title for experience in stream} == set(domains or ("mnist", "usps", "mnistm"))
        return " ".join(stream.notes)

    assert "mnistm is made from MNIST's digits" in notes()
    assert "mnistm is made from MNIST's digits" not in notes("usps", "mnistm")


@pytest.mark.parametrize("name", KEPT_INPUTS)
def test_more_experiences_leave_the_earlier_ones_as_they_are(name: str, make: Make) -> None:
    few, many = make(name, num_experiences=2), make(name, num_experiences=4)
    for one, other in zip(few, many, strict=False):
        assert same(one.train, other.train)
        assert same(one.test, other.test)
        batch = torch.arange(5)
        assert torch.equal(one.train.batch(batch)[0], other.train.batch(batch)[0])


def test_random_labels_are_independent_of_images_and_experiences(make: Make) -> None:
    stream = make("random_labels", num_experiences=3)
    drawn = [labels(experience.train) for experience in stream]
    true = labels(make("permuted_pixels", num_experiences=1).experiences[0].train)
    for one, other in ((drawn[0], drawn[1]), (drawn[1], drawn[2]), (drawn[0], true)):
        assert abs(float((one == other).double().mean()) - 0.1) < 0.03  # 2,800 images: five standard errors
    counts = torch.bincount(drawn[0], minlength=10).double()
    assert float(((counts - 280) ** 2 / 280).sum()) < 27.9  # chi-squared, 9 degrees, p = 0.001
    assert all(same(experience.train, experience.test) for experience in stream)


def test_permuted_labels_rename_classes_in_training_and_test_alike(make: Make) -> None:
    stream = make("permuted_labels", num_experiences=4)
    original = make("permuted_pixels", num_experiences=1).experiences[0]
    seen = set()
    for experience in stream:
        names = {}
        for split, true in ((experience.train, original.train), (experience.test, original.test)):
            for old, new in zip(labels(true).tolist(), labels(split).tolist(), strict=True):
                assert names.setdefault(old, new) == new
        assert sorted(names.values()) == list(range(10))
        seen.add(tuple(names[k] for k in range(10)))
    assert len(seen) == 4


def test_permuted_pixels_move_all_channels_together(make: Make) -> None:
    stream = make("permuted_pixels", num_experiences=3)
    orders = []
    for experience in stream:
        split = experience.train
        assert isinstance(split, PermutedSplit)
        where = torch.tensor([7, 0, 11])
        images, batch_labels = split.batch(where)
        plain, plain_labels = Split(split.images, split.labels, split.index).batch(where)
        for pixel in (0, 13, 63):
            source = int(split.pixel_order[pixel])
            assert torch.equal(images[:, :, pixel // 8, pixel % 8], plain[:, :, source // 8, source % 8])
        assert torch.equal(batch_labels, plain_labels)
        assert isinstance(experience.test, PermutedSplit)
        assert torch.equal(experience.test.pixel_order, split.pixel_order)
        orders.append(tuple(split.pixel_order.tolist()))
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len(set(orders)) == 3


def test_the_digest_is_the_recorded_one(make: Make) -> None:
    assert make("split_digits", 1).digest() == "904b9488e0100f1c"


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["split_cifar10", "split_cifar100"])
def test_a_missing_folder_is_told(name: str, make: Make, tmp_path: Path) -> None:
    benchmark = name.removeprefix("split_")
    with pytest.raises(DataError, match=f"Benchmark {benchmark} reads real data: name its folder"):
        make(name, data={"dir": ""})
    with pytest.raises(DataError, match="does not exist"):
        make(name, data={"dir": str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match=f"Data set '{benchmark}' is not in"):
        make(name, data={"dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=f"made of {benchmark}; data.name is 'digits'"):
        make(name, data={"name": "digits"})


def stream_of(label: int, num_test: int = 4) -> Stream:
    split = Split(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1, label]), torch.arange(4))
    test = Split(split.images, split.labels, split.index[:num_test])
    experience = Experience(0, "toy", (0, 1), split, Split(split.images, split.labels, split.index[:0]), test)
    return Stream("toy stream", 2, 2, (experience,), (0, 1))


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_out_of_range_are_refused(label: int) -> None:
    low, high = min(label, 0), max(label, 1)
    with pytest.raises(DataError, match=f"training labels from {low} to {high}; the stream's 2 classes"):
        stream_of(label)


def test_an_experience_without_test_images_is_refused() -> None:
    assert len(stream_of(1)) == 1
    with pytest.raises(DataError, match=r"Experience 0 \(toy\) of toy stream has no test images"):
        stream_of(1, num_test=0)


def test_several_data_sets_are_not_one(toy_folder: Path) -> None:
    config: dict[str, Any] = {"name": "folders", "dir": str(toy_folder), "domains": ("cifar10", "cifar100")}
    with pytest.raises(DataError, match="is several data sets; this scenario is made of one"):
        SCENARIOS["random_labels"].stream(DataConfig(**config), image_size=8, seed=1)
    config["domains"] = ("cifar10",)
    stream = SCENARIOS["random_labels"].stream(DataConfig(**config), image_size=8, seed=1)
    assert len(stream.experiences[0].train) == 30


@pytest.mark.data
@pytest.mark.slow
def test_real_cifar10_in_five(real_data: Path) -> None:
    if not (real_data / "cifar10").is_dir():
        pytest.skip(f"no cifar10 in {real_data}")
    config = DataConfig(dir=str(real_data))
    stream = SCENARIOS["split_cifar10"].stream(config, image_size=32, seed=1)
    assert [len(experience.train) for experience in stream] == [10_000] * 5
    assert [len(experience.test) for experience in stream] == [2_000] * 5
    assert np.unique(labels(stream.experiences[3].train)).tolist() == [6, 7]
    assert stream.experiences[0].train.images.shape[1:] == (3, 32, 32)
