"""The command line: what scripts rely on, and that a mistake ends with a sentence and exit code 2."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fednorm.cli as cli
from fednorm.commands.catalogue import SECTIONS
from fednorm.config import config_from_dict
from fednorm.data.benchmarks import BENCHMARKS
from fednorm.federated import client
from fednorm.models import MODELS
from fednorm.norms import NORMS
from fednorm.registry import resolve_config, strategy_names

SMALL = (
    *("--set", "model.width=4", "--train-per-client", "16", "--set", "data.test_per_domain=10"),
    *("--learning-rate", "0.03", "--rounds", "2"),
)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it must be, numbers that are no JSON refused."""
        return json.loads(self.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


Call = Callable[..., Outcome]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fednorm", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def refused(outcome: Outcome, *words: str) -> None:
    """Demand what every mistake of a user gets: exit code 2, a sentence that names the thing, nothing else."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    error = outcome.err[outcome.err.rindex("error: ") :]
    for word in words:
        assert word in error


# What scripts rely on -------------------------------------------------------------------------------------------------


def test_federated_prints_one_document(call: Call, tmp_path: Path) -> None:
    outcome = call("federated", "--strategy", "fedbn", "--evaluate", "own,cross", "--json", *SMALL)
    assert outcome.code == 0
    result = outcome.document
    assert {"plan", "rounds", "final", "run", "config", "evaluation", "hash", "seconds"} <= set(result)
    assert set(result["plan"]) == {"shared", "local", "pooled", "reset", "bytes_per_round"}
    assert (result["plan"]["shared"], result["plan"]["local"]) == (12, 25)  # six layers' weights and biases; five BN
    assert {"per_domain", "mean", "worst"} <= set(result["final"])
    assert list(result["final"]["per_domain"]) == ["scans", "photo", "fonts", "street", "faint"]
    assert [line["round"] for line in result["rounds"]] == [1, 2]
    for line in result["rounds"]:
        assert line["bytes_down"] + line["bytes_up"] == result["plan"]["bytes_per_round"]
    assert set(result["evaluation"]) == {"own", "cross"}
    assert resolve_config(result["config"]) == config_from_dict(result["config"])
    folder = Path(result["run"])
    assert folder.parent == tmp_path / "runs"
    assert json.loads((folder / "result.json").read_text()) == result

    again = call("federated", "--strategy", "fedbn", "--evaluate", "own,cross", "--json", *SMALL)
    assert again.document == result
    assert "has finished before" in again.err


def test_a_dry_run_prints_the_same_document_without_training(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = call("federated", "--json", *SMALL).document
    monkeypatch.setattr("fednorm.commands.federated.simulate", lambda *_, **__: pytest.fail("it trained"))
    dry = call("federated", "--json", "--dry-run", "--runs", tmp_path / "dry", *SMALL)
    assert dry.code == 0
    estimate = dry.document.pop("estimated_seconds") if "estimated_seconds" in dry.document else None
    document = {key: value for key, value in dry.document.items() if key != "estimated_seconds"}
    assert estimate is not None
    assert estimate > 0
    assert document == {key: whole[key] for key in document}
    assert {"plan", "config", "hash", "parameters", "data"} <= set(document)
    assert not (tmp_path / "dry").exists()


def test_a_dry_run_shows_the_plan_entry_by_entry(call: Call) -> None:
    outcome = call("federated", "--strategy", "silobn", "--dry-run", "--layers", *SMALL)
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
        ("norms", list(NORMS)),
        ("strategies", list(strategy_names())),
        ("models", list(MODELS)),
        ("data", list(BENCHMARKS)),
        ("scenarios", []),
        ("studies", sorted(path.stem for path in (Path(cli.__file__).parent / "study/recipes").glob("*.toml"))),
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


@pytest.mark.parametrize("name", [*NORMS, *strategy_names(), *MODELS, *BENCHMARKS, *SECTIONS])
def test_explain_explains_every_name(name: str, call: Call) -> None:
    card = call("explain", name.replace("_", "-"), "--json").document
    assert card["name"] == name
    assert card.get("about") or card["summary"]
    if name in (*NORMS, *strategy_names()):
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


def test_explain_and_list_offer_the_nearest_name(call: Call) -> None:
    refused(call("explain", "fedbm"), "'fedbm'", "Did you mean 'fedbn'")
    refused(call("list", "norm"), "'norm'", "Did you mean 'norms'")


def test_options_override_the_file_and_settings_override_options(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 5\n[strategy]\nname = "fed-bn"\n[train]\nmomentum = 0.5\n[data]\ntrain_per_client = 4')
    arguments = ("--config", path, "--dry-run", "--json", "--strategy", "FedProx", "--seed", "6", *SMALL)
    config = call("federated", *arguments, "--set", "strategy.mu=0.25", "--set", "seed=7").document["config"]
    assert config["strategy"] == {"name": "fedprox", "mu": 0.25}
    assert (config["seed"], config["train"]["momentum"], config["data"]["train_per_client"]) == (7, 0.5, 16)


def test_names_are_read_with_dashes_and_underscores(call: Call) -> None:
    documents = [
        call("federated", "--data", data, "--norm", norm, "--model", model, "--dry-run", "--json", *SMALL).document
        for data, norm, model in (("digits-mini", "group-norm", "digits-cnn"), ("digits_mini", "Group_Norm", "digits_cnn"))
    ]
    assert documents[0]["hash"] == documents[1]["hash"]


# Studies and tables ---------------------------------------------------------------------------------------------------

STUDY = """
[base]
model = { width = 4 }
data = { train_per_client = 16, test_per_domain = 10, validation = 0.25 }
rounds = { num_rounds = 1 }
evaluate = { split = "validation", kinds = ["own", "cross"] }
[[points]]
strategy.name = "fedbn"
[[points]]
strategy.name = "fedavg"
[grid]
seed = [1, 2]
"""


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run studies in this process: starting others is what tests/study is for."""
    from fednorm.study import grid

    def run_study(configs: Sequence[Any], *, runs: Path, jobs: int, on_done: Any) -> None:
        for config in configs:
            on_done(config, *grid._run(config, runs))

    monkeypatch.setattr("fednorm.commands.compare.run_study", run_study)


def markdown(text: str) -> list[dict[str, str]]:
    """Read the tables of a Markdown text back, a dictionary a row."""
    rows, head = [], []
    for line in text.splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
        elif set(cells[0]) != {"-"}:
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


@pytest.mark.usefixtures("in_process")
def test_compare_runs_a_grid_reads_it_back_and_report_makes_its_tables(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY)
    dry = call("compare", study, "--dry-run", "--json").document["runs"]
    first = call("compare", study, "--out", tmp_path / "out", "--json")
    assert first.code == 0
    assert [run["hash"] for run in dry] == [result["hash"] for result in first.document["results"]]
    assert first.document["failures"] == []

    monkeypatch.setattr("fednorm.federated.server._serve", lambda *_: pytest.fail("a run was run again"))
    again = call("compare", study, "--out", tmp_path / "out", "--json")
    assert again.document == first.document
    results = first.document["results"]

    report = call("report", tmp_path / "out", tmp_path / "out", "--markdown")  # naming it twice counts once
    rows = {row["method"]: row for row in markdown(report.out) if "method" in row}
    assert set(rows) == {"fedbn", "fedavg"}
    for name, row in rows.items():
        group = [r for r in results if r["config"]["strategy"]["name"] == name]
        assert len(group) == 2
        for column in ("mean", "worst", *results[0]["final"]["per_domain"]):
            final = [{**r["final"], **r["final"]["per_domain"]}[column] for r in group]
            m, s = 100 * np.mean(final), 100 * np.std(final, ddof=1)
            assert row[column] == f"{m:.1f} ± {s:.1f}"
        sent = {line["bytes_down"] + line["bytes_up"] for r in group for line in r["rounds"]}
        assert row["MB a round"] == f"{sent.pop() / 1e6:.2f}"
    assert "n = 2 seeds" in report.out
    assert "last round, validation images" in report.out
    matrix = [row["evaluated under"] for row in markdown(report.out) if "evaluated under" in row]
    assert len(matrix) == len(set(matrix)) == 2 * (1 + 5) + 2 * (1 + 1)

    assert call("report", tmp_path / "out", "--json").document["results"] != []
    summary = call("report", tmp_path / "out", "--markdown", "--summary", tmp_path / "small" / "results.json")
    assert summary.out == report.out
    assert call("report", tmp_path / "small" / "results.json", "--markdown").out == report.out
    assert "clients" not in json.loads((tmp_path / "small" / "results.json").read_text())["results"][0]["rounds"][0]

    best = call("report", tmp_path / "out", "--select", "--json").document["results"]
    assert {r["hash"] for r in best} == {r["hash"] for r in results}  # seeds are no hyper-parameters


@pytest.mark.usefixtures("in_process")
def test_methods_that_share_a_name_are_told_apart_and_none_is_lost(call: Call, tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    base = STUDY.replace("seed = [1, 2]", "rounds.fraction = [0.5, 1.0]\nevaluate.split = ['test', 'validation']")
    study.write_text(base)
    results = call("compare", study, "--out", tmp_path / "out", "--json").document["results"]
    assert len(results) == 8
    report = call("report", tmp_path / "out", "--markdown").out
    rows = [row for row in markdown(report) if "method" in row]
    assert sorted(row["method"] for row in rows) == sorted(
        2 * [f"{name} rounds.fraction {fraction}" for name in ("fedavg", "fedbn") for fraction in (0.5, 1.0)]
    )
    assert sorted(row["mean"] for row in rows) == sorted(f"{100 * r['final']['mean']:.1f}" for r in results)
    assert "last round, validation images" in report
    assert "last round, test images" in report  # and never in one table
    refused(call("report", tmp_path / "out", "--select"), "scored on test images", "evaluate.split = 'validation'")


@pytest.mark.usefixtures("in_process")
def test_compare_goes_on_after_a_failure_and_says_so(call: Call, tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY + "norm.name = ['none', 'batch_norm']")
    outcome = call("compare", study, "--out", tmp_path / "out", "--json")
    assert outcome.code == 2
    assert len(outcome.document["results"]) == 6
    assert len(outcome.document["failures"]) == 2  # FedBN without normalization, of either seed
    assert "2 of 8 runs failed; the first: FedBN keeps normalization layers local" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_study_that_is_not_there_is_named(call: Call, tmp_path: Path) -> None:
    refused(call("compare", "nowhere.toml"), "There is no study file nowhere.toml", "digits_tuning")
    refused(call("compare", "digit-tuning"), "no study named 'digit-tuning'", "Did you mean 'digits_tuning'")
    refused(call("compare", "digits-tuning", "--jobs", "0"), "--jobs must be at least 1; got 0")
    (tmp_path / "s.toml").write_text("[base]\n[grid]\nseed = []")
    refused(call("compare", "s.toml"), "grid.seed must be a list of one value or more")


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "{}", '{"results": 3}', '{"results": [{}]}', "\xff"])
def test_what_is_no_result_is_named(content: str | None, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    refused(call("report", path), "x.json")


def test_a_folder_without_results_is_named(call: Call, tmp_path: Path) -> None:
    refused(call("report", tmp_path), "There is no finished run", str(tmp_path))


def test_demo_ends_in_a_table_and_the_path_of_the_records(call: Call, tmp_path: Path) -> None:
    result = call("demo", "--rounds", "1", "--json")
    assert result.code == 0
    results = result.document["results"]
    assert [r["config"]["strategy"]["name"] for r in results] == ["fedavg", "fedbn", "fedwon"]
    outcome = call("demo", "--rounds", "1")
    for r in results:
        row = next(line for line in outcome.out.splitlines() if f" {r['config']['strategy']['name']} " in line)
        numbers = row.replace("│", " ").split()[1:]
        scores = [*r["final"]["per_domain"].values(), r["final"]["mean"], r["final"]["worst"]]
        assert numbers[:-2] == [f"{100 * score:.1f}" for score in scores]
    assert outcome.out.splitlines()[-1] == f"records: {tmp_path / 'runs' / 'demo'}"
    refused(call("demo", "--rounds", "0"), "rounds.num_rounds must be at least 1; got 0")


# Verify ---------------------------------------------------------------------------------------------------------------


def test_verify_golden_prints_a_row_a_trace(call: Call) -> None:
    default = Path(__file__).resolve().parents[1] / "../shared/golden"
    folder = Path(os.environ.get("FEDNORM_GOLDEN") or default)
    if not folder.is_dir():
        pytest.skip("no golden traces: set FEDNORM_GOLDEN to their folder")
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


def test_verify_golden_fails_on_a_trace_it_does_not_reproduce(call: Call, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    refused(call("verify", "golden", tmp_path / "traces"), "holds no trace")
    refused(call("verify", "golden", tmp_path / "nowhere"), "There is no folder")
    (tmp_path / "traces" / "broken.npz").write_bytes(b"not a trace")
    outcome = call("verify", "golden", tmp_path / "traces", "--json")
    assert outcome.code == 1
    assert outcome.document["traces"][0]["status"] == "unreadable"
    assert "broken.npz" in outcome.err


def test_verify_determinism_compares_bit_for_bit(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--set", "model.width=4", "--set", "data.train_per_client=16", "--set", "rounds.num_rounds=2")
    outcome = call("verify", "determinism", "--json", *settings)
    assert outcome.code == 0
    assert outcome.document["checks"] == {"run again": True, "cut short and gone on with": True}
    assert "cut after round 1, going on" in outcome.err

    calls, fit = [0], client.fit

    def drifting(bench: Any, *args: Any, **kwargs: Any) -> Any:
        metrics, calls[0] = fit(bench, *args, **kwargs), calls[0] + 1
        bench.model.fc1.weight.data[0, 0] += calls[0] * 1e-6
        return metrics

    monkeypatch.setattr(client, "fit", drifting)
    outcome = call("verify", "determinism", "--json", *settings)
    assert outcome.code == 1
    assert outcome.document["checks"] == {"run again": False, "cut short and gone on with": False}


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--strategy", "fedbm"), ("'fedbm'", "'fedbn'")),
        (("--norm", "groupnorm"), ("'groupnorm'", "'group_norm'")),
        (("--model", "digits-cn"), ("'digits-cn'", "'digits_cnn'")),
        (("--data", "digit_mini"), ("'digit_mini'", "'digits_mini'")),
        (("--runtime", "flowr"), ("--runtime", "'flowr'", "'flower'")),
        (("--evaluate", "own,unsen"), ("evaluate.kinds", "'unsen'", "'unseen'")),
        (("--set", "train.learning_rte=1"), ("'train.learning_rte'", "'learning_rate'")),
        (("--set", "norm.groups=2", "--norm", "group_norm"), ("group_norm", "'groups'", "num_groups")),
        (("--set", "strategy.nu=2", "--strategy", "fedprox"), ("fedprox", "'nu'", "mu")),
        (("--set", "strategy.mu=true", "--strategy", "fedprox"), ("mu", "True")),
        (("--set", "norm.options=3"), ("norm.options", "3")),
        (("--set", "train.learning_rate"), ("--set", "'train.learning_rate'")),
        (("--learning-rate", "-1"), ("train.learning_rate", "-1")),
        (("--learning-rate", "inf"), ("train.learning_rate", "finite", "inf")),
        (("--fraction", "1.5"), ("rounds.fraction", "1.5")),
        (("--config", "nowhere.toml"), ("nowhere.toml", "No such file")),
        (("--strategy", "fedbn", "--norm", "none"), ("FedBN", "silently be FedAvg")),
        (("--strategy", "fedbn", "--norm", "sws"), ("FedBN", "silently be FedAvg")),
        (("--strategy", "fedwon", "--norm", "batch_norm"), ("FedWon", "'norm1'")),
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
def test_a_mistake_is_named(arguments: tuple[str, ...], words: tuple[str, ...], json_flag: Any, call: Call) -> None:
    refused(call("federated", *SMALL, *arguments, *json_flag), *words)


def test_an_unknown_option_is_a_usage_error(call: Call) -> None:
    outcome = call("federated", "--learning-rte", "1")
    assert outcome.code == 2
    assert "--learning-rate" in outcome.err
    assert call("federated", "--seed", "x").code == 2


def run_on(folders: Path, call: Call, *more: str) -> Outcome:
    return call("federated", "--data", "folders", "--data-dir", folders, "--domains", "left,right", *SMALL, *more)


def test_domains_never_seen_before(folders: Path, call: Call) -> None:
    result = run_on(folders, call, "--json").document
    assert list(result["final"]["per_domain"]) == ["left", "right"]


def test_a_domain_that_is_missing_is_named(folders: Path, call: Call) -> None:
    (folders / "right").rename(folders / "wrong")
    refused(run_on(folders, call), "right", str(folders))


def test_a_corrupt_file_is_named(folders: Path, call: Call) -> None:
    path = folders / "right" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:200])
    refused(run_on(folders, call), str(path))


def test_an_empty_client_is_named(folders: Path, call: Call) -> None:
    refused(run_on(folders, call, "--clients-per-domain", "60", "--norm", "none"), "left")


def test_all_clients_failing_keeps_the_last_good_round(call: Call, tmp_path: Path) -> None:
    arguments = ("--set", "train.learning_rate=1e30", "--rounds", "3", "--json")
    outcome = call("federated", *SMALL, *arguments)
    refused(outcome, "Round 2: none of the 5 sampled clients", "NaN or infinite", "train.learning_rate")
    folder = next((tmp_path / "runs").iterdir())
    assert [json.loads(line)["round"] for line in (folder / "rounds.jsonl").read_text().splitlines()] == [1]
    assert (folder / "checkpoint.safetensors").exists()
    assert not (folder / "result.json").exists()


def test_one_client_s_failure_is_counted_and_shown(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = client.fit

    def fail(bench: Any, who: Any, **settings: Any) -> Any:
        if who.partition_id == 1:
            raise RuntimeError("the fan broke")
        return fit(bench, who, **settings)

    monkeypatch.setattr(client, "fit", fail)
    outcome = call("federated", *SMALL)
    assert outcome.code == 0
    assert "1 updates rejected" in outcome.err
    assert "2 updates were rejected; see rounds.jsonl." in outcome.out
    document = call("federated", *SMALL, "--json").document
    assert document["rejected_updates"] == 2
    assert document["rounds"][0]["rejected"] == [{"client": 1, "reason": "RuntimeError: the fan broke"}]


def test_a_folder_that_cannot_be_written_is_named(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(call("federated", *SMALL, "--runs", tmp_path / "file" / "runs"), "Not a directory", "--runs")


def test_ctrl_c_says_how_to_go_on_and_loses_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = client.fit

    def interrupted(bench: Any, who: Any, *, server_round: int, **settings: Any) -> Any:
        if (server_round, who.partition_id) == (2, 3):
            raise KeyboardInterrupt
        return fit(bench, who, server_round=server_round, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(client, "fit", interrupted)
        outcome = call("federated", *SMALL)
    assert outcome.code == 130
    assert "Run the same command again to go on from the last checkpoint" in outcome.err
    again = call("federated", *SMALL)
    assert again.code == 0
    assert "going on from round 1" in again.err


def test_a_package_of_the_same_name_is_not_taken_for_ours(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type(sys)("strategies")
    stranger.__file__ = "/somewhere/strategies/__init__.py"
    monkeypatch.setitem(sys.modules, "strategies", stranger)
    refused(call("federated", *SMALL), "/somewhere/strategies", "not fednorm's")


def test_paths_are_printed_whole(call: Call, tmp_path: Path) -> None:
    runs = tmp_path / "[red]runs" / ("x" * 120) / ("y" * 120)
    outcome = call("federated", *SMALL, "--runs", runs)
    assert f"record: {runs}" in outcome.out


# A process of its own -------------------------------------------------------------------------------------------------


def test_the_console_script_s_exit_codes_and_streams(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fednorm.cli"]

    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    good = process("federated", "--json", *SMALL)
    assert good.returncode == 0
    assert json.loads(good.stdout)["final"]["round"] == 2
    assert "round 2/2" in good.stderr
    bad = process("explain", "fedbm")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: There is no ")


def test_results_are_not_mixed_with_flower_s_log(call: Call) -> None:
    logging.getLogger("flwr").setLevel(logging.INFO)
    assert call("federated", "--json", *SMALL).document["final"]["round"] == 2
