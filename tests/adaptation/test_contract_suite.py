"""The contract suite of adaptations: it passes what ships, and names what a stranger's method breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from fednorm.adaptation import Adaptation, AdaptationSpec, Adapter, Knowledge
from fednorm.cards import ADAPTATIONS
from fednorm.testing import _check_adapting, check_adaptation


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTATIONS.names)
def test_every_adaptation_keeps_the_contract(name: str) -> None:
    check_adaptation(name)


def spec(wrong: Callable[[nn.Module, Tensor], Tensor], **card: bool) -> AdaptationSpec:
    """A method that gives what a function makes of the network and a batch."""

    @dataclass(frozen=True, kw_only=True)
    class Stranger(Adaptation):
        method = "stranger"

        def check(self, model: nn.Module) -> None:
            """Take every network."""

        def begin(self, model: nn.Module, knowledge: Knowledge) -> Adapter:
            del knowledge
            return lambda images: wrong(model, images)

    return replace(AdaptationSpec(name="stranger", summary="A stranger's.", make=Stranger), **card)


@torch.no_grad()
def plain(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


GIVEN: list[Tensor] = []


def counting(model: nn.Module, images: Tensor) -> Tensor:
    GIVEN.append(images)
    return plain(model, images) + len(GIVEN)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda model, images: model(images), "logits still hang on the graph of gradients"),
        (lambda model, images: plain(model, images)[:, :3], r"logits of 4 classes have the shape \(8, 3\)"),
        (lambda model, images: plain(model, images).argmax(1), r"shape \(images, classes\); got \(8,\)"),
        (lambda model, images: plain(model, images) / 0, "logits are not finite"),
        (lambda model, images: plain(model, images)[1:], r"of 21 images in batches of 8 it gave logits of \[7, 7, 4\]"),
        (lambda model, images: plain(model, images) + torch.rand(()), "two predictions"),
        (lambda model, images: plain(model, images) + 0 * torch.rand(()), "global random generator"),
        (counting, "the same images gave two predictions"),
    ],
)
def test_what_is_wrong_is_named(wrong: Callable[[nn.Module, Tensor], Tensor], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        _check_adapting(spec(wrong), {"batch_size": 8, "order": "shuffled", "reset": "each"})


def test_a_card_that_asks_for_statistics_refuses_a_network_without() -> None:
    with pytest.raises(AssertionError, match="its card needs running statistics, and it takes a network without"):
        check_adaptation(spec(plain, statistics=True))


@pytest.mark.slow
def test_a_method_that_keeps_it_passes() -> None:
    check_adaptation(spec(plain))
