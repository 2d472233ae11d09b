"""The replay of the traces of token norms: they pass, and every alteration is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_traces import read, written

from fednorm.verify.golden import Status, replay

METHODS = {
    "dyt": ("dyt", 60),
    "pre_rmsnorm": ("rms_norm and crms_norm (exact rewrite)", 35),
    "zero_mean_linear": ("rms_norm and crms_norm (zero-mean linear layer)", 7),
}
"""The method of each trace, and how many recorded arrays its replay compares."""


def computed(name: str, arrays: dict[str, Any]) -> list[str]:
    """Return the keys of what the official code computed, as opposed to what it was given."""
    if name == "dyt":
        given = (".x", ".gy", *(f"step0.{tensor}" for tensor in ("alpha", "weight", "bias")))
        keys = [key for key in arrays if not key.endswith(given)]
        return [key for key in keys if key.startswith(("channels_", "convert.after.", "convert.y", "convert2d.y"))]
    if name == "pre_rmsnorm":
        keys = [key for key in arrays if key.startswith(("pre_rms.", "pre_crms.", "out.", "norm."))]
        return [key for key in keys if not key.endswith((".x", ".gy"))]
    return [key for key in arrays if key.startswith(("y", "grad_", "module_y"))]


@pytest.mark.parametrize("name", METHODS)
def test_every_recorded_result_is_reproduced_and_known_by_its_contents(name: str, tmp_path: Path) -> None:
    outcome = replay(written(tmp_path / "adamp.npz", read(name)))
    method, count = METHODS[name]
    assert (outcome.status, outcome.method) == (Status.PASS, method), outcome.detail
    assert f"{count} arrays reproduced" in outcome.detail
    assert len(computed(name, read(name))) == count
    assert outcome.largest_error is not None
    assert outcome.largest_error < 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_a_change_in_any_recorded_result_is_seen(name: str, tmp_path: Path) -> None:
    arrays = read(name)
    altered = {key: arrays[key].copy() for key in computed(name, arrays)}
    for values in altered.values():
        values.reshape(-1)[-1] += 1e-4 if values.dtype == np.float32 else 1e-6
    outcome = replay(written(tmp_path / "altered.npz", {**arrays, **altered}))
    assert (outcome.status, outcome.method) == (Status.FAIL, METHODS[name][0])
    assert outcome.detail.startswith(f"{METHODS[name][1]} of {METHODS[name][1]} arrays differ")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("dyt", "alpha_init_value", 0.4),
        ("dyt", "convert_alpha_init", 0.4),
        ("dyt", "lr", 0.02),
        ("pre_rmsnorm", "eps_in_model", 1e-3),
        ("pre_rmsnorm", "heads", 4),
        ("zero_mean_linear", "eps", 1e-2),
    ],
)
def test_hyper_parameters_are_taken_from_the_file(name: str, setting: str, value: float, tmp_path: Path) -> None:
    arrays = read(name)
    hparams = json.loads(str(arrays["hparams"]))
    assert hparams[setting] != value
    changed = {**arrays, "hparams": np.array(json.dumps({**hparams, setting: value}))}
    outcome = replay(written(tmp_path / "other.npz", changed))
    assert (outcome.status, outcome.method) == (Status.FAIL, METHODS[name][0])
