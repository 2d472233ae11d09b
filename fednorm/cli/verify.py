"""``fednorm verify``: golden traces, determinism."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fednorm.cli.console import err, fail, out, print_json
from fednorm.cli.options import collect_values, nested
from fednorm.config import merge, resolve
from fednorm.errors import DataError
from fednorm.verify import golden
from fednorm.verify.determinism import ROUNDS, checks_of, determinism_table


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
    "federated_continual": {
        "kind": "federated_continual",
        "model.width": 8,
        "norm.name": "adab2n",
        "strategy.name": "fedbn",
        "learner.memory_size": 40,
        "scenario.num_experiences": 2,
        "scenario.train_per_experience": 100,
        "scenario.test_per_experience": 50,
        "grid.clients": 2,
        "rounds.per_experience": 2,
        "train.batch_size": 10,
    },
}
"""The run that is verified where no configuration is given, by kind."""


def run_determinism(
    config: Path | None, *, data_dir: Path | None, settings: Sequence[str], rounds: int | None, as_json: bool
) -> None:
    """Run in several ways that must compute the same; print a table, and leave with code 1 if a bit differs."""
    values = collect_values(config, {"data.dir": None if data_dir is None else str(data_dir)}, settings)
    kind = values.get("kind", "federated_continual" if "grid" in values else "federated")
    if config is None:
        values = merge(nested(SMALL.get(kind, {})), values)
    if rounds is not None:
        name = "per_experience" if kind == "federated_continual" else "num_rounds"
        values = merge(values, {"rounds": {name: rounds}})
    resolved = resolve(values)
    if resolved.kind == "federated" and rounds is None and resolved.rounds.num_rounds > ROUNDS:
        err().print(f"{ROUNDS} of {resolved.rounds.num_rounds} rounds; --rounds asks for more")
        resolved = resolve(merge(values, {"rounds": {"num_rounds": ROUNDS}}))

    def tell(text: str) -> None:
        err().print(text, markup=False, soft_wrap=True)

    with tempfile.TemporaryDirectory() as folder:
        checks = list(checks_of(resolved, Path(folder), tell))
    if as_json:
        rows = [{**dataclasses.asdict(check), "same": check.same} for check in checks]
        same = {check.name: check.same for check in checks}
        print_json({"checks": same, "rows": rows, "tensors": checks[0].tensors, "config": resolved.to_dict()})
    else:
        out().print(determinism_table(checks, f"Determinism: {resolved.title}").rich())
    if not all(check.same for check in checks):
        fail("the numbers depend on something that is not in the configuration", 1)
