"""Options that several commands have, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fednorm.cards import FAMILIES
from fednorm.errors import canonical
from fednorm.study.recipes import recipe_names


def names(*families: str) -> Callable[[str], list[str]]:
    """Return what completes a name of families that is typed in part; no method is imported for it.

    Args:
        families: Families' plurals, e.g. ``norms``; ``studies`` for those that ship.
    """

    def complete(incomplete: str) -> list[str]:
        known = [name for family in families if family in FAMILIES for name in FAMILIES[family].names]
        known += recipe_names() if "studies" in families else []
        return [name for name in known if name.startswith(canonical(incomplete))]

    return complete


KINDS = (*FAMILIES, "studies")
"""What ``fednorm list`` lists."""

NormOption = Annotated[
    str | None,
    typer.Option(
        "--norm", help="Norm: fednorm list norms; the strategy's own by default.", autocompletion=names("norms")
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Model: fednorm list models; timm:NAME; package.module:callable.",
        autocompletion=names("models"),
    ),
]
OptimizerOption = Annotated[
    str | None,
    typer.Option("--optimizer", help="Optimizer: fednorm list optimizers.", autocompletion=names("optimizers")),
]
RateOption = Annotated[
    float | None, typer.Option("--learning-rate", "--lr", help="Learning rate, per step, before the schedule.")
]

ScenarioOption = Annotated[
    str | None,
    typer.Option(
        "--scenario",
        help="Scenario: fednorm list scenarios. In a federation each client learns on a stream of its own.",
        autocompletion=names("scenarios"),
    ),
]
LearnerOption = Annotated[
    str | None,
    typer.Option("--learner", help="What learns: fednorm list learners.", autocompletion=names("learners")),
]
MemoryOption = Annotated[int | None, typer.Option("--memory-size", help="Samples a learner remembers.")]
StrategyOption = Annotated[
    str | None,
    typer.Option("--strategy", help="Strategy: fednorm list strategies.", autocompletion=names("strategies")),
]

DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="Benchmark (fednorm list data), or package.module:yours.", autocompletion=names("data")
    ),
]
StudyArgument = Annotated[
    str,
    typer.Argument(
        help="A study's TOML file, or the name of one that ships: fednorm recipes.", autocompletion=names("studies")
    ),
]

RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the records.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
DataDirOption = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the real data.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps; cpu by default.")]
AmpOption = Annotated[str | None, typer.Option(help="bf16: forward passes under autocast in bfloat16; none.")]
CompileOption = Annotated[bool | None, typer.Option("--compile", help="Forward passes go through torch.compile.")]
EngineOption = Annotated[
    str | None,
    typer.Option(help="client: one after the other; cohort: many small clients at once; auto: cohorts where they pay."),
]
CohortSizeOption = Annotated[int | None, typer.Option(help="Most clients of a cohort; by the model's size.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(help="Processes that take the clients side by side, to the same bits; by default what pays."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any configuration key; repeatable.")
]

ScheduleOption = Annotated[
    str | None, typer.Option(help="Of the learning rate: constant, linear, cosine, step or exponential.")
]
AugmentOption = Annotated[
    str | None, typer.Option(help="none, or any of crop,flip,rotate,jitter,resized_crop; separated by commas.")
]

DetailsOption = Annotated[
    bool, typer.Option("--details", help="All tables, with all their columns, where not the one that answers.")
]
NotesOption = Annotated[
    bool, typer.Option("--notes", help="All that must be known of the numbers, beneath each table.")
]
ReduceOption = Annotated[
    float | None,
    typer.Option("--reduce", metavar="FACTOR", help="A smaller study: 0.1 for a tenth of rounds, images, clients."),
]


def whole(number: float | None) -> float | int | None:
    """Return a number as an integer where it is whole, so that 1 and 1.0 are one configuration."""
    return int(number) if number is not None and number.is_integer() else number


LogOption = Annotated[
    list[str] | None,
    typer.Option("--log", help="Tell the run as it goes: tensorboard, wandb or mlflow; repeatable.", metavar="TOOL"),
]
LogDirOption = Annotated[Path | None, typer.Option("--log-dir", help="Folder of what --log writes; logs.")]
RuntimeOption = Annotated[
    str, typer.Option(help="in-process, flower (flwr run on Ray), or deployment (sites on a running SuperLink).")
]
SuperlinkOption = Annotated[str, typer.Option(help="Address of the SuperLink of a deployment, host:port.")]
RootsOption = Annotated[
    Path | None, typer.Option("--root-certificates", help="Certificate (PEM) that the SuperLink's is checked against.")
]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Speak to the SuperLink without encryption.")]
