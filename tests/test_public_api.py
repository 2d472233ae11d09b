"""What a Python program uses: ``fednorm.federated`` and ``fednorm.convert``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import fednorm
from fednorm.errors import ConfigError, FedNormError, UnknownNameError
from fednorm.federated.simulate import simulate
from fednorm.norms import spec_of
from fednorm.registry import resolve_config

SMALL: dict[str, Any] = {"data": {"train_per_client": 16, "test_per_domain": 10}, "model": {"width": 4}}


def test_a_run_from_python_is_the_run_of_its_configuration(tmp_path: Path) -> None:
    result = fednorm.federated(strategy="FedBN", data="digits-mini", rounds=2, seed=0, config=SMALL)
    assert result["run"] is None
    assert json.loads(json.dumps(result)) == result
    values = {**SMALL, "strategy": {"name": "fedbn"}, "rounds": {"num_rounds": 2}, "seed": 0}
    written = simulate(resolve_config(values), runs=tmp_path)
    for key in ("final", "evaluation", "plan", "config", "hash"):
        assert result[key] == written[key]
    assert [line["train_loss"] for line in result["rounds"]] == [line["train_loss"] for line in written["rounds"]]


def test_the_function_survives_the_package_of_its_name() -> None:
    """Importing ``fednorm.federated.simulate``, as the first call does, binds ``fednorm.federated`` to the package."""
    code = """
import fednorm
for _ in range(2):
    try:
        fednorm.federated(strategy="fedbm")
    except fednorm.errors.UnknownNameError:
        import fednorm.federated.simulate
fednorm.convert, fednorm.convert
from fednorm.federated.pooling import pool_moments
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_argument_reaches_the_configuration(tmp_path: Path) -> None:
    config = fednorm.federated(
        strategy="fedprox",
        norm="group-norm",
        model="digits_cnn",
        rounds=1,
        seed=3,
        data_dir=tmp_path,
        runs=tmp_path / "runs",
        config={**SMALL, "strategy": {"mu": 0.5}, "train": {"learning_rate": 0.1}},
    )["config"]
    assert config["strategy"] == {"name": "fedprox", "mu": 0.5}
    assert (config["norm"]["name"], config["model"]["name"], config["model"]["width"]) == (
        "group_norm",
        "digits_cnn",
        4,
    )
    assert (config["seed"], config["rounds"]["num_rounds"], config["train"]["learning_rate"]) == (3, 1, 0.1)
    assert config["data"]["dir"] == str(tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_process_wide_settings_are_as_they_were() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    fednorm.federated(rounds=1, config=SMALL)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_two_runs_in_one_process_do_not_disturb_each_other() -> None:
    first, other, again = (fednorm.federated(strategy=s, rounds=1, config=SMALL) for s in ("fedbn", "fedavg", "fedbn"))
    assert first["final"] == again["final"]
    assert [line["train_loss"] for line in first["rounds"]] == [line["train_loss"] for line in again["rounds"]]
    assert other["hash"] != first["hash"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"strategy": "fedbm"}, UnknownNameError),
        ({"rounds": 0}, ConfigError),
        ({"config": {"trian": {}}}, ConfigError),
        ({"strategy": "fedbn", "norm": "none", "config": SMALL}, FedNormError),
    ],
)
def test_mistakes_are_our_errors(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        fednorm.federated(**arguments)


def test_a_converted_model_can_be_converted_again() -> None:
    original = torchvision.models.resnet18(num_classes=10)
    before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    grouped = fednorm.convert(original, "group-norm", num_groups=8)
    back = fednorm.convert(grouped, norm="batch_norm")

    def norms(model: torch.nn.Module) -> list[str]:
        return [spec.name for module in model.modules() if (spec := spec_of(module)) is not None]

    assert norms(original) == norms(back) == ["batch_norm"] * 20
    assert norms(grouped) == ["group_norm"] * 20
    assert list(back.state_dict()) == list(before)
    assert all(torch.equal(original.state_dict()[key], tensor) for key, tensor in before.items())
    for key, tensor in back.state_dict().items():
        if "bn" not in key and "downsample.1" not in key:
            assert torch.equal(tensor, before[key])
    with pytest.raises(ConfigError):
        fednorm.convert(grouped, "group_norm", num_groups=7)
