"""``fednorm demo``: three strategies on embedded digits, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fednorm.cli import err, out, print_json
from fednorm.federated.simulate import simulate
from fednorm.registry import resolve_config
from fednorm.report.progress import RoundProgress
from fednorm.report.table import accuracy_table

STRATEGIES = ("fedavg", "fedbn", "fedwon")
LEARNING_RATE = 0.03


def demo_values(strategy: str, *, rounds: int, seed: int) -> dict[str, Any]:
    """Return the configuration of one of the demo's runs: FedBN's network at a quarter of its width."""
    return {
        "seed": seed,
        "data": {"name": "digits_mini"},
        "model": {"name": "digits_cnn", "width": 16},
        "strategy": {"name": strategy},
        "train": {"learning_rate": LEARNING_RATE},
        "rounds": {"num_rounds": rounds, "evaluate_every": 5},
    }


def run_demo(*, runs: Path, rounds: int, seed: int, as_json: bool) -> None:
    """Run the three strategies one after the other and print their table."""
    results = []
    with RoundProgress(err()) as progress:
        for strategy in STRATEGIES:
            config = resolve_config(demo_values(strategy, rounds=rounds, seed=seed))
            results.append(simulate(config, runs=runs, observer=progress))
    if as_json:
        return print_json({"results": results})
    out().print(accuracy_table(results).rich())
    out().print(f"records: {Path(results[0]['run']).parent}", markup=False, soft_wrap=True)
    return None
