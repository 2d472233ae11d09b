"""Other simulators on the bench's cases: they end with our weights; where one is missing, a sentence says so."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from fednorm.bench import engine
from fednorm.bench.case import Case
from fednorm.bench.engine import bench_engine, bench_table
from fednorm.bench.peers import PEERS, setting_of
from fednorm.errors import ConfigError
from fednorm.rng import torch_stream

CASE = Case(name="sane", clients=3, train=32, test=7, image_size=8, width=4, batch_size=16, rounds=2)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
def test_a_simulator_ends_with_our_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{PEERS[name].package} is not installed (the extra bench)")
    monkeypatch.setattr(engine, "case_of", lambda _: CASE)
    document = bench_engine(["sane"], [name], 1)
    assert document["cases"]["sane"]["engines"][name]["difference"] < 1e-5
    assert name in bench_table(document).notes[-1]


@pytest.mark.parametrize("name", [*PEERS, "flower"])
def test_a_simulator_that_is_not_installed_is_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fednorm.bench.peers.find_spec", lambda _: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"(?s)not installed.*pip install 'fednorm\[(bench|simulation)\]'"):
        bench_engine(["tiny-1000"], [name], 1, lines.append)
    assert lines == [], "before anything is timed"


def test_batches_are_the_bare_loops() -> None:
    setting = setting_of(CASE)
    generator = torch_stream(CASE.seed, "client", 1, "round", 2, "batches")
    rows = torch.randperm(CASE.train, generator=generator)
    batches: list[Any] = list(setting.batches(1, 2))
    assert [len(labels) for _, labels in batches] == [16, 16]
    assert torch.equal(torch.cat([labels for _, labels in batches]), setting.clients[1].train_labels[rows])
    assert torch.equal(torch.cat([images for images, _ in batches]), setting.clients[1].train_images[rows])
