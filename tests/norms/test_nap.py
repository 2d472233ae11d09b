"""NaP's layers and what they do to a network: invariances, biases, revival of dead units; the paper's section 3."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.models import make_model
from fednorm.norms import make_norm, spec_of
from fednorm.norms.nap import NaP, NaPLayer
from fednorm.optim.hidden import hidden_layers
from fednorm.optim.projection import WeightProjection

KINDS = [(statistics, over) for statistics in ("layer_norm", "rms_norm") for over in ("sample", "channels")]
SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"width": 16, "image_size": 8},
    "cnn": {"width": 4, "image_size": 8},
    "digits_cnn": {"width": 4, "image_size": 8},
    "resnet18": {"width": 4, "image_size": 8},
    "mobilenet_v2": {"width": 8, "image_size": 8},
}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(name: str = "mlp", **options: Any) -> Any:
    return make_model(name, make_norm("nap", options), num_classes=3, **SIZES[name]).double()


def shake(model: nn.Module, size: float = 0.3) -> nn.Module:
    """Move every parameter from where it started; ones and zeros hide errors."""
    for index, parameter in enumerate(model.parameters()):
        parameter.data += size * parameter.std().nan_to_num(1.0).clamp_min(0.1) * gaussian(*parameter.shape, seed=index)
    return model


def scale_hidden(model: nn.Module, factor: float) -> nn.Module:
    scaled = copy.deepcopy(model)
    for hidden in hidden_layers(scaled):
        hidden.layer.weight.data *= factor
    return scaled


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("statistics", "over"), KINDS)
@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 2, 4)], ids=["features", "maps"])
def test_layers_scale_and_shift_what_they_normalize(
    shape: tuple[int, ...], statistics: str, over: str, offset: bool
) -> None:
    layer = make_norm("nap", {"statistics": statistics, "over": over, "offset": offset}).layer(6, len(shape) - 2)
    shake(layer.double())
    x = gaussian(*shape) + 1
    axes = tuple(range(1, x.ndim)) if over == "sample" else (1,)
    centred = x - x.mean(axes, keepdim=True) if statistics == "layer_norm" else x
    y = centred / (centred.square().mean(axes, keepdim=True) + 1e-8).sqrt()
    broadcast = (1, 6, *[1] * (x.ndim - 2))
    y = y * layer.weight.view(broadcast) + (layer.bias.view(broadcast) if offset else 0)
    torch.testing.assert_close(layer(x), y, rtol=1e-10, atol=1e-12)
    assert [name for name, _ in layer.named_parameters()] == (["weight", "bias"] if offset else ["weight"])
    spec = spec_of(layer)
    assert spec is not None
    assert spec.name == "nap"


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_only_the_output_layer_has_a_bias(name: str, offset: bool) -> None:
    model = network(name, offset=offset)
    with_bias = [
        path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None
    ]
    last = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    assert with_bias == [last]
    plain = make_model(name, make_norm("layer_norm"), num_classes=3, **SIZES[name])
    for key, weight in plain.named_parameters():  # taking biases away disturbs no other initial value
        if key in dict(model.named_parameters()) and key.endswith("weight"):
            assert torch.equal(model.get_parameter(key), weight.double())


def test_biases_before_other_norms_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 6), make_norm("nap").layer(6, 0))
    make_norm("nap").prepare(model)
    assert (model[0].bias is None, model[2].bias is None) == (False, True)


@pytest.mark.parametrize(("statistics", "over"), KINDS)
@pytest.mark.parametrize("name", ["mlp", "resnet18"])
def test_the_network_does_not_depend_on_the_scale_of_its_hidden_weights(name: str, statistics: str, over: str) -> None:
    model = shake(network(name, statistics=statistics, over=over, eps=1e-12))
    x = gaussian(4, 3, 8, 8)
    torch.testing.assert_close(scale_hidden(model, 3.0)(x), model(x), rtol=1e-7, atol=1e-8)


def test_a_bias_that_is_kept_would_tie_the_network_to_its_weights_scale() -> None:
    biased = make_model("mlp", make_norm("layer_norm"), num_classes=3, **SIZES["mlp"]).double()
    x = gaussian(4, 3, 8, 8)
    assert (scale_hidden(biased, 3.0)(x) - biased(x)).abs().max() > 1e-3


def test_eps_is_small_against_what_projected_weights_put_out() -> None:
    x = gaussian(4, 3, 8, 8)

    def change(**options: float) -> float:
        model = network("mlp", **options)
        return (scale_hidden(model, 1e-2)(x) - model(x)).abs().max().item()

    assert change(eps=1e-5) > 0.01
    assert change() < change(eps=1e-5) / 100


def test_gradients_are_orthogonal_to_the_weights_and_shrink_as_they_grow() -> None:
    """Scale invariance f(c W) = f(W) gives <W, grad f(W)> = 0 and grad f(c W) = grad f(W) / c (section 3)."""
    model = shake(network("cnn", eps=1e-12))
    grown = scale_hidden(model, 4.0)
    x, labels = gaussian(6, 3, 8, 8), torch.arange(6) % 3
    for each in (model, grown):
        functional.cross_entropy(each(x), labels).backward()
    for small, large in zip(hidden_layers(model), hidden_layers(grown), strict=True):
        gradient, weight = small.layer.weight.grad, small.layer.weight.detach()
        assert ((gradient * weight).sum() / (gradient.norm() * weight.norm())).abs() < 1e-6
        torch.testing.assert_close(large.layer.weight.grad, gradient / 4.0, rtol=1e-5, atol=1e-9)


def test_without_projection_the_squared_norm_grows_by_the_squared_step() -> None:
    """||W - lr g||^2 = ||W||^2 + lr^2 ||g||^2, since the gradient is orthogonal: norms can only grow."""
    model = network("mlp", eps=1e-12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, labels = gaussian(6, 3, 8, 8), torch.arange(6) % 3
    layers = [hidden.layer for hidden in hidden_layers(model)]
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        expected = [layer.weight.square().sum() + 0.25 * layer.weight.grad.square().sum() for layer in layers]
        before = [layer.weight.norm() for layer in layers]
        optimizer.step()
        for layer, wanted, old in zip(layers, expected, before, strict=True):
            assert layer.weight.square().sum().item() == pytest.approx(wanted.item(), rel=1e-8)
            assert layer.weight.norm() > old


@pytest.mark.parametrize(("activation", "unchanged"), [("relu", True), ("leaky_relu", True), ("tanh", False)])
def test_scaling_scale_and_offset_together_passes_through_homogeneous_nonlinearities_only(
    activation: str, unchanged: bool
) -> None:
    norm = make_norm("nap", {"eps": 1e-12})
    torch.manual_seed(0)
    first, second = norm.layer(8, 0), norm.layer(5, 0)
    model = shake(nn.Sequential(first, norm.activation(activation), nn.Linear(8, 5, bias=False), second).double())
    x = gaussian(4, 8)
    before = model(x)
    for parameter in first.parameters():
        parameter.data *= 3.0
    change = (model(x) - before).abs().max().item()
    assert (change < 1e-6) == unchanged
    assert unchanged or change > 0.05


def test_a_saturated_unit_gets_a_gradient_through_the_normalization() -> None:
    """Proposition 1: d relu(f(h))_j / dh_i = -relu'(f(h)_j) h_i h_j sqrt(d) / ||h||^3 for i != j, f the RMS norm.

    The paper leaves out the sqrt(d) that the mean in the norm brings.
    """
    layer = make_norm("nap", {"statistics": "rms_norm", "eps": 1e-30}).layer(4, 0).double()
    h = torch.tensor([[-2.0, 1.0, 3.0, -0.5]], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: functional.relu(layer(x))[0], h)[:, 0]
    for j in (1, 2):
        for i in (0, 3):  # dead units
            expected = -h[0, i] * h[0, j] * 4**0.5 / h.norm() ** 3
            torch.testing.assert_close(jacobian[j, i], expected)
            assert expected.abs() > 0.01
    after = torch.autograd.functional.jacobian(lambda x: layer(functional.relu(x))[0], h)[:, 0]
    assert torch.equal(after[:, [0, 3]], torch.zeros(4, 2, dtype=torch.float64))


def test_after_update_is_the_projection_with_the_methods_options() -> None:
    projection = make_norm("nap", {"affine": "joint", "decay": 0.5, "every": 7}).after_update(network())
    assert isinstance(projection, WeightProjection)
    assert (projection.affine, projection.decay, projection.every) == ("joint", 0.5, 7)
    assert list(projection.radii) == ["fc1", "fc2", "fc3", "fc4"]


def test_other_methods_prepare_nothing_and_do_nothing_after_an_update() -> None:
    for name in ("batch_norm", "layer_norm", "none", "sws"):
        norm = make_norm(name)
        model = nn.Sequential(nn.Linear(4, 5), norm.layer(5, 0))
        keys = list(model.state_dict())
        assert norm.prepare(model) is model
        assert list(model.state_dict()) == keys
        assert norm.after_update(model) is None
        assert not norm.inserts


def test_every_layer_bears_the_mark() -> None:
    for statistics, over in KINDS:
        assert isinstance(NaP(statistics=statistics, over=over).layer(4, 2), NaPLayer)
