"""``fednorm bench continual``: the speed of a step on a stream, and of normalization layers, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fednorm.bench.continual import COMPILED, STREAM_ENGINES, bench_continual, bench_table
from fednorm.bench.layers import bench_layers, layers_table
from fednorm.bench.stream_case import STREAM_CASES
from fednorm.cli.console import err, print_json
from fednorm.cli.options import names
from fednorm.cli.report import show
from fednorm.report.table import Table


def run_bench_continual(case: str, against: str, repeats: int, *, markdown: bool, as_json: bool) -> None:
    """Time the engines on the cases and print their table."""
    others = [name for name in STREAM_ENGINES if name not in COMPILED]
    result = bench_continual(names(case, STREAM_CASES), names(against, others), repeats, on_line=_say)
    _show(result, bench_table(result), markdown=markdown, as_json=as_json)


def run_bench_layers(repeats: int, *, markdown: bool, as_json: bool) -> None:
    """Time normalization layers and print their table."""
    result = bench_layers(repeats, on_line=_say)
    _show(result, layers_table(result), markdown=markdown, as_json=as_json)


def _say(line: str) -> None:
    err().print(line, markup=False)


def _show(result: Mapping[str, Any], table: Table, *, markdown: bool, as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        show(table, style="markdown" if markdown else "table")
