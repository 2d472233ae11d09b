"""Each method of test-time adaptation against its formula, written out here in float64 or with PyTorch's own layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.adaptation._layers import entropy
from fednorm.adaptation.atp import ATP, RATES
from fednorm.adaptation.bn_alpha import BNAlpha
from fednorm.adaptation.rotta import Memory, RoTTA
from fednorm.adaptation.tent import Tent
from fednorm.errors import ConfigError

CHANNELS = 3


def images(count: int, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 1.5 + 2 * torch.randn(count, CHANNELS, 4, 4, generator=draw)


def with_values(layer: nn.Module, seed: int = 2) -> nn.Module:
    """Return a layer, or a network, in evaluation mode, of which no tensor has the value it begins with."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=draw) + 0.5
                tensor.copy_(values if "var" in key or tensor.ndim == 1 else values - 1)
    return layer.eval()


def single(norm: nn.Module) -> nn.Module:
    """Return a network that is a norm, and whose logits are the means of its channels."""
    return with_values(nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def deep(norm: Callable[[], nn.Module]) -> nn.Module:
    """Return a small network with two norms."""
    return with_values(
        nn.Sequential(
            *(nn.Conv2d(CHANNELS, 3, 3), norm(), nn.ReLU(), nn.Conv2d(3, 3, 2), norm(), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(3, 4)),
        )
    )


def batch_norm() -> nn.Module:
    return nn.BatchNorm2d(3)


def arrays(layer: nn.Module) -> dict[str, np.ndarray]:
    return {key: tensor.double().numpy() for key, tensor in layer.state_dict().items()}


# bn_alpha -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "share"),
    [(BNAlpha(alpha=0.3), 0.3), (BNAlpha(prior=5), 7 / 12), (BNAlpha(alpha=1.0), 1.0)],
    ids=["alpha", "prior", "batch"],
)
def test_bn_alpha_is_its_formula(method: BNAlpha, share: float) -> None:
    model, x = single(nn.BatchNorm2d(3)), images(7)
    made = method.begin(copy.deepcopy(model), {})(x)
    own, values = arrays(model[0]), x.double().numpy()
    mean = (1 - share) * own["running_mean"] + share * values.mean((0, 2, 3))
    var = (1 - share) * own["running_var"] + share * values.var((0, 2, 3))
    y = (values.mean((2, 3)) - mean) / np.sqrt(var + 1e-5) * own["weight"] + own["bias"]
    torch.testing.assert_close(made.double(), torch.from_numpy(y), rtol=1e-5, atol=1e-5)


def test_bn_alpha_of_nothing_is_plain_evaluation_to_the_bit_and_of_one_is_the_batch_s_statistics() -> None:
    model, x = deep(batch_norm), images(6)
    with torch.no_grad():
        plain = model(x)
        by_batch = copy.deepcopy(model).train()(x)
    assert torch.equal(BNAlpha(alpha=0.0).begin(copy.deepcopy(model), {})(x), plain)
    torch.testing.assert_close(BNAlpha(alpha=1.0).begin(copy.deepcopy(model), {})(x), by_batch)
    assert not torch.allclose(plain, by_batch)


def test_bn_alpha_carries_nothing_from_one_batch_to_the_next() -> None:
    model, x = deep(batch_norm), images(6)
    predict = BNAlpha(alpha=0.5).begin(copy.deepcopy(model), {})
    first = predict(x)
    predict(images(3, seed=9))
    assert torch.equal(predict(x), first)


def test_bn_alpha_has_one_weight() -> None:
    with pytest.raises(ConfigError, match="prior = 16 makes the weight"):
        BNAlpha(alpha=0.3, prior=16)
    with pytest.raises(ConfigError, match=r"bn_alpha\.alpha is a share, 0 to 1; got 1\.5"):
        BNAlpha(alpha=1.5)


# tent -----------------------------------------------------------------------------------------------------------------


def tented(model: nn.Module) -> nn.Module:
    """Return a network as TENT's code prepares it: training mode, no running statistics, affine tensors alone."""
    model = copy.deepcopy(model).train().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.requires_grad_(True)
    return model


@pytest.mark.parametrize("norm", [batch_norm, lambda: nn.GroupNorm(1, 3)], ids=["batch", "group"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_tent_takes_the_steps_of_its_code_and_predicts_before_each(
    norm: Callable[[], nn.Module], optimizer: str
) -> None:
    model, batches = deep(norm), [images(5, seed) for seed in (3, 4, 5)]
    own = copy.deepcopy(model)
    predict = Tent(learning_rate=0.05, optimizer=optimizer, batch_size=5).begin(own, {})
    reference = tented(model)
    parameters = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    steps = torch.optim.Adam(parameters, lr=0.05) if optimizer == "adam" else torch.optim.SGD(parameters, 0.05, 0.9)
    for x in batches:
        logits = reference(x)
        probabilities = logits.softmax(1)
        loss = -(probabilities * logits.log_softmax(1)).sum(1).mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        torch.testing.assert_close(predict(x), logits.detach())
    before, after = model.state_dict(), own.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_of_several_steps_tent_predicts_with_the_last_forward_pass() -> None:
    model, x = deep(batch_norm), images(5)
    once = Tent(learning_rate=0.05).begin(copy.deepcopy(model), {})
    assert torch.equal(
        Tent(learning_rate=0.05, steps=3).begin(copy.deepcopy(model), {})(x), [once(x) for _ in "123"][2]
    )


def test_one_value_of_a_channel_leaves_its_shift() -> None:
    model = with_values(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48)))
    assert torch.equal(Tent().begin(copy.deepcopy(model), {})(images(1))[0], model[1].bias.detach())


def test_masked_classes_have_no_part_in_the_entropy() -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    value = entropy(logits)
    torch.testing.assert_close(value, entropy(logits[:, :2]))
    value.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, :2].isfinite().all()


# atp ------------------------------------------------------------------------------------------------------------------


class ByHand:
    """A network of one batch normalization and a linear layer in float64, with gradients of plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        norm, linear = model[0], model[3]
        state = [*norm.parameters(), *linear.parameters(), norm.running_mean, norm.running_var]
        self.start = [tensor.detach().double() for tensor in state]

    @staticmethod
    def logits(tensors: list[Tensor], x: Tensor) -> Tensor:
        scale, shift, weight, bias, mean, var = tensors
        centred = (x.mean((2, 3)) - mean) / (var + 1e-5).sqrt()
        return (centred * scale + shift) @ weight.T + bias

    def moves(self, x: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_(True) for tensor in self.start]
        p = self.logits(leaves, x).softmax(1)
        grads = torch.autograd.grad(-(p * p.log()).sum(1).mean(), leaves[:4])
        flat = x.transpose(0, 1).flatten(1)
        return [*(-grad for grad in grads), flat.mean(1) - self.start[4], flat.var(1) - self.start[5]]

    def moved(self, rates: Tensor, x: Tensor) -> list[Tensor]:
        tensors = [w + r * h for w, r, h in zip(self.start, rates, self.moves(x), strict=True)]
        return [*tensors[:5], tensors[5].clamp(min=0)]

    def refined(self, rates: Tensor, x: Tensor, labels: Tensor, step: float) -> Tensor:
        leaves = [tensor.clone().requires_grad_(True) for tensor in self.moved(rates, x)]
        grads = torch.autograd.grad(functional.cross_entropy(self.logits(leaves, x), labels), leaves)
        slopes = [(g * h).sum() / math.sqrt(g.numel()) for g, h in zip(grads, self.moves(x), strict=True)]
        return rates - step * torch.stack(slopes)


def headed() -> nn.Module:
    return with_values(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)))


def test_atp_learns_a_rate_a_tensor_and_moves_each_by_it() -> None:
    model = headed()
    by_hand, method = ByHand(model), ATP(rounds=1, rate_of_rates=0.5)
    labelled = [(images(6, seed), torch.arange(6) % 4) for seed in (3, 4, 5)]
    rates = torch.zeros(6, dtype=torch.float64)
    for x, labels in labelled:
        rates = by_hand.refined(rates, x.double(), labels, 0.5)
    learned = method.refine(copy.deepcopy(model), method.initial(model), labelled)
    assert rates.abs().min() > 1e-5
    torch.testing.assert_close(learned[RATES].double(), rates, rtol=1e-3, atol=1e-7)
    # Online, the network that predicts is the mean of those that were adapted.
    predict, so_far = method.begin(copy.deepcopy(model), learned), []
    for seed in (6, 7, 8):
        x = images(5, seed)
        so_far.append(by_hand.moved(rates, x.double()))
        mean = [torch.stack(tensors).mean(0) for tensors in zip(*so_far, strict=True)]
        torch.testing.assert_close(predict(x).double(), by_hand.logits(mean, x.double()), rtol=1e-4, atol=1e-5)


def test_atp_s_variances_are_not_negative_and_rates_of_nothing_are_plain_evaluation_to_the_bit() -> None:
    model, x = deep(batch_norm), images(6)
    with torch.no_grad():
        plain = model(x)
    method = ATP()
    assert torch.equal(method.begin(copy.deepcopy(model), method.initial(model))(x), plain)
    away = {RATES: torch.full_like(method.initial(model)[RATES], -50.0)}
    assert method.begin(copy.deepcopy(model), away)(x).isfinite().all()


# rotta ----------------------------------------------------------------------------------------------------------------


def test_rotta_moves_the_statistics_towards_the_memory_s_and_not_before() -> None:
    model = single(nn.BatchNorm2d(3))
    own = copy.deepcopy(model)
    predict = RoTTA(momentum=0.2, memory=300, update_every=4).begin(own, {})
    stream = images(8)
    with torch.no_grad():
        plain = model(stream[:4])
    assert torch.equal(predict(stream[:4]), plain)
    before, values = arrays(model[0]), stream[:4].double().numpy()
    expected = 0.8 * before["running_mean"] + 0.2 * values.mean((0, 2, 3))
    np.testing.assert_allclose(arrays(own[0])["running_mean"], expected, rtol=1e-5)
    expected = 0.8 * before["running_var"] + 0.2 * values.var((0, 2, 3))
    np.testing.assert_allclose(arrays(own[0])["running_var"], expected, rtol=1e-5)
    with torch.no_grad():
        moved = own(stream[4:])
    assert torch.equal(predict(stream[4:]), moved)
    assert torch.equal(own[0].weight, model[0].weight)


def test_rotta_s_memory_is_balanced_and_gives_up_the_old_and_the_unsure() -> None:
    memory = Memory(capacity=6, num_classes=3)
    for number in range(20):
        memory.add(torch.tensor(float(number)), 0, 0.1)
    assert [len(items) for items in memory.items] == [2, 0, 0]
    # A fresh one replaces the older; an image as unsure as can be replaces nothing that is surer.
    assert memory.images().tolist() == [18.0, 19.0]
    memory.add(torch.tensor(20.0), 0, math.log(3))
    assert memory.images().tolist() == [18.0, 19.0]
    for number in (21, 22):
        memory.add(torch.tensor(float(number)), 1, 0.1)
    assert memory.images().tolist() == [18.0, 19.0, 21.0, 22.0]
    # The score, written out, of an image that has seen nine others come.
    assert memory.score(0.5, 9) == pytest.approx(1 / (1 + math.exp(-1.5)) + 0.5 / math.log(3))


def test_a_full_memory_makes_room_among_the_largest_classes() -> None:
    memory = Memory(capacity=4, num_classes=2)
    for number, kind in enumerate((0, 0, 1, 1)):
        memory.add(torch.tensor(float(number)), kind, 0.1)
    memory.items[1].pop(0)
    memory.items[0].append(memory.items[0][0])
    memory.add(torch.tensor(9.0), 1, 0.1)
    assert [len(items) for items in memory.items] == [2, 2]
    assert memory.items[1][-1].image == 9.0
