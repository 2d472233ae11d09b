"""A model that clients were evaluated on is written again only where it is not what the next one is to evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fednorm.federation.local import Local, Turn
from fednorm.federation.wire import pack, unpack

Between = Callable[[Any, Any], object]


def first_parameter(site: Any) -> torch.Tensor:
    parameter: torch.Tensor = next(site.bench.model.parameters())
    return parameter


def written(site: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each time that the model is written."""
    times, write = [], site.bench.write

    def counted(tensors: Any) -> None:
        times.append(1)
        write(tensors)

    monkeypatch.setattr(site.bench, "write", counted)
    return times


@pytest.mark.parametrize("strategy", ["fedavg", "fedwon"])
def test_clients_that_evaluate_what_is_sent_have_it_written_once(
    strategy: str, make_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, alone = make_site(strategy), make_site(strategy)
    arrays = pack(site.train(0, 1))
    times = written(site, monkeypatch)
    together = [site.evaluate(pid, arrays) for pid in (0, 1, 2, 0)]
    assert len(times) == 1
    assert together == [alone.evaluate(pid, pack(unpack(arrays))) for pid in (0, 1, 2, 0)]
    other = pack(unpack(arrays))
    assert site.evaluate(0, other) == together[0]
    assert len(times) == 2, "other arrays, if of the same values"


@pytest.mark.parametrize(
    "between",
    [
        lambda site, arrays: site.train(1, 1, arrays),
        lambda site, arrays: site.evaluate(1, arrays, mode="reestimated", images=4),
        lambda site, arrays: site.evaluate(1, pack({k: v * 2 for k, v in unpack(arrays).items()})),
        lambda site, _: site.bench.write({k: v * 0 for k, v in site.bench.model.state_dict().items()}),
        lambda site, arrays: first_parameter(site).data.mul_(3) if site.train(1, 1, arrays) else None,
        lambda site, _: first_parameter(site).detach().mul_(3),
    ],
    ids=["training", "reestimated", "others", "written", "training, then data", "in place"],
)
@pytest.mark.parametrize("strategy", ["fedavg", "fedwon"])
def test_whatever_happens_between_two_evaluations(strategy: str, between: Between, make_site: Any) -> None:
    site = make_site(strategy)
    arrays = pack(site.train(0, 1))
    before = site.evaluate(0, arrays)
    between(site, arrays)
    assert site.evaluate(0, arrays) == before


def test_a_client_with_tensors_of_its_own_has_its_model_written(make_site: Any) -> None:
    site, other = make_site("fedbn"), make_site("fedbn")
    arrays = pack(site.train(0, 1))
    for each in (site, other):
        each.keep(1, site.kept(0))
    turns = [site.evaluate(pid, arrays) for pid in (0, 2, 1, 2, 0)]
    assert turns == [turns[0], turns[1], other.evaluate(1, pack(unpack(arrays))), turns[1], turns[0]]


class Shrinks(Local):
    """A user's client side that writes past PyTorch's count of versions."""

    def before_evaluation(self, turn: Turn) -> None:
        for parameter in turn.model.parameters():
            parameter.data.mul_(0.5)


@pytest.mark.parametrize("strategy", ["fedavg", "fedwon"])
def test_what_a_strategy_does_before_an_evaluation_is_gone_at_the_next(
    strategy: str, make_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, other = make_site(strategy), make_site(strategy)
    arrays = pack(site.train(0, 1))
    plain = site.evaluate(0, arrays)
    monkeypatch.setattr(type(site.strategy), "local", Shrinks)
    shrunk = site.evaluate(0, arrays)
    assert shrunk != plain
    assert [shrunk, shrunk] == [site.evaluate(0, arrays), other.evaluate(0, pack(unpack(arrays)))]
    monkeypatch.undo()
    assert site.evaluate(0, arrays) == plain


class Moves(nn.Module):
    """A user's network that moves a statistic while it evaluates, past PyTorch's count of versions."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * image_size**2, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(images).flatten(1))
        assert self.norm.running_mean is not None
        self.norm.running_mean.data.add_(1.0)
        return logits


def test_a_users_layer_may_change_what_it_holds_in_an_evaluation(make_site: Any) -> None:
    site = make_site(model={"name": Moves})
    arrays = pack(site.train(0, 1))
    assert site.evaluate(1, arrays) == site.evaluate(1, arrays)
