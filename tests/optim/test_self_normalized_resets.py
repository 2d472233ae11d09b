"""Self-normalized resets, against a loop over single units that keeps a list of its inter-firing times."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError, DataError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.optim.self_normalized_resets import SelfNormalizedResets
from fednorm.rng import torch_seeded
from fednorm.training.step import TrainingStep


class Unit:
    """What a unit remembers, and the rule in words of the paper: P(A >= a) <= eta."""

    def __init__(self, eta: float, longest: int) -> None:
        self.eta, self.longest = eta, longest
        self.times: list[int] = []
        self.since = 0

    def is_reset(self, fires: bool) -> bool:
        self.since += 1  # one more update since the last firing
        if fires:
            self.times.append(self.since)
            self.since = 0
            return False
        least = self.since + 1  # what the present inter-firing time is at least
        chance = (1 + sum(time >= least for time in self.times)) / (1 + len(self.times))
        if chance <= self.eta or self.since >= self.longest:
            self.times.append(least)
            self.since = 0
            return True
        return False


def switches() -> nn.Sequential:
    """Four units, each of which fires where its input is above 0."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
    return model


def run(effect: SelfNormalizedResets, model: nn.Sequential, pattern: Iterable[Tensor]) -> list[list[int]]:
    """Play which units fire; what is reset is put back, as the rule is what is looked at."""
    first = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    resets = []
    for fires in pattern:
        model(torch.where(fires, 1.0, -1.0).expand(3, 4) * torch.tensor([[0.0], [0.5], [1.0]]))
        effect()
        resets.append(effect.reset.get("0", []))
        model.load_state_dict(first)
    return resets


@pytest.mark.parametrize(("eta", "longest"), [(0.1, 40), (0.3, 6), (0.02, 12)])
def test_it_resets_as_a_list_of_inter_firing_times_says(eta: float, longest: int) -> None:
    model = switches()
    effect = SelfNormalizedResets(model, torch.optim.SGD(model.parameters(), lr=0.0), eta=eta, longest=longest)
    generator = torch.Generator().manual_seed(0)
    often = torch.tensor([1.0, 0.8, 0.3, 0.05])
    pattern = [torch.rand(4, generator=generator) < often for _ in range(120)]
    pattern += [torch.tensor([False, False, True, False])] * 60
    units = [Unit(eta, longest) for _ in range(4)]
    expected = [[i for i, unit in enumerate(units) if unit.is_reset(bool(fires[i]))] for fires in pattern]
    assert run(effect, model, pattern) == expected
    assert any(expected[120:])
    for place, unit in enumerate(units):
        times = [k + 1 for k, count in enumerate(effect.past[0][place].tolist()) for _ in range(count)]
        assert times == sorted(unit.times)


def test_one_that_always_fired_is_reset_at_once_and_a_rare_one_is_waited_for() -> None:
    model = switches()
    effect = SelfNormalizedResets(model, torch.optim.SGD(model.parameters(), lr=0.0), eta=0.05, longest=1000)
    moments = [torch.tensor([True, number % 10 == 9, True, True]) for number in range(300)]
    silence = [torch.zeros(4, dtype=torch.bool)] * 30
    resets = run(effect, model, [*moments, *silence])
    assert not any(resets[:300])
    first = {unit: next(i for i, units in enumerate(resets[300:]) if unit in units) for unit in (0, 1)}
    # After 300 firings in a row a single miss has probability 1/301; the other is late from the tenth update on.
    assert first == {0: 0, 1: 9}


def test_without_a_past_the_longest_silence_decides() -> None:
    model = switches()
    effect = SelfNormalizedResets(model, torch.optim.SGD(model.parameters(), lr=0.0), eta=0.01, longest=7)
    resets = run(effect, model, [torch.zeros(4, dtype=torch.bool)] * 15)
    assert [place for place, units in enumerate(resets) if units] == [6, 13]
    assert resets[6] == [0, 1, 2, 3]


def built(name: str, norm: str) -> nn.Module:
    return make_model(name, make_norm(norm), num_classes=3, image_size=8, width=4, seed=2)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(12) % 3


@pytest.mark.parametrize("optimizer_name", ["adam", "momentum"])
def test_a_reset_unit_is_new_and_all_else_is_as_it_was(optimizer_name: str) -> None:
    model: Any = built("cnn", "batch_norm")
    make = {"adam": lambda p: torch.optim.Adam(p, lr=0.01), "momentum": lambda p: torch.optim.SGD(p, 0.01, 0.9)}
    optimizer = make[optimizer_name](model.parameters())
    with torch.no_grad():
        model.norm2.bias[1] = -1e3  # dead, in a layer whose outgoing weights are a convolution's or a flattening's
    effect = SelfNormalizedResets(model, optimizer, eta=0.01, longest=1, seed=7)
    TrainingStep(model, optimizer)(*batch(0))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    effect()
    assert effect.reset == {"conv2": [1]}
    fresh = copy.deepcopy(model.conv2)
    with torch_seeded(7, "snr", 1, "conv2"):
        fresh.reset_parameters()
    after = model.state_dict()
    for key, tensor in before.items():
        expected = tensor.clone()
        if key == "conv2.weight":
            expected[1] = fresh.weight[1].detach()
        elif key in ("conv2.bias", "norm2.bias", "norm2.running_mean"):
            expected[1] = 0
        elif key in ("norm2.weight", "norm2.running_var"):
            expected[1] = 1
        elif key == f"{effect.links[2].path}.weight":
            expected.view(len(expected), effect.links[1].units, -1)[:, 1] = 0
        assert torch.equal(after[key], expected), key
    for parameter in (model.conv2.weight, model.norm2.weight, model.norm2.bias):
        kept = [t for t in optimizer.state[parameter].values() if t.shape == parameter.shape]
        assert kept
        assert not any(t[1].any() for t in kept)
        assert any(t[[0, 2, 3]].any() for t in kept)


def test_passes_of_one_update_are_one() -> None:
    """New and memory samples in passes of their own: a unit that fires in either has fired."""
    model = switches()
    effect = SelfNormalizedResets(model, torch.optim.SGD(model.parameters(), lr=0.0), eta=0.5, longest=50)
    model(torch.tensor([[1.0, -1, -1, 1]]))
    model(torch.tensor([[-1.0, 1, -1, 1]]))
    with torch.no_grad():
        model(torch.ones(1, 4))  # statistics alone
    model.eval()
    model(torch.ones(1, 4))
    model.train()
    effect()
    assert effect.silent[0].tolist() == [0, 0, 1, 0]
    with pytest.raises(ConfigError, match="seen no training forward pass through 0"):
        effect()


def test_its_state_is_all_that_it_needs() -> None:
    states = []
    for cut in (False, True):
        model = built("mlp", "none")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def made(model: nn.Module = model, optimizer: Any = optimizer) -> SelfNormalizedResets:
            return SelfNormalizedResets(model, optimizer, eta=0.3, longest=3, seed=1)

        effect = made()
        resets = 0
        for number in range(12):
            if cut and number == 6:
                kept = {key: tensor.clone() for key, tensor in effect.state_dict().items()}
                effect = made()
                effect.load_state_dict(kept)
            TrainingStep(model, optimizer, after=(effect,))(*batch(number))
            resets += len(effect.reset)
        assert resets
        states.append(model.state_dict() | effect.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_layers_that_are_not_trained_are_left_alone() -> None:
    model = built("mlp", "none")
    model.get_submodule("fc2").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torch.no_grad():
        for path in ("fc1", "fc2", "fc3"):
            model.get_submodule(path).bias.fill_(-1e3)  # type: ignore[operator,union-attr]
    effect = SelfNormalizedResets(model, optimizer, eta=0.1, longest=1)
    TrainingStep(model, optimizer, after=(effect,))(*batch(0))
    assert "fc3" in effect.reset
    assert not {"fc1", "fc2"} & set(effect.reset)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0.0}, r"train\.snr_eta must be greater than 0"),
        ({"eta": 1.0}, r"train\.snr_eta is a probability below 1; got 1\.0"),
        ({"eta": 0.1, "longest": 0}, r"train\.snr_longest must be an integer of 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    model = built("mlp", "none")
    with pytest.raises(ConfigError, match=words):
        SelfNormalizedResets(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_what_is_no_chain_or_no_batch_of_images_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1), nn.Linear(3, 2))
    with pytest.raises(ConfigError, match=r"'1' \(Softmax\) stands where Self-normalized resets"):
        SelfNormalizedResets(model, torch.optim.SGD(model.parameters(), lr=0.1), eta=0.1)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    SelfNormalizedResets(model, torch.optim.SGD(model.parameters(), lr=0.1), eta=0.1)
    with pytest.raises(DataError, match=r"the 3 units of layer '0' on axis 1 .*got shape \(2, 5, 3\)"):
        model(torch.zeros(2, 5, 4))
