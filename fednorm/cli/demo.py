"""``fednorm demo``: three strategies on embedded digits, then streams of them; tables, and a page of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fednorm.cli.console import err, out, print_json
from fednorm.cli.report import show
from fednorm.cli.standing import saying_what_stands
from fednorm.config import resolve
from fednorm.federation.simulate import simulate
from fednorm.limits import require_path
from fednorm.records.result import result_of
from fednorm.records.results import Loaded
from fednorm.report.comparison import Comparison, comparisons
from fednorm.report.numbers import percent, signed
from fednorm.report.page import write_page
from fednorm.report.progress import RoundProgress, StreamProgress
from fednorm.report.table import Table
from fednorm.report.verdict import verdict
from fednorm.streams.simulate import simulate as simulate_stream

STRATEGIES = ("fedavg", "fedbn", "fedwon")
LEARNING_RATE = 0.03

STREAM_NORMS = ("batch_norm", "adab2n", "continual_norm", "group_norm")
"""Norms of the class-incremental stream, learned online with ER-ACE."""

MEMORIZATION_NORMS = ("none", "layer_norm", "nap")
"""Norms of the random-label stream: plain, normalized, normalized and projected."""

PLANNED = len(STRATEGIES) + len(STREAM_NORMS) + len(MEMORIZATION_NORMS)
"""Runs of the demo."""


def demo_values(strategy: str, *, rounds: int, seed: int) -> dict[str, Any]:
    """Return the configuration of one of the demo's federations: FedBN's network at a quarter of its width."""
    return {
        "seed": seed,
        "data": {"name": "digits_mini"},
        "model": {"name": "digits_cnn", "width": 16},
        "strategy": {"name": strategy},
        "train": {"learning_rate": LEARNING_RATE},
        "rounds": {"num_rounds": rounds, "evaluate_every": 5},
    }


def stream_values(norm: str, *, images: int, seed: int) -> dict[str, Any]:
    """Return the configuration of one of the demo's class-incremental streams."""
    return {
        "kind": "continual",
        "seed": seed,
        "scenario": {"name": "split_digits", "train_per_experience": images},
        "learner": {"name": "er_ace", "memory_size": 200},
        "norm": {"name": norm},
        "train": {"epochs": 1, "batch_size": 10, "learning_rate": LEARNING_RATE},
    }


def memorization_values(norm: str, *, images: int, seed: int) -> dict[str, Any]:
    """Return the configuration of one of the demo's random-label streams: a rate at which a plain network dies.

    The rate falls to zero in each experience, as NaP needs it: its effective rate does not fall by itself.
    """
    return {
        "kind": "continual",
        "seed": seed,
        "scenario": {"name": "random_labels", "num_experiences": 8, "train_per_experience": images or 200},
        "model": {"name": "mlp", "width": 64},
        "norm": {"name": norm},
        "train": {
            "optimizer": "adam",
            "learning_rate": 0.003,
            "schedule": "linear",
            "schedule_over": "experience",
            "batch_size": 20,
            "epochs": 30,
        },
    }


def _run_all(results: list[dict[str, Any]], runs: Path, *, rounds: int, images: int, seed: int) -> None:
    """Run strategies and streams one after the other; each result is added as soon as there is one."""
    for strategy in STRATEGIES:
        config = resolve(demo_values(strategy, rounds=rounds, seed=seed))
        with RoundProgress(err(), _place(results, strategy)) as progress:
            results.append(simulate(config, runs=runs, observer=progress))
    streams = [(norm, stream_values(norm, images=images, seed=seed)) for norm in STREAM_NORMS]
    streams += [(norm, memorization_values(norm, images=images, seed=seed)) for norm in MEMORIZATION_NORMS]
    for norm, values in streams:
        with StreamProgress(err(), _place(results, norm)) as progress_of_streams:
            results.append(simulate_stream(resolve(values), runs=runs, observer=progress_of_streams))


def _place(results: Sequence[object], name: str) -> str:
    """Return what leads the lines of the next run, e.g. ``run 2 of 10: fedbn``."""
    return f"run {len(results) + 1} of {PLANNED}: {name}"


def short_table(comparison: Comparison) -> Table:
    """Return a comparison's one headline by strategy or norm, and how far each is from the first of its world."""
    section, title, first = _world(comparison)
    head = comparison.score(comparison.headline)
    scores = {
        method.results[0]["config"][section]["name"]: method.scores[comparison.headline].mean
        for method in comparison.methods
    }
    columns = (section, head.label if head else comparison.headline, f"to {first}")
    rows = tuple(
        (name, percent(score), "" if name == first else signed(score - scores[first])) for name, score in scores.items()
    )
    return Table(title, columns, rows)


def _world(comparison: Comparison) -> tuple[str, str, str]:
    """Return what differs within one of the demo's worlds, its title, and what the others are compared with."""
    return {
        "federated": ("strategy", "Five clients, each with digits of its own kind (%)", "fedavg"),
        "continual": ("norm", "A stream of two digits at a time, learned online with a memory (%)", "batch_norm"),
        "memorization": ("norm", "A stream of labels that are drawn anew again and again (%)", "none"),
    }[comparison.first.subject]


def run_demo(*, runs: Path, rounds: int, images: int, seed: int, as_json: bool) -> None:
    """Run strategies and streams one after the other; print a short table of each world, and where the page is."""
    require_path(runs, "--runs")
    results: list[dict[str, Any]] = []
    again = "The same command goes on with the others, from their checkpoints."
    with saying_what_stands(lambda: f"Finished and whole: {len(results)} of the demo's {PLANNED} runs. {again}"):
        _run_all(results, runs, rounds=rounds, images=images, seed=seed)
    if as_json:
        return print_json({"results": results})
    for comparison in comparisons(results):
        show(short_table(comparison))
        out().print(f"What to see: {verdict(comparison)}.", markup=False, soft_wrap=True)
        out().print()
    folder = Path(results[0]["run"]).parent
    write_page(folder / "page.html", Loaded([result_of(result) for result in results], [], []))
    out().print("One seed and small images: a way to look at things, not a result.")
    out().print(f"page, with curves, matrices and statistics: {folder / 'page.html'}", markup=False, soft_wrap=True)
    return None
