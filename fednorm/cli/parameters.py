"""Options that several commands have, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the records.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
DataDirOption = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the real data.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps; cpu by default.")]
AmpOption = Annotated[str | None, typer.Option(help="bf16: forward passes under autocast in bfloat16; none.")]
CompileOption = Annotated[bool | None, typer.Option("--compile", help="Forward passes go through torch.compile.")]
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
