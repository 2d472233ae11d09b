"""``engine = cohort`` from a configuration to a result: strategies, evaluation, resuming, what is refused and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from safetensors.torch import load_file
from torch import Tensor, nn

from fednorm.config import RunConfig, resolve
from fednorm.data.domain import Federation
from fednorm.errors import ConfigError
from fednorm.federation.cohort.engine import engine_of
from fednorm.federation.cohort.training import CohortTraining
from fednorm.federation.executors import Executor, Failure, Job
from fednorm.federation.executors.choice import executor_of
from fednorm.federation.executors.cohort import Cohort
from fednorm.federation.executors.sequential import Sequential
from fednorm.federation.local import Local, Turn
from fednorm.federation.simulate import simulate
from fednorm.federation.simulate_flower import simulate_flower
from fednorm.federation.strategy import NormStrategy
from fednorm.federation.wire import unpack
from fednorm.federation.workbench import LOCAL_RECORD, Workbench
from strategies.fedprox import FedProx, Proximal

MakeFederation = Callable[..., Federation]

COUNTS = (8, 12, 5, 9, 8, 4, 16)

STRATEGIES: Mapping[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg pooled": {"moments": "pool"},
    "fedbn": {},
    "silobn": {},
    "fedprox": {"mu": 0.5},
    "fedavgm": {},
    "fedadam": {},
    "fedyogi": {},
    "fedper": {},
    "fedrep": {"head_epochs": 1.5},
    "fedbabu": {"finetune_epochs": 1.0},
    "fedavg_ft": {"finetune_epochs": 1.0},
    "local": {},
    "fedwon": {},
}


def configuration(strategy: str = "fedavg", /, **more: Any) -> RunConfig:
    name = strategy.split()[0]
    base: dict[str, Any] = {
        "model": {"name": "digits_cnn", "width": 4},
        "strategy": {"name": name, **STRATEGIES.get(strategy, {})},
        "train": {"batch_size": 8, "learning_rate": 0.02, "momentum": 0.5, **more.pop("train", {})},
        "rounds": {"num_rounds": 2, **more.pop("rounds", {})},
    }
    return resolve(base | {"engine": "cohort", "cohort_size": 3} | more)


def bench_of(make: MakeFederation, config: RunConfig, counts: Sequence[int] = COUNTS) -> Workbench:
    return Workbench(config, make(counts))


def run(make: MakeFederation, config: RunConfig, runs: Path, observer: Any = None) -> tuple[dict[str, Any], Path]:
    result = simulate(config, runs=runs, bench=bench_of(make, config), observer=observer)
    return result, Path(result["run"])


def tensors_of(run: Path) -> dict[str, Tensor]:
    files = sorted(run.glob("*.safetensors"))
    return {f"{file.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        most = max(float(tensor.double().abs().max()), 1e-1)
        off = float((found[key].double() - tensor.double()).abs().max())
        assert off <= relative * most, f"{key}: off by {off:.2e} of {most:.2e}"


OFTEN = {("fedavg pooled", "batch_norm"), ("fedbn", "batch_norm"), ("fedprox", "nap"), ("fedrep", "group_norm")}
"""The cells that the default tier has."""


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("strategy", "norm"),
    [
        pytest.param(strategy, norm, marks=() if (strategy, norm) in OFTEN else pytest.mark.slow)
        for strategy in STRATEGIES
        for norm in ("batch_norm", "group_norm", "nap")
    ],
)
def test_every_strategy_is_the_same_by_cohorts(
    strategy: str, norm: str, tmp_path: Path, make_federation: MakeFederation
) -> None:
    if strategy == "fedwon":
        norm = "sws"
    elif norm != "batch_norm" and strategy in ("silobn", "fedavg pooled"):
        pytest.skip("there are no running moments")
    more: dict[str, Any] = {"norm": {"name": norm}, "evaluate": {"best_round": False}}
    found, folder = run(make_federation, configuration(strategy, **more), tmp_path / "cohort")
    expected, alone = run(
        make_federation, configuration(strategy, engine="client", cohort_size=0, **more), tmp_path / "client"
    )
    assert found["engine"]["name"] == "cohort"
    assert_alike(tensors_of(folder), tensors_of(alone), 2e-3 if strategy in ("fedadam", "fedyogi") else 2e-4)
    for mine, other in zip(found["rounds"], expected["rounds"], strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert (mine["bytes_up"], mine["rejected"]) == (other["bytes_up"], other["rejected"])
    assert found["final"]["per_domain"].keys() == expected["final"]["per_domain"].keys()


class _Stopped(Exception):
    pass


class _StopAfter:
    def __init__(self, number: int) -> None:
        self.number = number

    def begin(self, *_: object) -> None: ...

    def round(self, line: Mapping[str, Any]) -> None:
        if line["round"] == self.number:
            raise _Stopped


@pytest.mark.parametrize(
    ("strategy", "fraction"),
    [("fedbn", 0.6), *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (("fedbn", 1.0), ("fedavgm", 0.6)))],
)
def test_a_run_that_was_cut_short_goes_on_to_the_same_bits(
    strategy: str, fraction: float, tmp_path: Path, make_federation: MakeFederation
) -> None:
    config = configuration(strategy, rounds={"num_rounds": 4, "fraction": fraction})
    _, whole = run(make_federation, config, tmp_path / "whole")
    with pytest.raises(_Stopped):
        run(make_federation, config, tmp_path / "parts", _StopAfter(2))
    result, parts = run(make_federation, config, tmp_path / "parts")
    assert [line["round"] for line in result["rounds"]] == [1, 2, 3, 4]
    found = tensors_of(parts)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors_of(whole).items())


# Evaluation -----------------------------------------------------------------------------------------------------------


def _jobs(bench: Workbench, kind: str, **config: Any) -> list[Job]:
    arrays = bench.strategy.initial_arrays(bench.model)
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1, **config})})
    count = len(bench.federation.clients)
    contexts = [Context(1, pid, {"partition-id": pid}, RecordDict(), {}) for pid in range(count)]
    return [Job(kind, pid, content, context) for pid, context in enumerate(contexts)]


def _metrics(answers: Sequence[Any]) -> list[dict[str, float]]:
    return [dict(answer.metric_records["metrics"]) for answer in answers]


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "fedper", "local"])
@pytest.mark.parametrize("normalize", ["half", "domain"])
@pytest.mark.cover(1)
def test_an_evaluation_is_the_same_by_cohorts(strategy: str, normalize: str, make_federation: MakeFederation) -> None:
    """Also of a client that has never trained, whose statistics are estimated first, and of one without test images."""
    config = configuration(strategy, data={"normalize": normalize})
    answers = []
    for make in (Sequential, lambda bench: Cohort(bench, 3)):
        bench = bench_of(make_federation, config)
        executor: Executor = make(bench)
        jobs = _jobs(bench, "train")
        list(executor.run(jobs[:-1]))  # the last one has never trained
        evaluations = [Job("evaluate", job.client, job.content, job.context) for job in jobs]
        answers.append(_metrics(list(executor.run(evaluations))))
    for alone, found in zip(*answers, strict=True):
        assert found["num-examples"] == alone["num-examples"] == 3
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert found["accuracy"] == pytest.approx(alone["accuracy"])


def test_a_client_that_diverges_is_rejected_alone_and_keeps_what_it_had(make_federation: MakeFederation) -> None:
    bench = bench_of(make_federation, configuration("fedbn"))
    executor, jobs = Cohort(bench, 4), _jobs(bench, "train")
    list(executor.run(jobs))
    before = unpack(jobs[2].context.state.array_records[LOCAL_RECORD])
    poisoned = {key: t * torch.nan if t.is_floating_point() else t for key, t in before.items()}
    from fednorm.federation.wire import pack

    jobs[2].context.state[LOCAL_RECORD] = pack(poisoned)
    answers = list(executor.run(jobs))
    finite = [all(bool(t.isfinite().all()) for t in unpack(a.array_records["arrays"]).values()) for a in answers]  # type: ignore[union-attr]
    assert finite == [number != 2 for number in range(len(jobs))]
    kept = unpack(jobs[2].context.state.array_records[LOCAL_RECORD])
    assert all(bool(t.isnan().all()) for t in kept.values() if t.is_floating_point()), "an update of NaN is not kept"


def test_a_cohort_that_fails_fails_its_clients_and_not_the_round(
    make_federation: MakeFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(make_federation, configuration("fedbn"))
    executor, jobs, whole = Cohort(bench, 3), _jobs(bench, "train"), CohortTraining.train

    def train(self: CohortTraining, clients: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if any(client.partition_id == 2 for client in clients):
            raise MemoryError("no room")
        return whole(self, clients, *args, **kwargs)

    monkeypatch.setattr(CohortTraining, "train", train)
    answers = list(executor.run(jobs))
    failed = [answer for answer in answers if isinstance(answer, Failure)]
    assert 1 <= len(failed) <= 3
    assert isinstance(answers[2], Failure)
    assert failed[0].reason == "the client's cohort failed: MemoryError: no room"
    kept = [LOCAL_RECORD in job.context.state for job in jobs]
    assert kept == [not isinstance(answer, Failure) for answer in answers]


# What cannot be stacked -----------------------------------------------------------------------------------------------


class Meddling(Local):
    def adjust(self, turn: Turn) -> None:
        for parameter in turn.shared.values():
            parameter.grad = None


class WithMeddling(NormStrategy):
    local = Meddling


class Nearer(Proximal):
    def adjust(self, turn: Turn) -> None:
        super().adjust(turn)


class BelowProx(FedProx):
    local = Nearer


class OfTheBatch(nn.Module):
    """Takes moments from the batch, and nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class OfTheValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > 0 else 2 * x


def _network(layer: nn.Module) -> Callable[..., nn.Module]:
    def foreign(num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), layer, nn.Flatten(), nn.Linear(144, num_classes)
        )

    return foreign


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategy": {"name": WithMeddling}}, "Meddling.adjust"),
    ({"strategy": {"name": BelowProx}}, "Nearer.adjust"),
    (
        {"strategy": {"name": "scaffold"}, "train": {"momentum": 0.0}},
        "clients of strategy scaffold do something of their own",
    ),
    ({"norm": {"name": "adab2n"}}, "takes part in the training step"),
    ({"norm": {"name": "l1_norm"}}, "no form for padded batches"),
    ({"norm": {"name": "power_norm"}}, "no form for padded batches"),
    ({"train": {"redo_every": 3}}, "ReDo has no stacked form"),
    ({"train": {"optimizer": "sgdp"}}, "optimizer sgdp has no stacked form"),
    ({"train": {"momentum": 0.9, "reset_optimizer": False}}, "begins anew with every round"),
    ({"norm": {"name": "nap", "every": 3}}, "has no stacked form"),
    ({"model": {"name": _network(nn.Dropout(0.5))}}, "cannot be computed for several clients at once"),
    ({"model": {"name": _network(OfTheValues())}}, "cannot be computed for several clients at once"),
    ({"model": {"name": _network(OfTheBatch())}}, "looks at other rows than an image's own"),
]


@pytest.mark.parametrize(("more", "why"), REFUSED, ids=[why[:30] for _, why in REFUSED])
def test_what_has_no_stacked_form_says_so_and_falls_back(
    more: dict[str, Any], why: str, make_federation: MakeFederation
) -> None:
    bench = bench_of(make_federation, configuration(**more))
    before = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    with pytest.raises(ConfigError, match=why):
        engine_of(bench)
    assert all(torch.equal(bench.model.state_dict()[key], tensor) for key, tensor in before.items()), "it was a trial"
    automatic = engine_of(bench_of(make_federation, configuration(**more, engine="auto")))
    assert automatic.name == "client"
    assert why in automatic.why


def test_a_foreign_network_with_batch_normalization_is_stacked(make_federation: MakeFederation) -> None:
    bench = bench_of(make_federation, configuration(model={"name": _network(nn.Identity())}))
    assert engine_of(bench).name == "cohort"


def test_auto_decides_by_the_work_of_a_step_alone(make_federation: MakeFederation) -> None:
    small = engine_of(bench_of(make_federation, configuration(engine="auto", cohort_size=0)))
    assert (small.name, small.cohort_size) == ("cohort", 200)
    large = configuration(engine="auto", cohort_size=0, model={"name": "digits_cnn", "width": 64})
    chosen = engine_of(bench_of(make_federation, large))
    assert chosen.name == "client"
    assert "million floating-point operations, and a cohort pays up to 50" in chosen.why
    one = engine_of(bench_of(make_federation, configuration(engine="auto"), counts=(8,)))
    assert one.name == "client"


def test_the_engine_is_part_of_a_runs_identity() -> None:
    plain = resolve({})
    assert plain.engine == "client"
    assert resolve({"engine": "client"}).hash == plain.hash
    others: list[dict[str, Any]] = [{"engine": "auto"}, {"engine": "cohort"}, {"engine": "cohort", "cohort_size": 50}]
    assert len({plain.hash, *(resolve(other).hash for other in others)}) == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine": "fast"}, "engine"),
        ({"engine": "cohort", "cohort_size": -1}, "cohort_size is a number of clients"),
        ({"engine": "cohort", "cohort_size": True}, "cohort_size is a number of clients"),
        ({"cohort_size": 50}, "takes clients one at a time"),
        ({"kind": "continual", "engine": "cohort"}, "take their turns one at a time"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_in_a_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(values)


def test_flower_s_runtime_and_workers_know_no_cohorts(tmp_path: Path, make_federation: MakeFederation) -> None:
    with pytest.raises(ConfigError, match="Flower's runtime takes each client for itself"):
        simulate_flower(configuration(), runs=tmp_path)
    with pytest.raises(ConfigError, match="a cohort trains in one process"):
        executor_of(bench_of(make_federation, configuration(workers=2)))


def test_a_client_without_a_step_answers_as_it_does_alone(make_federation: MakeFederation) -> None:
    bench = bench_of(make_federation, configuration(), counts=(8, 0, 9))
    answers = list(Cohort(bench, 3).run(_jobs(bench, "train")))
    assert [metrics["num-examples"] for metrics in _metrics(answers)] == [8, 0, 9]
    assert _metrics(answers)[1] == _metrics(list(Sequential(bench).run(_jobs(bench, "train"))))[1]
