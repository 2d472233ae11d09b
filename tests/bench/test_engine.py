"""The engine against the bare loop, the bare loop against the formula in float64, and what is made of the numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.bench import engine
from fednorm.bench.alone import alone
from fednorm.bench.bare import Data, federated_averaging
from fednorm.bench.case import CASES, Case, case_of
from fednorm.bench.engine import bench_engine, bench_table, run_bare, run_cohort, run_fednorm, run_flower
from fednorm.bench.meter import Cost, ProcessWatch, cost
from fednorm.errors import ConfigError, FedNormError, UnknownNameError
from fednorm.rng import stream_seed

SMALL = Case(name="small", clients=3, train=10, test=70, image_size=8, width=4, batch_size=4, rounds=2)
"""Its last batch is smaller than the others, and its test images do not fit one evaluation batch."""


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "case",
    [SMALL, Case(name="one-step", clients=5, train=8, test=3, image_size=8, width=4, batch_size=8, rounds=3, seed=2)],
    ids=lambda case: case.name,
)
def test_engine_and_bare_loop_reach_the_same_bits(case: Case) -> None:
    bare, ours = run_bare(case), run_fednorm(case)
    assert set(bare.tensors) == set(ours.tensors)
    start = case.workbench().model.state_dict()
    for key, tensor in bare.tensors.items():
        # A bias before a normalization has a gradient of rounding errors: it may well stay.
        assert key.endswith("bias") or not torch.equal(tensor, start[key]), f"{key} was never trained"
        torch.testing.assert_close(ours.tensors[key], tensor, rtol=0, atol=0)
    assert len(bare.cpu) == len(ours.cpu) == case.rounds


@pytest.mark.few(1)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_a_small_version_of_each_case_runs_in_every_engine_to_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name].small()
    monkeypatch.setattr(engine, "case_of", lambda _: case)
    document = bench_engine([name], ["bare", "workers"], 1)
    engines = document["cases"][name]["engines"]
    assert list(engines) == (["bare"] if case.plain else []) + ["fednorm", "workers"]
    assert {found["difference"] for found in engines.values()} == {0.0}
    assert all(found["wall_seconds"] > 0 and found["memory_mb"] > 50 for found in engines.values())
    assert len(bench_table(document).rows) == len(engines)


def test_contiguous_bare_loop_computes_the_same() -> None:
    # Not SMALL: normalizing its last batches of two images is so ill-conditioned that rounding errors grow to 0.1.
    case = Case(name="sane", clients=3, train=32, test=7, image_size=8, width=4, batch_size=16, rounds=1)
    bare, ours = run_bare(case, channels_last=False), run_fednorm(case)
    for key, tensor in bare.tensors.items():
        torch.testing.assert_close(ours.tensors[key], tensor, rtol=1e-4, atol=1e-5)


def test_a_cohort_computes_what_one_client_after_the_other_does() -> None:
    case = Case(name="many", clients=7, train=16, test=7, image_size=8, width=4, batch_size=16, rounds=1)
    cohort, ours = run_cohort(case), run_fednorm(case)
    for key, tensor in cohort.tensors.items():
        torch.testing.assert_close(ours.tensors[key], tensor, rtol=1e-4, atol=1e-5)


def test_bare_loop_is_federated_averaging() -> None:
    """Two clients of different size on a linear model, whose gradient is written out in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    sizes, batch_size, rate, seed, rounds = (7, 4), 3, 0.3, 5, 2
    images = [torch.randn(n, 3, 2, 2) for n in sizes]
    labels = [torch.randint(0, 3, (n,)) for n in sizes]
    weight, bias = (tensor.double() for tensor in model.state_dict().values())
    for server_round in (1, 2):
        new = []
        for number in (0, 1):
            w, b = weight.clone(), bias.clone()
            generator = torch.Generator().manual_seed(
                stream_seed(seed, "client", number, "round", server_round, "batches")
            )
            order = torch.randperm(sizes[number], generator=generator)
            for i in range(0, sizes[number], batch_size):
                rows = order[i : i + batch_size]
                x = images[number][rows].double().flatten(1)
                error = torch.softmax(x @ w.T + b, 1) - functional.one_hot(labels[number][rows], 3)
                w, b = w - rate * error.T @ x / len(rows), b - rate * error.mean(0)
            new.append((w, b))
        weight, bias = ((7 * first + 4 * second) / 11 for first, second in zip(*new, strict=True))

    ends: list[int] = []
    clients = [Data(x, y, x, y) for x, y in zip(images, labels, strict=True)]
    trained = federated_averaging(
        model,
        clients,
        rounds=rounds,
        batch_size=batch_size,
        learning_rate=rate,
        seed=seed,
        on_round=lambda: ends.append(1),
    )
    torch.testing.assert_close(trained["1.weight"].double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained["1.bias"].double(), bias, rtol=1e-5, atol=1e-6)
    assert len(ends) == rounds


def test_cases_are_what_the_table_says() -> None:
    assert [(case.clients, case.image_size, case.width) for case in CASES.values()] == [
        (5, 28, 64),
        (50, 28, 8),
        (1000, 8, 4),
        (1000, 8, 64),
        (20, 28, 8),
    ]
    federation = SMALL.federation()
    rows = torch.cat([torch.cat([client.train.index, client.test.index]) for client in federation.clients])
    assert sorted(rows.tolist()) == list(range(3 * 80)), "every image belongs to one client and one split"
    assert torch.equal(federation.clients[0].train.images, SMALL.federation().clients[0].train.images)
    assert Case(**json.loads(SMALL.to_json())) == SMALL
    assert case_of("tiny-1000").summary.startswith("1,000 clients × 8 training images (1 step of 8) and 8 test images")
    assert "(8 steps of 32)" in case_of("digits-cnn").summary


def test_cost_leaves_the_first_round_to_the_start() -> None:
    found = cost([10.0, 15.0, 16.0, 18.0], [1.0, 4.0, 4.5, 5.75], 7, {})
    assert astuple(found) == (3.0, 5.0, (0.5, 1.25), (1.0, 2.0), 7, {})


def fake(rounds: list[tuple[float, ...]], weight: float) -> Callable[[Case], Cost]:
    runs = iter(rounds)

    def run(case: Case) -> Cost:
        del case
        cpu = next(runs)
        return Cost(4.0, 5.0, cpu, tuple(2 * seconds for seconds in cpu), 3_000_000, {"w": torch.tensor([weight])})

    return run


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    fakes = {
        "bare": fake([(2.0, 1.0), (1.5, 3.0)], 1.0),
        "fednorm": fake([(4.0, 3.0), (2.5, 9.0)], 1.0),
        "flower": fake([(8.0, 7.0), (7.5, 9.0)], 1.25),
    }
    monkeypatch.setattr(engine, "ENGINES", fakes)
    monkeypatch.setattr(engine, "alone", lambda run, case: run(case))
    monkeypatch.setattr(engine, "case_of", lambda name: SMALL if name == "small" else pytest.fail(name))
    lines: list[str] = []
    document = bench_engine(["small"], ["flower", "bare"], 2, lines.append)
    assert lines[:2] == [
        "small, bare, run 1 of 2: 1.000 CPU seconds a round",
        "small, fednorm, run 1 of 2: 3.000 CPU seconds a round",
    ], "engines take turns"
    assert len(lines) == 6
    return document


def test_document_has_ratios_to_the_fastest_rounds(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result)) == result
    engines = result["cases"]["small"]["engines"]
    assert list(engines) == ["bare", "fednorm", "flower"]
    assert [found["cpu_seconds"] for found in engines.values()] == [1.0, 2.5, 7.0]
    assert [found["wall_seconds"] for found in engines.values()] == [2.0, 5.0, 14.0]
    assert [found["ratio"] for found in engines.values()] == [1.0, 2.5, 7.0]
    # Three clients: 1.5 and 6 seconds more, a third of them each.
    assert [found["overhead_ms"] for found in engines.values()] == pytest.approx([0.0, 500.0, 2000.0])
    assert [found["difference"] for found in engines.values()] == [0.0, 0.0, 0.25]
    assert engines["fednorm"]["all_cpu_seconds"] == [[4.0, 3.0], [2.5, 9.0]]
    assert engines["flower"]["startup_wall_seconds"] == 5.0
    assert result["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_table_says_what_the_document_says(result: dict[str, Any]) -> None:
    table = bench_table(result)
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[1] == ("small: fednorm", "2.500", "5.000", "2.50×", "2.50×", "+500.00", "5.0", "4.0", "3", "0")
    costs = ("7.000", "14.000", "7.00×", "7.00×", "+2000.00", "5.0", "4.0", "3", "2.5e-01")
    assert table.rows[2] == ("small: flower", *costs)
    assert SMALL.summary in table.notes[0]


def test_without_the_bare_loop_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ENGINES", {"fednorm": fake([(1.0, 2.0)], 1.0)})
    monkeypatch.setattr(engine, "alone", lambda run, case: run(case))
    monkeypatch.setattr(engine, "case_of", lambda _: SMALL)
    document = bench_engine(["small"], [], 1)
    found = document["cases"]["small"]["engines"]["fednorm"]
    assert found["ratio"] is None
    assert found["overhead_ms"] is None
    assert bench_table(document).rows[0][3:6] == ("–", "–", "–")


def test_mistakes_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ENGINES", dict.fromkeys(engine.ENGINES, lambda _: pytest.fail("ran")))
    with pytest.raises(ConfigError, match=r"against must be one of bare.*got 'flowr'. Did you mean 'flower'"):
        bench_engine(["tiny-1000"], ["flowr"], 1)
    with pytest.raises(UnknownNameError, match=r"no benchmark case named 'tiny-100'. Did you mean 'tiny-1000'"):
        bench_engine(["tiny-100"], ["bare"], 1)
    with pytest.raises(ConfigError, match="repeats must be at least 1; got 0"):
        bench_engine(["tiny-1000"], ["bare"], 0)
    with pytest.raises(UnknownNameError, match=r"no strategy named 'fedwom'\. Did you mean 'fedwon'"):
        bench_engine(["tiny-1000"], [], 1, strategy="fedwom")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a run has no process of its own")
def test_a_case_with_another_strategy_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "case_of", lambda _: SMALL)
    document = bench_engine(["small"], ["bare"], 1, strategy="fedwon")["cases"]["small"]
    assert list(document["engines"]) == ["fednorm"], "the bare loop does federated averaging alone"
    assert document["summary"].endswith("digits_cnn of width 4, fedwon")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a run has no process of its own")
def test_what_an_engine_raises_comes_out_and_so_does_its_death() -> None:
    def refuse(case: Case) -> Cost:
        raise ConfigError(f"{case.name} is refused")

    def die(case: Case) -> Cost:
        del case
        os._exit(3)

    with pytest.raises(ConfigError, match="small is refused"):
        alone(refuse, SMALL)
    with pytest.raises(FedNormError, match="case small was run ended with exit code 3"):
        alone(die, SMALL)


BUSY = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass\n"


@pytest.mark.slow
def test_watch_counts_a_grandchild_and_nothing_older() -> None:
    older = subprocess.Popen([sys.executable, "-c", BUSY.format(seconds=30)])
    try:
        time.sleep(0.3)
        busy = BUSY.format(seconds=0.5)
        child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {busy!r}])\n{busy}"
        with ProcessWatch(descendants=True) as watch:
            subprocess.run([sys.executable, "-c", child], check=True)
            ended = time.time()
    finally:
        older.kill()
        older.wait()
    spent = watch.cpu_at([watch.started, ended])
    assert spent[0] == 0
    # A second of work and two starts of Python, less what the last look at each process missed.
    assert 1 - 2 * 2 * ProcessWatch.INTERVAL < spent[1] < 1.6
    assert 2e6 < watch.memory < 200e6


@pytest.mark.slow
def test_watch_of_this_process_sees_its_own_memory_and_time() -> None:
    with ProcessWatch(descendants=False) as watch:
        end = time.process_time() + 0.3
        held = torch.ones(40_000_000)
        while time.process_time() < end:
            pass
        time.sleep(2 * ProcessWatch.INTERVAL)
        ended = time.time()
    assert held.nbytes < watch.memory
    first, last = watch.cpu_at([watch.started, ended])
    # The system counts a process's time in hundredths of a second.
    assert 0.25 < last - first < 2.0


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Ray on this system needs a POSIX process tree")
def test_flower_runs_the_same_apps_to_the_same_bits() -> None:
    pytest.importorskip("ray", reason="the simulation extra is not installed")
    case = Case(name="two", clients=2, train=8, test=4, image_size=8, width=4, batch_size=4, rounds=1)
    flower, ours = run_flower(case), run_fednorm(case)
    tensors: dict[str, Tensor] = dict(flower.tensors)
    assert set(tensors) == set(ours.tensors)
    for key, tensor in ours.tensors.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=0)
    # Starting SuperLink, Ray and two processes that import torch costs seconds; a round of this case does not.
    assert flower.startup_wall > flower.wall[0] > 0
    assert flower.startup_cpu > 1


def test_engines_of_the_cpu_are_refused_beside_others_on_a_device() -> None:
    with pytest.raises(ConfigError, match=r"workers, flower would compute on the CPU, beside others on cuda. Leave"):
        bench_engine(["tiny-1000"], ["flower", "workers", "bare"], 1, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="cuda"):
        bench_engine(["tiny-1000"], ["bare", "cohort"], 1, device="cuda")
