"""A cohort computes what its clients compute alone: each norm, each option, ragged clients, and one that diverges."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fednorm.config import TrainConfig, resolve
from fednorm.data.domain import Client, Federation
from fednorm.data.scaling import Scaling
from fednorm.federation.client import fit
from fednorm.federation.cohort.batches import Draws, Plan
from fednorm.federation.cohort.kernels import STACKED, normalized, normalized_whole
from fednorm.federation.cohort.network import alike
from fednorm.federation.cohort.training import CohortTraining, Trained, is_whole
from fednorm.federation.local import Phase, rows_of_phase
from fednorm.federation.workbench import Workbench
from fednorm.rng import torch_stream

MakeFederation = Callable[[Sequence[int]], Federation]

RAGGED = (8, 13, 5, 2, 9, 1)
"""Images of each client; batches have four, so that last batches have one, two and four."""

NORMS: Mapping[str, dict[str, Any]] = {
    "batch_norm": {},
    "batch_norm_corrected": {},
    "batch_renorm": {"growth": 0.05},
    "batch_channel_norm": {},
    "batch_channel_norm estimate": {"statistics": "estimate"},
    "continual_norm": {},
    "group_norm": {},
    "layer_norm": {},
    "instance_norm": {},
    "rms_norm": {},
    "crms_norm": {},
    "pre_affine": {},
    "gated_norm": {},
    "seednorm": {},
    "sws": {},
    "ws_group_norm": {},
    "weight_compander": {},
    "dyt": {},
    "bhyt": {},
    "selu": {},
    "nap": {},
    "none": {},
}
"""The norms that have a stacked form, with options."""

TRAIN: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "agc": {"agc": 0.05},
    "clip": {"clip_norm": 0.3},
    "l2 init": {"l2_init": 0.05},
    "smoothing": {"label_smoothing": 0.1},
    "half an epoch": {"local_epochs": 2.5},
    "steps": {"local_steps": 3},
    "augmented": {"augment": "crop,flip,rotate"},
    "schedule": {"schedule": "cosine", "warmup_steps": 2},
    "norm and head": {"trainable": "norm,head"},
    "head": {"trainable": "head"},
    "probe": {"linear_probe_rounds": 3},
}


def workbench(
    make: MakeFederation, counts: Sequence[int] = RAGGED, *, norm: str = "batch_norm", double: bool = True, **more: Any
) -> Workbench:
    name, options = norm.split()[0], NORMS.get(norm, {})
    if name.startswith("batch") or name == "continual_norm":
        counts = [count for count in counts if count > 1]
    train = {"batch_size": 4, "learning_rate": 0.05, **more.pop("train", {})}
    model = {"name": "digits_cnn", "width": 4}
    bench = Workbench(
        resolve({"model": model, "norm": {"name": name, **options}, "train": train, **more}), make(counts)
    )
    if double:
        in_double(bench)
    return bench


def in_double(bench: Workbench) -> None:
    """Let a workbench compute in float64, where another order of sums makes no visible difference."""
    bench.model.double()
    bench._state = bench.model.state_dict()
    for effect in bench.trainee.effects:
        if hasattr(effect, "anchors"):
            effect.anchors = [anchor.double() for anchor in effect.anchors]


@pytest.fixture(autouse=True)
def _double_images(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("single") is None:
        whole = Scaling.__call__
        monkeypatch.setattr(Scaling, "__call__", lambda self, *args: whole(self, *args).double())


def trained(
    bench: Workbench, clients: Sequence[Client], *, poisoned: Sequence[int] = (), server_round: int = 2
) -> tuple[CohortTraining, Trained]:
    training = CohortTraining(bench)
    before = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    tensors = training.network.stack(before, len(clients))
    for key in training.network.parameters:
        tensors[key][list(poisoned)] = torch.nan
    phases = [(Phase(),)] * len(clients)
    return training, training.train(clients, tensors, server_round=server_round, phases=phases)


def require_alike(bench: Workbench, *, relative: float, server_round: int = 2) -> None:
    """Compare every tensor and metric of every client with those of the client alone."""
    before = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    clients = bench.federation.clients
    training, found = trained(bench, clients, server_round=server_round)
    for number, client in enumerate(clients):
        bench.write(before)
        bench.trainee.begin_turn({})
        alone = fit(bench, client, server_round=server_round)
        assert float(found.loss[number]) == pytest.approx(alone["loss"], rel=1e-5)
        assert float(found.accuracy[number]) == pytest.approx(alone["accuracy"], abs=1e-6)
        for key, tensor in bench.model.state_dict().items():
            held = (
                before[key] if key not in training.network.same else found.tensors[training.network.same[key]][number]
            )
            assert_close(held, tensor, relative, f"{key} of client {number}")
    bench.write(before)


def assert_close(found: Tensor, expected: Tensor, relative: float, what: str) -> None:
    most = float(expected.double().abs().max()) if expected.numel() else 0.0
    off = float((found.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    assert off <= relative * max(most, 1e-2), f"{what}: off by {off:.2e} of {most:.2e}"


OFTEN = ("group_norm", "sws", "nap", "gated_norm")
"""Of the norms that look at one image at a time, those that the default tier has."""


def _of_tiers() -> list[Any]:
    batch = ("batch", "continual")
    return [
        norm if norm.startswith(batch) or norm in OFTEN else pytest.param(norm, marks=pytest.mark.slow)
        for norm in NORMS
    ]


@pytest.mark.few(3)
@pytest.mark.parametrize("norm", _of_tiers())
def test_a_client_of_a_cohort_computes_what_it_computes_alone(norm: str, make_federation: MakeFederation) -> None:
    require_alike(workbench(make_federation, norm=norm, train={"momentum": 0.9}), relative=1e-9)


@pytest.mark.few(7)
@pytest.mark.parametrize("norm", ["batch_norm", "nap", "group_norm"])
@pytest.mark.parametrize("option", TRAIN)
def test_every_option_of_training_means_the_same(option: str, norm: str, make_federation: MakeFederation) -> None:
    if norm == "nap" and "trainable" in TRAIN[option]:
        pytest.skip("there is no hidden weight to project")
    require_alike(workbench(make_federation, norm=norm, train=TRAIN[option]), relative=1e-8)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_means_the_same(optimizer: str, make_federation: MakeFederation) -> None:
    train = {"optimizer": optimizer, "learning_rate": 1e-3, "weight_decay": 0.1, "local_epochs": 2}
    require_alike(workbench(make_federation, norm="group_norm", train=train), relative=1e-6)


@pytest.mark.parametrize("norm", ["batch_norm", "nap"])
def test_a_projection_of_any_norm_means_the_same(norm: str, make_federation: MakeFederation) -> None:
    options = {"project": True} if norm == "batch_norm" else {"momentum": 0.5}
    require_alike(workbench(make_federation, norm=norm, train=options), relative=1e-8)


@pytest.mark.single
@pytest.mark.parametrize("norm", ["batch_norm", "sws", "layer_norm"])
def test_in_single_precision_a_step_is_the_same_up_to_rounding(norm: str, make_federation: MakeFederation) -> None:
    bench = workbench(
        make_federation, (16, 12, 9), norm=norm, double=False, train={"batch_size": 16, "learning_rate": 0.01}
    )
    require_alike(bench, relative=1e-5)


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(2, 11), min_size=1, max_size=5), size=st.integers(3, 6), seed=st.integers(0, 99))
def test_whatever_the_shapes_a_cohort_is_its_clients(
    counts: list[int], size: int, seed: int, make_federation: MakeFederation
) -> None:
    require_alike(
        workbench(make_federation, counts, seed=seed, train={"batch_size": size, "momentum": 0.5}), relative=1e-7
    )


@pytest.mark.single
@pytest.mark.parametrize("norm", ["batch_norm", "nap"])
def test_companions_do_not_matter_and_the_same_cohort_has_the_same_bits(
    norm: str, make_federation: MakeFederation
) -> None:
    bench = workbench(
        make_federation, (8, 13, 5, 2, 9, 4, 7, 8), norm=norm, double=False, train={"momentum": 0.9, "agc": 0.1}
    )
    clients = bench.federation.clients
    _, first = trained(bench, clients)
    _, again = trained(bench, clients)
    _, others = trained(bench, [*clients[:3], *[clients[7]] * 5])
    for key, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[key]), key
        assert torch.equal(tensor[:3], others.tensors[key][:3]), key
    assert torch.equal(first.loss[:3], others.loss[:3])


@pytest.mark.single
def test_a_client_that_diverges_does_not_touch_its_companions(make_federation: MakeFederation) -> None:
    bench = workbench(
        make_federation, (8, 13, 5, 9), double=False, train={"momentum": 0.9, "clip_norm": 1.0, "l2_init": 0.1}
    )
    clients = bench.federation.clients
    _, sound = trained(bench, clients)
    for place in (1, 2):  # the client with most steps, and the one that is done first
        _, poisoned = trained(bench, clients, poisoned=[place])
        others = [number for number in range(len(clients)) if number != place]
        for key, tensor in sound.tensors.items():
            assert torch.equal(tensor[others], poisoned.tensors[key][others]), key
        assert torch.equal(sound.loss[others], poisoned.loss[others])
        assert bool(poisoned.loss[place].isnan())


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("images", [1, 3, 4, 5, 8, 9])
def test_a_plan_draws_what_each_client_draws_alone(images: int, single: bool) -> None:
    """Whole passes and parts of them, of batches of 4: also where a last batch of one image is left out."""
    train = TrainConfig(batch_size=4)
    phases = [Phase(epochs=1), Phase(epochs=2.5), Phase(steps=1), Phase(steps=7)]
    wanted = [phase.batches(train, -(-images // 4)) for phase in phases]
    each = [torch_stream(1, "client", number) for number in range(4)]
    plan = Plan.drawn([Draws(images, count, single) for count in wanted], each, 4, 5)
    again = [torch_stream(1, "client", number) for number in range(4)]
    for number, (phase, generator) in enumerate(zip(phases, again, strict=True)):
        alone = list(rows_of_phase(generator, images, train, phase, single=single))
        assert plan.counts[number].tolist() == [len(rows) for rows in alone] + [0] * (plan.steps - len(alone))
        for step, rows in enumerate(alone):
            assert plan.rows[number, step].tolist() == rows.tolist() + [int(rows[0])] * (5 - len(rows))
        assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=each[number]))


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_normalization_written_out_has_the_formula_s_values_and_gradients(shape: tuple[int, ...]) -> None:
    """In float64, of two clients, one with padding: against nn's own function of the images alone."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 4, *shape, dtype=torch.float64, generator=draw).requires_grad_()
    weight, bias = (torch.randn(2, 4, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(2))
    counts = torch.tensor([5, 3])
    mask = (torch.arange(5) < counts[:, None]).double()
    n = counts * math.prod(shape)

    y, mean, var = (t.movedim(*axes) for t, axes in zip(
        normalized(x.movedim(0, 1), mask, n, weight, bias, 1e-5), ((1, 0), (0, 0), (0, 0)), strict=True
    ))  # fmt: skip
    pull = torch.randn(y.shape, dtype=torch.float64, generator=draw) * mask.view(2, 5, *[1] * (1 + len(shape)))
    found = torch.autograd.grad((y * pull).sum(), (x, weight, bias))
    for client, count in enumerate(counts.tolist()):
        own = x[client, :count]
        axes = (0, *range(2, own.ndim))
        alone = functional.batch_norm(own, None, None, weight[client], bias[client], training=True)
        torch.testing.assert_close(y[client, :count], alone)
        torch.testing.assert_close(mean[client], own.mean(axes))
        torch.testing.assert_close(var[client], own.var(axes, correction=0))
        gradients = torch.autograd.grad((alone * pull[client, :count]).sum(), (x, weight, bias))
        for ours, formula in zip(found, gradients, strict=True):
            rows = (client, slice(count)) if ours is found[0] else client
            torch.testing.assert_close(ours[rows], formula[rows])
    assert not found[0][1, 3:].any(), "padding has no gradient"


@pytest.mark.parametrize("shape", [(), (3, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_normalization_of_whole_batches_is_that_of_the_formula(affine: bool, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(5, 2, 4, *shape, dtype=torch.float64, generator=draw).requires_grad_()
    weight, bias = (torch.randn(2, 4, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(2))
    scale, shift = (weight, bias) if affine else (None, None)
    mask, n = torch.ones(2, 5, dtype=torch.float64), torch.full((2,), 5 * math.prod(shape))
    formula, whole = normalized(x, mask, n, scale, shift, 1e-5), normalized_whole(x, scale, shift, 1e-5)
    pull = torch.randn(whole[0].shape, dtype=torch.float64, generator=draw)
    wanted = (x, weight, bias) if affine else (x,)
    gradients = [torch.autograd.grad((y * pull).sum(), wanted) for y, _, _ in (formula, whole)]
    for expected, found in zip((*formula, *gradients[0]), (*whole, *gradients[1]), strict=True):
        torch.testing.assert_close(found, expected)


LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv groups stride": lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
    "conv same": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "conv reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "linear": lambda: nn.Linear(5, 3),
    "linear without bias": lambda: nn.Linear(5, 3, bias=False),
    "linear of tokens": lambda: nn.Linear(5, 3),
    "pool": lambda: nn.MaxPool2d(2),
    "pool overlapping": lambda: nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
}


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_stacked_layer_computes_what_each_client_s_does(layer: str, frozen: tuple[str, ...]) -> None:
    """Also where clients have one weight, or one bias, in common."""
    one = LAYERS[layer]().double()
    shape = (3, 7, 5) if "tokens" in layer else (3, 5) if "linear" in layer else (3, 4, 6, 5)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, *shape, dtype=torch.float64, generator=draw)
    own = {
        name: torch.randn(2, *p.shape, dtype=torch.float64, generator=draw).requires_grad_()
        for name, p in one.named_parameters() if name not in frozen
    }  # fmt: skip
    stacked = copy.deepcopy(one)
    stacked.__class__ = STACKED[type(one)]
    y = torch.func.vmap(lambda own, x: torch.func.functional_call(stacked, own, (x,)))(own, x)
    pull = torch.randn(y.shape, dtype=torch.float64, generator=draw)
    found = torch.autograd.grad((y * pull).sum(), list(own.values())) if own else ()
    if layer.startswith("linear") and not frozen:
        assert all(gradient.is_contiguous() for gradient in found), "they lie in memory as the parameters do"
    for client in range(2):
        alone = {name: p[client].detach().requires_grad_() for name, p in own.items()}
        expected = torch.func.functional_call(one, alone, (x[client],))
        torch.testing.assert_close(y[client], expected)
        gradients = torch.autograd.grad((expected * pull[client]).sum(), list(alone.values())) if alone else ()
        for ours, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(ours[client], theirs)


@pytest.mark.parametrize("norm", ["batch_norm", "batch_norm_corrected", "batch_renorm"])
def test_clients_whose_batches_are_all_whole_compute_what_they_compute_alone(
    norm: str, make_federation: MakeFederation
) -> None:
    """Eight images are two batches of four, nine too, whose last one is left out."""
    bench = workbench(make_federation, (8, 4, 9, 12), norm=norm, train={"momentum": 0.9})
    assert is_whole(bench)
    assert not is_whole(workbench(make_federation, (8, 4, 10, 12), norm=norm))
    assert not is_whole(workbench(make_federation, (8, 9), norm="group_norm"))
    require_alike(bench, relative=1e-9)


@pytest.mark.parametrize("option", ["plain", "momentum", "agc", "head"])
@pytest.mark.parametrize("norm", ["batch_norm", "nap"])
def test_clients_that_begin_with_one_tensor_in_common_end_where_those_with_copies_do(
    option: str, norm: str, make_federation: MakeFederation
) -> None:
    if (norm, option) == ("nap", "head"):
        pytest.skip("there is no hidden weight to project")
    bench = workbench(make_federation, (8, 8, 5), norm=norm, train=TRAIN[option])
    before = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    _, expected = trained(bench, bench.federation.clients)
    training = CohortTraining(bench)
    shared = {key: alike(before[key], 3) for key in training.network.keys}
    found = training.train(bench.federation.clients, shared, server_round=2, phases=[(Phase(),)] * 3)
    for key, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[key], tensor), key
        assert found.tensors[key].is_contiguous(), key
    assert all(torch.equal(bench.model.state_dict()[key], tensor) for key, tensor in before.items())
