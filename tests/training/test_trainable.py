"""What a run trains: only norms, only the head, the head first; in federations and on streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fednorm.config import TrainConfig, merge, resolve
from fednorm.errors import ConfigError, FedNormError, RoleError
from fednorm.export import load_model
from fednorm.federation.simulate import plan, simulate
from fednorm.federation.workbench import Workbench
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.streams.simulate import simulate as simulate_stream
from fednorm.streams.workbench import ContinualWorkbench
from fednorm.testing import CONTINUAL, FEDERATED
from fednorm.training.trainable import Trainable


def federated(**values: Any) -> Any:
    return resolve(merge(FEDERATED, values))


def continual(**values: Any) -> Any:
    return resolve(merge(CONTINUAL, values))


def model(norm: str = "batch_norm") -> nn.Module:
    return make_model("digits_cnn", make_norm(norm), num_classes=10, width=4, seed=0)


def trainable(network: nn.Module, **train: Any) -> Trainable:
    return Trainable(network, TrainConfig(**train), 10)


# Which tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("all", lambda _: True),
        ("norm", lambda key: key.startswith("norm")),
        ("head", lambda key: key.startswith("fc3.")),
        ("head, norm", lambda key: key.startswith(("norm", "fc3."))),
    ],
)
def test_the_parts_are_found_by_what_layers_are(parts: str, expected: Any) -> None:
    network = model()
    trainable(network, trainable=parts)
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in network.named_parameters() if expected(key)}


def test_norms_are_found_whatever_they_are_called() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))
    assert trainable(network, trainable="norm").learned == {"1.weight", "1.bias"}

    class Odd(nn.Module):
        """Divides by its size and scales: a normalization that no card speaks for."""

        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.g * x / x.square().mean(-1, keepdim=True).sqrt()
            return y

    assert trainable(nn.Sequential(nn.Linear(3, 4), Odd(), nn.Linear(4, 10)), trainable="norm").learned == {"1.g"}


def test_what_was_frozen_before_stays_so() -> None:
    network = model()
    network.norm1.weight.requires_grad_(False)  # type: ignore[union-attr]
    assert "norm1.weight" not in trainable(network, trainable="norm").learned
    assert not network.norm1.weight.requires_grad  # type: ignore[union-attr]


def test_while_the_head_is_probed_all_else_is_in_evaluation_mode() -> None:
    network = model()
    stages = trainable(network, linear_probe_rounds=2)
    with stages.stage(True):
        assert {key for key, p in network.named_parameters() if p.requires_grad} == {"fc3.weight", "fc3.bias"}
        assert {path for path, module in network.named_modules() if module.training} == {"fc3"}
    assert all(p.requires_grad for p in network.parameters())
    assert all(module.training for module in network.modules())
    with stages.stage(False):
        assert all(module.training for module in network.modules())


def test_head_norm_is_that_of_all_its_parameters() -> None:
    network = model()
    stages = trainable(network, trainable="head")
    state = network.state_dict()
    expected = torch.cat([state["fc3.weight"].flatten(), state["fc3.bias"]]).double().norm()
    assert stages.head_norm(state) == pytest.approx(float(expected), rel=1e-12)
    assert stages.head_norm({"fc3.weight": state["fc3.weight"]}) is None


class NoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.aside = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(x)
        return y


def test_a_head_that_cannot_be_found_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"'aside', has 3 outputs, and there are 10 classes\. Name the head: train"):
        trainable(NoHead(), trainable="head")
    assert trainable(NoHead(), trainable="head", head="classifier").learned == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ConfigError, match="no linear layer and no convolution"):
        trainable(nn.Sequential(nn.BatchNorm1d(10)), linear_probe_rounds=1)
    with pytest.raises(ConfigError, match="No tensor of NoHead matches 'nose'"):
        trainable(NoHead(), trainable="head", head="nose")
    with pytest.raises(ConfigError, match="nothing but the head of Linear is trained"):
        trainable(nn.Linear(4, 10), linear_probe_rounds=1)


# In a federation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "keys"), [("norm", 25), ("head", 2), ("norm,head", 27)])
def test_only_what_is_trained_is_sent_and_the_plan_says_so_in_bytes(parts: str, keys: int) -> None:
    bench = Workbench(federated(train={"trainable": parts}))
    summary = plan(bench.config, bench)["plan"]
    state = bench.model.state_dict()
    sent = sum(state[key].numel() * state[key].element_size() for key in bench.plan.sent)
    assert (summary["shared"], summary["constant"]) == (keys, len(state) - keys)
    assert summary["bytes"]["shared"] == sent
    assert summary["bytes_per_round"] == 2 * 5 * sent
    assert summary["bytes"]["constant"] == sum(t.numel() * t.element_size() for t in state.values()) - sent


def test_frozen_tensors_are_the_initial_ones_and_trained_ones_are_not(tmp_path: Path) -> None:
    config = federated(train={"trainable": "norm", "weight_decay": 0.1, "momentum": 0.9})
    result = simulate(config, runs=tmp_path)
    assert result["rounds"][0]["bytes_up"] == result["plan"]["bytes_per_round"] // 2
    initial = model_of(config)
    final = load_model(result["run"]).state_dict()
    changed = {key for key, tensor in final.items() if not torch.equal(tensor, initial[key])}
    assert changed == {key for key in initial if key.startswith("norm")}
    assert set(load_file(Path(result["run"], "model.safetensors"))) == changed


def model_of(config: Any) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in Workbench(config).model.state_dict().items()}


def test_first_rounds_train_the_head_alone_and_then_everything(tmp_path: Path) -> None:
    probed = federated(train={"linear_probe_rounds": 1}, rounds={"num_rounds": 2}, seed=3)
    bench = Workbench(probed)
    initial = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    result = simulate(probed, runs=tmp_path, bench=bench)
    final = load_model(result["run"]).state_dict()
    assert all(not torch.equal(final[key], initial[key]) for key in final if not key.endswith("tracked"))
    assert result["rounds"][1]["head_norm"] == pytest.approx(
        float(torch.cat([final["fc3.weight"].flatten(), final["fc3.bias"]]).double().norm()), rel=1e-6
    )
    whole = federated(train={"trainable": "head"}, rounds={"num_rounds": 1}, seed=3)
    alone = simulate(whole, runs=None)
    # The first round is a probe, and a probe alone is that round: the same head, bit for bit.
    assert alone["rounds"][0]["head_norm"] == result["rounds"][0]["head_norm"]
    assert "head_norm" not in simulate(federated(rounds={"num_rounds": 1}), runs=None)["rounds"][0]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "strategy",
    ["fedrep", "scaffold", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fedbn", "ditto", "fedavg_ft"))],
)
def test_strategies_train_norms_and_head_and_probe(strategy: str) -> None:
    local = {"train_per_client": 8, "test_per_domain": 4}
    for train in ({"trainable": "norm,head"}, {"linear_probe_rounds": 1}):
        result = simulate(federated(strategy={"name": strategy}, data=local, train=train), runs=None)
        assert result["rejected_updates"] == 0


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"norm": {"name": "none"}, "train": {"trainable": "norm"}}, ConfigError, "DigitsCNN has none. Take a norm"),
        ({"norm": {"name": "sws"}, "train": {"trainable": "norm"}}, ConfigError, "DigitsCNN has none. Take a norm"),
        ({"strategy": {"name": "fedbn"}, "train": {"trainable": "norm"}}, RoleError, "'norm,head'"),
        ({"strategy": {"name": "fedbn"}, "train": {"trainable": "head"}}, RoleError, "would silently be FedAvg"),
        ({"strategy": {"name": "fedper"}, "train": {"trainable": "norm"}}, RoleError, "would silently be FedAvg"),
        ({"strategy": {"name": "fedbabu"}, "train": {"linear_probe_rounds": 1}}, ConfigError, "fedbabu train none"),
        ({"train": {"linear_probe_rounds": 2}}, ConfigError, "less than rounds.num_rounds; got 2 of 2"),
        ({"train": {"linear_probe_rounds": 1, "trainable": "head"}}, ConfigError, "nothing but the head"),
        ({"train": {"linear_probe_epochs": 1}}, ConfigError, "It is a key of continual runs"),
        ({"train": {"trainable": "nrm"}}, ConfigError, "all, norm, head, or norm,head; got 'nrm'. Did you mean 'norm'"),
        ({"train": {"trainable": "all,norm"}}, ConfigError, "and all alone"),
        ({"train": {"trainable": 3}}, ConfigError, "train.trainable must be a string"),
        ({"train": {"trainable": "norm", "redo_every": 5}}, ConfigError, "train.redo_every sets weights anew"),
        ({"train": {"trainable": "norm", "cbp_rate": 0.1}}, ConfigError, "train.cbp_rate sets weights anew"),
        ({"train": {"trainable": "head", "snr_eta": 0.1}}, ConfigError, "train.snr_eta sets weights anew"),
        ({"train": {"head": "fc3"}}, ConfigError, "and none of them is set"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(values: dict[str, Any], error: type[FedNormError], words: str) -> None:
    with pytest.raises(error, match=words):
        Workbench(federated(**values))


# On a stream ---------------------------------------------------------------------------------------------------------


def test_a_stream_probes_in_the_first_epochs_of_each_experience() -> None:
    bench = ContinualWorkbench(continual(learner={"name": "naive"}, train={"linear_probe_epochs": 1, "epochs": 2}))
    trained: list[tuple[int, bool]] = []
    watch = _Epochs(bench.model, trained)
    bench.learner.epoch_watchers.append(watch.begin)
    bench.learner.watchers.append(watch.step)
    result = simulate_stream(bench.config, runs=None, bench=bench)
    assert trained == [(0, False), (1, True), (0, False), (1, True)]
    assert [line["head_norm"] > 0 for line in result["experiences"]] == [True, True]


class _Epochs:
    """Takes down, at each epoch's end, whether the body moved in it."""

    def __init__(self, network: nn.Module, trained: list[tuple[int, bool]]) -> None:
        self.network, self.trained = network, trained

    def begin(self, _: Any) -> None:
        self.before = {key: tensor.clone() for key, tensor in self.network.state_dict().items()}

    def step(self, learner: Any) -> None:
        if learner.progress.batch * learner.train_mb_size < len(learner.source.train):
            return
        now = self.network.state_dict()
        moved = {key for key in now if not torch.equal(now[key], self.before[key])}
        assert {"fc3.weight", "fc3.bias"} <= moved
        self.trained.append((learner.progress.epoch, len(moved) > 2))


@pytest.mark.parametrize(
    "learner", ["ewc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("er_ace", "lwf", "gdumb", "joint"))]
)
def test_learners_train_norms_alone(learner: str) -> None:
    bench = ContinualWorkbench(continual(learner={"name": learner}, train={"trainable": "norm", "weight_decay": 0.1}))
    initial = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    simulate_stream(bench.config, runs=None, bench=bench)
    now = bench.model.state_dict()
    assert {key for key in now if not torch.equal(now[key], initial[key])} == {k for k in now if k.startswith("norm")}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"linear_probe_epochs": 1}}, "less than train.epochs; got 1 of 1"),
        ({"train": {"linear_probe_epochs": 1, "epochs": 2}, "learner": {"name": "gdumb"}}, "there is no linear probe"),
        ({"train": {"linear_probe_rounds": 1}}, "It is a key of federated runs"),
        ({"train": {"trainable": "norm"}, "norm": {"name": "none"}}, "DigitsCNN has none"),
    ],
)
def test_streams_refuse_what_makes_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ContinualWorkbench(continual(**values))
