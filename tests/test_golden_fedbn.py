"""The replay of FedBN's communication step: it passes on what was recorded, and sees everything that was altered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_traces import GOLDEN, written

from fednorm.verify.golden import Status, replay

METHOD = "one round of communication (FedBN)"
MODES = ("fedbn", "fedavg")
DISPUTED = ("norm2.", "subnet_out.")


def read(mode: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"fedbn_comm_{mode}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def with_hparam(arrays: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**arrays, "hparams": np.array(json.dumps({**json.loads(str(arrays["hparams"])), **values}))}


def disputed(mode: str, key: str) -> bool:
    return mode == "fedbn" and key.split(".", 2)[2].startswith(DISPUTED)


def altered(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed.reshape(-1)[-1] += 1 if array.dtype.kind == "i" else np.float32(1e-4)
    return changed


@pytest.mark.parametrize("mode", MODES)
def test_recorded_steps_are_reproduced(mode: str, tmp_path: Path) -> None:
    outcome = replay(written(tmp_path / "agc_timm.npz", read(mode)))
    assert (outcome.status, outcome.method) == (Status.PASS, METHOD), outcome.detail
    assert outcome.largest_error is not None
    assert outcome.largest_error <= 6e-8


def test_what_is_not_compared_is_said() -> None:
    fedbn, fedavg = (replay(GOLDEN / f"fedbn_comm_{mode}.npz").detail for mode in MODES)
    # 3 holders of 25 entries, less norm2's five and subnet_out's two
    assert fedbn.startswith("54 arrays reproduced; not compared")
    assert fedbn.endswith("norm2.*, subnet_out.*")
    assert fedavg == "75 arrays reproduced"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_change_in_any_recorded_result_is_seen(mode: str, tmp_path: Path) -> None:
    arrays = read(mode)
    keys = [key for key in arrays if key.startswith("out.") and not disputed(mode, key)]
    assert len(keys) == {"fedbn": 54, "fedavg": 75}[mode]
    for key in keys:
        outcome = replay(written(tmp_path / "altered.npz", {**arrays, key: altered(arrays[key])}))
        assert outcome.status is Status.FAIL, key
        assert key in outcome.detail


def test_untouched_entries_are_compared_exactly(tmp_path: Path) -> None:
    arrays = read("fedbn")
    key = "out.client0.bn1.running_mean"
    nearly = np.nextafter(arrays[key], np.float32(np.inf))
    assert replay(written(tmp_path / "near.npz", {**arrays, key: nearly})).status is Status.FAIL
    averaged = "out.server.conv1.weight"
    nearly = np.nextafter(arrays[averaged], np.float32(np.inf))
    assert replay(written(tmp_path / "near.npz", {**arrays, averaged: nearly})).status is Status.PASS


def test_fedavgs_clients_keep_their_counter_and_the_server_takes_the_first(tmp_path: Path) -> None:
    arrays = read("fedavg")
    counters = [int(arrays[f"out.{who}.bn1.num_batches_tracked"]) for who in ("server", "client0", "client1")]
    assert counters == [3, 3, 4]
    arrays["out.client1.bn1.num_batches_tracked"] = np.array(3)
    assert "out.client1.bn1.num_batches_tracked" in replay(written(tmp_path / "x.npz", arrays)).detail


@pytest.mark.parametrize(("given", "wrong"), [("fedbn", "fedavg"), ("fedavg", "fedbn"), ("fedavg", "silobn")])
def test_the_strategy_is_taken_from_the_file(given: str, wrong: str, tmp_path: Path) -> None:
    outcome = replay(written(tmp_path / "x.npz", with_hparam(read(given), mode=wrong)))
    assert (outcome.status, outcome.method) == (Status.FAIL, METHOD)


def test_client_weights_are_taken_from_the_file(tmp_path: Path) -> None:
    arrays = read("fedavg")
    for key in [key for key in arrays if key.startswith("out.") and arrays[key].dtype.kind == "f"]:
        name = key.split(".", 2)[2]
        first, second = (arrays[f"in.client{i}.{name}"].astype(np.float64) for i in range(2))
        arrays[key] = (0.25 * first + 0.75 * second).astype(np.float32)
    assert replay(written(tmp_path / "x.npz", arrays)).status is Status.FAIL
    outcome = replay(written(tmp_path / "x.npz", with_hparam(arrays, client_weights=[0.25, 0.75])))
    assert outcome.status is Status.PASS, outcome.detail


def test_nested_names_become_nested_modules(tmp_path: Path) -> None:
    def nested(key: str) -> str:
        place = key.split(".", 2)
        if len(place) < 3:
            return key
        name = place[2].replace("conv2", "stage.0.conv").replace("norm2", "stage.0.shortcut.1").replace("fc2", "head")
        return ".".join((*place[:2], name))

    arrays = {nested(key): array for key, array in read("fedbn").items()}
    outcome = replay(written(tmp_path / "x.npz", arrays))
    assert outcome.status is Status.PASS, outcome.detail
    assert outcome.detail.endswith("stage.0.shortcut.1.*, subnet_out.*")


@pytest.mark.parametrize(
    ("hparams", "words"),
    [
        ({"mode": "fedbm"}, "no strategy named 'fedbm'"),
        ({"clients": 1}, "1 clients have 2 client_weights"),
        ({"clients": 3, "client_weights": [1, 1, 1]}, "no array"),
        ({"client_weights": [1.0]}, "2 clients have 1 client_weights"),
    ],
)
def test_settings_that_contradict_the_arrays_fail_in_words(hparams: dict[str, Any], words: str, tmp_path: Path) -> None:
    outcome = replay(written(tmp_path / "x.npz", with_hparam(read("fedbn"), **hparams)))
    assert outcome.status is Status.FAIL
    assert outcome.detail.startswith("cannot be replayed")
    assert words in outcome.detail


def test_a_layer_of_unknown_type_fails_in_words(tmp_path: Path) -> None:
    arrays = {key: array for key, array in read("fedavg").items() if ".bn1.running_" not in key}
    outcome = replay(written(tmp_path / "x.npz", arrays))
    assert outcome.status is Status.FAIL
    assert "cannot tell which layer owns bn1.weight, bn1.bias, bn1.num_batches_tracked" in outcome.detail
