"""What is measured inside a network, against the definitions applied to whole feature maps in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.cards import NORMS
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.norms.sws import ScaledActivation
from fednorm.streams.probe import diagnose, drift, probe_images

MODELS = {"digits_cnn": 4, "mlp": 16, "resnet18": 4}


def network(name: str = "digits_cnn", norm: str = "batch_norm", activation: str = "") -> nn.Module:
    model = make_model(
        name, make_norm(norm), num_classes=10, image_size=8, width=MODELS[name], seed=2, activation=activation
    )
    with torch.no_grad():
        model(torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(5)) + 1)
        for parameter in model.parameters():  # let some units die
            if parameter.ndim == 1:
                parameter.sub_(parameter.abs().mean() * torch.arange(len(parameter)).remainder(3))
    return model.eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def measure(model: nn.Module, batch: Tensor, size: int = 7) -> dict[str, Any]:
    return diagnose(model, batch, rate=0.25, optimizer="sgd", batch_size=size)


def outputs(model: nn.Module, batch: Tensor, kind: type[nn.Module]) -> dict[str, Tensor]:
    """Return what every module of a kind gives, whole."""
    kept: dict[str, Tensor] = {}
    chosen = [(path, module) for path, module in model.named_modules() if isinstance(module, kind)]
    hooks = [m.register_forward_hook(lambda _, __, out, path=path: kept.update({path: out})) for path, m in chosen]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("name", MODELS)
def test_units_are_dead_and_dormant_by_their_definitions(name: str) -> None:
    model, batch = network(name), images(20)
    found = measure(model, batch)
    maps = outputs(model, batch, nn.ReLU)
    assert len(maps) >= 4
    assert found["dead_units"].keys() == found["dormant_units"].keys() == maps.keys()
    for path, output in maps.items():
        size = output.double().transpose(0, 1).flatten(1).abs().mean(1)  # by unit, over samples and positions
        assert found["dead_units"][path] == pytest.approx(float((size == 0).double().mean()))
        assert found["dormant_units"][path] == pytest.approx(float((size <= 0.025 * size.mean()).double().mean()))
    assert max(found["dead_units"].values()) > 0


@pytest.mark.parametrize("name", MODELS)
def test_ranks_are_of_what_the_classifier_is_given(name: str) -> None:
    model, batch = network(name), images(20)
    found = measure(model, batch)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    given: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(batch)
    hook.remove()
    values = torch.linalg.svdvals(given[0].double())
    p = values / values.sum()
    p = p[p > 0]
    assert found["entropy_rank"] == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-4)
    assert found["threshold_rank"] == int((values > 0.01 * values.max()).sum())


def test_norms_of_weights_and_the_learning_rates_they_make() -> None:
    model = network()
    found = measure(model, images(4))
    for path in ("conv1", "conv2", "conv3", "fc1", "fc2", "fc3"):
        norm = float(model.get_submodule(path).weight.detach().double().square().sum().sqrt())
        assert found["weight_norm"][path] == pytest.approx(norm)
        assert found["effective_learning_rate"][path] == pytest.approx(0.25 / norm**2)
    adam = diagnose(model, images(4), rate=0.25, optimizer="adam", batch_size=4)
    assert adam["effective_learning_rate"]["fc1"] == pytest.approx(0.25 / found["weight_norm"]["fc1"])
    assert len(found["weight_norm"]) == 6


def test_the_drift_is_the_distance_from_the_images_own_statistics() -> None:
    model, batch = network(), images(60)
    found = drift(model, batch, batch_size=64)
    layer = model.norm1  # what it is given does not depend on other statistics
    values = outputs(model, batch, nn.Conv2d)["conv1"].double().transpose(0, 1).flatten(1)
    m, s = values.mean(1), (values.var(1) + 1e-5).sqrt()
    mu, sigma = layer.running_mean.double(), (layer.running_var.double() + 1e-5).sqrt()
    expected = (((mu - m).square() + (sigma - s).square()) / s.square()).mean().sqrt()
    assert found["norm1"] == pytest.approx(float(expected), rel=1e-4)
    assert list(found) == [f"norm{i}" for i in range(1, 6)]
    assert found["norm1"] > 0.1


@pytest.mark.parametrize("norm", ["batch_norm", "adab2n", "task_balanced_norm", "continual_norm"])
def test_statistics_of_the_images_themselves_have_not_drifted(norm: str) -> None:
    model = make_model("digits_cnn", make_norm(norm), num_classes=10, image_size=8, width=4, seed=2)
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0
    batch = images(60)
    with torch.no_grad():
        model(batch)  # adab2n's variance is biased, as published, and so a little smaller
    assert max(drift(model.eval(), batch, batch_size=64).values()) < (0.01 if norm == "adab2n" else 1e-5)


@pytest.mark.parametrize("norm", [name for name in NORMS.names if NORMS[name].tried_on == "digits_cnn"])
def test_the_network_is_left_as_it_was(norm: str) -> None:
    model = network(norm=norm)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = measure(model, images(20))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert bool(found["drift"]) == bool(list(make_norm(norm).layer(4, 2).buffers()))
    # One activation for each nonlinearity: where a norm scales it, what follows is measured, once.
    assert len(found["dead_units"]) == 5
    scaled = any(isinstance(module, ScaledActivation) for module in model.modules())
    assert scaled == (norm in ("sws", "anfr"))


def test_hooks_are_gone_after_a_failure() -> None:
    model = network()
    with pytest.raises(Exception, match="image"):
        measure(model, torch.zeros(4, 3, 12, 12))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh", "gelu", "silu", "elu", "selu"])
def test_units_of_every_activation_are_found(activation: str) -> None:
    assert len(measure(network(activation=activation), images(8))["dead_units"]) == 5


@pytest.mark.parametrize(("count", "size"), [(2, 1), (3, 1), (3, 2), (5, 2), (9, 4), (9, 100)])
def test_no_size_of_batch_leaves_an_image_alone(count: int, size: int) -> None:
    """A batch of one has no variance, from which the drift's reference could be estimated."""
    found = measure(network(), images(count), size)
    assert all(value >= 0 for value in found["drift"].values())
    whole = measure(network(), images(count), 100)
    assert found["dead_units"] == whole["dead_units"]
    assert found["entropy_rank"] == pytest.approx(whole["entropy_rank"], rel=1e-3)


def test_a_network_that_has_diverged_has_no_rank() -> None:
    model = network()
    with torch.no_grad():
        model.fc1.weight.fill_(float("nan"))
    found = measure(model, images(4))
    assert found["entropy_rank"] is None
    assert found["threshold_rank"] is None


# Probe images ---------------------------------------------------------------------------------------------------------


def test_as_many_images_of_each_experience_so_far(toy: Any) -> None:
    stream = toy.bench(toy.config()).stream
    number_of = {}
    for experience in stream:
        for image in experience.train.batch(torch.arange(12))[0]:
            number_of[image.numpy().tobytes()] = experience.number

    def numbers(probe: Tensor) -> list[int]:
        back = ((probe + 1) * 127.5).round().to(torch.uint8).contiguous()
        assert len({image.numpy().tobytes() for image in back}) == len(back)
        return [number_of[image.numpy().tobytes()] for image in back]

    both = numbers(probe_images(stream.experiences, 8, seed=1))
    assert Counter(both) == {0: 4, 1: 4}
    assert both != sorted(both)  # mixed, so that batches of them are alike
    assert Counter(numbers(probe_images(stream.experiences[:1], 8, seed=1))) == {0: 8}
    assert Counter(numbers(probe_images(stream.experiences, 7, seed=1))) == {0: 3, 1: 3}
    assert Counter(numbers(probe_images(stream.experiences, 1, seed=1))) == {0: 1, 1: 1}
    assert Counter(numbers(probe_images(stream.experiences, 1000, seed=1))) == {0: 12, 1: 12}


def test_probe_images_depend_on_the_seed_and_stay_the_same_while_the_stream_goes_on(toy: Any) -> None:
    stream = toy.bench(toy.config()).stream
    once, again = (probe_images(stream.experiences, 8, seed=1) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, probe_images(stream.experiences, 8, seed=2))
    early = {image.numpy().tobytes() for image in probe_images(stream.experiences[:1], 4, seed=1)}
    assert early < {image.numpy().tobytes() for image in once}
