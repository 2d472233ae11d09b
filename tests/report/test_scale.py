"""Reports of many runs: settings are read once a run, baselines are looked up, and a page leaves out curves aloud."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednorm.errors import FedNormError
from fednorm.records import formats
from fednorm.records.results import Loaded
from fednorm.report import _common, comparison, grouping, page_data
from fednorm.report.baselines import Nearest
from fednorm.report.comparison import comparisons
from fednorm.report.grouping import data_settings
from fednorm.report.sections import sections

Make = Callable[..., dict[str, Any]]


def grid(make: Make, rates: int, seeds: int = 2) -> list[dict[str, Any]]:
    return [
        make(
            learner={"name": learner},
            config={"seed": seed, "train": {"learning_rate": (1 + rate) / 100}},
            final={"average_accuracy": (1 + rate) / 100 + seed / 1000},
        )
        for learner in ("naive", "er_ace")
        for rate in range(rates)
        for seed in range(seeds)
    ]


def test_the_work_of_a_comparison_grows_with_its_runs(stream_result: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def counted(result: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal read
        read += 1
        return plain(result)

    plain = _common.settings
    for module in (_common, comparison, grouping):
        monkeypatch.setattr(module, "settings", counted)
    counts = []
    for rates in (10, 20):
        read = 0
        (compared,) = comparisons(grid(stream_result, rates), baseline="naive + batch_norm")
        assert len(compared.methods) == 2 * rates
        assert {m.label.split(" lr ")[1] for m in compared.methods if m.baseline} == {
            str((1 + rate) / 100) for rate in range(rates)
        }
        counts.append(read)
    assert counts[1] == 2 * counts[0]


def by_the_rule(label: str, baselines: list[str], own: dict[str, dict[str, Any]]) -> str | None:
    """The baseline that differs in fewest of all settings, written out."""
    if label in baselines:
        return None
    apart = {
        other: sum(own[label].get(key) != own[other].get(key) for key in own[label] | own[other])
        for other in baselines
        if data_settings(own[other]) == data_settings(own[label])
    }
    nearest = [other for other, count in apart.items() if count == min(apart.values())]
    return nearest[0] if len(nearest) == 1 else None


@given(st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_the_nearest_baseline_is_the_one_that_differs_least(drawn: random.Random) -> None:
    keys = ["data.name", "train.lr", "train.batch", "strategy.name", "train.list"]
    cells = {tuple(drawn.randrange(most) for most in (2, 3, 3, 3, 3)) for _ in range(14)}
    own = {str(cell): dict(zip(keys, cell, strict=True)) for cell in cells}
    for values in own.values():
        values["train.list"] = [values["train.list"]]
    baselines = [label for label, values in own.items() if values["strategy.name"] == 0]
    nearest = Nearest(baselines, own)
    assert [nearest.to(label) for label in own] == [by_the_rule(label, baselines, own) for label in own]


def test_a_page_of_many_runs_keeps_the_best_methods_curves_and_says_so(
    stream_result: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = grid(stream_result, 3)
    loaded = Loaded(results, [], [])
    monkeypatch.setattr(page_data, "WITH_CURVES", 5)
    made = page_data.document(loaded, sections(loaded))
    (section,) = made["sections"]
    kept = {section["methods"][run["method"]]["label"] for run in section["runs"] if run["series"]}
    assert kept == {"naive + batch_norm lr 0.03", "er_ace + batch_norm lr 0.03"}
    assert len(section["runs"]) == 12
    assert all(run["final"]["average_accuracy"] for run in section["runs"])
    assert "curves, matrices and diagnostics of" in made["thinned"]
    monkeypatch.setattr(page_data, "WITH_CURVES", 12)
    whole = page_data.document(loaded, sections(loaded))
    assert whole["thinned"] is None
    assert all(run["series"] for run in whole["sections"][0]["runs"])


NESTED = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(-(2**64), 2**64) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2) | st.just("\udfff"), inner, max_size=2)
    ),
    max_leaves=20,
)


@given(NESTED, st.integers(0, 13))
@settings(max_examples=30)
def test_what_is_quickly_found_writable_is(value: Any, depth: int) -> None:
    document: Any = value
    for _ in range(depth):
        document = {"key": document}
    document = {"it": document}
    try:
        formats._require_writable(document)
    except (formats.Unfit, FedNormError):
        assert not formats._is_writable(document)
    else:
        assert formats._is_writable(document)
