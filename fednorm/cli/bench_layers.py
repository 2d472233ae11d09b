"""``fednorm bench layers``: what each norm costs beside PyTorch's own layers."""

from __future__ import annotations

from fednorm.bench.norms import bench_norms, norms_table
from fednorm.cards import NORMS
from fednorm.cli.console import err, print_json
from fednorm.cli.options import names
from fednorm.cli.report import show


def run_bench_norms(norm: str, repeats: int, *, markdown: bool, as_json: bool) -> None:
    """Measure norms and print their table."""
    result = bench_norms(names(norm, NORMS.names), repeats, on_line=lambda line: err().print(line, markup=False))
    if as_json:
        print_json(result)
    else:
        show(norms_table(result), style="markdown" if markdown else "table")
