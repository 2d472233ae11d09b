"""``fednorm verify``: golden traces, determinism."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fednorm.cli.console import err, fail, out, print_json
from fednorm.cli.options import collect_values, nested
from fednorm.config import RunConfig, merge, resolve
from fednorm.errors import DataError
from fednorm.federation.simulate import simulate
from fednorm.streams.simulate import simulate as simulate_stream
from fednorm.streams.workbench import ContinualWorkbench
from fednorm.verify import golden


def run_golden(folder: Path, *, as_json: bool) -> None:
    """Replay a folder of traces, print a line each, and leave with code 1 if one failed."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Give a folder that holds traces (.npz).")
    replays = golden.replay_folder(folder)
    if not replays:
        raise DataError(f"{folder} holds no trace (.npz).")
    rows = [
        {
            "file": replay.file.name,
            "method": replay.method,
            "largest_error": replay.largest_error,
            "status": replay.status.value,
            "passed": replay.passed,
            "detail": replay.detail,
        }
        for replay in replays
    ]
    failed = [row["file"] for row in rows if row["status"] in ("fail", "unreadable")]
    if as_json:
        print_json({"traces": rows})
    else:
        width = max(len(str(row["file"])) for row in rows)
        for row in rows:
            error, method = row["largest_error"], f"{row['method']}: " if row["method"] else ""
            shown = "" if error is None else f"{error:.1e}"
            line = f"{row['file']:<{width}}  {row['status']:<9}  {shown:>7}  {method}{row['detail']}"
            out().print(line, markup=False, soft_wrap=True)
    if failed:
        fail(f"{len(failed)} traces were not reproduced: {', '.join(map(str, failed))}", 1)


SMALL: Mapping[str, Mapping[str, Any]] = {
    "federated": {
        "model.width": 8,
        "data.train_per_client": 64,
        "data.test_per_domain": 50,
        "rounds.num_rounds": 4,
        "strategy.name": "fedbn",
    },
    "continual": {
        "model.width": 8,
        "norm.name": "adab2n",
        "scenario.train_per_experience": 100,
        "scenario.test_per_experience": 50,
        "train.epochs": 1,
        "train.batch_size": 10,
        "train.checkpoint_every": 7,
    },
}
"""The run that is verified where no configuration is given, by kind."""


class _Cut:
    """An observer that cuts a run short after some rounds or steps, as a kill would."""

    def __init__(self, after: int) -> None:
        self._after = after

    def begin(self, *_: Any) -> None:
        """Do nothing."""

    def round(self, line: Any) -> None:
        """Stop a federation at the chosen round."""
        self.step(line["round"])

    def step(self, done: int) -> None:
        """Stop a stream at the chosen step."""
        if done == self._after:
            raise KeyboardInterrupt

    def experience(self, line: Any) -> None:
        """Do nothing."""


def run_determinism(config: Path | None, *, data_dir: Path | None, settings: Sequence[str], as_json: bool) -> None:
    """Run twice, and once with a cut in the middle; leave with code 1 if a bit differs."""
    flags: dict[str, Any] = {"data.dir": None if data_dir is None else str(data_dir)}
    values = collect_values(config, flags, settings)
    if config is None:
        values = merge(nested(SMALL["continual" if values.get("kind") == "continual" else "federated"]), values)
    resolved = resolve(values)
    with tempfile.TemporaryDirectory() as folder:
        first = _tensors(resolved, Path(folder) / "first")
        again = _tensors(resolved, Path(folder) / "again")
        cut = _tensors(resolved, Path(folder) / "cut", cut_short=True)
    checks = {"run again": _equal(first, again), "cut short and gone on with": _equal(first, cut)}
    if as_json:
        print_json({"checks": checks, "tensors": len(first), "config": resolved.to_dict()})
    else:
        for name, same in checks.items():
            out().print(f"{name}: {'the same' if same else 'DIFFERENT'}, {len(first)} tensors bit for bit")
    if not all(checks.values()):
        fail("the numbers depend on something that is not in the configuration", 1)


def _tensors(config: RunConfig, runs: Path, *, cut_short: bool = False) -> dict[str, Tensor]:
    if cut_short:
        what, after = _middle(config)
        try:
            _simulate(config, runs, _Cut(after))
        except KeyboardInterrupt:
            err().print(f"cut after {what} {after}, going on")
    return load_file(Path(_simulate(config, runs, None)["run"]) / "model.safetensors")


def _middle(config: RunConfig) -> tuple[str, int]:
    """Return where a run is cut, a round or a step; 0 where it is too short for that."""
    if config.kind == "continual":
        return "step", sum(ContinualWorkbench(config).steps) // 2
    return "round", config.rounds.num_rounds // 2


def _simulate(config: RunConfig, runs: Path, cut: _Cut | None) -> dict[str, Any]:
    if config.kind == "continual":
        return simulate_stream(config, runs=runs, observer=cut)
    return simulate(config, runs=runs, observer=cut)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
