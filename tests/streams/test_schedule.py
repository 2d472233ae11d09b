"""The learning rate against PyTorch's own schedulers, and against what the optimizer of a run is given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

from fednorm.streams.simulate import simulate
from fednorm.training.schedule import Schedule

RATES = st.floats(1e-6, 1.0)
SHARES = st.floats(0.0, 1.0)


def pytorch_s(kind: str, rate: float, warmup: int, final: float, total: int) -> list[float]:
    """Return the rates that PyTorch's schedulers would set, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    rest = max(total - warmup, 1)
    after: Any
    if kind == "cosine":
        after = CosineAnnealingLR(optimizer, rest, eta_min=final * rate)
    else:
        after = LinearLR(optimizer, 1.0, 1.0 if kind == "constant" else final, rest)
    if warmup:
        rising = LambdaLR(optimizer, lambda step: (step + 1) / warmup)
        after = SequentialLR(optimizer, [rising, after], [warmup])
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR calls its parts with it
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 12), (5, 12), (1, 3), (11, 12)])
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_it_is_pytorch_s(kind: str, warmup: int, total: int, final: float) -> None:
    schedule = Schedule(rate=0.3, kind=kind, warmup=warmup, final=final, total=total)
    rates = [schedule.at(step, 99, 99) for step in range(total)]
    assert rates == pytest.approx(pytorch_s(kind, 0.3, warmup, final, total), rel=1e-12, abs=1e-15)


@given(st.sampled_from(["linear", "cosine"]), RATES, SHARES, st.integers(0, 50), st.integers(1, 80))
def test_it_rises_to_the_rate_and_falls_to_the_final_one(
    kind: str, rate: float, final: float, warmup: int, total: int
) -> None:
    schedule = Schedule(rate=rate, kind=kind, warmup=warmup, final=final, total=warmup + total)
    rates = [schedule.at(step, 0, 1) for step in range(warmup + total + 2)]
    assert max(rates) == pytest.approx(rate)
    assert rates[warmup] == pytest.approx(rate)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    # Past the end, as in a stream that was planned too short, it stays where it ended.
    assert rates[-1] == rates[-2] == pytest.approx(rate * final, abs=1e-12)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 9), st.integers(0, 200))
def test_over_an_experience_only_its_own_steps_count(kind: str, steps: int, step: int) -> None:
    anew = Schedule(rate=0.1, kind=kind, over="experience", warmup=2, final=0.1, total=1000)
    alone = Schedule(rate=0.1, kind=kind, over="stream", warmup=2, final=0.1, total=steps)
    for own in range(steps):
        assert anew.at(step, own, steps) == alone.at(own, 0, 1)


@pytest.mark.parametrize("over", ["stream", "experience"])
def test_the_optimizer_of_a_run_gets_it(over: str, toy: Any) -> None:
    train = {"schedule": "cosine", "schedule_over": over, "warmup_steps": 2, "final_rate": 0.5, "epochs": 2}
    config = toy.config(train={**train, "learning_rate": 0.04})
    bench = toy.bench(config)
    rates: list[float] = []
    step = bench.learner.optimizer.step
    bench.learner.optimizer.step = lambda: (rates.append(bench.learner.optimizer.param_groups[0]["lr"]), step())[1]
    document = simulate(config, runs=None, bench=bench)

    def cosine(t: int, total: int) -> float:
        if t < 2:
            return 0.04 * (t + 1) / 2
        return 0.04 * (0.75 + 0.25 * math.cos(math.pi * (t - 2) / (total - 2)))

    expected = [cosine(t, 12) for t in range(12)] if over == "stream" else [cosine(t, 6) for t in range(6)] * 2
    assert rates == pytest.approx(expected, rel=1e-12)
    # A reader of the effective rate needs that of the experience, not that of its last step, where schedules end.
    means = (sum(expected[:6]) / 6, sum(expected[6:]) / 6)
    for line, rate in zip(document["experiences"], means, strict=True):
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-12)
        inside = line["diagnostics"]
        for layer, norm in inside["weight_norm"].items():
            assert inside["effective_learning_rate"][layer] == pytest.approx(rate / norm**2)


@pytest.mark.parametrize("rate", [0.03, 0.1, 1 / 3])
def test_the_mean_of_a_constant_rate_is_the_rate_itself(rate: float, toy: Any) -> None:
    """To the last bit: a sum of equal floats, divided by their number, need not be the float again."""
    document, _ = toy.run(toy.config(train={"learning_rate": rate, "epochs": 7}))
    assert [line["learning_rate"] for line in document["experiences"]] == [rate, rate]
    for line in document["experiences"]:
        inside = line["diagnostics"]
        for layer, norm in inside["weight_norm"].items():
            assert inside["effective_learning_rate"][layer] == rate / norm**2
