"""Every strategy of avalanche.training that works on Avalanche's own benchmark works on ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fednorm.avalanche import table
from fednorm.avalanche.benchmark import to_avalanche

pytestmark = pytest.mark.filterwarnings("ignore")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/avalanche.md"


def test_every_strategy_is_run_or_left_out_for_a_reason() -> None:
    assert set(table.strategies()) == set(table.RECIPES) | set(table.LEFT_OUT)
    assert not set(table.RECIPES) & set(table.LEFT_OUT)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["ICaRL", "GDumb", "PNNStrategy"])
def test_representatives_train_on_our_streams(name: str) -> None:
    benchmark = to_avalanche(table.tiny_stream(), task_labels=table.RECIPES[name].task_labels)
    network: Any = table.train(name, benchmark)
    assert network is not None


@pytest.mark.slow
def test_the_table_is_as_committed() -> None:
    text = table.table()
    for line in text.splitlines()[6:]:
        _, name, own, ours, norm, _ = (cell.strip() for cell in line.split("|"))
        if own == "yes":
            assert ours == "yes", name
            assert norm == "yes" or name in table.WITHOUT_NORM, (name, norm)
    made, committed = text.splitlines(), DOCUMENT.read_text(encoding="utf-8").splitlines()
    if importlib.util.find_spec("quadprog") is None:  # the table was made with it; GEM alone asks for it
        made, committed = ([line for line in lines if not line.startswith("| GEM |")] for lines in (made, committed))
    assert made == committed
