"""``fednorm continual``: one run on a stream, its plan before it and its tables after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fednorm.cli.answer import Depth, say_one
from fednorm.cli.console import err, out, print_json
from fednorm.cli.standing import run_stands, saying_what_stands
from fednorm.config import RunConfig
from fednorm.limits import require_path
from fednorm.records.record import RunRecord
from fednorm.report.live import Live, Several
from fednorm.report.progress import StreamProgress
from fednorm.streams.simulate import plan, simulate
from fednorm.streams.workbench import ContinualWorkbench
from fednorm.threads import torch_threads


def run_continual(
    config: RunConfig,
    *,
    runs: Path,
    dry_run: bool,
    depth: Depth | None = None,
    live: Live | None = None,
    as_json: bool,
) -> None:
    """Show the plan, train (unless it is a dry run), show the result; ``live`` is told how it goes."""
    require_path(runs, "--runs")
    if not dry_run and (finished := RunRecord(runs, config).result()):
        err().print(
            f"This run has finished before; its record is read back: {finished['run']}", markup=False, soft_wrap=True
        )
        return show_result(finished, depth or Depth(), as_json=as_json)
    if config.workers not in ("auto", 1):
        err().print("workers does nothing here: a stream has one learner, which takes one experience after the other.")
    bench = ContinualWorkbench(config)
    document = plan(config, bench)
    if dry_run:
        from fednorm.study.estimate import seconds_of  # it knows every kind of run, which one run does without

        with torch_threads(config.threads):
            document["estimated_seconds"] = round(seconds_of(bench), 1)
    if dry_run and as_json:
        return print_json(document)
    show_plan(document, out() if dry_run else err())
    if dry_run:
        return None
    told = live or Live(())
    with saying_what_stands(lambda: run_stands(config, runs)), StreamProgress(err()) as progress, told:
        result = simulate(config, runs=runs, observer=Several(progress, told), bench=bench)
        told.end(result)
    return show_result(result, depth or Depth(), as_json=as_json)


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
    if "estimated_seconds" in document:
        console.print(f"estimated time: {document['estimated_seconds']:.0f} s")
    if learner.get("passes") == "separate":
        console.print("new and memory samples go through the network in separate passes: two updates of statistics")


def show_result(result: Mapping[str, Any], depth: Depth, *, as_json: bool) -> None:
    """Print a result: the answer and its table, or the document."""
    if as_json:
        return print_json(result)
    say_one(result, depth)
    out().print(f"record: {result['run']}", markup=False, soft_wrap=True)
    return None
