"""Autocast and compiled forward passes: the same weights and keys, other bits, in both worlds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from machine_code import require_compiler
from torch import Tensor

import fednorm
from fednorm import device as devices
from fednorm.config import merge, resolve
from fednorm.device import as_written
from fednorm.federation.workbench import Workbench
from fednorm.report._common import by_method
from fednorm.report._common import name_of as method_name
from fednorm.streams.probe import diagnose

SMALL: dict[str, Any] = {
    "data": {"train_per_client": 16, "test_per_domain": 10},
    "model": {"width": 4},
    "train": {"learning_rate": 0.05, "batch_size": 8},
}
STREAM: dict[str, Any] = {
    "scenario": {"train_per_experience": 32, "test_per_experience": 10, "num_experiences": 2},
    "model": {"width": 4},
    "train": {"batch_size": 16, "epochs": 1},
    "evaluate": {"probe_images": 16, "train_images": 16},
}


def bench(**machine: Any) -> Workbench:
    return Workbench(resolve({**SMALL, **machine}))


def test_bf16_is_autocast_and_gives_logits_in_single_precision() -> None:
    plain, low = bench().model, bench(amp="bf16").model
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    convolved: list[Tensor] = []
    first = next(module for module in low.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda _, __, output: convolved.append(output))
    expected, logits = plain(images), low(images)
    assert convolved[0].dtype is torch.bfloat16
    assert logits.dtype is torch.float32
    assert all(parameter.dtype is torch.float32 for parameter in low.parameters())
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1)
    assert list(low.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(copy.deepcopy(low)(images), logits)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["er_ace", "ewc", "lwf", "derpp"])
def test_a_stream_in_bf16(learner: str, tmp_path: Path) -> None:
    result = fednorm.continual(learner=learner, config={**STREAM, "amp": "bf16"}, runs=tmp_path)
    plain = fednorm.continual(learner=learner, config=STREAM)
    losses = [[line["train_loss"] for line in each["experiences"]] for each in (result, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert result["config"]["amp"] == "bf16"


@pytest.mark.slow
def test_a_federation_in_bf16() -> None:
    config = merge(SMALL, {"evaluate": {"kinds": ["own", "averaged", "reestimated"]}, "amp": "bf16"})
    result = fednorm.federated(strategy="fedbn", rounds=2, config=config)
    plain = fednorm.federated(strategy="fedbn", rounds=2, config={**config, "amp": "none"})
    losses = [[line["train_loss"] for line in each["rounds"]] for each in (result, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.slow
def test_the_model_that_is_compiled_has_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    own = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: own(model, backend=backend, **kwargs))
    plain, compiled = bench(), bench(compile=True)
    before = len(graphs)
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compiled.model(images), plain.model(images))
    assert len(graphs) > before
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())


@pytest.mark.filterwarnings("ignore")  # TorchDynamo's own
def test_who_looks_into_a_compiled_model_sees_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks that come when the model is compiled already, in passes as they are written and in compiled ones."""
    own = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: own(model, backend="aot_eager", **kwargs))
    torch._dynamo.reset()
    model = bench(compile=True).model.eval()
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model(images)
    activation = next(module for module in model.modules() if isinstance(module, torch.nn.ReLU))
    for number in range(12):  # more often than anything is compiled anew
        seen: list[torch.Tensor] = []
        handle = activation.register_forward_hook(lambda *of, seen=seen: seen.append(of[-1]))
        model(images)
        with as_written(model):
            model(images)
        handle.remove()
        assert len(seen) == 2, number
        model(images)
        assert len(seen) == 2
    plain = bench().model.eval()
    plain.load_state_dict(model.state_dict())
    asked = {"rate": 0.1, "optimizer": "sgd", "batch_size": 2}
    ours, right = (diagnose(each, images, **asked) for each in (model, plain))  # type: ignore[arg-type]
    assert ours["dead_units"] == right["dead_units"]
    assert ours["entropy_rank"] == pytest.approx(right["entropy_rank"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TorchDynamo's own
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_whole_compiled_runs(amp: str) -> None:
    require_compiler()
    machine = {"compile": True, "amp": amp}
    for run, config, method in (
        (fednorm.federated, SMALL, {"strategy": "fedbn", "rounds": 2}),
        (fednorm.continual, STREAM, {"learner": "er_ace", "norm": "adab2n"}),
        (fednorm.continual, STREAM, {"learner": "icarl"}),
    ):
        compiled = run(**method, config={**config, **machine})["final"]
        plain = run(**method, config={**config, "amp": amp})["final"]
        key = "mean" if "mean" in plain else "average_accuracy"
        assert compiled[key] == pytest.approx(plain[key], abs=0.15)


def test_the_machine_is_part_of_the_hash_and_which_one_of_several_is_not() -> None:
    def hash_of(**machine: Any) -> str:
        return resolve(machine).hash

    assert hash_of(device="cpu", amp="none", compile=False) == hash_of()
    assert len({hash_of(), hash_of(device="cuda"), hash_of(device="mps"), hash_of(amp="bf16")}) == 4
    assert hash_of(compile=True) != hash_of()
    assert hash_of(device="cuda:1") == hash_of(device="cuda") == hash_of(device=" CUDA ")
    assert resolve({"device": "auto"}).device == devices.automatic()
    assert "device" not in resolve({}).to_dict()
    assert resolve({"device": "cuda:1"}).to_dict()["device"] == "cuda:1"


def test_devices_are_never_in_one_mean() -> None:
    result = fednorm.federated(rounds=1, config=SMALL)
    plain, low = (dict(result, config=resolve({**SMALL, **machine}).to_dict()) for machine in ({}, {"amp": "bf16"}))
    on_two = [dict(result, config={**plain["config"], "device": device}) for device in ("cuda:0", "cuda:1")]
    older = dict(result, config=dict(plain["config"]))
    groups = by_method([plain, low, *on_two, older], method_name)
    assert {label: len(group) for label, group in groups.items()} == {
        "fedavg device cpu, amp none": 2,
        "fedavg device cpu, amp bf16": 1,
        "fedavg device cuda, amp none": 2,
    }
