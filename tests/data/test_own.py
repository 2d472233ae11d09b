"""Data given as objects: pixels and labels arrive as they were given, splits are seeded and said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from fednorm.cards import DATA, SCENARIOS
from fednorm.config import DataConfig, resolve
from fednorm.data import load_federation
from fednorm.data.arrays import read_image, read_images, read_labels
from fednorm.data.benchmarks import Benchmark, Loaded, Reader
from fednorm.data.domain import Domain, Split
from fednorm.data.partition import train_and_test
from fednorm.errors import ConfigError, DataError, FedNormError

S = 6


def images(count: int = 10, shape: tuple[int, ...] = (S, S), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count: int = 10, classes: int = 2) -> np.ndarray:
    return np.arange(count) % classes


def read(data: Any, size: int = S, **config: Any) -> Loaded:
    name = DATA.add(data)
    return DATA[name].read(Reader(DataConfig(name=name, **config), size))


def whole(domain: Domain) -> tuple[np.ndarray, np.ndarray]:
    """Return a domain's images and labels, training and test images put back into the order of the array."""
    index = torch.cat([domain.train.index, domain.test.index]).sort().values
    return domain.train.images[index].numpy(), domain.train.labels[index].numpy()


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, None], 3, axis=1)


# Images ---------------------------------------------------------------------------------------------------------------

LAYOUTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "N3HW": lambda x: x,
    "NHW3": lambda x: x.transpose(0, 2, 3, 1),
    "NHW": lambda x: x[:, 0],
    "N1HW": lambda x: x[:, :1],
    "NHW1": lambda x: x[:, :1].transpose(0, 2, 3, 1),
}
"""Layouts, made of images of shape (N, 3, H, W)."""

TYPES: Mapping[str, Callable[[np.ndarray], Any]] = {
    "uint8": lambda x: x,
    "float16": lambda x: (x / 255).astype(np.float16),
    "float32": lambda x: x.astype(np.float32) / 255,
    "float64": lambda x: x / 255,
}


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    kind=st.sampled_from(sorted(TYPES)),
    count=st.integers(1, 4),
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    as_tensor=st.booleans(),
    one_by_one=st.booleans(),
    size=st.integers(4, 9),
    seed=st.integers(0, 9),
)
def test_pixels_arrive_as_given(
    layout: str,
    kind: str,
    count: int,
    height: int,
    width: int,
    as_tensor: bool,
    one_by_one: bool,
    size: int,
    seed: int,
) -> None:
    original = images(count, (3, height, width), seed)
    given_images: Any = TYPES[kind](np.ascontiguousarray(LAYOUTS[layout](original)))
    if as_tensor:
        given_images = torch.from_numpy(given_images)
    before = given_images.clone() if as_tensor else given_images.copy()
    got = read_images(list(given_images) if one_by_one else given_images, "here")
    out = np.empty((count, 3, size, size), dtype=np.uint8)
    got.write(out)
    plain = original if "3" in layout else rgb(original[:, 0])
    expected = [
        np.asarray(Image.fromarray(x.transpose(1, 2, 0)).resize((size, size), Image.Resampling.BILINEAR)) for x in plain
    ]
    assert np.array_equal(out, np.stack(expected).transpose(0, 3, 1, 2))
    if (height, width) == (size, size):
        assert np.array_equal(out, plain)
    assert (got.kind == "uint8") == (kind == "uint8")
    assert bool((given_images == before).all()), "what the caller gave is never written"


def test_images_of_several_sizes_are_resized_one_by_one() -> None:
    small, large = images(1, (4, 4))[0], images(1, (9, 5))[0]
    out = np.empty((2, 3, 4, 4), dtype=np.uint8)
    read_images([small, large], "here").write(out)
    assert np.array_equal(out[0], rgb(small[None])[0])
    resized = Image.fromarray(large).resize((4, 4), Image.Resampling.BILINEAR)
    assert np.array_equal(out[1], rgb(np.asarray(resized)[None])[0])


def test_a_pillow_image_is_read_as_a_file_of_it_would_be() -> None:
    deep = Image.fromarray(np.array([[0, 65535], [257, 32896]], dtype=np.uint16))
    assert read_image(deep, "here").blocks[0][0, 0].tolist() == [[0, 255], [1, 128]]
    clear = Image.fromarray(np.array([[[0, 0, 0, 0], [9, 9, 9, 255]]], dtype=np.uint8), "RGBA")
    assert read_image(clear, "here").blocks[0][0, 0].tolist() == [[255, 9]], "transparency lies on white"
    with pytest.raises(DataError, match=r"^here: the image holds 32-bit integers"):
        read_image(Image.fromarray(np.array([[1, 2]], dtype=np.int32)), "here")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (images(4, (S * S,)), r"shape \(4, 36\); expected \(N, H, W\).*reshape\(-1, H, W\)"),
        (images(4, (S, S, 4)), r"shape \(4, 6, 6, 4\).*fourth channel"),
        (images(4, (S, S, 2)), r"shape \(4, 6, 6, 2\); expected"),
        (images(4, (3, S, 3)), "which of the two is not said"),
        (images(4, (0, S)), "have no pixels"),
        (images().astype(np.int64), "type int64 leave open which value is white"),
        (images().astype(bool), "type bool"),
        (images().astype(np.uint16), "type uint16"),
        (images() / 1.0, r"go from 0 to 2\d\d. Divide them by 255"),
        (images() / 127.5 - 1, "Undo their normalization"),
        (np.full((2, S, S), np.nan), "no finite numbers"),
        (np.full((2, S, S), 1.5), r"must be in \[0, 1\]; they go from 1.5 to 1.5"),
        ("x.png", "expected images as a NumPy array, a PyTorch tensor or Pillow images; got a str"),
        ([images(1)[0], images(1)[0] / 255], "image 0 is uint8 and image 1 is float"),
        ([images(1)[0], "x.png"], "row 1: expected images as"),
        (np.array([None, "x"], dtype=object), r"shape \(2,\)"),
    ],
)
def test_images_that_leave_something_open_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read_images(wrong, "domain a, train images")
    assert str(refused.value).startswith("domain a, train images")


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_labels", "numbers", "names"),
    [
        ([0, 2, 1], [0, 2, 1], ()),
        (np.array([1, 0], dtype=np.uint8), [1, 0], ()),
        (np.array([[1], [0]]), [1, 0], ()),
        (torch.tensor([1, 0], dtype=torch.int32), [1, 0], ()),
        ([torch.tensor(1), np.int64(0), np.array([2])], [1, 0, 2], ()),
        ([True, False], [1, 0], ()),
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        (np.array(["10", "2"]), [1, 0], ("2", "10")),
        (np.array(["b", "a"], dtype=object), [1, 0], ("a", "b")),
    ],
)
def test_labels_are_numbers_or_names(given_labels: Any, numbers: list[int], names: tuple[str, ...]) -> None:
    got, got_names = read_labels(given_labels, "here")
    assert (got.dtype, got.tolist(), got_names) == (np.int64, numbers, names)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0.0, 1.0], r"row 0: the label is 0.0 \(float64\); expected whole numbers"),
        (torch.tensor([0.5]), r"the label is 0.5 \(float32\)"),
        ([0, -3], "row 1: label -3 is outside 0 to K - 1"),
        ([0, -1], "kept secret"),
        (np.array([0, 2**63], dtype=np.uint64), "row 1: label 9223372036854775808 is outside"),
        (np.eye(3), r"shape \(3, 3\); expected \(N,\). One-hot labels become numbers with labels.argmax\(1\)"),
        (3, r"shape \(\)"),
        (["a", 1], "some labels are texts and some are not: 'a', 1"),
        ([None, 1], r"row 0: the label is None \(object\)"),
        ([[1, 2], [3]], "no array of numbers or texts"),
    ],
)
def test_labels_that_are_none_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(wrong, "here")


# Forms ----------------------------------------------------------------------------------------------------------------


def test_a_mapping_of_arrays_is_domains_in_its_order() -> None:
    x, z = images(10), images(15, (S, S, 3), seed=1)
    loaded = read({"zebra": (x, labels(10)), "ant": (z, labels(15))})
    assert [domain.name for domain in loaded.domains] == ["zebra", "ant"]
    assert (loaded.title, loaded.num_classes) == ("own data (zebra, ant)", 2)
    for domain, pixels, count in zip(loaded.domains, (rgb(x), z.transpose(0, 3, 1, 2)), (10, 15), strict=True):
        got, got_labels = whole(domain)
        assert np.array_equal(got, pixels)
        assert np.array_equal(got_labels, labels(count))
    assert [d.name for d in read({"a": (x, labels()), "b": (x, labels())}, domains=("b",)).domains] == ["b"]
    with pytest.raises(DataError, match="has no domain 'c'; its domains: a, b"):
        read({"a": (x, labels()), "b": (x, labels())}, domains=("c",))


def test_test_images_of_its_own_stay_test_images() -> None:
    x, z = images(10), images(4, seed=1)
    loaded = read({"a": {"train": (x, labels(10)), "test": (z, labels(4))}})
    (domain,) = loaded.domains
    assert np.array_equal(domain.train.batch(torch.arange(10))[0].numpy(), rgb(x))
    assert np.array_equal(domain.test.batch(torch.arange(4))[0].numpy(), rgb(z))
    assert loaded.notes == ()


def test_one_domain_needs_no_name() -> None:
    x, y = images(), labels()
    pairs = list(zip(x, y.tolist(), strict=True))
    forms: list[Any] = [(x, y), [x, y], pairs, TensorDataset(torch.from_numpy(x), torch.from_numpy(y))]
    for form in [*forms, *({"train": form, "test": (x[:2], y[:2])} for form in forms), lambda: (x, y)]:
        (domain,) = read(form).domains
        assert domain.name == "data"
        assert np.array_equal(whole(domain)[0][:10], rgb(x))


class Items(Dataset[Any]):
    """A map-style dataset of whatever items."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]()


def items(x: np.ndarray, y: Any, **attributes: Any) -> Items:
    return Items([lambda a=a, k=k: (Image.fromarray(a), k) for a, k in zip(x, y, strict=True)], **attributes)


def test_a_dataset_is_read_once_item_by_item() -> None:
    x, reads = images(5), []
    dataset = Items([lambda a=a, k=k: reads.append(k) or (Image.fromarray(a), 0) for k, a in enumerate(x)])
    reference = DATA.add({"a": dataset})
    loaded = DATA[reference].read(Reader(DataConfig(), S))
    DATA[reference].read(Reader(DataConfig(), 4))
    assert np.array_equal(whole(loaded.domains[0])[0], rgb(x))
    assert reads == [0, 1, 2, 3, 4]


def test_datasets_that_name_their_classes_are_numbered_by_the_names() -> None:
    first = items(images(4), [0, 1, 0, 1], classes=["cat", "dog"])
    second = Subset(items(images(6), [0, 1, 0, 1, 1, 1], classes=["dog", "cat"]), [0, 1, 2, 3])
    unnamed = items(images(4), [1, 1, 0, 0])
    loaded = read({"a": first, "b": second, "c": unnamed})
    assert [whole(domain)[1].tolist() for domain in loaded.domains] == [[0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]
    assert "c does not name its classes: its labels are taken to mean those of a." in loaded.notes
    changed = items(images(4), [0, 1, 0, 1], classes=["x", "y"], target_transform=lambda k: k)
    assert read({"a": first, "b": changed}).num_classes == 2, "classes say nothing where labels are transformed"
    with pytest.raises(DataError, match="'dog' only in a, 'cow' only in b"):
        read({"a": first, "b": items(images(4), [0, 1, 0, 1], classes=["cat", "cow"])})


def test_names_for_labels_mean_the_same_in_every_domain() -> None:
    a, b = ["cat", "dog"] * 3, ["dog", "cat"] * 3
    loaded = read({"a": (images(6), a), "b": {"train": (images(6), b), "test": (images(2), ["dog", "dog"])}})
    assert whole(loaded.domains[0])[1].tolist() == [0, 1] * 3
    assert whole(loaded.domains[1])[1].tolist() == [*[1, 0] * 3, 1, 1]
    named = {"train": (images(4), labels(4)), "classes": ["cat", "dog", "cow"]}
    loaded = read({"a": named})
    assert loaded.num_classes == 3
    assert "a has no images of class cow." in loaded.notes
    unknown = {"train": (images(6), a), "test": (images(1), ["cow"])}
    with pytest.raises(DataError, match="domain a, test images, row 0: label 'cow' is none of the classes cat, dog"):
        read({"a": unknown})


class Feature:
    """Stands in for Hugging Face's features, which are known by the names of their classes."""


def feature(kind: str, **attributes: Any) -> Any:
    return type(kind, (Feature,), attributes)()


class Rows:
    """Stands in for a Hugging Face ``Dataset``: rows are dictionaries, columns have features."""

    def __init__(self, features: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.features, self.rows, self.column_names = features, rows, list(features)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int | str) -> Any:
        return self.rows[row] if isinstance(row, int) else [entry[row] for entry in self.rows]


def hugging_face(x: np.ndarray, *, image: str = "image", label: str = "label", **columns: list[Any]) -> Rows:
    features = {image: feature("Image"), label: feature("ClassLabel", names=["cat", "dog"])}
    features |= {name: feature("Value") for name in columns}
    extra = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] or [{}] * len(x)
    rows = [{image: Image.fromarray(a), label: k % 2, **more} for k, (a, more) in enumerate(zip(x, extra, strict=True))]
    return Rows(features, rows)


def test_a_hugging_face_dataset_is_known_by_what_it_can_do() -> None:
    x, z = images(6), images(4, seed=1)
    loaded = read({"train": hugging_face(x), "validation": hugging_face(z)})
    (domain,) = loaded.domains
    assert np.array_equal(whole(domain)[0], rgb(np.concatenate([x, z])))
    assert domain.test.targets.tolist() == [0, 1, 0, 1]
    assert loaded.notes == ("data has no test images: its validation images are the test images here.",)
    assert read(hugging_face(x, image="picture", label="kind")).num_classes == 2, "found by their features"
    split = read(hugging_face(x, domain=["art", "photo", "photo", "art", "photo", "photo"]))
    assert [domain.name for domain in split.domains] == ["art", "photo"]
    assert np.array_equal(whole(split.domains[0])[0], rgb(x[[0, 3]]))
    with pytest.raises(
        DataError, match="the item has the keys 'picture', 'label'; expected an image under image or img"
    ):
        read([{"picture": x[0], "label": 0}])


def test_a_real_hugging_face_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    x = images(6)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [Image.fromarray(a) for a in x], "label": [0, 1] * 3}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    for form in (dataset, datasets.DatasetDict(train=dataset, test=dataset)):
        assert np.array_equal(whole(read(form).domains[0])[0][:6], rgb(x))


def test_a_callable_of_the_reader_says_itself_what_it_has() -> None:
    def make(reader: Reader) -> Loaded:
        pixels = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, reader.image_size, reader.image_size)
        parts = [Split(pixels[:4], torch.tensor([0, 1, 0, 1]), torch.arange(4))]
        parts.append(Split(pixels[4:], torch.tensor([1, 0]), torch.arange(2)))  # an array of its own
        return Loaded("mine", 2, (Domain("d", parts[0], parts[1]),), ("A note.",))

    reference = DATA.add(make)
    assert DATA.add(make) == reference, "the same object is found again"
    config = DataConfig(name=reference, merge=False)
    federation = load_federation(config, image_size=5, seed=1)
    (client,) = federation.clients
    assert (federation.title, federation.notes) == ("mine", ("A note.",))
    assert sorted(client.test.batch(torch.arange(2))[0][:, 0, 0, 0].tolist()) == [4, 5]
    assert sorted(client.train.batch(torch.arange(4))[0][:, 0, 0, 0].tolist()) == [0, 1, 2, 3]
    merged = load_federation(config.replace(merge=True), image_size=5, seed=1).clients[0]
    together = torch.cat(
        [split.batch(torch.arange(len(split)))[0][:, 0, 0, 0] for split in (merged.train, merged.test)]
    )
    assert sorted(together.tolist()) == [0, 1, 2, 3, 4, 5]


# The split ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    seed=st.integers(0, 5),
)
def test_a_split_is_stratified_and_loses_nothing(labels: list[int], seed: int) -> None:
    given_labels = np.array(labels, dtype=np.int64)
    train, test = train_and_test("a", given_labels, seed)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
    assert len(test) == max(round(0.2 * len(labels)), 1)
    for label in set(labels):
        share = len(test) / len(labels) * labels.count(label)
        assert abs(int((given_labels[test] == label).sum()) - share) < 1 + 1e-9
    again = train_and_test("a", given_labels, seed)
    assert all(map(np.array_equal, (train, test), again))


def test_the_split_depends_on_its_own_seed_alone_and_is_said() -> None:
    data = {"a": (images(50), labels(50))}
    reference = DATA.add(data)

    def tested(seed: int, **config: Any) -> list[int]:
        federation = load_federation(DataConfig(name=reference, **config), image_size=S, seed=seed)
        return sorted(federation.clients[0].test.index.tolist())

    assert tested(1) == tested(2)
    assert tested(1, split_seed=3) == tested(2, split_seed=3) != tested(1)
    notes = load_federation(DataConfig(name=reference, split_seed=3), image_size=S, seed=1).notes
    assert notes == (
        "a came without test images: split 80/20 into training and test images, stratified by class, by split seed 3 "
        "(data.split_seed).",
    )
    resized = load_federation(DataConfig(name=reference), image_size=4, seed=1).notes
    assert resized[-1] == "Images of 6 x 6 were resized to 4 x 4 pixels (data.image_size)."


@pytest.mark.slow
def test_a_split_seed_deals_apart_from_the_run_seed() -> None:
    def dealt(seed: int, split_seed: int) -> list[list[int]]:
        config = DataConfig(clients_per_domain=3, partition="dirichlet", validation=0.2, split_seed=split_seed)
        federation = load_federation(config.replace(train_per_client=40), image_size=8, seed=seed)
        return [split.index.tolist() for client in federation.clients for split in (client.train, client.validation)]

    assert dealt(1, 0) != dealt(2, 0)
    assert dealt(1, 5) == dealt(2, 5)
    assert dealt(9, 5) == dealt(5, 0), "it takes the run seed's place"


# Identity -------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(place=st.tuples(st.integers(0, 9), st.integers(0, S - 1), st.integers(0, S - 1)))
def test_one_other_pixel_is_other_data(place: tuple[int, int, int]) -> None:
    x = images()
    changed = x.copy()
    changed[place] ^= 1
    first, same, other = ({"a": (pixels, labels())} for pixels in (x, x.copy(), changed))
    assert DATA.add(first) == DATA.add(same) != DATA.add(other)
    digests = [
        load_federation(DataConfig(name=DATA.add(data)), image_size=S, seed=1).digest() for data in (first, same, other)
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("scenario", [spec.name for spec in SCENARIOS if len(spec.data) != 1])
def test_one_other_pixel_is_another_stream(scenario: str) -> None:
    x = images(20)
    changed = x.copy()
    changed[7, 0, 0] ^= 1
    digests = []
    for pixels in (x, x.copy(), changed):
        config = DataConfig(name=DATA.add({"a": (pixels, labels(20)), "b": (x, labels(20))}))
        digests.append(SCENARIOS[scenario].stream(config, image_size=S, seed=1).digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_split_seed_orders_a_stream_apart_from_the_run_seed() -> None:
    name = DATA.add({"a": (images(40), labels(40, 4))})

    def dealt(seed: int, split_seed: int) -> list[Any]:
        config = DataConfig(name=name, validation=0.2, split_seed=split_seed)
        stream = SCENARIOS["split"].stream(config, image_size=S, seed=seed)
        return [stream.class_order, *(experience.train.index.tolist() for experience in stream)]

    assert dealt(1, 0) != dealt(2, 0)
    assert dealt(1, 5) == dealt(2, 5)


def test_other_labels_names_or_domains_are_other_data() -> None:
    x, y = images(), labels()
    variants = [
        {"a": (x, y)},
        {"b": (x, y)},
        {"a": (x, 1 - y)},
        {"a": {"train": (x, y), "classes": ["cat", "dog"]}},
        {"a": {"train": (x, y), "test": (x, y)}},
    ]
    assert len({DATA.add(data) for data in variants}) == len(variants)


def test_an_object_of_another_process_is_told_from_a_module() -> None:
    with pytest.raises(ConfigError, match="is a Python object that was given as benchmark in another process"):
        DATA["object:dict-0123456789ab"]


# What is refused ------------------------------------------------------------------------------------------------------

X, Y = images(), labels()


def raising() -> Any:
    raise ValueError("no such thing")


def two_arguments(first: Any, second: Any) -> Any:
    return first, second


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "The data has no domain"),
        ({"a": (images(0), [])}, "domain a, train images: there are none"),
        ({"a": (X, Y), "b": []}, "domain b, train images: there are none"),
        ({"a": (images(1), [0])}, "Domain a has one image, which cannot be split"),
        ({"a": (X, Y[:-1])}, "there are 10 images and 9 labels"),
        ({"a": (X, Y * 2)}, "go up to 2, but no image has label 1"),
        ({"a": (X, Y + 2**40)}, "but no image has label 0, 1, 2, 3"),
        ({"a": (X, Y), "b": (X / 255, Y)}, "domain a, train images are uint8, and domain b, train images are float"),
        ({"a": {"train": (X, Y), "test": (X / 255, Y)}}, "are uint8, and domain a, test images are float"),
        ({"a": (X, ["c", "d"] * 5), "b": (X, ["c", "e"] * 5)}, "'d' only in a, 'e' only in b"),
        ({"a": {"train": (X, Y), "classes": ["one"]}}, "row 1: label 1 is outside 0 to 0, the classes one"),
        ({"a": {"train": (X, Y), "classes": "ab"}}, "expected a list of texts"),
        ({"a": {"train": (X, Y), "classes": ["c", "c"]}}, "name a class twice"),
        ({"a": {"train": (X, Y), "extra": (X, Y)}}, "has a split 'extra'"),
        ({"a": {"test": (X, Y)}}, "the keys 'test'; expected 'train'"),
        ({"a": {"train": (X, Y), "test": (X, ["c"] * 10)}}, "texts for labels of one split and numbers for the other"),
        ({"a": X}, "were given without labels"),
        ({"a": 3}, "a int is no data"),
        ({"a": iter([])}, r"list\(...\) of an iterable dataset, a loader's .dataset"),
        ({"": (X, Y)}, "is no name"),
        ({(1, 2): (X, Y)}, "is no name"),
        ({0: (X, Y), "0": (X, Y)}, "Domain 0 is there more than once"),
        ([(X[0], 0, "more")], r"row 0: the item is a tuple of 3; expected \(image, label\)"),
        ([X[0], X[1], X[2]], "row 0: the item is a ndarray"),
        ([(X[0], 0), (X[1], None)], "train labels, row 1: the label is None"),
        (Items([lambda: (X[0], 0), raising]), "row 1: reading the item of the Items raised ValueError: no such thing"),
        (Items([lambda: (X[0], 0), lambda: (X[1], -1)]), "row 1: label -1"),
        (raising, "raised ValueError: no such thing"),
        (lambda: 3, "returned a int; expected a mapping"),
        (two_arguments, "is a function, which is no benchmark. Data is a mapping"),
        (3.5, "is a float, which is no benchmark. Data is a mapping"),
    ],
)  # fmt: skip
def test_unfit_data_is_refused_in_a_sentence(wrong: Any, message: str) -> None:
    with pytest.raises(FedNormError, match=message):
        read(wrong)


def loaded_with(**changes: Any) -> Callable[[Reader], Any]:
    def make(reader: Reader) -> Any:
        del reader
        values = {"images": torch.zeros(4, 3, S, S, dtype=torch.uint8), "labels": torch.tensor([0, 1, 0, 1])}
        values |= {"index": torch.arange(4), **changes}
        split = Split(values["images"], values["labels"], values["index"])
        return Loaded("mine", 2, (Domain("d", split, split),)[: changes.get("domains", 1)])

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (loaded_with(domains=0), "expected a Loaded with one domain or more"),
        (loaded_with(images=torch.zeros(4, 3, S, S)), "images are float32 of shape"),
        (loaded_with(images=torch.zeros(4, 3, 9, 9, dtype=torch.uint8)), r"expected uint8 of shape \(N, 3, 6, 6\)"),
        (loaded_with(labels=torch.tensor([0, 1])), "with a label an image"),
        (loaded_with(labels=torch.tensor([0, 1, 2, 0])), "labels from 0 to 2, outside 0 to 1"),
        (loaded_with(index=torch.tensor([9])), "goes beyond the 4 images"),
        (loaded_with(index=torch.arange(0)), "has no training images"),
        (Benchmark(name="mine", summary="", load=lambda _: 3), "mine returned 3; expected a Loaded"),  # type: ignore[arg-type,return-value]
        (Benchmark(name="mine", summary="", load=lambda _: raising()), "Reading the data mine raised ValueError"),
    ],
)
def test_what_a_strangers_benchmark_returns_is_checked(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(make)


def test_the_configuration_takes_objects_where_it_takes_names() -> None:
    config = resolve({"data": {"name": {"a": (X, Y)}}, "model": {"width": 4}})
    assert config.data.name == DATA.add({"a": (X, Y)})
    assert config.hash != resolve({"data": {"name": {"a": (X, 1 - Y)}}, "model": {"width": 4}}).hash
    with pytest.raises(ConfigError, match=r"is an object of this Python process, and it cannot\. Put a function"):
        config.require_importable("it cannot")
    with pytest.raises(ConfigError, match=r"data.name must be a string; got 3"):
        resolve({"data": {"name": 3}})
