"""``fednorm.check``: every verdict in a report, names of models, strangers' code that raises, the command."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fednorm
from fednorm.cards import NORMS, STRATEGIES
from fednorm.cli.app import app
from fednorm.errors import ConfigError, FedNormError, UnknownNameError
from fednorm.federation import flower_private
from fednorm.inspection.model import NO_VALUES, check
from fednorm.inspection.norm_survey import MODELS, norm_page, norm_survey
from fednorm.inspection.strangers import load_model
from fednorm.inspection.survey import check_row, markdown_page, markdown_row, surveyed

NORMS_PAGE = Path(__file__).resolve().parents[1] / "docs" / "conversions.md"
MODELS_PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

STRANGERS = """
import torch
from torch import nn

def make():
    print("a model's own words")
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)

ready = make()
number = 3

def raises():
    raise KeyError("weights")

def exits():
    raise SystemExit(3)

def for_a_run(num_classes, norm, image_size=8):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm.layer(4, 2), nn.Flatten(), nn.Linear(4 * 36, num_classes))

def greedy(num_classes, depth):
    return nn.Linear(depth, num_classes)

def none():
    return None

class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        raise ZeroDivisionError("never works")
"""


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "strangers_nets.py").write_text(STRANGERS)
    (tmp_path / "strangers_broken.py").write_text("import no_such_module_at_all")
    monkeypatch.chdir(tmp_path)
    yield "strangers_nets"
    sys.modules.pop("strangers_nets", None)


class Normalize(nn.Module):
    """Has two constants."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def small() -> nn.Sequential:
    return nn.Sequential(
        Normalize(),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def test_a_report_has_a_verdict_of_every_strategy_and_every_norm() -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    report = fednorm.check(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (report.model, report.parameters, report.input_shape) == ("Sequential", 112 + 8 + 34, (3, 32, 32))
    assert report.layers == {"BatchNorm2d": (1, "batch_norm")}
    assert report.step.ok
    assert tuple(verdict.name for verdict in report.strategies) == STRATEGIES.names
    verdicts = {verdict.name: verdict for verdict in report.strategies}
    counts = {"shared": 9, "local": 0, "pooled": 0, "reset": 0, "constant": 2}
    # (112 + 34 + 4 * 4) floats and a counter, there and back
    assert verdicts["fedavg"].plan == {**counts, "bytes_per_round": 2 * (162 * 4 + 8)}
    assert verdicts["fedbn"].plan == {**counts, "shared": 4, "local": 5, "bytes_per_round": 2 * 146 * 4}
    assert verdicts["fedwon"].plan is None
    assert "is a BatchNorm2d" in verdicts["fedwon"].refusal or "plain Conv2d" in verdicts["fedwon"].refusal
    assert {name for name, verdict in verdicts.items() if not verdict.step.ok} == {"fbn", "fedwon", "hbn"}
    assert "no layer of it" in verdicts["hbn"].refusal
    assert tuple(verdict.name for verdict in report.norms) == NORMS.names
    elsewhere = [verdict for verdict in report.norms if NORMS[verdict.name].tried_on != "digits_cnn"]
    assert all("--model" in verdict.refusal for verdict in elsewhere)
    for verdict in set(report.norms) - set(elsewhere):
        assert (verdict.refusal, verdict.layers, verdict.step.failure) == ("", ("2",), "")
        assert verdict.step.loss is not None
        assert verdict.step.loss >= 0
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_model_without_values_is_checked_without_steps_of_strategies() -> None:
    report = check(small().to("meta"), norms=["group_norm"], strategies=["fedbn"])
    [fedbn], [group] = report.strategies, report.norms
    assert fedbn.plan is not None
    assert (fedbn.plan["local"], fedbn.step.failure) == (5, NO_VALUES)
    assert (group.layers, group.step.ok, group.step.loss) == (("2",), True, None)


def test_a_converted_model_may_need_more_pixels_than_the_model() -> None:
    shrinking = nn.Sequential(
        nn.Conv2d(3, 4, 3, 32, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    report = check(shrinking, norms=["instance_norm"], strategies=["fedavg"])
    assert report.input_shape == (3, 32, 32)
    assert report.norms[0].step.ok


def test_control_variates_are_among_the_bytes_of_a_round() -> None:
    """FedAvg sends every tensor down and up; SCAFFOLD c and dc_i besides, of what is learned."""
    report = check(small(), strategies=["fedavg", "scaffold"], norms=["batch_norm"], steps=False)
    plain, controlled = (verdict.plan["bytes_per_round"] for verdict in report.strategies if verdict.plan is not None)
    assert controlled == plain + 2 * sum(parameter.nbytes for parameter in small().parameters())


def test_names_of_models(strangers: str) -> None:
    assert type(load_model("mlp")).__name__ == "MLP"
    assert type(load_model("torchvision:resnet18")).__name__ == "ResNet"
    assert len(list(load_model(f"{strangers}:make"))) == len(list(load_model(f"{strangers}:ready"))) == 6
    assert list(load_model(f"{strangers}:for_a_run"))[-1].out_features == 10
    assert type(load_model("torchvision:fcn_resnet50", device="meta")).__name__ == "FCN"
    meta = load_model("timm:resnet26d", device="meta")
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("resnet81", UnknownNameError, "resnet18"),
        ("torchvision:resnet81", UnknownNameError, "resnet18"),
        ("timm:resnet26x", UnknownNameError, "resnet26"),
        ("timm:hf-hub:someone/model", UnknownNameError, "timm has no classifier named"),
        ("strangers_nets:mak", ConfigError, "It has: torch, nn, make, ready"),
        ("strangers_nets:number", ConfigError, "is a int; it must be a model or a function"),
        ("strangers_nets:raises", ConfigError, "could not be made: KeyError: 'weights'"),
        ("strangers_nets:exits", ConfigError, "SystemExit: 3"),
        ("strangers_nets:none", ConfigError, "made a NoneType"),
        ("strangers_nets:greedy", ConfigError, "has depth without a default"),
        ("strangers_broken:make", ConfigError, "No module named 'no_such_module_at_all'"),
        ("no_such_package:make", ConfigError, "There is no module 'no_such_package'"),
        ("..:x", ConfigError, "Importing '..' for model '..:x'"),
        (":", FedNormError, "Importing ''"),
        ("", UnknownNameError, "torchvision:NAME"),
    ],
)
@pytest.mark.usefixtures("strangers")
def test_mistakes_in_names_are_sentences(name: str, error: type[FedNormError], words: str) -> None:
    with pytest.raises(error) as refused:
        load_model(name)
    assert words in str(refused.value)


def test_names_of_strategies_and_norms_are_checked_first() -> None:
    with pytest.raises(UnknownNameError, match=r"'fedbm'.*'fedbn'"):
        check(small(), strategies=["fedbm"])
    with pytest.raises(UnknownNameError, match=r"'grup_norm'.*'group_norm'"):
        check(small(), norms=["grup_norm"])
    with pytest.raises(ConfigError, match="got int"):
        check(3)  # type: ignore[arg-type]


def test_a_model_that_never_works_has_a_report_that_says_so(strangers: str) -> None:
    report = check(f"{strangers}:Stubborn", norms=["group_norm"])
    assert not report.step.ok
    assert "ZeroDivisionError: never works" in report.step.failure
    assert report.strategies[0].plan is not None


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["check", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_tables_or_one_document(strangers: str) -> None:
    code, out, _ = run(f"{strangers}:make")
    assert code == 0
    assert "a model's own words" not in out
    for words in ("fedbn", "5 local", "group_norm", "1 layers replaced", "FedWon"):
        assert words in out
    code, out, _ = run(f"{strangers}:make", "--json")
    document = json.loads(out)
    assert code == 0
    assert {row["name"] for row in document["strategies"]} == set(STRATEGIES.names)
    assert document["input_shape"] == [3, 32, 32]


@pytest.mark.parametrize(
    "arguments", [(), ("mlp", "--all"), ("mlp", "--norms"), ("--all", "--norms"), ("mlp", "--markdown"), ("mlq",)]
)
def test_mistakes_on_the_command_line(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert isinstance(result.exception, FedNormError)


# The survey -----------------------------------------------------------------------------------------------------------


def test_a_report_says_nothing_of_the_rounds_that_were_tried(capfd: pytest.CaptureFixture[str]) -> None:
    log, heard, head = logging.getLogger("flwr"), list[str](), nn.Linear(4 * 36, 2)
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        with flower_private.quiet_flower_log(logging.INFO):  # as in a session of a user's, who has set nothing
            tried = check(
                nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(6), nn.Flatten(), head)
            )
    finally:
        log.removeHandler(handler)
    assert all(verdict.step.ok for verdict in tried.strategies if not verdict.refusal)
    assert heard == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_row_of_the_survey_and_its_page() -> None:
    row = check_row("torchvision:resnet18")
    assert {key: row[key] for key in ("fedavg", "constant", "fedbn", "silobn", "group_norm")} == {
        "fedavg": 122, "constant": 0, "fedbn": 100, "silobn": 60, "group_norm": 20,
    }  # fmt: skip
    assert markdown_row(row) == (
        "| torchvision:resnet18 | 11,689,512 | 20 BatchNorm2d | 122 | 0 | 100 | 60 | 20 | 20 | 20 | works |"
    )
    refused = row | {"model": "other", "silobn": None, "refusals": {"silobn": "No."}, "failures": {"sws": "It breaks."}}
    page = markdown_page([row, refused])
    assert "| other | 11,689,512 | 20 BatchNorm2d | 122 | 0 | 100 | – | 20 | 20 | 20 | fails: sws |" in page
    assert "* **silobn**: No. (other)" in page
    assert "* **sws**: It breaks. (other)" in page
    assert markdown_row({"model": "a | b", "error": "x\ny"}).startswith("| a \\| b | | x y |")


@pytest.mark.slow
def test_the_page_of_models_is_what_the_survey_says() -> None:
    lines = MODELS_PAGE.read_text(encoding="utf-8").splitlines()
    table = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines if line.startswith("| t")}
    assert set(table) == set(surveyed())
    for i, name in enumerate(surveyed()):
        # A step of every ninth only: backward passes take most of the time.
        row = check_row(name, steps=i % 9 == 0)
        now = markdown_row(row).split(" | ")
        assert now[:-1] == table[name][:-1], name
        assert "failures" not in row or now[-1] == table[name][-1], name


def test_a_row_of_the_survey_of_norms_and_its_page(strangers: str) -> None:
    (row,) = norm_survey([f"{strangers}:make"], ["group_norm", "sws", "nalaformer", "adab2n"])
    assert row["norms"]["group_norm"] == {
        "layers": 1, "inserted": 0, "convolutions": 0, "refusal": "", "failure": "",
    }  # fmt: skip
    assert (row["norms"]["sws"]["layers"], row["norms"]["sws"]["convolutions"]) == (1, 1)
    assert "replaces the attention of a transformer, and model has none" in row["norms"]["nalaformer"]["refusal"]
    assert row["norms"]["adab2n"]["failure"] == "", "a step that needs values is not tried on the meta device"
    other: Any = {"model": "other", "norms": {"sws": dict(row["norms"]["sws"], inserted=2, failure="It breaks.")}}
    (unknown,) = norm_survey(["torchvision:resnet17"], ["sws"])
    page = norm_page([row, other, unknown])
    assert "| norm | strangers_nets:make | other | resnet17 |" in page
    assert "| sws | 1 (1) | fails | – |" in page
    assert "| nalaformer | – | – | – |" in page
    assert "* **sws**: It breaks. (other)" in page
    assert "* **no norm**: " in page
    assert page.endswith("(torchvision:resnet17)")
    other["norms"]["sws"]["failure"] = ""
    assert "| sws | 1 + 2 (1) |" in norm_page([other])


@pytest.mark.slow
def test_the_page_of_conversions_is_what_the_survey_says() -> None:
    lines = NORMS_PAGE.read_text(encoding="utf-8").splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert table[0] == ["norm", *(name.removeprefix("torchvision:") for name in MODELS.split())]
    norms = [row[0].removesuffix(" †") for row in table[1:]]
    assert set(norms) <= set(NORMS.names)
    some = [name for i, name in enumerate(MODELS.split()) if i % 6 == 0]
    for row in norm_survey(some, norms):
        column = MODELS.split().index(row["model"]) + 1
        now = [line.strip("| ").split(" | ")[1] for line in norm_page([row]).splitlines() if line.startswith("| ")]
        assert now[1:] == [line[column] for line in table[1:]], row["model"]
