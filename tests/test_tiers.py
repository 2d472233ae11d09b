"""What stays of a product in the default tier: its cases hold every value, or every pair of values, and are few."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FAMILIES = {"strategy": ("fedavg", "fedbn", "local"), "norm": ("a", "b", "c", "d"), "seed": range(5)}


def left(pytestconfig: pytest.Config, cases: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    conftest = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    assert conftest is not None
    items = [SimpleNamespace(callspec=SimpleNamespace(params=case)) for case in cases]
    beyond = conftest._beyond_a_covering(items, n)
    return [item.callspec.params for item in items if item not in beyond]


def product() -> list[dict[str, Any]]:
    return [dict(zip(FAMILIES, values, strict=True)) for values in itertools.product(*FAMILIES.values())]


@pytest.mark.parametrize(("n", "fewest", "most"), [(1, 5, 5), (2, 20, 26), (3, 60, 60)])
def test_every_n_values_are_held_together_by_few(n: int, fewest: int, most: int, pytestconfig: pytest.Config) -> None:
    cases = left(pytestconfig, product(), n)
    for names in itertools.combinations(FAMILIES, n):
        held = {tuple(case[name] for name in names) for case in cases}
        assert held == set(itertools.product(*(FAMILIES[name] for name in names)))
    assert fewest <= len(cases) <= most


def test_values_take_turns(pytestconfig: pytest.Config) -> None:
    pairs = [case for case in product() if case["seed"] == 0]
    counts = [sum(case["strategy"] == name for case in left(pytestconfig, pairs, 1)) for name in FAMILIES["strategy"]]
    assert sorted(counts) == [1, 1, 2]


def test_a_case_alone_stays(pytestconfig: pytest.Config) -> None:
    """Whoever names one case on the command line gets it in any tier."""
    assert left(pytestconfig, product()[:1], 2) == product()[:1]


@pytest.mark.parametrize(("n", "stay"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 5]), (8, range(8)), (20, range(8))])
def test_a_few_cases_stay_evenly_spread(n: int, stay: list[int], pytestconfig: pytest.Config) -> None:
    class Case:
        def __init__(self, number: int, *marks: Any) -> None:
            self.nodeid, self.marks = f"test_x[{number}]", [pytest.mark.few(n).mark, *marks]

        def get_closest_marker(self, name: str) -> Any:
            return next((mark for mark in self.marks if mark.name == name), None)

        def add_marker(self, mark: Any) -> None:
            self.marks.append(mark.mark)

    conftest = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    cases = [Case(number) for number in range(8)]
    conftest._leave_few([*cases, Case(8, pytest.mark.slow.mark)])
    assert [number for number, case in enumerate(cases) if case.get_closest_marker("slow") is None] == list(stay)
