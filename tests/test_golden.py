"""The replay of recorded traces: it passes on what was recorded, and sees everything that was altered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_traces import GOLDEN, read, written

from fednorm.errors import DataError
from fednorm.verify.golden import Status, replay, replay_folder

METHODS = {
    "scaled_ws_timm": "sws (timm)",
    "scaled_ws_nfnets": "sws (nfnets_pytorch)",
    "scaled_ws_deepmind": "sws (DeepMind)",
    "ws_conv": "ws_group_norm (convolution)",
    "agc_timm": "agc (timm)",
    "agc_deepmind": "agc (DeepMind)",
    "sgd_agc_nfnets": "agc with sgd (nfnets_pytorch)",
}


@pytest.mark.parametrize("name", METHODS)
def test_recorded_traces_are_reproduced(name: str) -> None:
    outcome = replay(GOLDEN / f"{name}.npz")
    assert (outcome.status, outcome.method) == (Status.PASS, METHODS[name]), outcome.detail
    assert outcome.largest_error is not None
    assert outcome.largest_error < 1e-10


@pytest.mark.parametrize("name", METHODS)
def test_traces_are_known_by_contents_not_by_file_name(name: str, tmp_path: Path) -> None:
    outcome = replay(written(tmp_path / "fedbn_comm.npz", read(name)))
    assert (outcome.status, outcome.method) == (Status.PASS, METHODS[name])


def recorded_results(name: str, arrays: dict[str, Any]) -> list[str]:
    """Return the keys that hold what the official code computed, as opposed to what it was given."""
    if name.startswith("agc"):
        return [key for key in arrays if key.startswith("grad_out.")]
    if name.startswith("sgd"):
        return [key for key in arrays if ".param." in key or ".momentum_buffer." in key]
    unbiased = {"plain"} if name == "ws_conv" else set()
    return [
        key
        for key in arrays
        if key.rsplit(".", 1)[-1].startswith(("grad_", "standardized_")) or key.endswith(".y")
        if not (key.endswith("grad_bias") and key.split(".")[0] in unbiased)
    ]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", METHODS)
def test_a_change_in_any_recorded_array_is_seen(name: str, tmp_path: Path) -> None:
    arrays = read(name)
    keys = recorded_results(name, arrays)
    assert len(keys) > 5
    for key in keys:
        altered = arrays[key].copy()
        altered.reshape(-1)[-1] += 1e-6
        outcome = replay(written(tmp_path / "altered.npz", {**arrays, key: altered}))
        assert outcome.status is Status.FAIL, key
        assert key in outcome.detail
        assert outcome.largest_error == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_not_a_number_never_passes(name: str, tmp_path: Path) -> None:
    arrays = read(name)
    key = recorded_results(name, arrays)[0]
    spoiled = np.full_like(arrays[key], np.nan)
    outcome = replay(written(tmp_path / "nan.npz", {**arrays, key: spoiled}))
    assert (outcome.status, outcome.largest_error) == (Status.FAIL, float("inf"))


def change_hparam(arrays: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    hparams = json.loads(str(arrays["hparams"]))
    change(hparams)
    return {**arrays, "hparams": np.array(json.dumps(hparams))}


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("scaled_ws_timm", ("plain", "eps"), 1e-2),
        ("scaled_ws_timm", ("groups2", "gamma"), 1.0),
        ("scaled_ws_timm", ("std_unscaled", "eps"), 1e-2),
        ("scaled_ws_nfnets", ("eps",), 1e-2),
        ("scaled_ws_deepmind", ("eps",), 1e-2),
        ("agc_timm", ("clip_factor",), 0.03),
        ("agc_deepmind", ("eps",), 0.1),
        ("sgd_agc_nfnets", ("clipping",), 0.03),
        ("sgd_agc_nfnets", ("weight_decay",), 0.0),
        ("sgd_agc_nfnets", ("nesterov",), False),
    ],
)
def test_hyper_parameters_are_taken_from_the_file(
    name: str, path: tuple[str, ...], value: float, tmp_path: Path
) -> None:
    def change(hparams: dict[str, Any]) -> None:
        for step in path[:-1]:
            hparams = hparams[step]
        assert hparams[path[-1]] != value
        hparams[path[-1]] = value

    outcome = replay(written(tmp_path / "other.npz", change_hparam(read(name), change)))
    assert outcome.status is Status.FAIL
    assert outcome.method == METHODS[name]


def test_a_trace_that_lacks_an_array_fails_in_words(tmp_path: Path) -> None:
    arrays = read("agc_timm")
    del arrays["grad_out.head.bias"]
    outcome = replay(written(tmp_path / "short.npz", arrays))
    assert outcome.status is Status.FAIL
    assert outcome.detail == "cannot be replayed: the trace has no array 'grad_out.head.bias'"


def test_a_trace_whose_shapes_contradict_its_settings_fails_in_words(tmp_path: Path) -> None:
    arrays = read("ws_conv")
    arrays["plain.x"] = arrays["plain.x"][:, :3]
    outcome = replay(written(tmp_path / "shapes.npz", arrays))
    assert outcome.status is Status.FAIL
    assert "cannot be replayed" in outcome.detail
    assert "\n" not in outcome.detail


def test_a_truncated_file_is_unreadable(tmp_path: Path) -> None:
    whole = (GOLDEN / "ws_conv.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[2000:2100] = bytes(100)
    (tmp_path / "flipped.npz").write_bytes(bytes(flipped))
    assert [outcome.status for outcome in replay_folder(tmp_path)] == [Status.UNREADABLE] * 2


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "not a readable"),
        (b"not an archive at all", "not a readable"),
        ({"x": np.zeros(3)}, "no hparams"),
        ({"hparams": np.array("{oops")}, "not JSON"),
        ({"hparams": np.array("[1, 2]")}, "must be a JSON object; got list"),
        ({"hparams": np.array("{}"), "x": np.array([{}], dtype=object)}, "not a readable"),
    ],
    ids=["empty", "text", "no hparams", "bad JSON", "JSON list", "pickle"],
)
def test_a_foreign_file_is_unreadable(contents: bytes | dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.npz"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        written(path, contents)
    outcome = replay(path)
    assert (outcome.status, outcome.method, outcome.largest_error) == (Status.UNREADABLE, None, None)
    assert words in outcome.detail


def test_a_bare_array_under_the_wrong_ending_is_unreadable(tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", np.zeros(3))
    bare = (tmp_path / "bare.npy").rename(tmp_path / "bare.npz")
    assert replay(bare).detail == "a single NumPy array, not an .npz archive"


def test_a_kind_without_a_method_is_named_so(tmp_path: Path) -> None:
    unknown = written(tmp_path / "agc_timm.npz", {"hparams": np.array('{"eps": 1}'), "x": np.zeros(3)})
    outcome = replay(unknown)
    assert (outcome.status, outcome.method, outcome.passed) == (Status.NO_METHOD, None, False)


def test_a_missing_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.npz trace"):
        replay_folder(tmp_path)
    with pytest.raises(DataError, match="There is no folder"):
        replay_folder(tmp_path / "nowhere")
    assert replay(tmp_path / "nowhere.npz").status is Status.UNREADABLE


def test_the_recorded_folder_has_no_failure() -> None:
    outcomes = replay_folder(GOLDEN)
    assert [outcome.file.name for outcome in outcomes if outcome.status not in (Status.PASS, Status.NO_METHOD)] == []
    assert {outcome.file.stem for outcome in outcomes if outcome.passed} >= set(METHODS)
