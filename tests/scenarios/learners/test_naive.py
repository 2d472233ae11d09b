"""Naive against Avalanche's own, and the order in which a learner goes through an experience."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from avalanche.training import Naive as AvalancheNaive
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.streams.buffer import Samples
from fednorm.streams.stream import Stream


class InOurOrder(AvalancheNaive):
    """Avalanche's strategy, its loader replaced by batches that a learner of ours was given."""

    batches: list[Samples]

    def make_train_dataloader(self, **_: Any) -> None:
        self.dataloader = [[pixels(b.images), b.labels, torch.zeros_like(b.labels)] for b in self.batches]


@pytest.mark.filterwarnings("ignore:No loggers specified")
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm"])
def test_it_trains_as_avalanches_naive_does(
    norm: str, build: Any, bare: Any, watch: Any, experiences: list[Any]
) -> None:
    learner = build("naive", norm, momentum=0.9)
    model, optimizer = bare(norm, momentum=0.9)
    avalanche = InOurOrder(model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), evaluator=None)
    for experience in experiences[:2]:
        avalanche.batches = watch(learner)
        learner.train(experience)
        avalanche.train(experience, [])
    for key, value in learner.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(
    build: Any, watch: Any, stream: Stream, experiences: list[Any]
) -> None:
    learner = build("naive", train_epochs=2, train_mb_size=12)
    batches = watch(learner)
    learner.train(experiences[0])
    assert [len(batch) for batch in batches] == [12, 12, 12, 4] * 2
    images, labels = stream.experiences[0].train.batch(torch.arange(40))
    epochs = [torch.cat([batch.images for batch in batches[start : start + 4]]) for start in (0, 4)]
    expected = Counter(image.numpy().tobytes() for image in images)
    assert [Counter(image.numpy().tobytes() for image in epoch) for epoch in epochs] == [expected, expected]
    assert not torch.equal(*epochs)
    assert sorted(torch.cat([batch.labels for batch in batches[:4]]).tolist()) == sorted(labels.tolist())


def test_a_step_and_the_online_accuracy_before_it(build: Any, watch: Any, retrace: Any, experiences: list[Any]) -> None:
    learner = build("naive")
    outputs: list[Tensor] = []

    def loss_of(model: nn.Module, new: Samples) -> Tensor:
        outputs.append(model(pixels(new.images)))
        return -outputs[-1].log_softmax(1)[torch.arange(len(new)), new.labels].mean()

    batches = watch(learner)
    learner.train(experiences[:2])
    retrace([*batches.states, learner.model.state_dict()], batches, loss_of)
    logits, labels = torch.cat(outputs[5:]).detach(), torch.cat([new.labels for new in batches[5:]])
    assert (int(learner.hits), learner.tally.seen) == (int((logits.argmax(1) == labels).sum()), 40)
    total = float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert float(learner.tally.loss_sum) == pytest.approx(total, rel=1e-4)
