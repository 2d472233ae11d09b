"""ReDo, against a loop over single units that follows the paper's algorithm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError, DataError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.optim.hidden_units import hidden_units
from fednorm.optim.redo import ReDo
from fednorm.rng import torch_seeded
from fednorm.training.diagnostics import dormant_units
from fednorm.training.step import TrainingStep

Optimizer = Callable[[nn.Module], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, amsgrad=True),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2),
}


def grouped() -> nn.Module:
    """Convolutions in groups, after a pooling that stands before the nonlinearity."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.MaxPool2d(2),
        nn.GroupNorm(2, 6),
        nn.Sequential(nn.GELU(), nn.Conv2d(6, 4, 3, groups=2, bias=False, padding=1), nn.Tanh(), nn.Flatten()),
        nn.Linear(64, 3),
    )


def built(name: str, norm: str = "batch_norm", width: int = 6) -> nn.Module:
    if name == "grouped":
        return grouped()
    return make_model(name, make_norm(norm), num_classes=3, image_size=8, width=width, seed=2)


def uneven(model: nn.Module) -> nn.Module:
    """Shift the units apart, so that some of every layer fire less than others; after a norm they would not."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for link in hidden_units(model, "ReDo"):
            noise = torch.randn(link.units, generator=generator)
            for shift in [m.bias for m in (*link.norms, link.layer) if m.bias is not None][:1]:
                shift.add_(noise)  # type: ignore[operator]
    return model


def batch(seed: int = 0, n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 3


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {key: value.clone() for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}:{key}"] = value.clone()
    return found


def weighted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def activations(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What follows each nonlinearity, by calling the layers one after the other."""
    found, hidden = [], images
    for module in [m for m in model.modules() if not isinstance(m, nn.Sequential)]:
        hidden = module(hidden)
        if isinstance(module, nn.ReLU | nn.GELU | nn.Tanh | nn.LeakyReLU):
            found.append(hidden.detach())
    return found


def fresh_layer(layer: nn.Module, seed: int, count: int, path: str) -> nn.Module:
    with torch_seeded(seed, "redo", count, path):
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
            return nn.Conv2d(*sizes, groups=layer.groups, bias=layer.bias is not None)  # type: ignore[arg-type]
        return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)  # type: ignore[arg-type]


def norm_between(model: nn.Module, layer: nn.Module) -> nn.Module | None:
    """The layer with a scale that comes before the next nonlinearity."""
    order = list(model.modules())
    for module in order[order.index(layer) + 1 :]:
        if isinstance(module, nn.ReLU | nn.GELU | nn.Tanh):
            return None
        if next(module.parameters(recurse=False), None) is not None:
            return module
    return None


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})
    return [
        state[k] for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer") if state.get(k) is not None
    ]


def dormant_one_by_one(output: Tensor, tau: float) -> list[int]:
    sizes = [output[:, c].double().abs().mean() for c in range(output.shape[1])]
    return [c for c, size in enumerate(sizes) if size / (sum(sizes) / len(sizes)) <= tau]


def cut_one(following: nn.Module, tensor: Tensor, c: int, width: int) -> None:
    """Set the weights that leave unit c of ``width`` units to 0."""
    if isinstance(following, nn.Conv2d):
        within, outputs_each = width // following.groups, len(tensor) // following.groups
        group = c // within
        tensor[group * outputs_each : (group + 1) * outputs_each, c % within] = 0
    else:
        cells = tensor.shape[1] // width
        for cell in range(cells):
            tensor[:, c * cells + cell] = 0


@torch.no_grad()
def recycle_one_by_one(
    model: nn.Module, optimizer: torch.optim.Optimizer, dormant: list[list[int]], seed: int, count: int
) -> None:
    """The paper's algorithm, a unit at a time, on a chain, without anything clever."""
    layers = weighted(model)
    for (path, layer), units in zip(layers, dormant, strict=False):
        fresh = fresh_layer(layer, seed, count, path).state_dict()
        norm = norm_between(model, layer)
        affine = [] if norm is None else list(norm.named_parameters())
        for c in units:
            for name, parameter in layer.named_parameters():
                parameter[c] = fresh[name][c]
            for name, parameter in affine:
                parameter[c] = {"weight": 1.0, "bias": 0.0}[name]
            for _, parameter in [*layer.named_parameters(), *affine]:
                for moment in moments_of(optimizer, parameter):
                    moment[c] = 0
    for (_, layer), (_, following), units in zip(layers, layers[1:], dormant, strict=False):
        weight: Any = following.weight
        for tensor in [weight, *moments_of(optimizer, weight)]:
            for c in units:
                cut_one(following, tensor, c, len(layer.weight))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "norm"), [("mlp", "none"), ("mlp", "layer_norm"), ("cnn", "batch_norm"), ("grouped", "")]
)
def test_it_recycles_as_a_loop_over_single_units_does(name: str, norm: str, optimizer_name: str) -> None:
    ours = uneven(built(name, norm))
    optimizer = OPTIMIZERS[optimizer_name](ours)
    # A high tau, so that dormant units meet in adjoining layers: their common weight ends at 0.
    tau, seed, every = 0.8, 5, 3
    redo = ReDo(ours, optimizer, every=every, tau=tau, seed=seed)
    step = TrainingStep(ours, optimizer, after=(redo,))
    for i in range(every - 1):
        step(*batch(i))
    assert redo.recycled == {}
    naive = copy.deepcopy(ours)
    theirs = OPTIMIZERS[optimizer_name](naive)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    outputs = activations(copy.deepcopy(naive), batch(9)[0])
    TrainingStep(naive, theirs)(*batch(9))
    untouched = tensors(naive, theirs)
    dormant = [dormant_one_by_one(output, tau) for output in outputs]
    recycle_one_by_one(naive, theirs, dormant, seed, 1)

    step(*batch(9))
    after, expected = tensors(ours, optimizer), tensors(naive, theirs)
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(after[key], value), key
    assert list(redo.recycled.values()) == [len(units) for units in dormant]
    assert all(dormant), "each layer has dormant units in this test"
    same = {key for key, value in after.items() if torch.equal(value, untouched[key])}
    moments = {key for key in after if ":" in key and not key.endswith(":step")}
    assert bool(moments) == (optimizer_name != "sgd")
    assert not moments or not moments <= same
    assert {key for key in after if key.endswith(":step") or "running" in key or "num_batches" in key} <= same


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.7])
def test_dormant_is_what_the_diagnostics_call_dormant(tau: float) -> None:
    model = built("cnn", "none")
    with torch.no_grad():
        model.get_submodule("conv2").bias[2] = -100.0  # type: ignore[index,operator]
    outputs = activations(model, batch()[0])
    redo = ReDo(model, torch.optim.SGD(model.parameters(), lr=0.0), every=1, tau=tau)
    model(batch()[0])
    redo()
    assert list(redo.recycled.values()) == [int(dormant_units(output, tau=tau).sum()) for output in outputs]
    assert redo.recycled["conv2"] >= 1


def with_dead_units(name: str, norm: str) -> nn.Module:
    model = built(name, norm)
    with torch.no_grad():
        for link in hidden_units(model, "ReDo")[:2]:
            shift = link.norms[0].bias if norm != "none" else link.layer.bias
            shift[:2] = -1e3  # type: ignore[index]
    return model


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize(("norm", "same"), [("none", True), ("batch_norm", True), ("layer_norm", False)])
def test_dead_units_are_recycled_without_a_change_of_the_function(name: str, norm: str, same: bool) -> None:
    model, images = with_dead_units(name, norm), batch(4)[0]
    redo = ReDo(model, torch.optim.SGD(model.parameters(), lr=0.0), every=1, tau=0.0)
    before = model(images)
    layers = [copy.deepcopy(link.layer) for link in hidden_units(model, "ReDo")]
    redo()
    assert list(redo.recycled.values())[:2] >= [2, 2]
    for old, link in zip(layers[:2], hidden_units(model, "ReDo")[:2], strict=True):
        assert not torch.equal(link.layer.weight[:2], old.weight[:2])
    # Layer normalization pools the units, so the others see the new weights: what NaP's authors found.
    assert torch.allclose(model(images), before, rtol=1e-5, atol=1e-5) is same
    # They have outgoing weights of 0 and fire again.
    revived = [output[:, :2].abs().sum() for output in activations(model, images)[:2]]
    assert min(revived) > 0


def test_a_silent_layer_is_recycled_whole() -> None:
    model = built("mlp", "none")
    with torch.no_grad():
        model.get_submodule("fc2").bias.fill_(-1e3)  # type: ignore[operator,union-attr]
    redo = ReDo(model, torch.optim.SGD(model.parameters(), lr=0.0), every=1, tau=0.0)
    model(batch()[0])
    redo()
    assert redo.recycled["fc2"] == 6
    assert not model.get_submodule("fc3").weight.any()  # type: ignore[operator,union-attr]


def test_channels_last_weights_are_recycled_alike() -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = uneven(built("cnn")).to(memory_format=layout)  # type: ignore[call-overload]
        optimizer = OPTIMIZERS["adam"](model)
        redo = ReDo(model, optimizer, every=1, tau=0.8)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        model(batch()[0])
        redo()
        results.append(tensors(model, optimizer))
    first, last = results
    assert all(torch.equal(first[key] == 0, last[key] == 0) for key in first if ":" in key)
    assert sum(int((value == 0).sum()) for key, value in first.items() if ":exp_avg" in key) > 0


# --- when, and at what cost ---------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_on_the_model_for_the_update_that_recycles_only() -> None:
    model = built("mlp")
    step = TrainingStep(model, optimizer := OPTIMIZERS["sgd"](model), after=(ReDo(model, optimizer, every=3, tau=0.1),))
    seen = []
    for i in range(7):
        seen.append(hooks(model))
        step(*batch(i))
    assert seen == [0, 0, 4, 0, 0, 4, 0]


def run(updates: int, resume_at: int = -1, seed: int = 0, every: int = 2) -> dict[str, Tensor]:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, ReDo]:
        model = uneven(built("cnn"))
        optimizer = OPTIMIZERS["adam"](model)
        return model, optimizer, ReDo(model, optimizer, every=every, tau=0.6, seed=seed)

    model, optimizer, redo = build()
    for i in range(updates):
        if i == resume_at:
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), redo.state_dict()])
            torch.manual_seed(99)
            model, optimizer, redo = build()
            for part, state in zip((model, optimizer, redo), saved, strict=True):
                part.load_state_dict(state)  # type: ignore[arg-type]
        TrainingStep(model, optimizer, after=(redo,))(*batch(i))
    return tensors(model, optimizer)


def test_it_depends_on_the_seed_and_a_resumed_run_ends_with_the_same_numbers() -> None:
    before = torch.random.get_rng_state()
    whole = run(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    for resume_at in (2, 3):
        again = run(5, resume_at)
        assert all(torch.equal(whole[key], again[key]) for key in whole)
    other = run(5, seed=1)
    assert not torch.equal(whole["conv1.weight"], other["conv1.weight"])


def test_each_recycling_draws_anew() -> None:
    model = built("mlp", "none")
    redo = ReDo(model, torch.optim.SGD(model.parameters(), lr=0.0), every=1, tau=0.0)
    drawn = []
    for _ in range(2):
        with torch.no_grad():
            model.get_submodule("fc1").bias[0] = -1e3  # type: ignore[index,operator]
        model(batch()[0])
        redo()
        drawn.append(model.get_submodule("fc1").weight[0].clone())  # type: ignore[index,operator,union-attr]
    assert not torch.equal(*drawn)


def test_only_training_passes_of_the_model_itself_count() -> None:
    model = with_dead_units("mlp", "none")
    redo = ReDo(model, torch.optim.SGD(model.parameters(), lr=0.0), every=1, tau=0.0)
    copied = copy.deepcopy(model)
    copied(batch()[0])
    model.eval()
    model(batch()[0])
    with pytest.raises(ConfigError, match=r"no training forward pass through fc1, fc2, fc3, fc4 since"):
        redo()
    model.train()
    redo = ReDo(model, torch.optim.SGD(model.parameters(), lr=0.0), every=1, tau=0.0)
    model(batch()[0])
    with torch.no_grad():
        copied.get_submodule("fc3").bias.fill_(-1e3)  # type: ignore[operator,union-attr]
    copied(batch()[0])
    redo()
    assert redo.recycled["fc3"] < 6


# --- what is refused ----------------------------------------------------------------------------------------------


def of(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


RELU = nn.ReLU()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: built("cnn", "sws"), r"layer 'conv1' \(SWSConv2d\) does not compute with its raw weight"),
        (of(nn.Linear(2, 2)), "hidden layers, and Sequential has none"),
        (of(nn.Linear(2, 3), nn.Linear(3, 2)), "none between layers '0' and '1'"),
        (of(nn.Linear(2, 3), RELU, nn.Linear(3, 3), RELU, nn.Linear(3, 2)), r"'3' \(ReLU\) stands in it twice"),
        (of(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)), r"'2' \(BatchNorm1d\) stands where"),
        (of(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.ReLU(), nn.Linear(16, 2)), r"'1' \(Flatten\) stands where"),
        (of(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(8, 2)), r"'2' \(Linear\) has 8 inputs.* 4 units of '0'"),
        (of(nn.Linear(2, 3), nn.Softmax(1), nn.Linear(3, 2)), r"'1' \(Softmax\) stands where"),
        (
            of(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.ReLU(), nn.Linear(3, 2)),
            r"'0' \(ParametrizedLinear\)",
        ),
    ],
)
def test_what_is_no_chain_of_units_is_refused_by_the_layers_name(build: Callable[[], nn.Module], words: str) -> None:
    model = build()
    with pytest.raises(ConfigError, match=words):
        ReDo(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1, tau=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0, "tau": 0.1}, r"redo\.every must be an integer of 1 or more; got 0"),
        ({"every": 1, "tau": 1.0}, r"redo\.tau .*\[0, 1\); got 1\.0"),
        ({"every": 1, "tau": -0.1}, r"redo\.tau .*got -0\.1"),
        ({"every": 1, "tau": "x"}, r"redo\.tau must be a finite number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    model = built("mlp")
    with pytest.raises(ConfigError, match=words):
        ReDo(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_activations_without_an_axis_of_units_are_explained() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    ReDo(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1, tau=0.1)
    with pytest.raises(DataError, match=r"the 3 units of layer '0' on axis 1 .*got shape \(2, 5, 3\)"):
        model(torch.zeros(2, 5, 4))


@pytest.mark.parametrize("name", ["mlp", "cnn", "digits_cnn"])
def test_fednorms_chains_are_found_whole(name: str) -> None:
    model = built(name, width=4)
    links = hidden_units(model, "ReDo")
    layers = [path for path, _ in weighted(model)]
    assert [link.path for link in links] == layers[:-1]
    assert [link.following for link in links] == [m for _, m in weighted(model)][1:]
    assert [len(link.norms) for link in links] == [1] * len(links)
