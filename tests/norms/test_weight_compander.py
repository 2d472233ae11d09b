"""The weight compander: its formula and gradient, what it starts from, and that evaluation computes weights once."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.conversion import convert
from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.norms.weight_compander import Companded, CompandedConv2d, CompandedLinear


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 5)).double()


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.7, 2.0)])
def test_the_gradient_is_that_of_the_formula(a: float, b: float) -> None:
    conv = make_norm("weight_compander", {"a": a, "b": b}).conv(3, 4, 3).double()
    assert isinstance(conv, CompandedConv2d)
    assert conv.log_a is not None
    assert conv.log_b is not None
    a, b = conv.log_a.exp().item(), conv.log_b.exp().item()  # as given, but for their logarithms' rounding in float32
    v, wanted = conv.weight, gaussian(4, 3, 3, 3)
    v.data = 3 * gaussian(4, 3, 3, 3, seed=1)
    (conv.computed_weight() * wanted).sum().backward()
    inner = 1 + (v.detach() / b) ** 2
    torch.testing.assert_close(v.grad, wanted * (a / b) / inner, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(conv.log_a.grad, (wanted * a * (v.detach() / b).atan()).sum(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(conv.log_b.grad, (-wanted * a * v.detach() / b / inner).sum(), rtol=1e-10, atol=1e-12)
    assert float(conv.computed_weight().detach().abs().max()) < a * math.pi / 2


def test_a_converted_network_starts_from_its_weights_and_comes_back_with_them() -> None:
    plain = convert(network(), "none")
    x = gaussian(2, 3, 4, 4)
    companded = convert(network(), "weight_compander", a=0.8, b=0.5)
    kinds = [type(module) for module in companded.modules() if isinstance(module, Companded)]
    assert kinds == [CompandedConv2d, CompandedLinear]
    torch.testing.assert_close(companded(x), plain(x), rtol=1e-12, atol=1e-12)
    back = convert(nn.Sequential(companded, nn.BatchNorm1d(5).double()), "layer_norm")[0]
    assert [type(module) for module in back if list(module.parameters())] == [nn.Conv2d, nn.Linear]
    torch.testing.assert_close(back(x), plain(x), rtol=1e-12, atol=1e-12)


def test_layers_that_share_a_weight_share_everything() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = make_norm("weight_compander").prepare(nn.Sequential(first, second).double())
    x = gaussian(3, 4)
    expected = nn.Sequential(copy.deepcopy(first), copy.deepcopy(second))
    torch.testing.assert_close(model(x), expected(x))
    assert model[0].weight is model[1].weight
    assert model[0].log_a is model[1].log_a
    assert len(list(model.parameters())) == 5


def test_the_models_have_it_in_every_convolution_and_linear_layer() -> None:
    model = make_model("cnn", make_norm("weight_compander"), num_classes=3, width=4, image_size=8)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert layers
    assert all(isinstance(layer, Companded) for layer in layers)
    scales = [key for key in model.state_dict() if key.endswith(("log_a", "log_b"))]
    assert len(scales) == 2 * len(layers)


class _Counted(CompandedConv2d):
    count = 0

    def computed_weight(self) -> Tensor:
        type(self).count += 1
        return super().computed_weight()


def test_the_weight_is_computed_once_a_step_and_once_in_all_while_evaluating() -> None:
    conv, x = _Counted(3, 4, 3), torch.randn(2, 3, 5, 5)
    for step in range(3):
        conv(x)
        assert _Counted.count == step + 1
    _Counted.count = 0
    conv.eval()
    with torch.no_grad():
        outputs = [conv(x) for _ in range(3)]
        assert _Counted.count == 1
        assert all(torch.equal(y, outputs[0]) for y in outputs)
        conv.weight.add_(0.1)  # as an optimizer or load_state_dict writes
        assert not torch.equal(conv(x), outputs[0])
        assert _Counted.count == 2
        conv.weight.data = torch.zeros_like(conv.weight)
        assert conv.bias is not None
        torch.testing.assert_close(conv(x), conv.bias.view(1, 4, 1, 1).expand(2, 4, 3, 3))
    y = conv.eval()(x.requires_grad_())  # gradients flow in evaluation too
    y.sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_do_not_have_the_weight_that_was_kept(how: str) -> None:
    conv, x = CompandedConv2d(3, 4, 3).eval(), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        y = conv(x)
        clone: Any = copy.deepcopy(conv) if how == "deepcopy" else pickle.loads(pickle.dumps(conv))
        assert set(vars(conv)) - set(vars(clone)) == {"_kept_weight"}
        assert torch.equal(clone(x), y)
    assert set(conv.state_dict()) == {"weight", "bias", "log_a", "log_b"}


def test_a_layer_whose_weights_reach_beyond_the_bound_begins_with_a_wider_one() -> None:
    model = network()
    model[4].weight.data[0, 0] = 2.0
    plain, x = convert(model, "none"), gaussian(2, 3, 4, 4)
    companded = convert(model, "weight_compander", b=0.5)
    torch.testing.assert_close(companded(x), plain(x), rtol=1e-6, atol=1e-6)
    layer: Any = companded[4]  # type: ignore[index]
    assert layer.a == pytest.approx(2 / (0.9 * math.pi / 2))
    assert layer.b == pytest.approx(0.5 * layer.a)
    assert layer.log_a.exp().item() == pytest.approx(layer.a)
    other: Any = companded[0]  # type: ignore[index]
    assert (other.a, other.b) == (1.0, 0.5)


def test_a_convolution_of_its_own_kind_is_refused_with_its_path() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 2 * super().forward(x)
            return y

    with pytest.raises(ConfigError, match=r"Layer '0': A Own computes .* Build the model with plain nn.Conv2d"):
        convert(nn.Sequential(Own(3, 4, 3), nn.BatchNorm2d(4)), "weight_compander")
