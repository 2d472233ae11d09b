"""``fednorm federated``: one run, its plan before it and its tables after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fednorm.cli.answer import Depth, say_one
from fednorm.cli.console import err, out, print_json
from fednorm.cli.deploying import Target
from fednorm.cli.standing import run_stands, saying_what_stands
from fednorm.config import RunConfig, choose
from fednorm.federation.server import Observer, read_back
from fednorm.federation.simulate import plan, simulate
from fednorm.federation.simulate_flower import simulate_flower
from fednorm.federation.workbench import Workbench, workbench_of
from fednorm.limits import require_path
from fednorm.records import further
from fednorm.records.record import RunRecord
from fednorm.report.grid_table import boundaries_table, cells_table
from fednorm.report.live import Live, Several
from fednorm.report.progress import RoundProgress
from fednorm.report.table import plan_table
from fednorm.threads import torch_threads


def run_federated(
    config: RunConfig,
    *,
    runs: Path,
    runtime: str,
    dry_run: bool,
    layers: bool,
    depth: Depth | None = None,
    as_json: bool,
    target: Target | None = None,
    live: Live | None = None,
) -> None:
    """Show the plan, run (unless it is a dry run), show the result; ``live`` is told how it goes."""
    runtime = runtime.replace("_", "-")
    choose("--runtime", runtime, ("in-process", "flower", "deployment"))
    require_path(runs, "--runs")
    if runtime == "deployment":
        from fednorm.cli.deploy import run_deployed  # it shows its result with what is here

        return run_deployed(config, target or Target(), runs=runs, dry_run=dry_run, depth=depth, as_json=as_json)
    (target or Target()).require_none()
    if not dry_run and (finished := read_back(RunRecord(runs, config), config)):
        err().print(
            f"This run has finished before; its record is read back: {finished['run']}", markup=False, soft_wrap=True
        )
        return show_result(finished, depth or Depth(), as_json=as_json)
    bench = workbench_of(config)
    document = plan(config, bench)
    if layers:
        document["entries"] = [
            {**dataclasses.asdict(entry), "kind": entry.kind.value, "role": entry.role.value}
            for entry in bench.plan.entries
        ]
    if dry_run:
        from fednorm.study.estimate import seconds_of  # it knows every kind of run, which one run does without

        with torch_threads(config.threads):
            document["estimated_seconds"] = round(seconds_of(bench), 1)
    if dry_run and as_json:
        return print_json(document)
    show_plan(document, out() if dry_run else err())
    if dry_run:
        return None
    if runtime == "in-process" and (told := _earlier(config, runs)):
        err().print(told, markup=False, soft_wrap=True)
    tools = live or Live(())
    with saying_what_stands(lambda: run_stands(config, runs)), RoundProgress(err()) as progress, tools:
        result = _run(config, bench, runs, runtime, Several(progress, tools))
        tools.end(result)
    return show_result(result, depth or Depth(), as_json=as_json)


def _earlier(config: RunConfig, runs: Path) -> str:
    """Return what becomes of a shorter run of the same configuration that has finished; empty where there is none."""
    if RunRecord(runs, config).stands() or not (finished := further.shorter(config, runs)):
        return ""
    goes_on = f"A run of {finished.rounds} rounds has finished; this one goes on from its end: {finished.folder}"
    return further.why_not(config, finished) or goes_on


def _run(config: RunConfig, bench: Workbench, runs: Path, runtime: str, observer: Observer) -> dict[str, Any]:
    if runtime == "flower":
        return simulate_flower(config, runs=runs, observer=observer)
    return simulate(config, runs=runs, observer=observer, bench=bench)


def show_plan(document: Mapping[str, Any], console: Console) -> None:
    """Print what is known before training."""
    config, counts, data = document["config"], document["plan"], document["data"]
    console.print(
        f"[bold]{config['strategy']['name']}[/] with norm {config['norm']['name']} on {data['title']}: model "
        f"{config['model']['name']}, {document['parameters']:,} parameters"
    )
    for note in document["model"]["notes"]:
        console.print(f"  {note}", markup=False, soft_wrap=True)
    constant = ("constant",) if counts.get("constant") else ()
    roles = ", ".join(f"{counts[role]} {role}" for role in ("shared", "local", "pooled", "reset", *constant))
    console.print(f"norm plan: {roles} entries of the state dict; {counts['bytes_per_round'] / 1e6:.2f} MB a round")
    if places := config["strategy"].get("local"):
        console.print(f"kept on clients by place (strategy.local): {places}", markup=False)
    if "between" in document:
        console.print(document["between"]["text"], markup=False, soft_wrap=True)
    if "estimated_seconds" in document:
        console.print(f"estimated time: {document['estimated_seconds']:.0f} s")
    if "grid" in document:
        console.print(cells_table(document["grid"]).rich())
        console.print(boundaries_table(document["grid"]).rich())
        return
    for domain in dict.fromkeys(client["domain"] for client in data["clients"]):
        members = [client for client in data["clients"] if client["domain"] == domain]
        count = sum(client.get("clients", 1) for client in members)
        train, test = sum(c["train"] for c in members), sum(c["test"] for c in members)
        held = "held out, " if members[0]["held_out"] else ""
        console.print(f"  {domain}: {held}{count:,} client{'s'[: count > 1]}, {train} train, {test} test images")
    if engine := document.get("engine"):
        size = f" of {engine['cohort_size']} clients at most" if "cohort_size" in engine else ""
        console.print(f"engine: {engine['name']}{size}: {engine['why']}", markup=False, soft_wrap=True)
    if (workers := document["workers"]) > 1:
        console.print(f"workers: {workers} processes take the clients side by side")
    if "entries" in document:
        console.print(plan_table(document["entries"]).rich())


def show_result(result: Mapping[str, Any], depth: Depth, *, as_json: bool) -> None:
    """Print a result: the answer and its table, or the document."""
    if as_json:
        return print_json(result)
    console = out()
    say_one(result, depth)
    if missing := result["final"].get("missing"):
        whom = ", ".join(missing["domains"]) or f"client {', '.join(map(str, missing['clients']))}"
        share = f"{100 * result['final']['answered']:.0f} %"
        console.print(
            f"INCOMPLETE: {share} of the clients answered the last evaluation; missing: {whom}.", markup=False
        )
    if result["rejected_updates"]:
        console.print(f"{result['rejected_updates']} updates were rejected; see rounds.jsonl.")
    console.print(f"record: {result['run']}", markup=False, soft_wrap=True)
    return None
