"""The apps of a benchmark case for Flower's own simulation runtime: fednorm's, with a synthetic federation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fednorm.bench.case import Case
from fednorm.federation.client import make_client_app
from fednorm.federation.server import serve
from fednorm.federation.workbench import Workbench
from fednorm.records.record import RunRecord

STAMPS = "stamps.txt"
"""The file of the run's folder that says when each round ended, in seconds since the epoch, a line a round."""


class _Stamps:
    """Notes when each round ended."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, bench: Workbench, first_round: int) -> None:
        """Do nothing: the launcher knows when it began."""

    def round(self, line: Mapping[str, Any]) -> None:  # noqa: ARG002 - an Observer's method
        """Append the time to the file."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")


@lru_cache(maxsize=1)
def _workbench(case: str) -> Workbench:
    return Case(**json.loads(case)).workbench()


def _workbench_of(context: Context) -> Workbench:
    return _workbench(str(context.run_config["case"]))


server = ServerApp()
client = make_client_app(_workbench_of)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the case, and leave the final model and the rounds' times in the folder that the configuration names."""
    bench = _workbench_of(context)
    runs = Path(str(context.run_config["runs"]))
    serve(grid, bench, RunRecord(runs, bench.config), _Stamps(runs / STAMPS))
