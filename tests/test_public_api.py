"""What a Python program uses: ``fednorm.federated``, ``continual``, ``compare``, ``load`` and ``convert``."""

from __future__ import annotations

import doctest
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import fednorm
from fednorm.config import resolve
from fednorm.errors import ConfigError, FedNormError, StudyError, UnknownNameError
from fednorm.federation.simulate import simulate
from fednorm.norms import spec_of
from fednorm.roles import Role
from fednorm.streams.simulate import simulate as simulate_stream
from strategies.fedavg import FedAvg

SMALL: dict[str, Any] = {"data": {"train_per_client": 16, "test_per_domain": 10}, "model": {"width": 4}}


def test_a_run_from_python_is_the_run_of_its_configuration(tmp_path: Path) -> None:
    result = fednorm.federated(strategy="FedBN", data="digits-mini", rounds=2, seed=0, config=SMALL)
    assert result["run"] is None
    assert json.loads(json.dumps(result)) == result
    values = {**SMALL, "strategy": {"name": "fedbn"}, "rounds": {"num_rounds": 2}, "seed": 0}
    written = simulate(resolve(values), runs=tmp_path)
    for key in ("final", "evaluation", "plan", "config", "hash"):
        assert result[key] == written[key]
    assert [line["train_loss"] for line in result["rounds"]] == [line["train_loss"] for line in written["rounds"]]


@pytest.mark.parametrize("name", fednorm.__all__)
def test_no_module_has_the_name_of_a_public_function(name: str) -> None:
    """Importing it would bind the module in the function's place."""
    assert importlib.util.find_spec(f"fednorm.{name}") is None


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


# On a stream ----------------------------------------------------------------------------------------------------------

STREAM: dict[str, Any] = {
    "scenario": {"num_experiences": 2, "train_per_experience": 12, "test_per_experience": 6},
    "data": {"image_size": 8},
    "model": {"width": 4},
    "evaluate": {"probe_images": 8},
}


def timeless(document: Any) -> Any:
    """Return a document without what depends on the time and the place of a run."""
    if isinstance(document, dict):
        return {key: timeless(value) for key, value in document.items() if key not in ("seconds", "run")}
    return [timeless(value) for value in document] if isinstance(document, list) else document


def test_a_stream_from_python_is_the_run_of_its_configuration(tmp_path: Path) -> None:
    result = fednorm.continual(learner="ER-ACE", norm="adab2n", online=True, seed=0, config=STREAM)
    assert result["run"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    values = {
        **STREAM,
        "kind": "continual",
        "seed": 0,
        "learner": {"name": "er_ace"},
        "norm": {"name": "adab2n"},
        "train": {"epochs": 1, "batch_size": 10},
    }
    written = simulate_stream(resolve(values), runs=tmp_path)
    assert timeless(result) == timeless(written)
    assert len(result["accuracy_matrix"]) == 2
    again = fednorm.continual(learner="er_ace", norm="adab2n", online=True, seed=0, config=STREAM, runs=tmp_path)
    assert again == written  # it was read back


def test_every_argument_of_a_stream_reaches_the_configuration(tmp_path: Path) -> None:
    class Watch:
        steps = 0

        def begin(self, *_: Any) -> None:
            pass

        def step(self, steps_done: int) -> None:
            self.steps = steps_done

        def experience(self, *_: Any) -> None:
            pass

    watch = Watch()
    config = fednorm.continual(
        scenario="permuted-pixels",
        learner="er",
        norm="group-norm",
        model="mlp",
        data="digits-mini",
        data_dir=tmp_path,
        online=True,
        seed=3,
        runs=tmp_path / "runs",
        observer=watch,
        config={**STREAM, "learner": {"memory_size": 30}, "model": {"width": 8}, "train": {"optimizer": "adamw"}},
    )["config"]
    assert config["learner"] == {"name": "er", "memory_size": 30}
    assert config["scenario"]["name"] == "permuted_pixels"
    assert (config["norm"]["name"], config["model"]["name"], config["model"]["width"]) == ("group_norm", "mlp", 8)
    assert (config["seed"], config["data"]["name"], config["data"]["dir"]) == (3, "digits_mini", str(tmp_path))
    assert (config["train"]["epochs"], config["train"]["batch_size"], config["train"]["optimizer"]) == (1, 10, "adamw")
    assert watch.steps == 4
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"learner": "er_acce"}, UnknownNameError),
        ({"scenario": "spilt"}, UnknownNameError),
        ({"norm": "adab2m"}, UnknownNameError),
        ({"config": {"rounds": {"num_rounds": 2}}}, ConfigError),
        ({"config": {"scenario": {"num_experiences": 11}}}, ConfigError),
        ({"online": True, "config": {"train": {"epochs": 3}}}, ConfigError),
        ({"scenario": "random_labels", "learner": "joint"}, ConfigError),
        ({"scenario": "split_cifar10"}, FedNormError),
    ],
)
def test_mistakes_on_a_stream_are_our_errors(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        fednorm.continual(**arguments)


STUDY: dict[str, Any] = {
    "base": {**SMALL, "rounds": {"num_rounds": 1}},
    "points": [{"strategy": {"name": "fedavg"}}, {"strategy": {"name": "fedbn"}}],
    "grid": {"seed": [1, 2]},
}


def test_a_study_from_python_is_a_data_frame(tmp_path: Path) -> None:
    frame = fednorm.compare(STUDY, runs=tmp_path)
    assert frame["method"].to_list() == ["fedavg", "fedavg", "fedbn", "fedbn"]
    assert frame["seed"].to_list() == [1, 2, 1, 2]
    one = fednorm.federated(strategy="fedbn", rounds=1, seed=2, config=SMALL)
    assert frame["mean"][3] == one["final"]["mean"]
    assert frame["accuracy.street"][3] == one["final"]["per_domain"]["street"]
    again = fednorm.load(tmp_path)
    assert again.sort("run").equals(frame.select(again.columns).sort("run"))


def test_a_study_from_python_takes_keys_for_all_runs(tmp_path: Path) -> None:
    frame = fednorm.compare(STUDY, runs=tmp_path, config={"seed": 5, "train": {"learning_rate": 0.03}})
    assert frame["seed"].to_list() == [5, 5]
    assert set(frame["train.learning_rate"]) == {0.03}


def test_a_run_of_a_study_that_fails_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    study = {
        **STUDY,
        "points": [{"strategy": {"name": "fedbn"}}, {"strategy": {"name": "fedbn"}, "norm": {"name": "none"}}],
    }
    with pytest.raises(StudyError, match=r"2 of 4 runs failed: .*silently be FedAvg"):
        fednorm.compare(study, runs=tmp_path)
    assert fednorm.load(tmp_path)["norm.name"].to_list() == ["batch_norm", "batch_norm"]


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    fednorm.compare(STUDY, runs=tmp_path, config={"seed": 1})
    broken = next(tmp_path.glob("fedavg*")) / "result.json"
    broken.write_text("{")
    with pytest.warns(UserWarning, match="fedavg.*left out"):
        frame = fednorm.load(tmp_path)
    assert frame["method"].to_list() == ["fedbn"]
    with pytest.raises(FedNormError, match="There is no"):
        fednorm.load(tmp_path / "nowhere")


TRAINS = ("compare", "continual", "federated", "load", "load_model")
EXAMPLES = [
    pytest.param(name, marks=pytest.mark.slow) if name in TRAINS else name
    for name in fednorm.__all__
    if not name.startswith("__")
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_every_public_name_runs(name: str, tmp_path: Path) -> None:
    known = {"fednorm": fednorm, "torch": torch, "nn": torch.nn, "folder": tmp_path, "FedAvg": FedAvg, "Role": Role}
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(fednorm, name), name, globs=known)
    assert found.examples, f"fednorm.{name} has no example"
    told: list[str] = []
    assert not doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=told.append).failed, "".join(told)
