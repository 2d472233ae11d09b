"""A model in a stranger's file, through the command line: run, explained, exported; and what mistakes in it get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fednorm.config import resolve
from fednorm.errors import ConfigError

Call = Callable[..., Any]
Refused = Callable[..., None]

NET = """
import torch
from torch import nn

def make_net(num_classes, *, hidden: int = 6, extra: int = 0):
    '''A small network.'''
    return nn.Sequential(
        nn.Conv2d(3, hidden, 3, stride=2), nn.BatchNorm2d(hidden), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, num_classes + extra),
    )

def broken(num_classes):
    raise RuntimeError("no weights today")

text = "no model"
"""
DATA = ("--train-per-client", "16", "--set", "data.image_size=12", "--set", "data.test_per_domain=10", "--rounds", "1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own_model_of_the_cli.py").write_text(NET)
    (tmp_path / "broken_on_import.py").write_text("raise ValueError('not today')\n")
    return tmp_path


MODEL = "own_model_of_the_cli:make_net"


def test_a_file_in_the_working_directory_is_a_model_in_both_worlds(call: Call, folder: Path) -> None:
    outcome = call("federated", "--model", MODEL, "--set", "model.hidden=5", "--strategy", "fedbn", "--json", *DATA)
    assert outcome.code == 0, outcome.err
    result = outcome.document
    assert result["config"]["model"] == {"name": MODEL, "width": 0, "activation": "", "hidden": 5}
    assert len(result["config"]["sources"]["model"]) == 12
    assert result["model"]["notes"] == ["Its normalization layers are of the run's norm, and stay as they are."]
    assert (result["parameters"], result["plan"]["local"]) == (3 * 9 * 5 + 5 + 10 + 60, 5)
    written = call("export", result["run"], "--client", "2", "--to", "m.pt2", "--json").document
    assert (written["client"], written["num_classes"], written["image_size"]) == (2, 10, 12)
    assert (folder / "m.pt2").stat().st_size > 1000
    shown = call("explain", MODEL)
    assert "Options: hidden = 6, extra = 0" in shown.out

    (folder / "run.toml").write_text(f'[model]\nname = "{MODEL}"\nhidden = 4\n')
    stream = call(
        "continual", "--config", "run.toml", "--learner", "naive", "--norm", "layer_norm", "--epochs", "1",
        "--set", "scenario.train_per_experience=16", "--set", "evaluate.probe_images=16", "--json",
    )  # fmt: skip
    assert stream.code == 0, stream.err
    assert stream.document["model"]["conversion"] == {"layers": ["1"]}
    exported = call("export", stream.document["run"], "--to", "m.safetensors")
    assert exported.out.startswith(f"m.safetensors: {MODEL} with norm layer_norm; images (N, 3, 32, 32) in [-1, 1]")


def test_a_changed_source_is_another_run(call: Call, folder: Path) -> None:
    path = folder / "changing_model_of_the_cli.py"
    path.write_text(NET)
    arguments = ("federated", "--model", "changing_model_of_the_cli:make_net", "--json", "--dry-run", *DATA)
    before = call(*arguments).document
    path.write_text(NET.replace("= 6", "= 16"))
    after = call(*arguments).document
    assert (before["config"]["model"], before["config"]["data"]) == (after["config"]["model"], after["config"]["data"])
    assert before["config"]["sources"] != after["config"]["sources"]
    assert before["hash"] != after["hash"]
    with pytest.raises(ConfigError, match="source of model 'changing_model_of_the_cli:make_net' is not what it was"):
        resolve(before["config"])


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("no_such_module:net", (), "There is no module 'no_such_module'"),
        ("own_model_of_the_cli:nothing", (), "has no 'nothing'"),
        ("own_model_of_the_cli:text", (), "is a str, which is no model"),
        ("own_model_of_the_cli:broken", (), "raised RuntimeError"),
        ("broken_on_import:net", (), "raised ValueError: not today"),
        (MODEL, ("model.extra=1",), "there are 10 classes"),
        (MODEL, ("model.hiden=1",), "Did you mean 'hidden'"),
        (MODEL, ("model.hidden=wide",), "model.hidden must be an integer"),
        (MODEL, ("data.image_size=2",), "cannot take images of shape (2, 3, 2, 2)"),
        (MODEL, ("model.weights=none.pt",), "there is no such file"),
        (MODEL, ("model.weights=own_model_of_the_cli.py",), "takes a file that ends in"),
        ("timm:resnet10z", (), "Did you mean timm:resnet10t"),
        ("torchvision:resnet19", (), "Did you mean torchvision:resnet18"),
    ],
)
@pytest.mark.parametrize("command", ["federated", "continual"])
def test_mistakes_get_a_sentence(
    command: str, model: str, settings: tuple[str, ...], words: str, call: Call, refused: Refused
) -> None:
    extra = [word for setting in settings for word in ("--set", setting)]
    refused(call(command, "--model", model, *extra), words)
