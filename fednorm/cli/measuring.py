"""``fednorm bench``, ``verify`` and ``analyse``: the commands that measure speed, check numbers, and papers' claims."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fednorm.cli.parameters import DataDirOption, JsonOption, SetOption
from fednorm.errors import ConfigError
from fednorm.signals import starting

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed, side by side in one run.")
verify_app = typer.Typer(no_args_is_help=True, help="Check the numbers.")


@bench_app.command("engine")
def bench_engine(
    case: Annotated[str, typer.Option(help="Cases, separated by commas; all of them by default.")] = "",
    against: Annotated[
        str | None,
        typer.Option(
            help="Engines to compare with, separated by commas: bare, workers, cohort, flower, bare-contiguous; other "
            "simulators (the extra bench): fluke, blazefl, pfl. By default bare,workers; on another device bare,cohort."
        ),
    ] = None,
    strategy: Annotated[str, typer.Option(help="Of every case, with its norm; each case's own by default.")] = "",
    device: Annotated[str, typer.Option(help="Where clients train: cpu, cuda, mps.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Repetitions of each.")] = 3,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Time the in-process runtime beside a bare PyTorch loop, Flower's Ray runtime and other simulators."""
    with starting():
        from fednorm.cli.bench import run_bench_engine

    run_bench_engine(case, against, repeats, strategy=strategy, device=device, markdown=markdown, as_json=as_json)


@bench_app.command("continual")
def bench_continual(
    case: Annotated[str, typer.Option(help="Cases, separated by commas; all of them by default.")] = "",
    against: Annotated[
        str, typer.Option(help="Engines to compare with, separated by commas; all but the compiled ones by default.")
    ] = "",
    layers: Annotated[
        bool, typer.Option("--layers", help="Time normalization layers beside nn.BatchNorm2d instead of whole steps.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Repetitions of each.")] = 5,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Time a step on a stream beside a bare PyTorch loop and Avalanche's own ER_ACE and Replay."""
    with starting():
        from fednorm.cli.bench_continual import run_bench_continual, run_bench_layers

    if layers and (case or against):
        raise ConfigError("--layers times layers alone: leave --case and --against out, or --layers.")
    if layers:
        run_bench_layers(repeats, markdown=markdown, as_json=as_json)
    else:
        run_bench_continual(case, against, repeats, markdown=markdown, as_json=as_json)


@bench_app.command("layers")
def bench_layers(
    norm: Annotated[str, typer.Option(help="Norms, separated by commas; all of them by default.")] = "",
    repeats: Annotated[int, typer.Option(help="Turns of each.")] = 3,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure time and memory of every norm beside nn.BatchNorm2d and nn.LayerNorm on the same tensors."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler tells of each of its starts
    with starting():
        from fednorm.cli.bench_layers import run_bench_norms

    run_bench_norms(norm, repeats, markdown=markdown, as_json=as_json)


@bench_app.command("scale")
def bench_scale(
    clients: Annotated[
        str, typer.Option(help="Numbers of clients, separated by commas; 10 to 100,000 by default.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Timed rounds of each.")] = 5,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Time a round in which 100 of many clients are sampled, with what it takes of memory and disk."""
    with starting():
        from fednorm.cli.bench_scale import run_bench_scale

    run_bench_scale(clients, rounds, markdown=markdown, as_json=as_json)


@verify_app.command("golden")
def verify_golden(
    folder: Annotated[Path, typer.Argument(help="Folder of traces (.npz).")], as_json: JsonOption = False
) -> None:
    """Replay traces recorded from official implementations with our own classes."""
    with starting():
        from fednorm.cli.verify import run_golden

    run_golden(folder, as_json=as_json)


@verify_app.command("determinism")
def verify_determinism(
    config: Annotated[Path | None, typer.Argument(help="Configuration file (TOML); a small run by default.")] = None,
    data_dir: DataDirOption = None,
    settings: SetOption = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of each run; at most 4 by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a configuration twice, cut short and gone on with, and with 1, 2 and 4 workers; compare bit for bit."""
    with starting():
        from fednorm.cli.verify import run_determinism

    run_determinism(config, data_dir=data_dir, settings=settings or [], rounds=rounds, as_json=as_json)


def analyse(
    name: Annotated[
        str | None, typer.Argument(help="The analysis, or the file of one (.json); all are listed without.")
    ] = None,
    data: Annotated[str, typer.Option(help="Benchmark (fednorm list data), trained on as a whole.")] = "digits_mini",
    data_dir: DataDirOption = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "1,2,3",
    steps: Annotated[int, typer.Option(help="Updates of each training; 0 for the analysis's own number.")] = 0,
    document: Annotated[Path | None, typer.Option("--out", help="Also write the numbers to this file (.json).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure on small networks what papers say that a normalization does to a training."""
    with starting():
        from fednorm.cli.analyse import run_analyse

    run_analyse(
        name, data=data, data_dir=data_dir, seeds=seeds, steps=steps, out=document, markdown=markdown, as_json=as_json
    )
