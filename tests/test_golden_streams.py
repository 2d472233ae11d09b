"""The replay of the traces of norms made for streams: they pass, and every alteration is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_traces import GOLDEN, read, written

from fednorm.verify.golden import Status, replay

METHODS = {
    "adab2n_kappa_zero": ("adab2n", 153),
    "adab2n_kappa_mid": ("adab2n", 153),
    "adab2n_kappa_one": ("adab2n", 153),
    "cn_g4": ("continual_norm", 28),
    "cn_g8": ("continual_norm", 28),
    "tbbn": ("task_balanced_norm", 57),
    "batchrenorm_avalanche_given": ("batch_renorm (avalanche-lib)", 84),
    "batchrenorm_avalanche_default": ("batch_renorm (avalanche-lib)", 84),
}
"""The method of each trace, and how many recorded arrays its replay compares."""
GIVEN = ("x", "gy", "labels", "cur_tasks", "task_ids", "set_counts_called", "lambd", "task")
"""What a step was given, as opposed to what the official code computed."""
LEFT_OUT = {
    "cn_g4": ("num_batches_tracked",),
    "cn_g8": ("num_batches_tracked",),
    # Recorded after the gradients, which are compared: None is stored as zeros, and psi's gradient here is zeros.
    "adab2n_kappa_zero": ("task_weight_grad_is_none",),
    "adab2n_kappa_mid": ("task_weight_grad_is_none",),
    "adab2n_kappa_one": ("task_weight_grad_is_none",),
}


def computed(name: str, arrays: dict[str, Any]) -> list[str]:
    skipped = (*GIVEN, *LEFT_OUT.get(name, ()))
    keys = [key for key in arrays if key.startswith(("step", "eval", "final"))]
    keys = [key for key in keys if key.split(".")[1] not in skipped]
    if not name.startswith("adab2n"):
        return keys
    # Counts that the official layer was not given (before the first set_counts) or did not use (the first task).
    first = {f"step{s}.{key}" for s in range(3) for key in ("sample_task_counts", "task_counts_extended")}
    return [key for key in keys if key not in first]


@pytest.mark.parametrize("name", METHODS)
def test_every_recorded_result_is_reproduced(name: str) -> None:
    outcome = replay(GOLDEN / f"{name}.npz")
    method, count = METHODS[name]
    assert (outcome.status, outcome.method) == (Status.PASS, method), outcome.detail
    assert f"{count} arrays reproduced" in outcome.detail
    assert len(computed(name, read(name))) == count
    assert outcome.largest_error is not None
    assert outcome.largest_error < 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_a_change_in_any_recorded_result_is_seen(name: str, tmp_path: Path) -> None:
    """All at once: what one array was altered by does not reach another's comparison."""
    arrays = read(name)
    altered = {key: arrays[key].copy() for key in computed(name, arrays)}
    for values in altered.values():
        values.reshape(-1)[-1] += 1 if values.dtype.kind == "i" else 1e-6
    outcome = replay(written(tmp_path / "altered.npz", {**arrays, **altered}))
    assert (outcome.status, outcome.method) == (Status.FAIL, METHODS[name][0])
    assert outcome.detail.startswith(f"{METHODS[name][1]} of {METHODS[name][1]} arrays differ")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("adab2n_kappa_mid", "kappa", 0.5),
        ("adab2n_kappa_one", "momentum", 0.2),
        ("adab2n_kappa_mid", "eps", 1e-3),
        ("adab2n_kappa_mid", "lr", 0.4),
        ("cn_g4", "num_groups", 8),
        ("cn_g4", "momentum", 0.2),
        ("tbbn", "batch_ratio", 1),
        ("tbbn", "eps", 1e-3),
        ("batchrenorm_avalanche_given", "max_r_max", 1.2),
        ("batchrenorm_avalanche_given", "max_d_max", 0.1),
        ("batchrenorm_avalanche_given", "r_d_max_inc_step", 0.01),
        ("batchrenorm_avalanche_given", "r_max", 2.0),
    ],
)
def test_hyper_parameters_are_taken_from_the_file(name: str, setting: str, value: float, tmp_path: Path) -> None:
    arrays = read(name)
    hparams = json.loads(str(arrays["hparams"]))
    assert hparams[setting] != value
    changed = {**arrays, "hparams": np.array(json.dumps({**hparams, setting: value}))}
    outcome = replay(written(tmp_path / "other.npz", changed))
    assert (outcome.status, outcome.method) == (Status.FAIL, METHODS[name][0])


def test_what_the_replay_of_continual_norm_leaves_out_is_said() -> None:
    assert "num_batches_tracked left out" in replay(GOLDEN / "cn_g4.npz").detail
