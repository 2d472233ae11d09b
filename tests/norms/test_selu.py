"""Self-normalizing networks: PyTorch's F.selu, the fixed point by quadrature, initial weights, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fednorm
from fednorm.conversion import convert, convert_with_report
from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm


def activation(dropout: float = 0.0) -> nn.Module:
    return make_norm("selu", {"dropout": dropout}).activation("relu").double()


def moments(f: Callable[[Tensor], Tensor], mean: float, var: float) -> tuple[float, float]:
    """Return mean and variance of f(z) for a normal z, by Gauss-Legendre quadrature on both sides of f's kink."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    first = second = 0.0
    for low, high in ((-12.0, 0.0), (0.0, 12.0)):
        x = torch.from_numpy((high - low) / 2 * nodes + (high + low) / 2)
        density = torch.exp(-((x - mean) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)
        share = torch.from_numpy(weights) * (high - low) / 2 * density
        first += float((share * f(x)).sum())
        second += float((share * f(x) ** 2).sum())
    return first, second - first**2


def test_mean_0_and_variance_1_are_a_fixed_point() -> None:
    assert moments(activation(), 0.0, 1.0) == pytest.approx((0.0, 1.0), abs=1e-7)
    assert moments(nn.ELU(), 0.0, 1.0) != pytest.approx((0.0, 1.0), abs=0.1)


@pytest.mark.few(1)
@pytest.mark.parametrize("var", [0.8, 1.5])
def test_the_fixed_point_attracts(var: float) -> None:
    mean = math.nan
    for _ in range(60):
        # The next unit's input: weights that sum to 0, with squares that sum to 1, leave no mean and the second moment.
        mean, spread = moments(activation(), 0.0, var)
        var = spread + mean**2
    assert (mean, var) == pytest.approx((0.0, 1.0), abs=1e-4)


def test_it_is_pytorchs_selu_whatever_is_asked_for() -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    for name in ("relu", "relu6", "gelu", "tanh"):
        y = make_norm("selu").activation(name)(x)
        assert torch.equal(y, F.selu(x))
    torch.testing.assert_close(y, scale * torch.where(x > 0, x, alpha * x.expm1()), rtol=1e-14, atol=0)
    assert torch.equal(make_norm("selu").activation("identity")(x), x)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_initial_weights_are_lecuns(name: str) -> None:
    model = make_model(name, make_norm("selu"), num_classes=10)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert layers[-1].weight.shape[0] == 10  # the output layer too
    for layer in layers:
        if layer.weight.numel() > 5000:
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.03)
        assert layer.bias is not None
        assert not layer.bias.any()
    again = make_model(name, make_norm("selu"), num_classes=10).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_the_models_own_initial_weights_can_be_kept() -> None:
    own = make_model("mlp", make_norm("none"), num_classes=3, image_size=4, width=8).state_dict()
    kept = make_model("mlp", make_norm("selu", {"initialization": "model"}), num_classes=3, image_size=4, width=8)
    drawn = make_model("mlp", make_norm("selu"), num_classes=3, image_size=4, width=8).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in kept.state_dict().items())
    assert not torch.equal(own["fc1.weight"], drawn["fc1.weight"])


def test_given_weights_are_not_drawn_anew(tmp_path: object) -> None:
    from fednorm.models import Order, build_model

    path = f"{tmp_path}/w.pt"
    own = make_model("mlp", make_norm("none"), num_classes=3, image_size=4, width=8, seed=5).state_dict()
    torch.save(own, path)
    order = Order(norm=make_norm("selu"), num_classes=3, image_size=4, width=8, weights=path)
    loaded = build_model("mlp", order).model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in loaded.items())


def test_a_deep_network_keeps_mean_and_variance_where_relu_does_not() -> None:
    def after(norm: str) -> tuple[float, float]:
        torch.manual_seed(0)
        made = make_norm(norm)
        net = nn.Sequential(*[m for _ in range(40) for m in (nn.Linear(256, 256), made.activation("relu"))])
        made.initialize(net)
        with torch.no_grad():
            y = net(torch.randn(512, 256))
        return y.mean().item(), y.var().item()

    assert after("selu") == pytest.approx((0.0, 1.0), abs=0.15)
    assert after("none")[1] < 1e-3


def test_dropout_is_alpha_dropout_and_keeps_mean_and_variance() -> None:
    f, p = activation(dropout=0.2), 0.2
    x = torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    y = f.train()(x)
    bottom = -1.6732632423543772 * 1.0507009873554805
    a = ((1 - p) + bottom**2 * (1 - p) * p) ** -0.5
    b = -a * bottom * p
    dropped = torch.isclose(y, torch.tensor(a * bottom + b, dtype=torch.float64), rtol=1e-6)
    assert dropped.double().mean().item() == pytest.approx(p, abs=0.003)
    torch.testing.assert_close(y[~dropped], (a * F.selu(x) + b)[~dropped], rtol=1e-6, atol=1e-6)
    assert (y.mean().item(), y.var().item()) == pytest.approx((0.0, 1.0), abs=0.01)
    assert torch.equal(f.eval()(x), F.selu(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 1.0}, "at 1 none is left"),
        ({"dropout": -0.1}, "selu.dropout is a share, 0 to 1; got -0.1"),
        ({"initialization": "he"}, "initialization must be one of lecun_normal, model; got 'he'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_norm("selu", options)


def test_another_activation_beside_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.activation is 'tanh', and norm SELU brings its own"):
        make_model("mlp", make_norm("selu"), num_classes=3, activation="tanh")


def test_converting_replaces_layers_and_nonlinearities_and_keeps_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
                        nn.Linear(16, 5), nn.PReLU(), nn.Sigmoid())  # fmt: skip
    converted, report = convert_with_report(net, "selu")
    kinds = [type(module) for module in converted]  # type: ignore[attr-defined]
    assert kinds == [nn.Conv2d, nn.Identity, nn.SELU, nn.Flatten, nn.Linear, nn.SELU, nn.Sigmoid]
    assert (report.layers, report.activations) == (["1"], ["2", "5"])
    x = torch.randn(2, 3, 4, 4)
    expected = F.selu(F.conv2d(x, net[0].weight)).flatten(1)
    expected = torch.sigmoid(F.selu(expected @ net[4].weight.T + net[4].bias))
    torch.testing.assert_close(converted(x), expected)


def test_converting_a_network_without_layers_replaces_its_nonlinearities_or_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert isinstance(convert(net, "selu", dropout=0.1)[1][1], nn.AlphaDropout)  # type: ignore[index]
    with pytest.raises(ConfigError, match="would change nothing"):
        convert(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), "selu")


def make_stranger(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, num_classes))


def test_a_strangers_network_is_converted_and_drawn() -> None:
    from fednorm.cards import MODELS

    model = make_model(MODELS.add(make_stranger), make_norm("selu"), num_classes=10, image_size=8)
    assert isinstance(model[2], nn.SELU)  # type: ignore[index]
    assert model[1].weight.std().item() == pytest.approx(192**-0.5, rel=0.03)  # type: ignore[index]


def test_both_worlds_train_it_and_a_run_with_dropout_is_the_same_again() -> None:
    config = {
        "model": {"width": 4}, "train": {"batch_size": 6}, "norm": {"dropout": 0.1},
        "data": {"image_size": 8, "train_per_client": 12, "test_per_domain": 6},
    }  # fmt: skip
    one, two = (fednorm.federated(model="digits_cnn", norm="selu", rounds=1, config=config) for _ in range(2))
    assert one["final"] == two["final"]
