"""A mistake ends with a sentence that names it and with exit code 2, never with a traceback, and loses nothing."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fednorm.cards import Family
from fednorm.errors import ConfigError
from fednorm.federation import client

Call = Callable[..., Any]
Refused = Callable[..., None]
Small = tuple[str, ...]


# Mistakes: each from the list ---------------------------------------------------------------------------------


def write_domain(directory: Path, name: str, count: int = 40, classes: int = 2) -> None:
    rng = np.random.default_rng(len(name))
    (directory / name).mkdir(parents=True)
    for split in ("train", "test"):
        images = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": images, "label": [i % classes for i in range(count)]})
        pq.write_table(table, directory / name / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDNORM_CACHE", str(tmp_path / "cache"))
    for name in ("left", "right"):
        write_domain(tmp_path / "data", name)
    return tmp_path / "data"


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--strategy", "fedbm"), ("'fedbm'", "'fedbn'")),
        (("--norm", "groupnorm"), ("'groupnorm'", "'group_norm'")),
        (("--model", "digits_cn"), ("'digits_cn'", "'digits_cnn'")),
        (("--data", "digit_mini"), ("'digit_mini'", "'digits_mini'")),
        (("--runtime", "flowr"), ("--runtime", "'flowr'", "'flower'")),
        (("--evaluate", "own,unsen"), ("evaluate.kinds", "'unsen'", "'unseen'")),
        (("--set", "train.learning_rte=1"), ("'train.learning_rte'", "'learning_rate'")),
        (("--set", "norm.groups=2", "--norm", "group_norm"), ("group_norm", "'groups'", "num_groups")),
        (("--set", "strategy.nu=2", "--strategy", "fedprox"), ("fedprox", "'nu'", "mu")),
        (("--set", "strategy.mu=true", "--strategy", "fedprox"), ("strategy.mu", "finite number", "True")),
        (("--set", "strategy.mu=high", "--strategy", "fedprox"), ("strategy.mu", "finite number", "'high'")),
        (("--set", "strategy.mu=-1", "--strategy", "fedprox"), ("strategy.mu", "-1")),
        (("--set", "norm.options=3"), ("norm.options", "3")),
        (("--set", "train.learning_rate"), ("--set", "'train.learning_rate'")),
        (("--learning-rate", "-1"), ("train.learning_rate", "-1")),
        (("--learning-rate", "inf"), ("train.learning_rate", "finite", "inf")),
        (("--fraction", "1.5"), ("rounds.fraction", "1.5")),
        (("--config", "nowhere.toml"), ("nowhere.toml", "No such file")),
        (("--strategy", "fedbn", "--norm", "none"), ("FedBN", "silently be FedAvg")),
        (("--strategy", "fedbn", "--norm", "sws"), ("FedBN", "silently be FedAvg")),
        (("--strategy", "fedwon", "--norm", "batch_norm"), ("FedWon", "'conv1'", "'sws'")),
        (("--norm", "group_norm", "--set", "norm.num_groups=3"), ("4 channels", "num_groups is 3")),
        (("--train-per-client", "1"), ("Client 0", "'scans'", "one training image", "batch_norm")),
        (("--batch-size", "1"), ("batch_norm", "train.batch_size is 1")),
        (("--held-out", "nowhere"), ("data.held_out", "'nowhere'", "scans, photo")),
        (("--domains", "scans,nowhere"), ("nowhere", "photo")),
        (("--domains", "scans", "--held-out", "scans"), ("scans", "no domain to train on")),
        (("--evaluate", "unseen"), ("unseen", "data.held_out")),
        (("--evaluate", "unseen", "--held-out", "scans", "--strategy", "fedbn"), ("'fedbn'", "evaluate.fallback")),
        (("--set", "evaluate.split=validation"), ("evaluate.split", "data.validation")),
        (("--data", "digits"), ("data", "--data-dir")),
        (("--data", "digits", "--data-dir", "/nowhere"), ("/nowhere", "does not exist")),
    ],
)
@pytest.mark.parametrize("json_flag", [(), ("--json",)], ids=["plain", "json"])
def test_a_mistake_is_named(
    arguments: tuple[str, ...], words: tuple[str, ...], json_flag: Any, call: Call, refused: Refused, small: Small
) -> None:
    refused(call("federated", *small, *arguments, *json_flag), *words)


def test_an_unknown_option_is_a_usage_error(call: Call) -> None:
    outcome = call("federated", "--learning-rte", "1")
    assert outcome.code == 2
    assert "--learning-rate" in outcome.err
    assert call("federated", "--seed", "x").code == 2


@pytest.fixture
def run_on(call: Call, small: Small) -> Call:
    """Run on the two domains of a folder."""
    return lambda folder, *more: call(
        "federated", "--data", "folders", "--data-dir", folder, "--domains", "left,right", *small, *more
    )


def test_domains_never_seen_before(folders: Path, run_on: Call) -> None:
    result = run_on(folders, "--json").document
    assert list(result["final"]["per_domain"]) == ["left", "right"]


def test_a_domain_that_is_missing_is_named(folders: Path, run_on: Call, refused: Refused) -> None:
    (folders / "right").rename(folders / "wrong")
    refused(run_on(folders), "right", str(folders))


def test_a_corrupt_file_is_named(folders: Path, run_on: Call, refused: Refused) -> None:
    path = folders / "right" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:200])
    refused(run_on(folders), str(path))


def test_an_empty_client_is_named(folders: Path, run_on: Call, refused: Refused) -> None:
    refused(run_on(folders, "--clients-per-domain", "60", "--norm", "none"), "left")


def test_all_clients_failing_keeps_the_last_good_round(
    call: Call, tmp_path: Path, refused: Refused, small: Small
) -> None:
    arguments = ("--set", "train.learning_rate=1e30", "--rounds", "3", "--json")
    outcome = call("federated", *small, *arguments)
    refused(outcome, "Round 2: none of the 5 sampled clients", "NaN or infinite", "train.learning_rate")
    folder = next((tmp_path / "runs").iterdir())
    assert [json.loads(line)["round"] for line in (folder / "rounds.jsonl").read_text().splitlines()] == [1]
    assert (folder / "checkpoint.safetensors").exists()
    assert not (folder / "result.json").exists()


def test_one_client_s_failure_is_counted_and_shown(call: Call, monkeypatch: pytest.MonkeyPatch, small: Small) -> None:
    fit = client.fit

    def fail(bench: Any, who: Any, **settings: Any) -> Any:
        if who.partition_id == 1:
            raise RuntimeError("the fan broke")
        return fit(bench, who, **settings)

    monkeypatch.setattr(client, "fit", fail)
    outcome = call("federated", *small)
    assert outcome.code == 0
    assert "1 updates rejected" in outcome.err
    assert "2 updates were rejected; see rounds.jsonl." in outcome.out
    document = call("federated", *small, "--json").document
    assert document["rejected_updates"] == 2
    assert document["rounds"][0]["rejected"] == [{"client": 1, "reason": "RuntimeError: the fan broke"}]


def test_a_folder_that_cannot_be_written_is_named(call: Call, tmp_path: Path, refused: Refused, small: Small) -> None:
    (tmp_path / "file").write_text("")
    refused(call("federated", *small, "--runs", tmp_path / "file" / "runs"), "Not a directory", "--runs")


def test_ctrl_c_says_how_to_go_on_and_loses_nothing(call: Call, monkeypatch: pytest.MonkeyPatch, small: Small) -> None:
    fit = client.fit

    def interrupted(bench: Any, who: Any, *, server_round: int, **settings: Any) -> Any:
        if (server_round, who.partition_id) == (2, 3):
            raise KeyboardInterrupt
        return fit(bench, who, server_round=server_round, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(client, "fit", interrupted)
        outcome = call("federated", *small)
    assert outcome.code == 130
    assert "Run the same command again to go on from the last checkpoint" in outcome.err
    again = call("federated", *small)
    assert again.code == 0
    assert "going on from round 1" in again.err


def test_a_package_of_the_same_name_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type(sys)("strategies")
    stranger.__file__ = "/somewhere/strategies/__init__.py"
    monkeypatch.setitem(sys.modules, "strategies", stranger)
    first = Family("strategy", "strategies", "strategies", "fednorm.federation.spec:StrategySpec")
    with pytest.raises(ConfigError, match=r"/somewhere/strategies/__init__\.py is not fednorm's"):
        _ = first.names


def test_paths_are_printed_whole(call: Call, tmp_path: Path, small: Small) -> None:
    runs = tmp_path / "[red]runs" / ("x" * 120) / ("y" * 120)
    outcome = call("federated", *small, "--runs", runs)
    assert f"record: {runs}" in outcome.out
