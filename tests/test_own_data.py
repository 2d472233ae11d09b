"""Anybody's data in whole runs of both kinds: objects, import paths, entry points; records, studies and runtimes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fednorm
from fednorm.cli.app import main
from fednorm.config import resolve
from fednorm.errors import ConfigError, RecordError
from fednorm.federation.simulate_flower import simulate_flower

SMALL: dict[str, Any] = {
    "data": {"image_size": 8},
    "model": {"width": 4},
    "train": {"batch_size": 8, "learning_rate": 0.1},
}
STREAM: dict[str, Any] = {
    **SMALL,
    "train": {"batch_size": 8, "epochs": 1},
    "evaluate": {"probe_images": 8, "train_images": 8},
}

MODULE = """
import os
import numpy as np

def domains():
    rng = np.random.default_rng(int(os.environ.get("SEED", 0)))
    labels = np.arange(20) % 2
    return {name: (rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), labels) for name in ("a", "b")}

def with_reader(reader):
    return {"a": domains()["a"]}

DOMAINS = domains()
number = 3

def raising():
    raise ValueError("not today")
"""


def domains(seed: int = 0, count: int = 20) -> dict[str, Any]:
    """Two domains whose classes are told by where the image is bright."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.integers(0, 100, (2, count, 8, 8), dtype=np.uint8)
    images[:, labels == 0, :, :4] += 150
    images[:, labels == 1, :, 4:] += 150
    return {"a": (images[0], labels), "b": (images[1][..., None].repeat(3, 3), labels)}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in a folder outside the package, which is the working directory; return its name."""
    name = f"mydata_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return name


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the command line in this process; return its exit code and what it wrote."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fednorm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_federation_learns_what_it_is_given(tmp_path: Path) -> None:
    config = {**SMALL, "train": {"batch_size": 8, "learning_rate": 0.1, "local_epochs": 3}}
    result = fednorm.federated(data=domains(count=60), rounds=3, config=config, runs=tmp_path)
    assert result["final"]["per_domain"] == {"a": 1.0, "b": 1.0}
    assert result["data"]["title"] == "own data (a, b)"
    assert "split 80/20" in result["data"]["notes"][0]
    record = json.loads((Path(result["run"]) / "run.json").read_text())
    assert record["data"]["digest"] == result["data"]["digest"]
    again = fednorm.federated(data=domains(count=60), rounds=3, config=config, runs=tmp_path)
    assert again["run"] == result["run"], "the same data, given again, is the same run"
    assert again["final"] == result["final"]


def test_a_stream_is_made_of_what_it_is_given(tmp_path: Path) -> None:
    settings = {"scenario": "domain_digits", "learner": "naive", "config": STREAM, "runs": tmp_path}
    result = fednorm.continual(data=domains(), **settings)
    assert len(result["accuracy_matrix"]) == 2
    assert sorted(line["title"] for line in result["experiences"]) == ["a", "b"]
    other = fednorm.continual(data=domains(1), **settings)
    assert other["run"] != result["run"]
    assert other["data"]["digest"] != result["data"]["digest"], "labels and rows are the same, pixels are not"
    permuted = fednorm.continual(
        data=domains(),
        scenario="permuted_pixels",
        config={**STREAM, "model": {"width": 8}, "scenario": {"num_experiences": 2}},
    )
    assert permuted["data"]["experiences"][0]["train"] == 32, "the domains are one array"


def test_a_scenario_that_is_named_for_its_data_names_others() -> None:
    with pytest.raises(
        ConfigError, match=r"split_digits is made of digits_mini.*take a scenario of any data: permuted_labels"
    ):
        fednorm.continual(scenario="split_digits", data=domains())


def test_classes_of_own_data_come_one_after_another() -> None:
    images = np.random.default_rng(0).integers(0, 256, (48, 8, 8), dtype=np.uint8)
    for count, titles in ((6, ["classes 0, 1", "classes 2, 3", "classes 4, 5"]), (2, ["classes 0", "classes 1"])):
        result = fednorm.continual(
            data={"a": (images, np.arange(48) % count), "b": (images, np.arange(48) % count)},
            learner="naive",
            config={**STREAM, "scenario": {"class_order": "sorted"}},
        )
        assert result["scenario"]["name"] == "split"
        assert [line["title"] for line in result["experiences"]] == titles
        assert sum(line["train"] for line in result["data"]["experiences"]) == 2 * (48 - 10)


class _Stop(Exception):
    """Ends a run in the middle."""


class _After:
    """An observer that ends a run after some lines."""

    def begin(self, *_: Any) -> None:
        pass

    step = begin

    def round(self, _: Any) -> None:
        raise _Stop

    experience = round


@pytest.mark.parametrize("kind", ["federated", "continual"])
def test_a_run_goes_on_with_its_own_data_alone(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "federated":

        def again(**more: Any) -> Any:
            return fednorm.federated(data=f"{module}:domains", rounds=2, config=SMALL, runs=tmp_path / "runs", **more)
    else:

        def again(**more: Any) -> Any:
            names = {"scenario": "domain_digits", "learner": "naive", "data": f"{module}:domains"}
            return fednorm.continual(**names, config=STREAM, runs=tmp_path / "runs", **more)

    with pytest.raises(_Stop):
        again(observer=_After())
    monkeypatch.setenv("SEED", "1")
    with pytest.raises(RecordError, match="was trained on other data"):
        again()
    monkeypatch.delenv("SEED")
    assert again()["data"]["title"].endswith(f"{module}:domains (a, b)" + ", one after another" * (kind == "continual"))


def test_import_paths_of_every_form(module: str) -> None:
    for attribute, names in (("domains", ["a", "b"]), ("with_reader", ["a"]), ("DOMAINS", ["a", "b"])):
        result = fednorm.federated(data=f"{module}:{attribute}", rounds=1, config=SMALL)
        assert sorted(result["final"]["per_domain"]) == names
        assert len(result["config"]["sources"]["data"]) == 12
    imported = __import__(module)
    assert fednorm.federated(data=imported.domains, rounds=1, config=SMALL)["config"]["data"]["name"] == (
        f"{module}:domains"
    )


@pytest.mark.slow
def test_a_changed_source_is_told(module: str, tmp_path: Path) -> None:
    config = resolve({"data": {"name": f"{module}:domains"}})
    (tmp_path / f"{module}.py").write_text(MODULE + "\n# another\n")
    code = "import json, sys; from fednorm.config import resolve; resolve(json.loads(sys.argv[1]))"
    done = python("-c", code, json.dumps(config.to_dict()), cwd=tmp_path)
    assert "The source of data" in done.stderr


def test_the_command_line_takes_an_import_path(module: str, tmp_path: Path, call: Call) -> None:
    small = ("--set", "model.width=4", "--set", "data.image_size=8", "--json")
    code, out, err = call("federated", "--data", f"{module}:domains", "--rounds", "1", *small)
    assert code == 0, err
    result = json.loads(out)
    assert result["config"]["data"]["name"] == f"{module}:domains"
    assert sorted(result["final"]["per_domain"]) == ["a", "b"]
    (tmp_path / "run.toml").write_text(
        f'scenario.name = "domain_digits"\nlearner.name = "naive"\ndata.name = "{module}:domains"\n'
    )
    code, out, err = call("continual", "--config", "run.toml", "--epochs", "1", *small)
    assert code == 0, err
    assert len(json.loads(out)["accuracy_matrix"]) == 2


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("nothing", "has no 'nothing'"),
        ("number", "is a int, which is no benchmark"),
        ("raising", "raised ValueError: not today"),
    ],
)
def test_a_wrong_import_path_ends_with_a_sentence(attribute: str, message: str, module: str, call: Call) -> None:
    code, out, err = call("federated", "--data", f"{module}:{attribute}", "--dry-run")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_study_takes_import_paths_and_refuses_objects(module: str, tmp_path: Path) -> None:
    base = {"kind": "federated", "rounds": {"num_rounds": 1}, **SMALL}
    imported = __import__(module)
    for data in (f"{module}:domains", imported.domains):
        study = {"base": {**base, "data": {"name": data, "image_size": 8}}, "grid": {"seed": [1, 2]}}
        frame = fednorm.compare(study, runs=tmp_path / "runs")
        assert frame["data.name"].to_list() == [f"{module}:domains"] * 2
    several = {"base": base, "grid": {"data": {"name": [imported.domains, imported.with_reader]}}}
    assert len(fednorm.compare(several, runs=tmp_path / "runs")) == 2
    for data in (domains(), lambda: domains()):
        study = {"base": {**base, "data": {"name": data, "image_size": 8}}, "grid": {"seed": [1, 2]}}
        with pytest.raises(ConfigError, match=r"give its import path instead: data package\.module:function"):
            fednorm.compare(study, runs=tmp_path / "runs")


def test_flowers_runtime_refuses_objects(tmp_path: Path) -> None:
    config = resolve({"data": {"name": domains()}})
    with pytest.raises(ConfigError, match="Flower's runtime has processes of its own"):
        simulate_flower(config, runs=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_functions_of_the_main_program_are_objects(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import fednorm, numpy as np\n"
        "def domains():\n"
        "    return {'a': (np.zeros((10, 8, 8), dtype=np.uint8), np.arange(10) % 2)}\n"
        "config = {'data': {'image_size': 8}, 'model': {'width': 4}}\n"
        "print(fednorm.federated(data=domains, rounds=1, config=config)['config']['data']['name'])\n"
    )
    done = python(str(script), cwd=tmp_path)
    assert done.stdout.startswith("object:domains-"), done.stderr


def test_an_entry_point_is_a_name(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from fednorm.cards import DATA

    point = EntryPoint("my-data", f"{module}:domains", "fednorm.data")
    monkeypatch.setitem(vars(DATA), "installed", {"my_data": point})
    result = fednorm.federated(data="my-data", rounds=1, config=SMALL)
    assert result["config"]["data"]["name"] == "my_data"
    stream = fednorm.continual(scenario="domain_digits", learner="naive", data="my-data", config=STREAM)
    assert len(stream["accuracy_matrix"]) == 2
