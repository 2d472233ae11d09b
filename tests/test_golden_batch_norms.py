"""The replay of the traces of norms of a batch or a federation: they pass, and every alteration is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden_traces import read, with_hparams, written

from fednorm.verify.golden import Status, replay

METHODS = {
    "powernorm": ("power_norm", 73),
    "un_nofilter": ("unified_norm", 145),
    "un_filter": ("unified_norm", 145),
    "bcn_batch": ("batch_channel_norm", 38),
    "bcn_estimate": ("batch_channel_norm (estimate)", 38),
    "hybridbn_layer": ("hybrid_bn", 57),
    "hybridbn_merge": ("hybrid_bn (second pass and merge)", 196),
}
"""The method of each trace, and how many values its replay compares."""
GIVEN = {"x", "gy", "pad_mask", "pad_mask_given", "moving_speed", "before"}
"""What a step was given, as opposed to what the official code computed."""


def computed(name: str, arrays: dict[str, Any]) -> list[str]:
    if name == "hybridbn_merge":  # local training is not replayed: what it made of the weights is given
        heads = {"buffers", "global_out", "test_buffers", "test_global", "test_y"}
        kept = [key for key in arrays if ".trained." in key and ".global_" in key]  # training leaves these alone
        return [*(key for key in arrays if heads & set(key.split(".")[1:3])), *kept]
    heads = ("step", "eval", "groupscaling")
    return [key for key in arrays if key.startswith(heads) and key.split(".")[1] not in GIVEN]


@pytest.mark.parametrize("name", METHODS)
def test_every_recorded_result_is_reproduced(name: str, tmp_path: Path) -> None:
    outcome = replay(written(tmp_path / "adamp.npz", read(name)))  # known by its contents
    method, count = METHODS[name]
    assert (outcome.status, outcome.method) == (Status.PASS, method), outcome.detail
    assert outcome.detail.startswith(f"{count} arrays reproduced")
    assert outcome.largest_error is not None
    assert outcome.largest_error < 1e-10


@pytest.mark.parametrize("name", METHODS)
def test_a_change_in_any_recorded_result_is_seen(name: str, tmp_path: Path) -> None:
    """All at once: each is compared by itself, and what a round begins with is taken from the file."""
    arrays = read(name)
    altered = {key: arrays[key].copy() for key in computed(name, arrays)}
    # The number of skipped steps stands in hparams; what a round begins with is compared with what the last one left.
    count = METHODS[name][1] - name.startswith("un_")
    assert len(altered) == count - (22 if name == "hybridbn_merge" else 0)
    for values in altered.values():
        values.reshape(-1)[-1] += 1 if values.dtype.kind == "i" else 1e-6 * max(1, abs(values.reshape(-1)[-1]))
    outcome = replay(written(tmp_path / "altered.npz", {**arrays, **altered}))
    assert (outcome.status, outcome.method) == (Status.FAIL, METHODS[name][0])
    assert outcome.detail.startswith(f"{count} of {METHODS[name][1]} arrays differ")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("powernorm", {"alpha_fwd": 0.8}),
        ("powernorm", {"alpha_bkw": 0.8}),
        ("powernorm", {"warmup_iters": 5}),
        ("powernorm", {"group_num": 1}),
        ("powernorm", {"group_scaling_eps": 1e-3}),
        ("un_filter", {"momentum": 0.8}),
        ("un_filter", {"outlier_filtration": False}),
        ("un_nofilter", {"warmup_iters": 6}),
        ("un_nofilter", {"jump": {}}),
        ("un_nofilter", {"window_size": 4}),
        ("un_filter", {"skipped_per_step": [0] * 14}),
        ("bcn_batch", {"num_groups": 2}),
        ("bcn_batch", {"bn_momentum": 0.2}),
        ("bcn_batch", {"eps_bn": 1e-3}),
        ("bcn_estimate", {"eps": 1e-3}),
        ("hybridbn_layer", {"eps": 1e-3}),
        ("hybridbn_merge", {"avg_momentum_round": 0.01}),
        ("hybridbn_merge", {"client_weights": [1, 1, 1]}),
        ("hybridbn_merge", {"client_weights": [12, 8]}),
    ],
)
def test_settings_are_taken_from_the_file(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    outcome = replay(written(tmp_path / "other.npz", with_hparams(read(name), **values)))
    assert (outcome.status, outcome.method) == (Status.FAIL, METHODS[name][0])
    assert "\n" not in outcome.detail


@pytest.mark.parametrize("name", METHODS)
def test_a_trace_that_lacks_an_array_fails_in_words(name: str, tmp_path: Path) -> None:
    arrays = read(name)
    key = "round1.test_y" if name == "hybridbn_merge" else computed(name, arrays)[-1]
    del arrays[key]
    outcome = replay(written(tmp_path / "short.npz", arrays))
    assert (outcome.status, outcome.detail) == (Status.FAIL, f"cannot be replayed: the trace has no array {key!r}")
