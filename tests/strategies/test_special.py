"""SPECIAL's blend: the minimum of its objective, and which model the anchor is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.federated_continual.workbench import GridWorkbench
from fednorm.federation.round_report import RoundReport
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import workbench_of
from strategies.special import Special

GRID: dict[str, Any] = {
    "kind": "federated_continual",
    "scenario": {"name": "split_digits", "num_experiences": 3, "train_per_experience": 24, "test_per_experience": 10},
    "model": {"width": 4},
    "norm": {"name": "batch_norm"},
    "grid": {"clients": 2},
    "rounds": {"per_experience": 2},
    "train": {"batch_size": 8, "learning_rate": 0.05},
}


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for key, tensor in network().state_dict().items()
    }


def test_it_is_the_minimum_of_its_objective() -> None:
    strategy, old, mean = Special(network(), mu=0.5), values(1), values(2)
    strategy.report = RoundReport(1)
    new = strategy.server_update(old, dict(mean))
    for key in ("0.weight", "1.bias"):
        w = new[key].double().requires_grad_()
        (0.5 * (w - mean[key].double()).square().sum() + 0.25 * (w - old[key].double()).square().sum()).backward()
        assert w.grad is not None
        assert w.grad.abs().max() < 1e-6
        assert not torch.equal(new[key], mean[key])
    assert torch.equal(new["1.running_mean"], mean["1.running_mean"])
    assert torch.equal(new["1.running_var"], mean["1.running_var"])


def test_without_a_factor_it_is_fedavg() -> None:
    strategy, mean = Special(network(), mu=0), values(2)
    strategy.report = RoundReport(1)
    assert all(torch.equal(tensor, mean[key]) for key, tensor in strategy.server_update(values(1), dict(mean)).items())


def test_the_anchor_is_the_model_of_the_experience_before(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds 1 and 2 have none; 3 and 4 that after round 2; 5 and 6 that after round 4; also where a run was cut."""
    blended: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    update = Special.server_update

    def taken(self: Special, old: Any, mean: Any) -> Any:
        before = {key: tensor.clone() for key, tensor in mean.items()}
        new = update(self, old, mean)
        blended[self.report.server_round] = before, {key: tensor.clone() for key, tensor in new.items()}
        return new

    class Cut:
        def begin(self, bench: Any, first_round: int) -> None: ...

        def round(self, line: Any) -> None:
            if line["round"] == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(Special, "server_update", taken)
    config = resolve({**GRID, "strategy": {"name": "special", "mu": 0.25, "anchor": "experience"}})
    with pytest.raises(KeyboardInterrupt):
        simulate(config, runs=tmp_path, observer=Cut())
    simulate(config, runs=tmp_path)
    key = next(key for key, _ in GridWorkbench(config).model.named_parameters())
    for server_round, anchor in ((1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (6, 4)):
        mean, new = (part[key] for part in blended[server_round])
        expected = (mean + 0.25 * blended[anchor][1][key]) / 1.25 if anchor else mean
        torch.testing.assert_close(new, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mu": -1.0}, "0 or more; got -1.0"),
        ({"anchor": "task"}, "strategy.anchor"),
        ({"anchor": "experience"}, "has one experience: it would silently be FedAvg"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        workbench_of(resolve({"strategy": {"name": "special", **options}, "model": {"width": 4}}))


def test_gdumb_is_refused() -> None:
    with pytest.raises(ConfigError, match="gdumb trains a fresh network"):
        workbench_of(resolve({**GRID, "strategy": {"name": "special"}, "learner": {"name": "gdumb"}}))
