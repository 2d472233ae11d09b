"""``fednorm bench scale``: a round of a hundred clients among more and more of them."""

from __future__ import annotations

from fednorm.bench.scale import CLIENTS, bench_scale, scale_table
from fednorm.cli.console import err, print_json
from fednorm.cli.report import show
from fednorm.errors import ConfigError


def run_bench_scale(clients: str, rounds: int, *, markdown: bool, as_json: bool) -> None:
    """Run each number of clients and print the table."""
    result = bench_scale(_numbers(clients), rounds, on_line=lambda line: err().print(line, markup=False))
    if as_json:
        print_json(result)
    else:
        show(scale_table(result), style="markdown" if markdown else "table")


def _numbers(text: str) -> list[int]:
    parts = [part.strip().replace("_", "") for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(f"--clients takes numbers, separated by commas, e.g. 1000,100000; got {text!r}.")
    return [int(part) for part in parts] or list(CLIENTS)
