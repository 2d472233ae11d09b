"""What scripts rely on: one JSON document on standard output, names, exit codes, streams."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fednorm
from fednorm.cards import DATA, MODELS, NORMS, SCENARIOS, STRATEGIES
from fednorm.config import SECTION_VALUES as SECTIONS
from fednorm.config import resolve
from fednorm.federation import client

Call = Callable[..., Any]
Refused = Callable[..., None]
Small = tuple[str, ...]


# What scripts rely on -------------------------------------------------------------------------------------------------


def test_federated_prints_one_document(call: Call, tmp_path: Path, small: Small) -> None:
    outcome = call("federated", "--strategy", "fedbn", "--evaluate", "own,cross", "--json", *small)
    assert outcome.code == 0
    result = outcome.document
    assert {"plan", "rounds", "final", "run", "config", "evaluation", "hash", "seconds"} <= set(result)
    assert {"shared", "local", "pooled", "reset", "bytes_per_round"} <= set(result["plan"])
    assert sum(result["plan"]["bytes"].values()) == sum(entry["bytes"] for entry in result["plan"]["tensors"])
    assert (result["plan"]["shared"], result["plan"]["local"]) == (12, 25)  # six layers' weights and biases; five BN
    assert {"per_domain", "mean", "worst"} <= set(result["final"])
    assert list(result["final"]["per_domain"]) == ["scans", "photo", "fonts", "street", "faint"]
    assert [line["round"] for line in result["rounds"]] == [1, 2]
    for line in result["rounds"]:
        assert line["bytes_down"] + line["bytes_up"] == result["plan"]["bytes_per_round"]
    assert set(result["evaluation"]) == {"own", "cross"}
    assert resolve(result["config"]) == resolve(result["config"])
    folder = Path(result["run"])
    assert folder.parent == tmp_path / "runs"
    written = json.loads((folder / "result.json").read_text())
    assert {key: written[key] for key in result} == result
    assert set(written) - set(result) == {"format", "digest", "files"}

    again = call("federated", "--strategy", "fedbn", "--evaluate", "own,cross", "--json", *small)
    assert again.document == result
    assert "has finished before" in again.err


def test_a_dry_run_prints_the_same_document_without_training(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Small
) -> None:
    whole = call("federated", "--json", *small).document
    monkeypatch.setattr("fednorm.cli.federated.simulate", lambda *_, **__: pytest.fail("it trained"))
    dry = call("federated", "--json", "--dry-run", "--runs", tmp_path / "dry", *small)
    assert dry.code == 0
    document = dry.document
    estimated = document.pop("estimated_seconds")
    assert document.pop("workers") >= 1
    assert document == {key: whole[key] for key in document}
    assert {"plan", "config", "hash", "parameters", "data"} <= set(document)
    assert not (tmp_path / "dry").exists()
    longer = call("federated", "--json", "--dry-run", *small, "--rounds", "9999").document
    assert longer["estimated_seconds"] > estimated >= 0


def test_a_dry_run_shows_the_plan_entry_by_entry(call: Call, small: Small) -> None:
    outcome = call("federated", "--strategy", "silobn", "--dry-run", "--layers", *small)
    assert outcome.code == 0
    assert "estimated time:" in outcome.out
    assert "scans: 1 client, 16 train, 10 test images" in outcome.out
    rows = [line.split() for line in outcome.out.splitlines() if "norm1." in line or "conv1." in line]
    roles = {cells[i]: next(r for r in ("shared", "local", "pooled", "reset") if r in cells)
             for cells in rows for i in (0, 1) if "." in cells[i]}  # fmt: skip
    assert roles["conv1.weight"] == roles["norm1.weight"] == "shared"
    assert roles["norm1.running_mean"] == roles["norm1.running_var"] == "local"


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("norms", list(NORMS.names)),
        ("strategies", list(STRATEGIES.names)),
        ("models", list(MODELS.names)),
        ("data", list(DATA.names)),
        ("scenarios", list(SCENARIOS.names)),
        ("studies", sorted(path.stem for path in (Path(fednorm.__file__).parent / "recipes").glob("*.toml"))),
    ],
)
def test_list_names_everything(what: str, names: list[str], call: Call) -> None:
    document = call("list", what, "--json").document
    assert list(document) == [what]
    assert [row["name"] for row in document[what]] == names
    plain = call("list", what.upper())
    assert plain.code == 0
    assert [line.split()[0] for line in plain.out.splitlines()] == (names or ["There"])
    if what in ("norms", "strategies", "models", "data"):
        assert all(row["summary"] for row in document[what])


@pytest.mark.few(8)
@pytest.mark.parametrize("name", [*NORMS.names, *STRATEGIES.names, *MODELS.names, *DATA.names, *SECTIONS])
def test_explain_explains_every_name(name: str, call: Call) -> None:
    card = call("explain", name.replace("_", "-"), "--json").document
    assert card["name"] == name
    assert card.get("about") or card["summary"]
    if name in (*NORMS.names, *STRATEGIES.names):
        assert card["citation"]["title"] or name == "none"
        assert isinstance(card["options"], dict)
    text = call("explain", name)
    assert text.code == 0
    assert text.out.startswith(f"{name} (")


def test_explain_tells_what_each_tensor_is(call: Call) -> None:
    card = call("explain", "batch-norm", "--json").document
    kinds = {key: tensor["kind"] for key, tensor in card["tensors"].items()}
    assert kinds == {
        "weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"
    }  # fmt: skip
    assert card["normalizes"]
    assert card["batch_coupled"]
    assert "Tensor running_mean: mean" in call("explain", "batch-norm").out


def test_explain_and_list_offer_the_nearest_name(call: Call, refused: Refused) -> None:
    refused(call("explain", "fedbm"), "'fedbm'", "Did you mean 'fedbn'")
    refused(call("list", "norm"), "'norm'", "Did you mean 'norms'")


@pytest.mark.parametrize("line", [("lsit",), ("bench", "lsit")])
def test_a_misspelt_command_is_told_once(call: Call, line: tuple[str, ...]) -> None:
    said = call(*line)
    assert (said.code, said.err.count("lsit"), said.err.count("Did you mean")) == (2, 1, len(line) == 1)


def test_options_override_the_file_and_settings_override_options(call: Call, tmp_path: Path, small: Small) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 5\n[strategy]\nname = "fed-bn"\n[train]\nmomentum = 0.5\n[data]\ntrain_per_client = 4')
    arguments = ("--config", path, "--dry-run", "--json", "--strategy", "FedProx", "--seed", "6", *small)
    config = call("federated", *arguments, "--set", "strategy.mu=0.25", "--set", "seed=7").document["config"]
    assert config["strategy"] == {"name": "fedprox", "mu": 0.25}
    assert (config["seed"], config["train"]["momentum"], config["data"]["train_per_client"]) == (7, 0.5, 16)


def test_names_are_read_with_dashes_and_underscores(call: Call, small: Small) -> None:
    documents = [
        call("federated", "--data", data, "--norm", norm, "--model", model, "--dry-run", "--json", *small).document
        for data, norm, model in (
            ("digits-mini", "group-norm", "digits-cnn"),
            ("digits_mini", "Group_Norm", "digits_cnn"),
        )
    ]
    assert documents[0]["hash"] == documents[1]["hash"]


# A process of its own -------------------------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fednorm.cli.app"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.mark.slow
def test_the_console_script_s_exit_codes_and_streams(process: Call) -> None:
    good = process("--help")
    assert (good.returncode, good.stderr) == (0, "")
    assert "federated" in good.stdout
    bad = process("explain", "--nothing")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "No such option" in bad.stderr


@pytest.mark.slow
def test_the_console_script_s_run_and_its_mistake(process: Call, small: Small) -> None:
    good = process("federated", "--json", *small)
    assert good.returncode == 0
    assert json.loads(good.stdout)["final"]["round"] == 2
    assert "round 2/2" in good.stderr
    bad = process("explain", "fedbm")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: There is no ")


def test_results_are_not_mixed_with_flower_s_log(call: Call, small: Small) -> None:
    logging.getLogger("flwr").setLevel(logging.INFO)
    assert call("federated", "--json", *small).document["final"]["round"] == 2


# Verify ---------------------------------------------------------------------------------------------------------------


def test_verify_golden_prints_a_row_a_trace(call: Call) -> None:
    folder = Path(__file__).resolve().parents[1] / "golden"
    outcome = call("verify", "golden", folder, "--json")
    assert outcome.code == 0
    rows = outcome.document["traces"]
    assert {row["file"] for row in rows} == {path.name for path in folder.glob("*.npz")}
    for row in rows:
        assert set(row) == {"file", "method", "largest_error", "status", "passed", "detail"}
        assert (row["status"] == "pass") == bool(row["passed"])
    replayed = [row for row in rows if row["status"] == "pass"]
    assert {"agc", "scaled", "ws", "fedbn"} <= {row["file"].split("_")[0] for row in replayed}
    assert all(row["largest_error"] < 1e-4 for row in replayed)


def test_verify_golden_fails_on_a_trace_it_does_not_reproduce(call: Call, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "traces").mkdir()
    refused(call("verify", "golden", tmp_path / "traces"), "holds no .npz trace")
    refused(call("verify", "golden", tmp_path / "nowhere"), "There is no folder")
    (tmp_path / "traces" / "broken.npz").write_bytes(b"not a trace")
    outcome = call("verify", "golden", tmp_path / "traces", "--json")
    assert outcome.code == 1
    assert outcome.document["traces"][0]["status"] == "unreadable"
    assert "broken.npz" in outcome.err


@pytest.mark.slow
def test_workers_are_as_many_as_can_be_and_give_the_same_numbers(
    call: Call, refused: Refused, monkeypatch: pytest.MonkeyPatch, small: Small
) -> None:
    monkeypatch.setattr("fednorm.cores.usable_cores", lambda: 2)
    refused(call("federated", "--workers", "0"), "workers", "from 1 to", "got 0")
    refused(call("federated", "--workers", "3", "--dry-run", *small), "workers is 3", "2 cores")
    one = call("federated", "--workers", "1", "--json", *small).document
    two = call("federated", "--workers", "2", "--json", "--runs", "other", *small).document
    assert (one["hash"], one["final"]) == (two["hash"], two["final"])
    dry = call("federated", "--workers", "2", "--dry-run", "--json", *small).document
    assert dry["workers"] == 2
    assert "workers does nothing" in call("continual", "--workers", "2", "--dry-run").err


@pytest.mark.slow
@pytest.mark.parametrize("which", ["kind=federated_continual", "grid.clients=2"])
def test_verify_determinism_runs_clients_on_streams(call: Call, which: str) -> None:
    few = ("--set", "model.width=4", "--set", "scenario.train_per_experience=20", "--set", "learner.memory_size=10")
    outcome = call("verify", "determinism", "--json", "--rounds", "1", "--set", which, *few)
    assert outcome.code == 0
    assert outcome.document["config"]["rounds"]["per_experience"] == 1
    assert set(outcome.document["checks"].values()) == {True}
    assert "cut after round 1, going on" in outcome.err


@pytest.mark.slow
def test_verify_determinism_compares_bit_for_bit(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--set", "model.width=4", "--set", "data.train_per_client=16", "--set", "rounds.num_rounds=2")
    outcome = call("verify", "determinism", "--json", *settings)
    assert outcome.code == 0
    ways = ("run again", "cut short and gone on with", "1 worker", "2 workers", "4 workers")
    assert outcome.document["checks"] == dict.fromkeys(ways, True)
    assert {row["different"] for row in outcome.document["rows"]} == {0}
    assert "cut after round 1, going on" in outcome.err

    calls, fit = [0], client.fit

    def drifting(bench: Any, *args: Any, **kwargs: Any) -> Any:
        metrics, calls[0] = fit(bench, *args, **kwargs), calls[0] + 1
        bench.model.fc1.weight.data[0, 0] += calls[0] * 1e-6
        return metrics

    monkeypatch.setattr(client, "fit", drifting)
    outcome = call("verify", "determinism", "--json", *settings)
    assert outcome.code == 1
    assert outcome.document["checks"] == dict.fromkeys(ways, False)
    assert min(row["largest"] for row in outcome.document["rows"]) > 0
