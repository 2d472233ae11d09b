"""The sentence that says what a comparison found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fednorm.report.comparison import comparisons
from fednorm.report.verdict import verdict

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def said(stream_result: Make) -> Callable[..., str]:
    """Return a function that gives the verdict on accuracies by learner, one a seed, and a paper's number."""

    def verdict_on(
        accuracies: dict[str, Sequence[float]], baseline: str | None = "naive", paper: float | None = None
    ) -> str:
        results = [
            stream_result(learner={"name": name}, final={"average_accuracy": value}, config={"seed": seed})
            for name, values in accuracies.items()
            for seed, value in enumerate(values, start=1)
        ]
        entry = {"match": {"learner": {"name": "er_ace"}}, "score": "average_accuracy", "value": paper, "source": "x"}
        study = {"study": "s", "runs": [r["hash"] for r in results], "paper": [entry] if paper else []}
        named = f"{baseline} + batch_norm" if baseline else None
        (comparison,) = comparisons(results, studies=[study], baseline=named)
        return verdict(comparison).replace(" + batch_norm", "")

    return verdict_on


def test_a_difference_that_shows_something(said: Callable[..., str]) -> None:
    # differences 0.10, 0.11, 0.12: mean 0.11, half 4.302653 · 0.01 / √3 = 0.024841
    text = said({"naive": [0.40, 0.41, 0.42], "er_ace": [0.50, 0.52, 0.54]}, paper=0.62)
    assert text == "er_ace +11.0 [8.5, 13.5] over naive, 3 of 3 seeds; 10.0 below the paper"


def test_an_interval_that_holds_zero(said: Callable[..., str]) -> None:
    text = said({"naive": [0.40, 0.41], "er_ace": [0.41, 0.43]})  # 0.015 ± 12.7062 · 0.0070711 / √2
    assert text == "er_ace +1.5 [−4.9, 7.9] over naive, 2 of 2 seeds better: the interval holds 0"


def test_the_best_may_be_worse(said: Callable[..., str]) -> None:
    assert said({"naive": [0.5], "er_ace": [0.4]}) == "er_ace −10.0 under naive, one seed: no interval"


def test_without_a_baseline(said: Callable[..., str]) -> None:
    text = said({"naive": [0.40, 0.42], "er_ace": [0.50, 0.50]}, baseline=None, paper=0.5)
    assert text == "er_ace: 50.0 [50.0, 50.0], highest average accuracy of 2 methods, n = 2 seeds; as in the paper"
    assert said({"er_ace": [0.5]}, baseline=None, paper=0.4) == (
        "er_ace: 50.0 average accuracy, one seed: no interval; 10.0 above the paper"
    )


def test_nothing_measured(stream_result: Make) -> None:
    result = stream_result()
    (comparison,) = comparisons([{**result, "final": dict.fromkeys(result["final"])}])
    assert verdict(comparison) == "No finished run has a finite average_accuracy"
