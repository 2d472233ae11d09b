"""Continual backprop, against a loop over single units that follows the paper's algorithm, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError, DataError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.optim.cbp import ContinualBackprop
from fednorm.rng import torch_seeded
from fednorm.training.step import TrainingStep

SEED = 5


def grouped() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2, bias=False, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def built(name: str, norm: str = "none") -> nn.Module:
    if name == "grouped":
        return grouped()
    return make_model(name, make_norm(norm), num_classes=3, image_size=8, width=5, seed=2)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(12) % 3


def weighted(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def inputs_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What enters each layer with weights, by calling the modules one after the other."""
    entering, hidden = [], images
    for module in [m for m in copy.deepcopy(model).modules() if not list(m.children())]:
        if isinstance(module, nn.Linear | nn.Conv2d):
            entering.append(hidden.detach().double())
        hidden = module(hidden)
    return entering


def outgoing(layer: Any, tensor: Tensor, unit: int, units: int) -> list[tuple[Any, ...]]:
    """The indices of the weights that leave a unit, one for each of its positions behind a flattening."""
    if isinstance(layer, nn.Conv2d):
        within, each = units // layer.groups, len(tensor) // layer.groups
        group = unit // within
        return [(slice(group * each, (group + 1) * each), unit % within)]
    cells = tensor.shape[1] // units
    return [(slice(None), unit * cells + cell) for cell in range(cells)]


class Plain:
    """The paper's algorithm, a unit at a time."""

    def __init__(self, model: nn.Module, rate: float, maturity: int, decay: float) -> None:
        self.model, self.rate, self.maturity, self.decay = model, rate, maturity, decay
        self.layers = weighted(model)
        self.utility = [[0.0] * len(layer.weight) for _, layer in self.layers[:-1]]
        self.age = [[0] * len(layer.weight) for _, layer in self.layers[:-1]]
        self.due = [0.0] * (len(self.layers) - 1)
        self.updates = 0

    @torch.no_grad()
    def __call__(self, entering: list[Tensor]) -> dict[str, list[int]]:
        self.updates += 1
        chosen: list[list[int]] = []
        for number, (utility, age) in enumerate(zip(self.utility, self.age, strict=True)):
            following, given = self.layers[number + 1][1], entering[number + 1]
            for unit in range(len(utility)):
                parts = []
                for position in outgoing(following, following.weight, unit, len(utility)):
                    column = position[1] if isinstance(following, nn.Linear) else unit
                    parts.append(given[:, column].abs().mean() * following.weight[position].double().abs().mean())
                age[unit] += 1
                mean = float(sum(parts) / len(parts))
                utility[unit] = self.decay * utility[unit] + (1 - self.decay) * mean
            mature = [unit for unit in range(len(age)) if age[unit] > self.maturity]
            self.due[number] += self.rate * len(mature)
            chosen.append(self.least_useful(number, mature))
        self.renew(chosen)
        return {self.layers[number][0]: units for number, units in enumerate(chosen) if units}

    def least_useful(self, number: int, mature: list[int]) -> list[int]:
        utility, age, taken = self.utility[number], self.age[number], []
        while self.due[number] >= 1:
            worst = min(mature, key=lambda u: utility[u] / (1 - self.decay ** age[u]))
            mature.remove(worst)
            taken.append(worst)
            self.due[number] -= 1
        for unit in taken:
            utility[unit], age[unit] = 0.0, 0
        return sorted(taken)

    def renew(self, chosen: list[list[int]]) -> None:
        for number, units in enumerate(chosen):
            path, layer = self.layers[number]
            if units:
                fresh = copy.deepcopy(layer)
                with torch_seeded(SEED, "cbp", self.updates, path):
                    fresh.reset_parameters()
                for unit in units:
                    layer.weight[unit] = fresh.weight[unit]
                    if layer.bias is not None:
                        layer.bias[unit] = 0
        for number, units in enumerate(chosen):
            following = self.layers[number + 1][1]
            for unit in units:
                for position in outgoing(following, following.weight, unit, len(self.utility[number])):
                    following.weight[position] = 0


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "norm", "options"),
    [
        ("mlp", "none", {"rate": 0.15, "maturity": 2, "decay": 0.9}),
        ("mlp", "none", {"rate": 1.0, "maturity": 0, "decay": 0.0}),
        ("grouped", "none", {"rate": 0.2, "maturity": 1, "decay": 0.5}),
        ("cnn", "none", {"rate": 0.2, "maturity": 1, "decay": 0.9}),
    ],
)
def test_it_replaces_as_a_loop_over_single_units_does(name: str, norm: str, options: dict[str, Any]) -> None:
    ours = built(name, norm)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    cbp = ContinualBackprop(ours, optimizer, seed=SEED, **options)
    naive = built(name, norm)
    plain = Plain(naive, **options)
    without = TrainingStep(naive, torch.optim.SGD(naive.parameters(), lr=0.05))
    step = TrainingStep(ours, optimizer, after=(cbp,))
    replaced = 0
    for number in range(8):
        naive.load_state_dict(ours.state_dict())
        entering = inputs_of(naive, batch(number)[0])
        without(*batch(number))
        expected = plain(entering)
        step(*batch(number))
        assert cbp.replaced == expected, number
        replaced += sum(map(len, expected.values()))
        for key, tensor in naive.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=1e-6, atol=1e-7, msg=key)
        for found, wanted in zip(cbp.utilities, plain.utility, strict=True):
            torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-9)
        assert [ages.tolist() for ages in cbp.ages] == plain.age
    assert replaced > 5


def test_what_a_norm_and_an_optimizer_have_of_a_replaced_unit_begins_anew() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    cbp = ContinualBackprop(model, optimizer, rate=0.1, maturity=2, decay=0.9)
    step = TrainingStep(model, optimizer, after=(cbp,))
    for number in range(9):
        step(*batch(number))
        if cbp.replaced:
            break
    (unit,) = cbp.replaced["0"]
    others = [other for other in range(4) if other != unit]
    conv, norm, head = model[0], model[1], model[4]
    for tensor, new in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
        assert float(tensor[unit].detach()) == new
        assert all(float(tensor[other].detach()) != new for other in others)
    assert int(norm.num_batches_tracked) == number + 1
    cells = head.weight.detach().view(3, 4, 36)
    assert not cells[:, unit].any()
    assert cells[:, others].any(dim=2).all()
    for moment in ("exp_avg", "exp_avg_sq"):
        for parameter in (conv.weight, conv.bias, norm.weight, norm.bias):
            assert not optimizer.state[parameter][moment][unit].any()
        assert not optimizer.state[head.weight][moment].view(3, 4, 36)[:, unit].any()
        assert optimizer.state[head.weight][moment].view(3, 4, 36)[:, others].any()
    bound = 27**-0.5
    assert 0 < float(conv.weight[unit].detach().abs().max()) <= bound
    assert float(conv.bias[unit].detach()) == 0


def test_a_replaced_unit_changes_the_function_by_what_it_gave_alone() -> None:
    """Of a dead unit, the least useful that there can be, that is nothing."""
    model = built("mlp")
    with torch.no_grad():
        for path in ("fc1", "fc2", "fc3", "fc4"):
            model.get_submodule(path).bias[3] = -1e3  # type: ignore[index,operator]
    cbp = ContinualBackprop(model, torch.optim.SGD(model.parameters(), lr=0.0), rate=0.2, maturity=0, decay=0.0)
    before = model(batch(0)[0])
    cbp()
    assert [len(units) for units in cbp.replaced.values()] == [1] * 4
    torch.testing.assert_close(model(batch(0)[0]), before)


def test_the_rate_is_kept_over_fractions_and_the_young_are_spared() -> None:
    model = built("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    cbp = ContinualBackprop(model, optimizer, rate=0.03, maturity=4)
    step = TrainingStep(model, optimizer, after=(cbp,))
    units, count = cbp.links[0].units, []
    for number in range(60):
        ages = [a.clone() for a in cbp.ages]
        step(*batch(number))
        count.append(len(cbp.replaced.get("fc1", [])))
        for link, age in zip(cbp.links, ages, strict=True):
            assert all(int(age[unit]) >= 4 for unit in cbp.replaced.get(link.path, []))
    assert count[:4] == [0] * 4
    assert 0 < sum(count) <= 0.03 * units * 56


def test_layers_that_are_not_trained_are_left_alone() -> None:
    model = built("mlp")
    model.get_submodule("fc2").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cbp = ContinualBackprop(model, optimizer, rate=1.0, maturity=0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    TrainingStep(model, optimizer, after=(cbp,))(*batch(0))
    assert set(cbp.replaced) == {"fc3", "fc4"}
    assert torch.equal(model.state_dict()["fc2.weight"], before["fc2.weight"])
    assert [int(ages.sum()) for ages in cbp.ages][:2] == [0, 0]


def test_evaluation_and_passes_without_gradients_are_not_heard() -> None:
    model = built("mlp")
    cbp = ContinualBackprop(model, torch.optim.SGD(model.parameters(), lr=0.0), rate=0.5)
    model.eval()
    model(batch(0)[0])
    model.train()
    with torch.no_grad():
        model(batch(0)[0])
    copy.deepcopy(model)(batch(0)[0])
    with pytest.raises(ConfigError, match=r"seen no training forward pass through fc1, fc2, fc3, fc4"):
        cbp()


def test_its_state_is_all_that_it_needs() -> None:
    states = []
    for cut in (False, True):
        model = built("cnn", "batch_norm")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        cbp = ContinualBackprop(model, optimizer, rate=0.2, maturity=1, decay=0.9, seed=SEED)
        step = TrainingStep(model, optimizer, after=(cbp,))
        for number in range(10):
            if cut and number == 5:
                kept = {key: tensor.clone() for key, tensor in cbp.state_dict().items()}
                cbp = ContinualBackprop(model, optimizer, rate=0.2, maturity=1, decay=0.9, seed=SEED)
                cbp.load_state_dict(kept)
                step = TrainingStep(model, optimizer, after=(cbp,))
            step(*batch(number))
        states.append(model.state_dict() | cbp.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 0}, r"train\.cbp_rate must be greater than 0"),
        ({"rate": 1.5}, r"train\.cbp_rate must be .* at most 1; got 1\.5"),
        ({"rate": 0.1, "maturity": -1}, r"train\.cbp_maturity must be an integer of 0 or more"),
        ({"rate": 0.1, "decay": 1.0}, r"train\.cbp_decay must be less than 1"),
        ({"rate": 0.1, "decay": -0.1}, r"train\.cbp_decay is a share"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    model = built("mlp")
    with pytest.raises(ConfigError, match=words):
        ContinualBackprop(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_what_is_no_chain_or_no_batch_of_images_is_refused() -> None:
    model = make_model("mobilenet_v2", make_norm("batch_norm"), num_classes=3, image_size=8, width=8, seed=2)
    with pytest.raises(ConfigError, match=r"Continual backprop follows units .*depthwise .*train without Continual"):
        ContinualBackprop(model, torch.optim.SGD(model.parameters(), lr=0.1), rate=0.1)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    ContinualBackprop(model, torch.optim.SGD(model.parameters(), lr=0.1), rate=0.1)
    with pytest.raises(DataError, match=r"the 3 units of layer '0' on axis 1 .*got shape \(2, 5, 3\)"):
        model(torch.zeros(2, 5, 4))
