"""What the boundary of a stream's experiences does with normalization layers: that of a federation of one client.

How an image's experience is inferred is tested in ``tests/federated_continual/test_task_inference.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fednorm.config import resolve
from fednorm.errors import FedNormError
from fednorm.federation.simulate import simulate as federate
from fednorm.records.integrity import read_tensors
from fednorm.records.record import RunRecord
from fednorm.report.stream_table import stream_table
from fednorm.streams import estimate
from fednorm.streams.simulate import simulate
from fednorm.streams.workbench import ContinualWorkbench

STREAM: dict[str, Any] = {
    "kind": "continual",
    "scenario": {"name": "split_digits", "num_experiences": 3, "train_per_experience": 24, "test_per_experience": 20},
    "model": {"width": 4},
    "learner": {"name": "naive"},
    "train": {"batch_size": 8, "learning_rate": 0.05, "momentum": 0.5, "epochs": 2},
    "evaluate": {"probe_images": 0, "batch_size": 8},
}


def stream(norms: str, infer: str = "none", **values: Any) -> dict[str, Any]:
    evaluate = {**STREAM["evaluate"], "infer_task": infer, **values.pop("evaluate", {})}
    return {**STREAM, "train": {**STREAM["train"], "norms": norms}, "evaluate": evaluate, **values}


def grid(norms: str, **evaluate: Any) -> dict[str, Any]:
    train = {key: value for key, value in STREAM["train"].items() if key != "epochs"}
    return {
        **STREAM,
        "kind": "federated_continual",
        "grid": {"clients": 1, "norms": norms},
        "rounds": {"per_experience": 2},
        "train": {**train, "reset_optimizer": False},
        "evaluate": {"batch_size": 8, **evaluate},
    }


def run(folder: Any, values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = resolve(values)
    result = (simulate if config.kind == "continual" else federate)(config, runs=folder)
    tensors, _ = read_tensors(RunRecord(folder, config).folder / "model.safetensors", config.hash)
    return tensors, result


def rows_of(matrix: Any) -> list[list[float]]:
    return [list(row[: i + 1]) for i, row in enumerate(matrix)]


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["reset", "freeze"])
def test_a_stream_s_boundary_is_that_of_a_federation_of_one_client(tmp_path: Any, norms: str) -> None:
    learner = {"learner": {"name": "ewc", "fisher_samples": 6}}
    one, result = run(tmp_path, {**stream(norms), **learner})
    other, of_grid = run(tmp_path, {**grid(norms), **learner})
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert rows_of(result["accuracy_matrix"]) == [
        [x for x in time[0] if x is not None] for time in of_grid["accuracy_tensor"]
    ]
    plain, _ = run(tmp_path, {**stream("keep"), **learner})
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in one.items())


@pytest.mark.slow
def test_tensors_of_each_experience_are_those_of_a_federation_of_one_client(tmp_path: Any) -> None:
    """With the experience given, and inferred: every accuracy, and the share that is inferred right."""
    keep, _ = run(tmp_path, stream("keep"))
    given, without = run(tmp_path, stream("per_experience"))
    inferring, result = run(tmp_path, stream("per_experience", "statistics"))
    assert all(torch.equal(tensor, keep[key]) for key, tensor in (given | inferring).items()), "training is the same"
    _, of_grid = run(tmp_path, grid("per_experience", infer_task="statistics"))
    _, told = run(tmp_path, grid("per_experience", task_identity=True))

    def rows(tensor: Any) -> list[list[float]]:
        return [[x for x in time[0] if x is not None] for time in tensor]

    assert rows_of(result["accuracy_matrix"]) == rows(of_grid["accuracy_tensor"])
    assert rows_of(line["inferred"] for line in result["experiences"]) == rows(of_grid["inferred_tensor"])
    assert result["final"]["task_inference"] == pytest.approx(of_grid["final"]["task_inference"], abs=1e-12)
    for each in (result, without):
        assert rows_of(line["task_accuracy"] for line in each["experiences"]) == rows(told["accuracy_tensor"])
    assert result["experiences"][0]["inferred"] == [1.0, None, None], "what is to come cannot be inferred"
    assert "inferred" not in without["experiences"][0]
    table = stream_table([result])
    assert "task inferred" in table.columns


@pytest.mark.slow
def test_without_the_experience_an_image_is_scored_under_the_present_tensors(tmp_path: Any) -> None:
    _, keep = run(tmp_path, stream("keep"))
    _, own = run(tmp_path, stream("per_experience"))
    assert own["accuracy_matrix"] == keep["accuracy_matrix"]
    domains = {"name": "domain_digits", "train_per_experience": 24, "test_per_experience": 20}
    _, of_domains = run(tmp_path, {**stream("per_experience"), "scenario": domains})
    first, last = (of_domains["experiences"][place] for place in (0, -1))
    assert first["task_accuracy"][0] == first["accuracy"][0], "just ended, they are the present ones"
    assert last["task_accuracy"] != last["accuracy"]


class Cut:
    """Interrupts a run after an experience, or in the middle of one."""

    def __init__(self, step: int) -> None:
        self.at = step

    def begin(self, *_: Any) -> None: ...

    def step(self, steps_done: int) -> None:
        if steps_done == self.at:
            raise KeyboardInterrupt

    def experience(self, line: Any) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("values", [stream("per_experience", "entropy"), stream("freeze")], ids=["own", "freeze"])
def test_a_run_that_was_cut_goes_on_to_the_same_numbers(tmp_path: Any, values: dict[str, Any]) -> None:
    values = {**values, "train": {**values["train"], "checkpoint_every": 1}}
    whole, result = run(tmp_path / "whole", values)
    for step in (9, 16):  # an experience has six
        with pytest.raises(KeyboardInterrupt):
            simulate(resolve(values), runs=tmp_path / "cut", observer=Cut(step))
    tensors, again = run(tmp_path / "cut", values)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in whole.items())
    assert again["accuracy_matrix"] == result["accuracy_matrix"]
    if "inferred" in result["experiences"][0]:
        assert [line["inferred"] for line in again["experiences"]] == [
            line["inferred"] for line in result["experiences"]
        ]


@pytest.mark.slow
def test_evaluations_on_the_way_infer_too(tmp_path: Any) -> None:
    values = stream("per_experience", "entropy", evaluate={"every_steps": 6})
    _, result = run(tmp_path, values)
    points = [point for line in result["experiences"] for point in line["anytime"]]
    assert [point["accuracy"] for point in points] == rows_of(result["accuracy_matrix"])


def test_an_estimate_counts_the_passes_of_every_candidate() -> None:
    of = ContinualWorkbench(resolve(STREAM)).stream
    plain, own, inferring = (
        estimate.work(resolve(values), of).scored
        for values in (stream("keep"), stream("per_experience"), stream("per_experience", "statistics"))
    )
    assert own - plain == 3 * 60
    assert inferring - own == (1 + 2 + 3) * 60


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (stream("keep", "entropy"), r"with train\.norms = 'keep' there is one set of them: it would do nothing"),
        (stream("freeze", learner={"name": "joint"}), r"joint is given all experiences at once.*would do nothing"),
        (stream("freeze", learner={"name": "gdumb"}), r"gdumb trains a fresh network.*Take 'keep'"),
        (stream("reset", norm={"name": "sws"}), r"this network has none \(norm sws\): it would do nothing"),
        (stream("per_experience", "statistics", norm={"name": "layer_norm"}), r"keeps none.*infer_task = 'entropy'"),
    ],
)
def test_what_cannot_be_is_refused_before_training(values: dict[str, Any], words: str) -> None:
    with pytest.raises(FedNormError, match=words):
        ContinualWorkbench(resolve(values))


def test_frozen_layers_and_parts_that_are_trained_contradict_each_other() -> None:
    values = {**STREAM, "train": {**STREAM["train"], "norms": "freeze", "trainable": "head"}}
    with pytest.raises(FedNormError, match="Leave one of them out"):
        ContinualWorkbench(resolve(values))
