"""``fednorm bench engine``: speed, side by side."""

from __future__ import annotations

from fednorm.bench.case import CASES
from fednorm.bench.engine import bench_engine, bench_table
from fednorm.cli.console import err, print_json
from fednorm.cli.options import names
from fednorm.cli.report import show


def run_bench_engine(
    case: str, against: str | None, repeats: int, *, strategy: str, device: str, markdown: bool, as_json: bool
) -> None:
    """Run the cases and print their table; without engines to compare with, beside those that fit the device."""
    if against is None:
        against = "bare,workers" if device == "cpu" else "bare,cohort"
    result = bench_engine(
        names(case, CASES),
        names(against, ()),
        repeats,
        on_line=lambda line: err().print(line, markup=False),
        strategy=strategy,
        device=device,
    )
    if as_json:
        print_json(result)
    else:
        show(bench_table(result), style="markdown" if markdown else "table")
