"""``fednorm continual``: one run on a stream, its plan before it and its tables after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fednorm.cli.console import err, out, print_json
from fednorm.cli.options import collect_values
from fednorm.cli.standing import run_stands, saying_what_stands
from fednorm.config import ONLINE, RunConfig, merge, require_online, resolve
from fednorm.limits import require_path
from fednorm.records.record import RunRecord
from fednorm.report.progress import StreamProgress
from fednorm.report.stream_table import drift_table, matrix_table, plasticity_table, stream_table
from fednorm.streams.simulate import plan, simulate
from fednorm.streams.workbench import ContinualWorkbench


def collect_continual(
    config: Path | None, flags: Mapping[str, Any], settings: Sequence[str], *, online: bool
) -> RunConfig:
    """Return the configuration of a run from a file, options and ``--set``; the later overrides the earlier.

    Raises:
        FedNormError: A key or a value is wrong, or ``--online`` was given with more than one epoch.
    """
    values = merge({"kind": "continual", "train": ONLINE if online else {}}, collect_values(config, flags, settings))
    resolved = resolve(values, only="continual")
    return require_online(resolved) if online else resolved


def run_continual(config: RunConfig, *, runs: Path, dry_run: bool, as_json: bool) -> None:
    """Show the plan, train (unless it is a dry run), show the result."""
    require_path(runs, "--runs")
    if not dry_run and (finished := RunRecord(runs, config).result()):
        err().print(
            f"This run has finished before; its record is read back: {finished['run']}", markup=False, soft_wrap=True
        )
        return show_result(finished, as_json=as_json)
    if config.workers not in ("auto", 1):
        err().print("workers does nothing here: a stream has one learner, which takes one experience after the other.")
    bench = ContinualWorkbench(config)
    document = plan(config, bench)
    if dry_run and as_json:
        return print_json(document)
    show_plan(document, out() if dry_run else err())
    if dry_run:
        return None
    with saying_what_stands(lambda: run_stands(config, runs)), StreamProgress(err()) as progress:
        result = simulate(config, runs=runs, observer=progress, bench=bench)
    return show_result(result, as_json=as_json)


def show_plan(document: Mapping[str, Any], console: Console) -> None:
    """Print what is known before training."""
    config, data, learner = document["config"], document["data"], document["learner"]
    console.print(
        f"[bold]{learner['name']}[/] with norm {document['norm']['name']} on {data['title']}: model "
        f"{config['model']['name']}, {document['parameters']:,} parameters, {document['steps']:,} steps"
    )
    for note in document["model"]["notes"]:
        console.print(f"  {note}", markup=False, soft_wrap=True)
    for experience in data["experiences"][:20]:
        console.print(
            f"  experience {experience['experience'] + 1}: {experience['title']}, {experience['train']} train, "
            f"{experience['test']} test images",
            markup=False,
        )
    if len(data["experiences"]) > 20:
        console.print(f"  and {len(data['experiences']) - 20} more")
    if learner.get("passes") == "separate":
        console.print("new and memory samples go through the network in separate passes: two updates of statistics")


def show_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result: its tables, or the document."""
    if as_json:
        return print_json(result)
    console = out()
    console.print(stream_table([result]).rich())
    if result["data"]["memorization"]:
        console.print(plasticity_table([result]).rich())
    else:
        console.print(matrix_table(result).rich())
    if any(line["diagnostics"].get("drift") for line in result["experiences"]):
        console.print(drift_table([result]).rich())
    console.print(f"record: {result['run']}", markup=False, soft_wrap=True)
    return None
