"""Whole runs on a device that refuses what any accelerator would refuse, and gives the numbers of the CPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fednorm
from fednorm.bench.case import CASES, Case
from fednorm.bench.engine import run_bare, run_cohort, run_fednorm
from fednorm.bench.meter import Cost
from fednorm.config import merge

FEDERATED: dict[str, Any] = {
    "data": {"train_per_client": 20, "test_per_domain": 10, "validation": 0.2},
    "model": {"width": 4},
    "train": {"learning_rate": 0.05, "batch_size": 8, "augment": "crop_flip"},
}
CONTINUAL: dict[str, Any] = {
    "data": {"validation": 0.2},
    "scenario": {"train_per_experience": 40, "test_per_experience": 10, "num_experiences": 2},
    "model": {"width": 4},
    "train": {"batch_size": 16, "epochs": 1, "augment": "crop_flip"},
    "evaluate": {"probe_images": 16, "train_images": 16, "every_steps": 2, "every_images": 8, "online": "eval"},
}
MATRIX = ["own", "cross", "averaged", "pooled", "reestimated", "unseen"]
ROUNDS: dict[str, dict[str, Any]] = {
    "fedbn": {"evaluate": {"kinds": MATRIX[:5]}},
    "silobn": {"data": {"held_out": "faint"}, "evaluate": {"kinds": MATRIX, "fallback": "pooled"}},
    "fedprox": {"strategy": {"mu": 0.1}, "train": {"momentum": 0.9, "reset_optimizer": False, "l2_init": 1e-3}},
    "fedadam": {"norm": {"name": "group_norm"}, "train": {"agc": 0.1, "clip_norm": 1.0}},
    "fedwon": {},
    "fedavg": {"norm": {"name": "nap"}},
}
STREAMS: dict[str, dict[str, Any]] = {
    "naive": {"train": {"optimizer": "adam", "shrink": 0.8, "perturb": 0.1, "schedule": "cosine"}},
    "joint": {},
    "er": {"norm": {"name": "task_balanced_norm"}, "learner": {"memory_batch": 8}},
    "er_ace": {"norm": {"name": "adab2n"}, "learner": {"memory_size": 30}},
    "derpp": {"learner": {"passes": "separate", "statistics": "balanced", "recalibrate": True}},
    "ewc": {"norm": {"name": "continual_norm"}, "learner": {"fisher_samples": 6}},
    "lwf": {"norm": {"name": "batch_renorm"}, "train": {"label_smoothing": 0.1}},
    "gdumb": {"learner": {"memory_size": 20, "memory_epochs": 2}, "norm": {"name": "switch_norm"}},
}


def some_quick(names: Iterable[str], *quick: str) -> list[Any]:
    """Return names as parameters, of which only the quick ones are tried each time."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a run measured, without what tells of time and place."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("seconds", "config", "hash", "run", "device")}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    stripped: dict[str, Any] = strip(result)
    return stripped


def assert_alike(one: Any, other: Any) -> None:
    """Require the same document; floats but for last bits, which may depend on where tensors lie in memory."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    else:
        assert one == (pytest.approx(other, rel=1e-3, abs=1e-6) if isinstance(other, float) else other)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", some_quick(ROUNDS, "silobn"))
def test_a_federation_on_a_device_is_that_on_the_cpu(strategy: str, away: SimpleNamespace) -> None:
    del away
    config = merge(FEDERATED, ROUNDS[strategy])
    here = fednorm.federated(strategy=strategy, rounds=2, config=config)
    there = fednorm.federated(strategy=strategy, rounds=2, config=config, device="cuda")
    assert_alike(numbers(there), numbers(here))
    assert there["device"]["name"] == "cuda"
    assert there["hash"] != here["hash"]


@pytest.mark.slow
@pytest.mark.parametrize("learner", some_quick(STREAMS, "er_ace"))
def test_a_stream_on_a_device_is_that_on_the_cpu(learner: str, away: SimpleNamespace, tmp_path: Path) -> None:
    del away
    config = merge(CONTINUAL, STREAMS[learner])
    here = fednorm.continual(learner=learner, config=config)
    there = fednorm.continual(learner=learner, config=config, device="cuda", runs=tmp_path)
    assert_alike(numbers(there), numbers(here))


class Stop:
    """An observer that stops a run after so many rounds, or steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def begin(self, *_: Any) -> None:
        pass

    def experience(self, _: Any) -> None:
        pass

    def round(self, _: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    step = round


@pytest.mark.slow
def test_a_federation_goes_on_on_a_device(away: SimpleNamespace, tmp_path: Path) -> None:
    del away
    method: dict[str, Any] = {"strategy": "fedadam", "rounds": 3, "device": "cuda"}
    config = merge(FEDERATED, {"train": {"optimizer": "adam", "reset_optimizer": False}})
    with pytest.raises(KeyboardInterrupt):
        fednorm.federated(**method, config=config, runs=tmp_path, observer=Stop(2))
    went_on = fednorm.federated(**method, config=config, runs=tmp_path)
    assert_alike(numbers(went_on), numbers(fednorm.federated(**method, config=config)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # the pretended device has values
@pytest.mark.parametrize("learner", ["naive", "er_ace", "derpp", "ewc", "lwf", "gdumb"])
def test_a_stream_goes_on_on_a_device(learner: str, away: SimpleNamespace, tmp_path: Path) -> None:
    del away
    config = merge(merge(CONTINUAL, STREAMS[learner]), {"train": {"checkpoint_every": 1}})
    method: dict[str, Any] = {"learner": learner, "config": config, "device": "cuda"}
    with pytest.raises(KeyboardInterrupt):
        fednorm.continual(**method, runs=tmp_path, observer=Stop(4))
    went_on = fednorm.continual(**method, runs=tmp_path)
    assert_alike(numbers(went_on), numbers(fednorm.continual(**method)))


@pytest.mark.slow
@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("method", ["fedbn", "fedavg", "er_ace", "derpp", "ewc"])
def test_a_device_without_float64(method: str, away: SimpleNamespace, tmp_path: Path) -> None:
    del away
    if method in ROUNDS:
        config = merge(FEDERATED, merge(ROUNDS[method], {"model": {"name": "digits_cnn"}}))
        runs = [fednorm.federated(strategy=method, rounds=1, config=config, device=d)["final"] for d in ("cpu", "cuda")]
        assert runs[0]["per_domain"] == runs[1]["per_domain"]
        return
    config = merge(CONTINUAL, STREAMS[method])
    results = [fednorm.continual(learner=method, config=config, device=d, runs=tmp_path) for d in ("cpu", "cuda")]
    assert results[0]["accuracy_matrix"] == results[1]["accuracy_matrix"]
    assert results[0]["final"]["drift"] == results[1]["final"]["drift"]


def test_the_pretended_device_refuses_what_comes_from_elsewhere(away: SimpleNamespace) -> None:
    there, here = torch.ones(3, device=away.device), torch.ones(3)
    with pytest.raises(away.Mixed):
        there + here
    with pytest.raises(away.Mixed):
        here.copy_(here).add_(there)
    with pytest.raises(away.Mixed):
        torch.zeros(()).add_(there.sum())
    with pytest.raises(away.Mixed):
        here[torch.zeros(1, dtype=torch.int64, device=away.device)]
    with pytest.raises(away.Mixed):
        torch.randperm(3, device=away.device, generator=torch.Generator())
    with pytest.raises(away.Mixed):
        there.numpy()
    assert there[torch.zeros(1, dtype=torch.int64)].tolist() == [1.0]
    assert (there + torch.ones(())).cpu().tolist() == [2.0, 2.0, 2.0]


def _gpu_check() -> Any:
    path = Path(__file__).parents[1] / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_check_for_a_gpu_runs_on_the_cpu_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    check = _gpu_check()
    assert check.main(["--device", "cpu", "--rounds", "2", "--experiences", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["federated"]["apart"] == document["continual"]["apart"] == {"loss": 0, "accuracy": 0}
    assert document["federated"]["device"]["clients_per_second"] > 0
    assert document["continual"]["device"]["steps_per_second"] > 0
    assert check.main(["--device", "nonsense"]) == 2
    assert "device is auto, cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_curves_that_differ_are_told() -> None:
    check = _gpu_check()
    here = {"loss": [2.0, 1.0], "accuracy": [0.5, 0.7]}
    there = {"loss": [2.2, 0.9], "accuracy": [0.5, 0.5]}
    assert check.differences(here, there) == pytest.approx({"loss": 0.1, "accuracy": 0.1})


@pytest.mark.parametrize("run", [run_bare, run_fednorm, run_cohort], ids=["bare", "fednorm", "cohort"])
def test_a_case_of_the_engines_bench_runs_on_a_device(run: Callable[[Case], Cost], away: SimpleNamespace) -> None:
    del away
    case = CASES["tiny-1000"].small()
    here, there = run(case), run(replace(case, device="cuda"))
    assert "on cuda" in replace(case, device="cuda").summary
    for key, tensor in here.tensors.items():
        torch.testing.assert_close(there.tensors[key].cpu(), tensor, rtol=1e-5, atol=1e-6)
