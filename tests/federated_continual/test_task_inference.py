"""Test images of which nobody says the experience: the misfits by hand, whom they choose, and a whole run of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from fednorm.config import resolve
from fednorm.data.domain import Split
from fednorm.errors import ConfigError, FedNormError
from fednorm.federated_continual import estimate
from fednorm.federated_continual.workbench import GridWorkbench
from fednorm.federation.simulate import simulate
from fednorm.federation.wire import unpack
from fednorm.records.integrity import read_tensors
from fednorm.records.record import RunRecord
from fednorm.records.results import load
from fednorm.report.grid_table import grid_table
from fednorm.streams.task_inference import (
    Candidate,
    Inferred,
    TaskInference,
    choices,
    entropy_misfit,
    statistics_misfit,
)

GRID: dict[str, Any] = {
    "kind": "federated_continual",
    "scenario": {"name": "split_digits", "num_experiences": 2, "train_per_experience": 40, "test_per_experience": 30},
    "model": {"width": 4},
    "norm": {"name": "batch_norm"},
    "grid": {"clients": 2, "norms": "per_experience"},
    "rounds": {"per_experience": 1},
    "train": {"batch_size": 8, "learning_rate": 0.05},
}


def inferring(how: str, per: str = "image", **values: Any) -> dict[str, Any]:
    own = values.pop("evaluate", {})
    return {**GRID, "evaluate": {"infer_task": how, "infer_task_per": per, "batch_size": 8, **own}, **values}


# The formulas.


def test_entropy_is_that_of_the_softmax() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0], [5.0, -torch.inf]], dtype=torch.float64)
    by_hand = [0.25 * math.log(4) + 0.75 * math.log(4 / 3), math.log(2), 0.0]
    assert entropy_misfit(logits).tolist() == pytest.approx(by_hand, abs=1e-15)
    drawn = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(entropy_misfit(drawn), Categorical(logits=drawn).entropy(), rtol=1e-12, atol=0)


def test_statistics_by_hand() -> None:
    """Channel 0: mean 2, variance 1; channel 1: mean 0, variance 4."""
    image = torch.tensor([[[[1.0, 3.0]], [[2.0, -2.0]]]])
    misfit = statistics_misfit(image, torch.tensor([1.0, 0.0]), torch.tensor([3.75, 0.75]), 0.25)
    assert misfit.dtype == torch.float64
    assert misfit.tolist() == pytest.approx([(math.log(2) + (1 + 1) / (2 * 4)) + (math.log(1) + (4 + 0) / (2 * 1))])


@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (3, 4, 6), (3, 4)])
def test_statistics_are_a_gaussian_likelihood(shape: tuple[int, ...]) -> None:
    """Its negative, but for C/2 log 2 pi; and the divergence, but for what is the same under every experience."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(shape, generator=draw, dtype=torch.float64)
    means = torch.randn(2, 4, generator=draw, dtype=torch.float64)
    variances = torch.rand(2, 4, generator=draw, dtype=torch.float64) + 0.1
    values = inputs.reshape(3, 4, -1)
    misfits = [statistics_misfit(inputs, mean, var, 1e-5) for mean, var in zip(means, variances, strict=True)]
    for misfit, mean, var in zip(misfits, means, variances, strict=True):
        of_values = Normal(mean[:, None], (var + 1e-5).sqrt()[:, None]).log_prob(values).mean(2).sum(1)
        torch.testing.assert_close(misfit + 4 / 2 * math.log(2 * math.pi), -of_values, rtol=1e-12, atol=0)
    if values.shape[2] > 1:
        own = Normal(values.mean(2), values.std(2, correction=0))
        one, two = (
            kl_divergence(own, Normal(mean, (var + 1e-5).sqrt())).sum(1)
            for mean, var in zip(means, variances, strict=True)
        )
        torch.testing.assert_close(misfits[0] - misfits[1], one - two, rtol=1e-9, atol=1e-12)


def test_the_least_misfit_decides_and_of_equal_ones_the_first() -> None:
    misfits = torch.tensor([[1.0, 5.0, 2.0, 1.0, torch.nan], [3.0, 1.0, 2.0, 2.0, 7.0]])
    assert choices(misfits).tolist() == [0, 1, 0, 0, 1]
    assert choices(torch.full((2, 3), torch.nan)).tolist() == [0, 0, 0]
    by_two = choices(misfits[:, :4], 2)  # means 3 and 2; 1.5 and 2
    assert by_two.tolist() == [1, 1, 0, 0]
    ragged = choices(misfits[:, :3], 2)
    assert ragged.tolist() == [1, 1, 0]


@pytest.mark.parametrize(("own_classes", "inferred"), [(True, 0.5), (False, 0.0)])
def test_with_a_head_for_each_task_the_surest_answer_is_among_its_classes(own_classes: bool, inferred: float) -> None:
    """Both images are of experience 1 (classes 2 and 3); under either the network's answer is the same."""
    pixels = torch.tensor([[255, 255, 255, 0], [255, 0, 255, 255]], dtype=torch.uint8)
    split = Split(pixels[:, None, None], torch.tensor([2, 3]), torch.arange(2))
    judge = TaskInference(
        torch.nn.Flatten(),
        "entropy",
        per_batch=False,
        batch_size=2,
        own_classes=own_classes,
        wearing=lambda _: nullcontext(),
        images=split.inputs(torch.arange(1))[0],
    )
    candidates = [Candidate(0, (0, 1), None), Candidate(1, (2, 3), None)]
    assert judge.score(torch.nn.Flatten(), split, 1, candidates) == Inferred(inferred, inferred)


# A run.


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """The server's tensors after each round."""
    tensors: dict[int, dict[str, Tensor]] = {}
    after = GridWorkbench.after_round

    def taken(self: GridWorkbench, grid: Any, server_round: int, arrays: Any) -> Any:
        tensors[server_round] = {key: tensor.clone() for key, tensor in unpack(arrays).items()}
        return after(self, grid, server_round, arrays)

    monkeypatch.setattr(GridWorkbench, "after_round", taken)
    return tensors


def run(folder: Any, values: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = resolve(values)
    result = simulate(config, runs=folder)
    tensors, _ = read_tensors(RunRecord(folder, config).folder / "model.safetensors", config.hash)
    return tensors, result


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("how", "per"),
    [
        ("entropy", "image"),
        pytest.param("statistics", "image", marks=pytest.mark.slow),
        ("statistics", "batch"),
    ],
)
def test_images_are_scored_under_the_tensors_that_fit_them(
    tmp_path: Any, sent: dict[int, dict[str, Tensor]], how: str, per: str
) -> None:
    """After the second of two experiences, written out: both networks on every image, the misfits, the answers."""
    values = inferring(how, per)
    tensors, result = run(tmp_path / "inferred", values)
    bench = GridWorkbench(resolve(values))
    stream, model = bench.grid.stream, bench.model.eval()
    layer = next(path for path, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d))
    for experience in stream:
        images, labels = experience.test.inputs(torch.arange(len(experience.test)))
        misfits, answers = [], []
        for server_round, candidate in zip((1, 2), stream, strict=True):
            norms = {key: sent[server_round][key] for key in bench.norms.keys}
            model.load_state_dict({**sent[2], **norms})
            heard: list[Tensor] = []
            handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, x, heard=heard: heard.append(x[0]))
            with torch.no_grad():
                logits = model(images).double()
            handle.remove()
            mean, var = (norms[f"{layer}.{name}"].double() for name in ("running_mean", "running_var"))
            values_of = heard[0].double().flatten(2)
            density = Normal(mean[:, None], (var + 1e-5).sqrt()[:, None]).log_prob(values_of)
            misfits.append(Categorical(logits=logits).entropy() if how == "entropy" else -density.mean(2).sum(1))
            among = logits[:, list(candidate.classes)].argmax(1)
            answers.append(torch.tensor(candidate.classes)[among] == labels)
        either = torch.stack(misfits)
        if per == "batch":
            either = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in either.split(8, 1)], 1)
        second = either[1] < either[0]
        right = torch.where(second, answers[1], answers[0])
        inferred = second if experience.number else ~second
        for client in range(2):
            assert result["accuracy_tensor"][1][client][experience.number] == pytest.approx(
                float(right.double().mean())
            )
            assert result["inferred_tensor"][1][client][experience.number] == pytest.approx(
                float(inferred.double().mean())
            )
    assert result["inferred_tensor"][0] == [[1.0, None], [1.0, None]], "of one experience there is no choice"
    last = result["inferred_tensor"][1]
    assert result["final"]["task_inference"] == pytest.approx(sum(map(sum, last)) / 4)
    assert 0 < result["final"]["task_inference"] < 1
    kept, _ = run(tmp_path / "given", {**GRID, "evaluate": {"task_identity": True}})
    assert all(torch.equal(tensor, kept[key]) for key, tensor in tensors.items()), "training is the same"
    table = grid_table([result])
    shown = dict(zip(table.columns, table.rows[0], strict=True))["task inferred"]
    assert float(shown) == pytest.approx(100 * result["final"]["task_inference"], abs=0.051)
    assert load([tmp_path]).results  # the record can be read


def test_what_is_always_inferred_right_is_what_was_given(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experiences = iter(range(10**6))

    def oracle(misfits: Tensor, batch_size: int | None = None) -> Tensor:
        del batch_size
        number = next(experiences) % len(misfits) if len(misfits) > 1 else 0
        return torch.full(misfits.shape[1:], number)

    monkeypatch.setattr("fednorm.streams.task_inference.choices", oracle)
    _, inferred = run(tmp_path, inferring("entropy"))
    _, given = run(tmp_path, {**GRID, "evaluate": {"task_identity": True}})
    assert inferred["accuracy_tensor"] == given["accuracy_tensor"]
    assert inferred["own_accuracy_tensor"] == given["own_accuracy_tensor"]
    assert inferred["final"]["task_inference"] == 1


@pytest.mark.slow
def test_local_tensors_of_clients_at_different_experiences(tmp_path: Any) -> None:
    """FedBN: each client chooses among its own, those it has met."""
    grid = {**GRID["grid"], "order": "rotated"}
    _, result = run(tmp_path, inferring("statistics", grid=grid, strategy={"name": "fedbn"}))
    assert result["inferred_tensor"][0] == [[1.0, None], [None, 1.0]]
    assert all(0 <= share <= 1 for row in result["inferred_tensor"][1] for share in row)


def test_an_estimate_counts_the_passes_of_every_candidate() -> None:
    stream = GridWorkbench(resolve(inferring("entropy"))).grid.stream
    once, entropy, statistics = (
        estimate.work(resolve(inferring(how) if how else {**GRID, "evaluate": {"task_identity": True}}), stream).scored
        for how in ("", "entropy", "statistics")
    )
    # 30 test images an experience, two clients, twice: after the first of 1, after the second 60 images of 2.
    assert entropy - once == 2 * 2 * 60
    assert statistics - entropy == 2 * 2 * (30 + 60)


# What is refused.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (inferring("entropy", grid={"clients": 2}), r"with grid\.norms = 'keep' there is one set.*would do nothing"),
        (inferring("entropy", evaluate={"task_identity": True}), r"task_identity = true it is given.*Leave one"),
        (inferring("none", "batch"), r"infer_task_per = 'batch'.*infer_task is 'none'"),
        (inferring("nearest"), r"infer_task must be one of none, entropy, statistics"),
        (inferring("statistics", norm={"name": "group_norm"}), r"this network keeps none.*'entropy'"),
        (inferring("statistics", norm={"name": "continual_norm"}), r"evaluates by another formula.*'entropy'"),
        (
            inferring("entropy", train={"heads": "task"}, scenario={"name": "split_digits", "num_experiences": 10}),
            r"experience 1 has one class, of which it is always sure",
        ),
        ({**GRID}, r"infer_task to 'entropy' or 'statistics'"),
    ],
)
def test_what_cannot_be_is_refused_before_training(values: dict[str, Any], words: str) -> None:
    with pytest.raises(FedNormError, match=words):
        GridWorkbench(resolve(values))


def test_it_is_of_no_other_run() -> None:
    with pytest.raises(ConfigError, match="It is a key of continual and federated_continual runs"):
        resolve({"evaluate": {"infer_task": "entropy"}})
