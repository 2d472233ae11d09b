"""Which units of a network with branches are made new, and that making one new takes its contribution away alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.optim.cbp import ContinualBackprop
from fednorm.optim.hidden_units import hidden_units
from fednorm.optim.redo import ReDo
from fednorm.optim.self_normalized_resets import SelfNormalizedResets
from fednorm.optim.units import Link, replace_units
from fednorm.training.step import TrainingStep


def ours(norm: str = "batch_norm", name: str = "resnet18", width: int = 4) -> nn.Module:
    return make_model(name, make_norm(norm), num_classes=3, image_size=8, width=width, seed=2)


def theirs(block: str = "BasicBlock") -> nn.Module:
    """Two of torchvision's blocks, small, in a chain: each has one nonlinearity that serves in several places."""
    torch.manual_seed(0)
    make, planes = (BasicBlock, 8) if block == "BasicBlock" else (Bottleneck, 2)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(stem, make(8, planes), make(8, planes), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 3


class Functional(nn.Module):
    """A block as users write them: functions, one pooling module in two places, a sum, a flattening by ``view``."""

    def __init__(self, mode: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mode = mode
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first, self.norm = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(4, 6, 3, padding=1)
        self.head, self.out = nn.Linear(24, 7), nn.Linear(7, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.pool(F.relu(self.stem(images)))
        branch = F.relu(self.norm(self.first(hidden)))
        if self.mode == "softmax":
            branch = branch.softmax(1)
        hidden = hidden + self.second(branch)
        hidden = self.pool(F.gelu(self.last(hidden)))
        hidden = hidden.view(hidden.size(0), -1)
        if self.mode == "branches" and images.sum() > 0:
            hidden = hidden * 2
        if self.mode == "twice":
            hidden = F.pad(self.head(hidden).relu(), (0, 17))
        logits: Tensor = self.out(F.dropout(self.head(hidden).relu(), 0.5, self.training))
        return logits


# --- which ----------------------------------------------------------------------------------------------------------


def edges(model: nn.Module) -> list[tuple[str, str, list[str]]]:
    names = {module: path for path, module in model.named_modules()}
    return [
        (link.path, names[link.following], [names[norm] for norm in link.norms]) for link in hidden_units(model, "ReDo")
    ]


def test_of_our_resnet_the_units_within_the_blocks_are_made_new() -> None:
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert edges(ours()) == [(f"{block}.conv1", f"{block}.conv2", [f"{block}.norm1"]) for block in blocks]


def test_of_torchvisions_resnets_too_though_one_relu_serves_in_several_places() -> None:
    basic, bottleneck = torchvision.models.resnet18(), torchvision.models.resnet50()
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert edges(basic) == [(f"{block}.conv1", f"{block}.conv2", [f"{block}.bn1"]) for block in blocks]
    blocks = [
        f"layer{stage}.{block}"
        for stage, count in zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True)
        for block in range(count)
    ]
    assert edges(bottleneck) == [
        (f"{block}.conv{number}", f"{block}.conv{number + 1}", [f"{block}.bn{number}"])
        for block in blocks
        for number in (1, 2)
    ]
    assert all(link.activation is None for link in hidden_units(basic, "ReDo"))


def test_functions_are_read_as_modules_are() -> None:
    assert edges(Functional()) == [("first", "second", ["norm"]), ("last", "head", []), ("head", "out", [])]


class Skipping(nn.Sequential):
    """Layers in another order than that of their registration, and a sum: what a subclass is free to do."""

    def forward(self, images: Tensor) -> Tensor:
        stem, within, behind, flatten, out = self
        hidden = stem(images).relu()
        logits: Tensor = out(flatten(hidden + behind(within(hidden).relu()).relu()))
        return logits


def test_a_sequence_that_runs_its_layers_otherwise_is_traced() -> None:
    convs = [nn.Conv2d(channels, 4, 3, padding=1) for channels in (3, 4, 4)]
    model = Skipping(*convs, nn.Flatten(), nn.Linear(256, 3))
    assert edges(model) == [("1", "2", [])]


def test_a_network_with_gates_keeps_the_units_that_are_multiplied() -> None:
    """A squeeze-and-excitation block: its hidden units are units as any other, what it gates and its gates are not."""
    torch.manual_seed(0)
    block = torchvision.ops.SqueezeExcitation(6, 4)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), block, nn.ReLU(), nn.Conv2d(6, 3, 3))
    assert edges(model) == [("1.fc1", "1.fc2", [])]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ours(name="mobilenet_v2", width=8), r"'features\.\S+' \(\w*Conv2d\) is a depthwise convolution"),
        (lambda: ours("sws"), r"layer 'layer1\.0\.conv1' \(SWSConv2d\) does not compute with its raw weight"),
        (lambda: Functional("softmax"), r"'softmax' \(softmax\) stands where ReDo does not know"),
        (lambda: Functional("branches"), r"'the model itself' \(Functional\) cannot be traced .*control flow"),
        (lambda: Functional("twice"), r"'head' \(Linear\) stands in it twice"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2)),
            r"'1' \(TransformerEncoderLayer\) has layers inside that cannot be looked at",
        ),
        (lambda: torchvision.ops.Conv2dNormActivation(3, 4), "hidden layers, and Conv2dNormActivation has none"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(build: Callable[[], nn.Module], words: str) -> None:
    model = build()
    with pytest.raises(ConfigError, match=words):
        ReDo(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1, tau=0.1)


# --- what -----------------------------------------------------------------------------------------------------------

State = dict[str, Tensor]

EFFECTS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "cbp": lambda model, optimizer: ContinualBackprop(model, optimizer, rate=0.3, maturity=2, decay=0.5),
    "snr": lambda model, optimizer: SelfNormalizedResets(model, optimizer, eta=0.01, longest=3),
    "redo": lambda model, optimizer: ReDo(model, optimizer, every=3, tau=0.9),
}


def without(model: nn.Module, chosen: list[tuple[Link, Tensor]], images: Tensor) -> Tensor:
    """What the network gives with some units cut: their activations are 0 where the next layer takes them."""
    handles = []
    for link, units in chosen:

        def cut(_: nn.Module, args: tuple[Tensor, ...], link: Link = link, units: Tensor = units) -> Tensor:
            kept = (~units).repeat_interleave(args[0].shape[1] // link.units).to(args[0].dtype)
            return args[0] * kept.view(1, -1, *[1] * (args[0].ndim - 2))

        handles.append(link.following.register_forward_pre_hook(cut))
    output: Tensor = model(images)
    for handle in handles:
        handle.remove()
    return output.detach()


@pytest.mark.parametrize("build", [ours, theirs, lambda: theirs("Bottleneck"), Functional])
@pytest.mark.parametrize("whole", [True, False])
def test_a_renewed_network_is_the_one_with_those_units_cut(build: Callable[[], nn.Module], whole: bool) -> None:
    model = build().double()
    images = batch(3)[0].double()
    model(images)  # so that running statistics are not those of a new norm
    model.eval()
    generator = torch.Generator().manual_seed(5)
    links = hidden_units(model, "ReDo")
    chosen = [(link, torch.rand(link.units, generator=generator) < 0.4) for link in links]
    expected, before = without(model, chosen, images), model(images).detach()
    replace_units(chosen, torch.optim.SGD(model.parameters(), lr=0.0), 1, "renewed", whole=whole)
    torch.testing.assert_close(model(images).detach(), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(before, expected)


def renewed(build: Callable[[], nn.Module], name: str) -> tuple[nn.Module, torch.optim.Adam, Any, State, State]:
    """Train a network with a dead unit in each hidden layer up to a renewal; what it and its optimizer had before."""
    model = build()
    with torch.no_grad():
        for link in hidden_units(model, "ReDo"):  # a dead unit is the least useful, the most silent, and a dormant one
            (link.norms[0] if link.norms else link.layer).bias[1] = -50.0  # type: ignore[index,operator]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    effect = EFFECTS[name](model, optimizer)
    step = TrainingStep(model, optimizer)
    for number in range(2):
        step(*batch(number))
        effect()
    step(*batch(2))
    before, moments = copy.deepcopy(model.state_dict()), first_moments(model, optimizer)
    effect()
    return model, optimizer, effect, before, moments


def first_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    return {key: optimizer.state[parameter]["exp_avg"].clone() for key, parameter in model.named_parameters()}


def rows_of(units: list[int], count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, torch.tensor(units), value=True)


@pytest.mark.few(4)
@pytest.mark.parametrize("build", [ours, theirs, Functional])
@pytest.mark.parametrize("name", EFFECTS)
def test_what_belongs_to_a_renewed_unit_begins_anew(build: Callable[[], nn.Module], name: str) -> None:
    model, optimizer, effect, _, _ = renewed(build, name)
    links = hidden_units(model, "ReDo")
    units = changed(links, effect)
    assert all(1 in units[link.path] and len(units[link.path]) < link.units for link in links)
    for link in links:
        rows = rows_of(units[link.path], link.units)
        outgoing = link.following.weight.detach().view(len(link.following.weight), link.units, -1)
        assert not outgoing[:, rows].any()
        assert not optimizer.state[link.following.weight]["exp_avg"].view(outgoing.shape)[:, rows].any()
        for norm in link.norms:
            state = norm.state_dict()
            assert torch.equal(state["weight"][rows], torch.ones(int(rows.sum())))
            assert not state["bias"][rows].any()
            if name != "redo":  # whose card says that statistics stay
                assert torch.equal(state["running_var"][rows], torch.ones(int(rows.sum())))
                assert not state["running_mean"][rows].any()
        for parameter in (link.layer.weight, *(parameter for norm in link.norms for parameter in norm.parameters())):
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[parameter][moment][rows].any()
                assert optimizer.state[parameter][moment][~rows].any()


@pytest.mark.few(4)
@pytest.mark.parametrize("build", [ours, theirs, Functional])
@pytest.mark.parametrize("name", EFFECTS)
def test_all_else_stays_as_it_was(build: Callable[[], nn.Module], name: str) -> None:
    model, optimizer, effect, before, moments = renewed(build, name)
    names = {module: path for path, module in model.named_modules()}
    may = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in before.items()}
    links = hidden_units(model, "ReDo")
    units = changed(links, effect)
    for link in links:
        rows = rows_of(units[link.path], link.units)
        for module in (link.layer, *link.norms):
            for key, tensor in module.state_dict().items():
                if tensor.ndim:
                    may[f"{names[module]}.{key}"][rows] = True
        outgoing = may[f"{names[link.following]}.weight"]
        outgoing[:, rows.repeat_interleave(outgoing.shape[1] // link.units)] = True
    after = first_moments(model, optimizer)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor[~may[key]], before[key][~may[key]]), key
        if key in after:
            assert torch.equal(after[key][~may[key]], moments[key][~may[key]]), key
    assert sum(not entries.any() for entries in may.values()) > 4


def changed(links: tuple[Link, ...], effect: Any) -> dict[str, list[int]]:
    """Which units were renewed, by what is known of them: outgoing weights of 0."""
    if isinstance(effect, ContinualBackprop):
        return effect.replaced
    if isinstance(effect, SelfNormalizedResets):
        return effect.reset
    found = {}
    for link in links:
        outgoing = link.following.weight.detach().view(len(link.following.weight), link.units, -1)
        found[link.path] = [unit for unit in range(link.units) if not outgoing[:, unit].any()]
        assert len(found[link.path]) == effect.recycled[link.path]
    return found


def test_scores_of_a_relu_that_serves_twice_are_those_within_the_block() -> None:
    """The same network with a nonlinearity of its own in each place has the same scores, utilities and firings."""
    shared = theirs()
    with torch.no_grad():
        shared.get_submodule("1.bn1").bias[3] = -50.0  # type: ignore[index,operator]
    own = copy.deepcopy(shared)
    own[1].relu, own[2].relu = Twice(), Twice()  # type: ignore[index,operator]
    links = hidden_units(own, "ReDo")
    assert all(link.activation is not None for link in links)
    results = []
    for model in (shared, own):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        effects = [make(model, optimizer) for make in EFFECTS.values()]
        step = TrainingStep(model, optimizer)
        for number in range(2):
            step(*batch(number))
            for effect in effects:
                effect()
        step(*batch(2))
        cbp, snr, redo = effects
        results.append([*cbp.utilities, *snr.silent, *snr.past, *redo._dormant(), *redo._sizes.values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert results[0][2].tolist() == [0, 0, 0, 2, 0, 0, 0, 0]


class Twice(nn.Module):
    """A block's two nonlinearities in turn, each a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.calls = nn.ReLU(), nn.ReLU(), 0

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        output: Tensor = (self.inner if self.calls % 2 else self.outer)(features)
        return output
