"""Input normalization: what is measured, which image it scales, in both worlds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.functional import normalize

from fednorm.config import resolve
from fednorm.data import load_federation, pixels
from fednorm.data.domain import Client, Federation, Split
from fednorm.data.normalize import measured, normalized
from fednorm.data.scaling import HALF, UNIT, Scaling
from fednorm.errors import ConfigError, DataError
from fednorm.federation.client import fit, reestimate_on, score
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import Workbench
from fednorm.rng import torch_stream
from fednorm.streams.evaluation import accuracy
from fednorm.streams.probe import probe_images
from fednorm.streams.workbench import ContinualWorkbench

SMALL: dict[str, Any] = {
    "data": {"train_per_client": 12, "test_per_domain": 6},
    "model": {"width": 4},
    "train": {"batch_size": 6},
    "rounds": {"num_rounds": 1},
}


@pytest.fixture(autouse=True)
def own_cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDNORM_CACHE", str(shared_cache))


def some(n: int, seed: int, channels: int = 3, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, (n, channels, 5, 4), dtype=torch.uint8, generator=torch_stream(seed, "images"))


def split_of(images: Tensor, rows: list[int]) -> Split:
    return Split(images, torch.zeros(len(images), dtype=torch.int64), torch.tensor(rows, dtype=torch.int64))


def statistics(*parts: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and std by channel, in double precision."""
    x = torch.cat(parts).double().div(255).movedim(1, 0).flatten(1)
    return x.mean(1).tolist(), x.std(1, correction=0).tolist()


# Scaling --------------------------------------------------------------------------------------------------------------


def test_half_is_what_it_was_bit_for_bit() -> None:
    images = some(9, 1)
    ours = HALF(images)
    assert torch.equal(ours, images.to(torch.float32).div_(127.5).sub_(1.0))
    assert torch.equal(pixels(images), ours)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(UNIT(images), images.float() / 255)
    floats = torch.rand(2, 3, 4, 4)
    assert HALF(floats) is floats


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_scaling_is_torchvisions_normalize(channels: int, groups: int, seed: int) -> None:
    draw = torch_stream(seed, "scaling")
    mean, std = torch.rand(groups, channels, generator=draw), 0.1 + torch.rand(groups, channels, generator=draw)
    each = [Scaling((tuple(m),), (tuple(d),)) for m, d in zip(mean.tolist(), std.tolist(), strict=True)]
    group = torch.randint(groups, (7,), generator=draw)
    images = some(7, seed, channels)
    ours = Scaling.stack(each)(images, group)
    for image, number, row in zip(images, group.tolist(), ours, strict=True):
        theirs = normalize(image.double() / 255, mean[number].tolist(), std[number].tolist())
        torch.testing.assert_close(row.double(), theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(each[number](image[None])[0], row)


def test_images_of_several_domains_need_their_groups() -> None:
    two = Scaling.stack([HALF, UNIT])
    with pytest.raises(DataError, match="name their groups"):
        two(some(2, 1))
    assert Scaling.stack([UNIT, UNIT]) == UNIT
    with pytest.raises(DataError, match="have 1 channels, and were measured with 3"):
        Scaling(((0.1, 0.2, 0.3),), ((1.0, 1.0, 1.0),))(some(2, 1, channels=1))


@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_mean_and_std_are_those_of_the_rows_of_a_split(n: int, channels: int, seed: int) -> None:
    images, more = some(n + 4, seed, channels), some(5, seed + 1, channels)
    rows = torch.randperm(n + 4, generator=torch_stream(seed, "rows"))[:n].tolist()
    scaling = measured([split_of(images, rows), split_of(more, []), split_of(more, [4, 0])])
    mean, std = statistics(images[rows], more[[4, 0]])
    assert scaling.mean[0] == pytest.approx(mean, rel=1e-12)
    assert scaling.std[0] == pytest.approx(std, rel=1e-9)


def test_a_channel_of_one_level_is_centred_and_not_stretched() -> None:
    images = some(3, 1)
    images[:, 1] = 51
    scaling = measured([split_of(images, [0, 1, 2])])
    assert (scaling.mean[0][1], scaling.std[0][1]) == (0.2, 1.0)
    assert bool((scaling(images)[:, 1].abs() < 1e-6).all())
    with pytest.raises(DataError, match="there are none"):
        measured([split_of(images, [])])


# A federation ---------------------------------------------------------------------------------------------------------


def federation() -> Federation:
    """Two domains of two clients and one of one; the last is held out. Domains differ in brightness."""
    clients = []
    for pid, domain in enumerate(("dark", "dark", "light", "light", "new")):
        low, high = {"dark": (0, 90), "light": (150, 256), "new": (0, 256)}[domain]
        images = some(12, 10 + pid, low=low, high=high)
        train = [] if domain == "new" else [0, 2, 4, 5]
        parts = (split_of(images, rows) for rows in (train, [1] if train else [], [6, 7, 8]))
        clients.append(Client(pid, domain, *parts, held_out=domain == "new"))
    return Federation("three", 3, 5, tuple(clients))


def test_global_and_domain_are_measured_on_training_images_alone() -> None:
    data = federation()
    images = {
        name: [c.train.images[c.train.index] for c in data.training_clients if name in (c.domain, "global")]
        for name in ("dark", "light")
    }
    everything = statistics(*images["dark"], *images["light"])
    for how in ("global", "domain"):
        made = normalized(data, how)
        for client in made.clients:
            own = how == "domain" and client.domain != "new"
            mean, std = statistics(*images[client.domain]) if own else everything
            for split in (client.train, client.validation, client.test):
                assert split.scaling.mean[0] == pytest.approx(mean, rel=1e-12)
                assert split.scaling.std[0] == pytest.approx(std, rel=1e-9)
        assert made.digest() == data.digest()
    assert "new, on which nobody trained, by those of all others" in normalized(data, "domain").notes[0]
    assert normalized(data, "global").notes == (
        "Images are normalized by the mean and std of the training images of all clients.",
    )
    assert normalized(data, "half") is data
    assert {client.test.scaling for client in normalized(data, "none").clients} == {UNIT}


def seen_by(model: torch.nn.Module, act: Any) -> Tensor:
    """Return what a model is given while something is done."""
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    act()
    hook.remove()
    return torch.cat(seen)


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["none", "global", "domain"])
def test_clients_train_evaluate_and_reestimate_on_the_same_scale(how: str) -> None:
    values = {**SMALL, "data": {**SMALL["data"], "normalize": how}, "strategy": {"name": "fedbn"}}
    bench = Workbench(resolve(values))
    plain = load_federation(resolve(SMALL).data, image_size=bench.federation.image_size, seed=1)
    of_all = statistics(*(c.train.batch(torch.arange(len(c.train)))[0] for c in plain.clients))
    for client, other in list(zip(bench.federation.clients, plain.clients, strict=True))[:2]:
        raw = other.train.batch(torch.arange(len(other.train)))[0]
        mean, std = {"none": ([0.0] * 3, [1.0] * 3), "global": of_all, "domain": statistics(raw)}[how]

        def expected(split: Split, mean: list[float] = mean, std: list[float] = std) -> Tensor:
            return normalize(split.batch(torch.arange(len(split)))[0].double() / 255, mean, std)

        acts = {
            "train": (other.train, lambda c=client: fit(bench, c, server_round=1)),
            "test": (other.test, lambda c=client: score(bench, c.test)),
            "again": (other.train, lambda c=client: reestimate_on(bench, c.train, len(c.train))),
        }
        for split, act in acts.values():
            ours = seen_by(bench.model, act)
            # Training shuffles; its images are compared as a set.
            order, theirs = (x.double().flatten(1).sum(1).argsort() for x in (ours, expected(split)))
            torch.testing.assert_close(ours[order].double(), expected(split)[theirs], rtol=1e-4, atol=1e-4)


def test_the_key_is_part_of_the_hash_and_its_default_is_not() -> None:
    assert resolve({"data": {"normalize": "half"}}).hash == resolve({}).hash
    assert len({resolve({"data": {"normalize": how}}).hash for how in ("half", "none", "global", "domain")}) == 4
    with pytest.raises(ConfigError, match=r"data\.normalize must be one of half, none, global, domain; got 'imagenet'"):
        resolve({"data": {"normalize": "imagenet"}})


def test_a_table_says_what_images_were_normalized_by() -> None:
    result = simulate(resolve({**SMALL, "data": {**SMALL["data"], "normalize": "domain"}}), runs=None)
    assert any("their own domain's training images" in note for note in result["data"]["notes"])


# A stream -------------------------------------------------------------------------------------------------------------


def stream_config(how: str, learner: str = "er_ace", **train: Any) -> Any:
    return resolve(
        {
            "kind": "continual",
            "scenario": {"name": "domain_digits", "train_per_experience": 20, "test_per_experience": 6},
            "learner": {"name": learner},
            "data": {"normalize": how},
            "model": {"width": 4},
            "train": {"batch_size": 8, "epochs": 1, **train},
        }
    )


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("learner", "how"),
    [("er_ace", "none"), ("er_ace", "global"), *((name, "domain") for name in ("er_ace", "joint", "ewc", "gdumb"))],
)
def test_a_learner_sees_each_image_on_its_domains_scale(learner: str, how: str) -> None:
    """New and remembered images, of several domains in one batch, are told apart by their pixels."""
    bench = ContinualWorkbench(stream_config(how, learner))
    known: dict[bytes, Tensor] = {}
    each = [e.train.batch(torch.arange(len(e.train)))[0] for e in bench.stream]
    for raw in each:
        mean, std = {"none": ([0.0] * 3, [1.0] * 3), "global": statistics(*each), "domain": statistics(raw)}[how]
        for image, row in zip(raw, normalize(raw.double() / 255, mean, std), strict=True):
            known[key_of(row)] = image

    def go() -> None:
        for experience in bench.training[:2]:
            bench.learner.train(experience)

    seen = seen_by(bench.model, go)
    assert len(seen) >= 40
    assert all(key_of(image) in known for image in seen)
    source = bench.training[0]
    rows = torch.arange(min(30, len(source.train)))
    shown = seen_by(
        bench.model.eval(), lambda: accuracy(bench.model, source.train, source.classes, batch_size=64, rows=rows)
    )
    assert all(key_of(image) in known for image in shown)
    assert all(key_of(image) in known for image in probe_images(bench.stream.experiences, 12, 1))


def key_of(image: Tensor) -> bytes:
    """Return an image rounded so far that the last bits do not count."""
    return image.double().mul(200).round().to(torch.int32).contiguous().numpy().tobytes()


def test_the_domain_of_a_stream_of_one_data_sets_classes_is_all_of_it() -> None:
    values = {"kind": "continual", "scenario": {"name": "split_digits"}, "model": {"width": 4}}
    benches = [ContinualWorkbench(resolve({**values, "data": {"normalize": how}})) for how in ("global", "domain")]
    assert benches[0].learner.scaling == benches[1].learner.scaling
    assert len(benches[0].learner.scaling.mean) == 1
    notes = [note for note in benches[0].stream.notes if "normalized" in note]
    assert notes == ["Images are normalized by the mean and std of the training images of all experiences."]
    assert dataclasses.is_dataclass(benches[0].stream)
