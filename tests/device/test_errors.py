"""Devices that are not there, and values that are none: exit code 2, and a sentence with what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fednorm
from fednorm import device as devices
from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm

WITHOUT_GPU = pytest.mark.skipif(devices.available() != ["cpu"], reason="this machine has more than a CPU")


@WITHOUT_GPU
@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps"])
@pytest.mark.parametrize("run", [fednorm.federated, fednorm.continual])
def test_a_device_that_is_not_there(name: str, run: Any) -> None:
    with pytest.raises(ConfigError, match=rf"device is '{name}', and this machine has cpu \(PyTorch"):
        run(device=name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cpu:0", "cuda:1:2", "meta", "xpu"])
def test_a_device_that_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match="device is auto, cpu, mps, cuda or one of several, cuda:1; got"):
        fednorm.federated(device=name)


@pytest.mark.parametrize(
    ("key", "value"),
    [("device", 1), ("device", None), ("device", ["cpu"]), ("amp", "fp16"), ("amp", True), ("compile", "yes"),
     ("compile", 1)],
)  # fmt: skip
def test_a_value_that_is_none(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        fednorm.federated(config={key: value})


def test_a_number_that_no_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.automatic() == "cuda"
    assert devices.torch_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"'cuda:2', and this machine has cpu, cuda, cuda:0, cuda:1 \("):
        devices.torch_device("cuda:2")


def test_bf16_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_has_bf16", lambda _: False)
    with pytest.raises(ConfigError, match=r"amp is 'bf16', and cpu \(device cpu\) does not compute in bfloat16"):
        fednorm.federated(config={"amp": "bf16"})


def test_compile_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    devices._require_compiler.cache_clear()
    with pytest.raises(ConfigError, match=r"torch.compile does not work here on device cpu: OSError: No working C\+\+"):
        fednorm.federated(config={"compile": True})


@WITHOUT_GPU
def test_the_command_ends_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fednorm.cli.app import main

    for command in ("federated", "continual"):
        for words in (["--device", "cuda:7"], ["--device", "nonsense"], ["--amp", "fp8"]):
            monkeypatch.setattr("sys.argv", ["fednorm", command, *words, "--runs", str(tmp_path)])
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code == 2
            assert "Traceback" not in capsys.readouterr().err


def test_a_learner_is_where_its_network_is() -> None:
    from scenarios.learners.naive import SPEC

    model = make_model("mlp", make_norm("none"), num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"device = 'cuda', and its network is on 'cpu'. Move the network"):
        SPEC.make(model=model, optimizer=optimizer, num_classes=2, device="cuda")
    assert SPEC.make(model=model, optimizer=optimizer, num_classes=2, device="cpu").device == torch.device("cpu")
