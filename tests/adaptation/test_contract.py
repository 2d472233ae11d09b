"""What holds for every registered method of test-time adaptation, on networks with and without running statistics."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fednorm.adaptation import Adaptation, AdaptationSpec, Adapter, Knowledge
from fednorm.adaptation._scoring import Adapted, refined, rows_in_order
from fednorm.adaptation.bn_alpha import BNAlpha
from fednorm.adaptation.tent import Tent
from fednorm.cards import ADAPTATIONS, NORMS
from fednorm.data.domain import Split
from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.rng import torch_seeded, torch_stream

NETWORKS = {
    "digits_cnn, batch": ("digits_cnn", "batch_norm", 28),
    "digits_cnn, group": ("digits_cnn", "group_norm", 28),
    "vit": ("vit", "layer_norm", 32),
}


@cache
def network(model: str, norm: str, size: int) -> nn.Module:
    with torch_seeded(1, "network"):
        made = make_model(model, norm=make_norm(norm), num_classes=4, image_size=size, width=4 if model != "vit" else 8)
        made.train()
        with torch.no_grad():  # running statistics of something
            for _ in range(3):
                made(torch.randn(8, 3, size, size))
    return made


@cache
def split(size: int) -> Split:
    draw = torch.Generator().manual_seed(3)
    shape = (21, 3, size, size)
    return Split(
        torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8),
        torch.randint(0, 4, (21,), generator=draw),
        torch.arange(21),
    )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def quick(card: AdaptationSpec) -> Adaptation:
    options = {"atp": {"rounds": 1}, "rotta": {"update_every": 8, "memory": 12}}.get(card.name, {})
    return card.made({"batch_size": 8, **options})


@pytest.mark.parametrize("name", ADAPTATIONS.names)
@pytest.mark.parametrize("which", NETWORKS)
def test_a_network_is_adapted_alike_each_time_and_stays_as_it_is_or_is_refused_by_name(name: str, which: str) -> None:
    card, model = ADAPTATIONS[name], copy.deepcopy(network(*NETWORKS[which]))
    how, images = quick(card), split(NETWORKS[which][2])
    if card.statistics and which != "digits_cnn, batch":
        with pytest.raises(ConfigError, match=f"'{name}'.*has none. Take norm 'batch_norm'"):
            how.check(model)
        return
    how.check(model)
    before, modes = tensors(model), [module.training for module in model.modules()]
    draws = torch.get_rng_state()
    knowledge = refined(how, model, how.initial(model), images, 1, "learning") if how.rounds_of_learning else {}
    seen = []

    class Watched(type(how)):  # type: ignore[misc]
        def begin(self, model: nn.Module, knowledge: Knowledge) -> Adapter:
            adapter = super().begin(model, knowledge)

            def watched(images: Tensor) -> Tensor:
                seen.append(adapter(images))
                return seen[-1]

            return watched

    watched = Watched(batch_size=8, order="class_sorted", **how.options)
    shares = [Adapted(watched, model, knowledge).accuracy(images, 1, "client", 0) for _ in range(2)]
    assert shares[0] == shares[1]
    assert [len(logits) for logits in seen] == [8, 8, 5] * 2
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))
    assert torch.cat(seen).isfinite().all()
    assert not seen[0].requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws)


@pytest.mark.parametrize("name", NORMS.names)
def test_a_network_of_any_norm_is_adapted_or_refused_in_a_sentence(name: str) -> None:
    card = NORMS[name]
    size = 32 if card.tried_on == "vit" else 28
    with torch_seeded(1, "network"):
        model = make_model(card.tried_on, norm=make_norm(name), num_classes=4, image_size=size, width=8).eval()
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(x)
    if refused := refusal(BNAlpha(), model):
        assert "Take norm 'batch_norm'" in refused
    else:
        assert torch.equal(BNAlpha(alpha=0.0).begin(copy.deepcopy(model).eval(), {})(x), plain)
    if refused := refusal(Tent(), model):
        assert "Take" in refused
    else:
        assert Tent().begin(copy.deepcopy(model).eval(), {})(x).isfinite().all()


def refusal(how: Adaptation, model: nn.Module) -> str:
    """Return why a network is refused; empty where it is not."""
    try:
        how.check(model)
    except ConfigError as error:
        return str(error)
    return ""


def test_images_come_in_the_order_that_is_asked_for() -> None:
    images = split(28)
    draws = [rows_in_order(images, "shuffled", torch_stream(1, "order")) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].sort().values.tolist() == list(range(21)) != draws[0].tolist()
    assert rows_in_order(images, "as_given", torch_stream(1)).tolist() == list(range(21))
    rows = rows_in_order(images, "class_sorted", torch_stream(1))
    expected = sorted(range(21), key=lambda row: (int(images.targets[row]), row))
    assert rows.tolist() == expected


class Counting(Adaptation):
    """Says how often it began, and predicts class 0."""

    begun = 0

    def begin(self, model: nn.Module, knowledge: Knowledge) -> Adapter:
        del model, knowledge
        type(self).begun += 1
        return lambda images: torch.eye(4)[torch.zeros(len(images), dtype=torch.int64)]


@pytest.mark.parametrize(("reset", "begun"), [("each", 2), ("batch", 6), ("never", 1)])
def test_adaptation_begins_anew_when_it_is_asked_to(reset: str, begun: int) -> None:
    Counting.begun = 0
    images = split(28)
    adapted = Adapted(Counting(batch_size=8, reset=reset), nn.Identity(), {})
    shares = [adapted.accuracy(images, 1, "client", number) for number in (0, 1)]
    assert Counting.begun == begun
    assert shares == [int((images.targets == 0).sum()) / 21] * 2


def test_outputs_that_are_no_numbers_are_wrong() -> None:
    class Lost(Adaptation):
        def begin(self, model: nn.Module, knowledge: Knowledge) -> Adapter:
            del model, knowledge
            return lambda images: torch.full((len(images), 4), torch.nan)

    assert Adapted(Lost(), nn.Identity(), {}).accuracy(split(28), 1, "client") == 0


def test_layers_with_statistics_of_another_formula_are_refused() -> None:
    class Rectified(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Rectified(4), nn.Flatten(), nn.LazyLinear(4)).eval()
    model(torch.zeros(1, 3, 8, 8))
    for name in ADAPTATIONS.names:
        with pytest.raises(ConfigError, match=r"1 \(Rectified, batch_norm\) evaluates by another formula"):
            ADAPTATIONS[name].made().check(model)


def test_a_card_is_found_beside_a_class_and_made_for_one_without() -> None:
    assert ADAPTATIONS["fednorm.adaptation.tent:Tent"] is ADAPTATIONS["fednorm.adaptation.tent:SPEC"]
    reference = ADAPTATIONS.add(Counting)
    assert ADAPTATIONS[reference].summary == "Says how often it began, and predicts class 0."
    assert list(ADAPTATIONS["tent"].declared) == ["learning_rate", "optimizer", "steps", "batch_size", "order", "reset"]
