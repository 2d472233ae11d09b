"""Running statistics estimated anew are those of the images, layer upon layer; and what is kept comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.cards import NORMS
from fednorm.federation.plan import norm_plan
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.roles import STATISTICS, TRANSIENT, Kind, RoleRule
from fednorm.training.recalibration import Statistics, batch_layers, in_batches, reestimate

TRACKING = tuple(name for name in NORMS.names if list(make_norm(name).layer(4, 2).buffers()))


def network(norm: str = "batch_norm") -> nn.Module:
    """Return a network whose statistics and momenta are nobody's initial ones."""
    model = make_model("digits_cnn", make_norm(norm), num_classes=10, image_size=8, width=4, seed=2)
    model(images(16, seed=9))
    return model


def images(count: int, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=draw) * 2 + 1


def inputs_of(model: nn.Module, layer: nn.Module, batch: Tensor) -> Tensor:
    """Return what a layer is given, as (C, values), in float64."""
    kept: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(batch)
    hook.remove()
    return kept[0].double().transpose(0, 1).flatten(1)


def test_the_first_layer_s_are_the_mean_over_batches() -> None:
    model = network()
    parts = [images(n, seed=n) for n in (5, 3, 7)]
    values = [inputs_of(model, model.norm1, part) for part in parts]  # no norm stands before it
    reestimate(model, parts)
    mean = sum(v.mean(1) for v in values) / 3
    var = sum(v.var(1) for v in values) / 3  # unbiased, as PyTorch's running variance
    torch.testing.assert_close(model.norm1.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm1.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert int(model.norm1.num_batches_tracked) == 3


def test_deeper_layers_are_given_what_the_layers_before_normalize_by_the_batch() -> None:
    model, batch = network(), images(40)
    training = network().train()
    reestimate(model, [batch])
    assert not any(module.training for module in model.modules())
    for layer, twin in zip(batch_layers(model).values(), batch_layers(training).values(), strict=True):
        values = inputs_of(training, twin, batch)
        torch.testing.assert_close(layer.running_mean.double(), values.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var.double(), values.var(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", TRACKING)
def test_nothing_else_changes_and_momenta_are_as_they_were(norm: str) -> None:
    model = network(norm)
    kinds = {key: entry.kind for key, entry in norm_plan(model, RoleRule()).by_key.items()}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    momenta = [layer.momentum for layer in batch_layers(model).values()]
    assert len(momenta) == 5
    reestimate(model, [images(8), images(8, seed=3)])
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {kinds[key] for key in changed} <= STATISTICS
    running = {key for key, kind in kinds.items() if kind in (Kind.MEAN, Kind.VAR, Kind.DEVIATION, Kind.QUADRATIC)}
    assert len(running) in (5, 10)  # a quadratic mean, or two moments
    assert running <= changed
    assert [layer.momentum for layer in batch_layers(model).values()] == momenta
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("norm", TRACKING)
def test_what_was_estimated_before_leaves_no_trace(norm: str) -> None:
    fresh, used = network(norm), network(norm)
    used.train()
    used(images(9, seed=4))
    for model in (fresh, used):
        reestimate(model, [images(8), images(6, seed=3)])
    assert all(torch.equal(a, b) for a, b in zip(fresh.buffers(), used.buffers(), strict=True))


def test_the_tasks_of_an_earlier_batch_are_not_taken_for_these_images() -> None:
    model = network("adab2n")
    for layer in batch_layers(model).values():
        layer.set_tasks(torch.tensor([0, 1, 1]), 2)
    reestimate(model, [images(8)])  # eight images, and three tasks
    assert model.norm1.running_mean.isfinite().all()


def test_dropout_rests_and_without_images_there_are_the_initial_statistics() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
    batch = images(20)
    reestimate(model, [batch])
    torch.testing.assert_close(model[1].running_mean, batch.mean((0, 2, 3)))
    reestimate(model, [])
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert torch.equal(model[1].running_var, torch.ones(3))


def test_only_layers_that_track_are_found() -> None:
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm2d(3), untracked, nn.GroupNorm(1, 3), nn.InstanceNorm2d(3))
    assert list(batch_layers(model)) == ["0"]
    assert batch_layers(nn.Linear(2, 2)) == {}


@given(st.integers(2, 600), st.integers(1, 300))
def test_no_batch_has_a_single_image(count: int, size: int) -> None:
    rows = torch.arange(count)
    parts = in_batches(rows, size)
    lengths = [len(part) for part in parts]
    assert torch.equal(torch.cat(parts), rows)
    assert min(lengths) >= 2
    assert max(lengths) <= max(size, 3)
    assert max(lengths) - min(lengths) <= 1
    if size >= 3:  # no more batches than are needed
        assert len(parts) == -(-count // size)


# Kept -----------------------------------------------------------------------------------------------------------------


def train_on(model: nn.Module) -> None:
    model.train()
    model(images(8, seed=5))


def fail_on(model: nn.Module) -> None:
    train_on(model)
    raise ZeroDivisionError


@pytest.mark.parametrize("norm", [name for name in NORMS.names if NORMS[name].tried_on == "digits_cnn"])
@pytest.mark.parametrize("block", [train_on, fail_on])
def test_statistics_come_back_counters_included(norm: str, block: Callable[[nn.Module], None]) -> None:
    model = network(norm)
    statistics = Statistics(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if block is fail_on:
        with pytest.raises(ZeroDivisionError), statistics.kept():
            block(model)
    else:
        with statistics.kept():
            block(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert bool(len(statistics)) == (norm in TRACKING)
    if norm in TRACKING:
        train_on(model)
        moved = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
        # Those of gradients want a backward pass, and what counts outliers an outlier.
        kinds = {key: entry.kind for key, entry in norm_plan(model, RoleRule()).by_key.items()}
        later = [key for key, kind in kinds.items() if key not in moved and kind in STATISTICS]
        assert len(moved) + len(later) == len(statistics)
        assert {kinds[key] for key in later if not key.endswith("skip_counter")} <= TRANSIENT


def test_learned_tensors_are_not_kept() -> None:
    model = network()
    with Statistics(model).kept(), torch.no_grad():
        model.norm1.weight.add_(1)
        model.norm1.running_mean.add_(1)
    assert torch.equal(model.norm1.weight, torch.full((4,), 2.0))
    assert not torch.equal(model.norm1.running_mean, torch.zeros(4))
