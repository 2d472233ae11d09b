"""The replay of SGDP's and AdamP's traces: it passes on what was recorded, and sees everything that was altered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_traces import GOLDEN, read, written

from fednorm.optimizers import adamp, sgdp
from fednorm.verify.golden import Status, replay

METHODS = {"sgdp": "sgdp (clovaai/AdamP)", "adamp": "adamp (clovaai/AdamP)"}


@pytest.mark.parametrize("name", METHODS)
def test_recorded_runs_are_reproduced_under_any_file_name(name: str, tmp_path: Path) -> None:
    outcome = replay(written(tmp_path / "dyt.npz", read(name)))
    assert (outcome.status, outcome.method) == (Status.PASS, METHODS[name]), outcome.detail
    assert outcome.largest_error is not None
    assert outcome.largest_error < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_change_in_any_recorded_array_is_seen(name: str, tmp_path: Path) -> None:
    arrays = read(name)
    keys = [key for key in arrays if key not in ("hparams", "source")]
    assert len(keys) > 100
    for key in keys[::11]:
        altered = arrays[key].copy()
        altered.reshape(-1)[-1] += 1 if altered.dtype.kind == "i" else 1e-6
        outcome = replay(written(tmp_path / "altered.npz", {**arrays, key: altered}))
        assert outcome.status is Status.FAIL, key


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sgdp", {"wd_ratio": 0.5}),
        ("sgdp", {"delta": 0.0}),
        ("sgdp", {"momentum": 0.8}),
        ("adamp", {"wd_ratio": 0.5}),
        ("adamp", {"delta": 0.0}),
        ("adamp", {"betas": [0.8, 0.999]}),
        ("adamp", {"lr": 0.0}),
    ],
)
def test_hyper_parameters_are_taken_from_the_file(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    arrays = read(name)
    hparams = json.loads(str(arrays["hparams"]))
    for settings in hparams["configs"].values():
        settings.update(change)
    outcome = replay(written(tmp_path / "other.npz", {**arrays, "hparams": np.array(json.dumps(hparams))}))
    assert (outcome.status, outcome.method) == (Status.FAIL, METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_a_formula_that_is_wrong_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sgdp, adamp):
        monkeypatch.setattr(module, "remove_radial", lambda *_, **__: 0)
    assert replay(GOLDEN / f"{name}.npz").status is Status.FAIL
