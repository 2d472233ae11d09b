"""``fednorm verify``: golden traces, determinism."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fednorm.cli import err, fail, out, print_json
from fednorm.commands.options import collect
from fednorm.config import RunConfig
from fednorm.errors import DataError
from fednorm.federated.simulate import simulate
from fednorm.federated.workbench import Workbench
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


SMALL = {
    "model.width": 8,
    "data.train_per_client": 64,
    "data.test_per_domain": 50,
    "rounds.num_rounds": 4,
    "strategy.name": "fedbn",
}


class _Cut:
    """An observer that cuts a run short after some rounds, as a kill would."""

    def __init__(self, after: int) -> None:
        self._after = after

    def begin(self, bench: Workbench, first_round: int) -> None:
        """Do nothing."""

    def round(self, line: Any) -> None:
        """Stop the run at the chosen round."""
        if line["round"] == self._after:
            raise KeyboardInterrupt


def run_determinism(config: Path | None, *, data_dir: Path | None, settings: Sequence[str], as_json: bool) -> None:
    """Run twice, and once with a cut in the middle; leave with code 1 if a bit differs."""
    flags: dict[str, Any] = {} if config else dict(SMALL)
    flags["data.dir"] = None if data_dir is None else str(data_dir)
    resolved = collect(config, flags, settings)
    with tempfile.TemporaryDirectory() as folder:
        first = _tensors(resolved, Path(folder) / "first")
        again = _tensors(resolved, Path(folder) / "again")
        cut = _tensors(resolved, Path(folder) / "cut", cut_after=max(1, resolved.rounds.num_rounds // 2))
    checks = {"run again": _equal(first, again), "cut short and gone on with": _equal(first, cut)}
    if as_json:
        print_json({"checks": checks, "tensors": len(first), "config": resolved.to_dict()})
    else:
        for name, same in checks.items():
            out().print(f"{name}: {'the same' if same else 'DIFFERENT'}, {len(first)} tensors bit for bit")
    if not all(checks.values()):
        fail("the numbers depend on something that is not in the configuration", 1)


def _tensors(config: RunConfig, runs: Path, cut_after: int = 0) -> dict[str, Tensor]:
    if cut_after and cut_after < config.rounds.num_rounds:
        try:
            simulate(config, runs=runs, observer=_Cut(cut_after))
        except KeyboardInterrupt:
            err().print(f"cut after round {cut_after}, going on")
    result = simulate(config, runs=runs)
    return load_file(Path(result["run"]) / "model.safetensors")


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
