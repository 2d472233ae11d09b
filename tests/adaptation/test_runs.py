"""Test-time adaptation as an evaluation: of held-out clients, of clients, of streams; records, tables, mistakes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import fednorm
from fednorm.adaptation._scoring import Adapted, averaged, made_adaptations, refined
from fednorm.cli.app import app
from fednorm.config import merge, resolve
from fednorm.errors import ConfigError, FedNormError, RecordError, UnknownNameError
from fednorm.federation.client import score
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import Workbench
from fednorm.records.results import load
from fednorm.report.adaptation_table import adaptation_table
from fednorm.report.frame import records
from fednorm.report.numbers import percent, signed
from fednorm.streams.simulate import simulate as simulate_stream
from fednorm.streams.workbench import ContinualWorkbench

METHODS: list[Any] = [
    {"name": "bn_alpha", "alpha": 0.0},
    {"name": "bn_alpha", "alpha": 1.0, "order": ["shuffled", "class_sorted"]},
    {"name": "tent", "batch_size": [1, 16], "learning_rate": 0.01},
    {"name": "atp", "rounds": 2, "batch_size": 16},
    {"name": "rotta", "update_every": 16},
]


def values(**sections: Mapping[str, Any]) -> dict[str, Any]:
    base = {
        "data": {"held_out": "photo", "train_per_client": 24, "test_per_domain": 40},
        "model": {"width": 4},
        "train": {"learning_rate": 0.1, "batch_size": 8},
        "rounds": {"num_rounds": 2, "evaluate_every": 2},
        "evaluate": {"adaptation": METHODS, "diagnostics": False},
    }
    return merge(base, sections)


@cache
def held_out() -> dict[str, Any]:
    return simulate(resolve(values()), runs=None)


def without_time(result: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps({k: v for k, v in result.items() if k not in ("adaptation", "hash")}))
    plain["config"]["evaluate"].pop("adaptation")
    for line in plain["rounds"]:
        line.pop("seconds")
    return {key: value for key, value in plain.items() if key not in ("seconds", "workers")}


def test_all_else_of_a_run_is_what_it_is_without() -> None:
    plain = simulate(resolve(values(evaluate={"adaptation": []})), runs=None)
    assert "adaptation" not in plain
    assert without_time(held_out()) == without_time(plain)
    assert held_out()["hash"] != plain["hash"]


def trained(tmp_path: Path, config: dict[str, Any]) -> tuple[Workbench, dict[str, Any]]:
    """Return a workbench whose model holds the finished server's tensors, and the result."""
    resolved = resolve(config)
    result = simulate(resolved, runs=tmp_path)
    bench = Workbench(resolved)
    bench.write(load_file(Path(result["run"], "model.safetensors")))
    return bench, result


def test_held_out_clients_are_scored_as_by_hand_rates_learned_on_the_others(tmp_path: Path) -> None:
    bench, result = trained(tmp_path, values())
    told = result["adaptation"]
    (unseen,) = [client for client in bench.federation.clients if client.held_out]
    assert told["of"] == "held-out clients"
    assert told["without"]["per_domain"] == {"photo": score(bench, unseen.test)["accuracy"]}
    names = [(row["name"], row["order"], row["batch_size"]) for row in told["methods"]]
    assert names == [
        ("bn_alpha", "shuffled", 32),
        ("bn_alpha", "shuffled", 32),
        ("bn_alpha", "class_sorted", 32),
        ("tent", "shuffled", 1),
        ("tent", "shuffled", 16),
        ("atp", "shuffled", 16),
        ("rotta", "shuffled", 32),
    ]
    for how, row in zip(made_adaptations(bench.config.evaluate), told["methods"], strict=True):
        knowledge: dict[str, Tensor] = how.initial(bench.model)
        for number in range(how.rounds_of_learning):
            knowledge = averaged(
                [
                    refined(how, bench.model, knowledge, c.train, 1, "client", c.partition_id, "learning", number)
                    for c in bench.federation.clients
                    if not c.held_out
                ]
            )
        share = Adapted(how, bench.model, knowledge).accuracy(unseen.test, 1, "client", unseen.partition_id)
        assert row["per_domain"] == {"photo": share}, row["name"]
        assert row["change"] == row["mean"] - told["without"]["mean"]
    assert told["methods"][0]["change"] == 0


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"workers": 2}, id="two processes"),
        pytest.param({"engine": "cohort"}, id="cohorts", marks=pytest.mark.slow),
    ],
)
def test_whoever_carries_clients_out_scores_them_alike(other: dict[str, Any]) -> None:
    methods = [METHODS[0], {"name": "atp", "rounds": 1}]
    config = values(data={"held_out": "", "domains": ["scans", "photo"]}, evaluate={"adaptation": methods})
    made = simulate(resolve({**config, **other}), runs=None)["adaptation"]
    assert made["of"] == "clients"
    assert made["methods"][0]["per_domain"] == made["without"]["per_domain"]
    if "workers" in other:
        assert made == simulate(resolve({**config, "workers": 1}), runs=None)["adaptation"]


def test_a_strategy_that_keeps_tensors_needs_some_for_an_unseen_domain() -> None:
    config = values(strategy={"name": "fedbn"}, evaluate={"adaptation": ["bn_alpha"]})
    with pytest.raises(ConfigError, match=r"evaluate\.fallback = 'pooled'.*leave evaluate.adaptation out"):
        simulate(resolve(config), runs=None)
    made = simulate(resolve(merge(config, {"evaluate": {"fallback": "pooled", "kinds": ["unseen"]}})), runs=None)
    assert made["adaptation"]["with"] == "pooled"
    assert made["adaptation"]["without"] == {k: v for k, v in made["evaluation"]["unseen"].items() if k != "with"}


# Streams --------------------------------------------------------------------------------------------------------------


def stream(**evaluate: Any) -> dict[str, Any]:
    return {
        "kind": "continual",
        "scenario": {"name": "domain_digits", "train_per_experience": 24, "test_per_experience": 40},
        "data": {"domains": ["scans", "photo"]},
        "model": {"width": 4},
        "learner": {"name": "naive"},
        "train": {"epochs": 1, "learning_rate": 0.05},
        "evaluate": {"probe_images": 0, **evaluate},
    }


def test_a_stream_s_network_is_adapted_on_each_experience_or_from_one_to_the_next() -> None:
    methods = [
        {"name": "bn_alpha", "alpha": 0.0},
        {"name": "atp", "rounds": 1},
        {"name": "tent", "learning_rate": 0.05, "batch_size": 8, "reset": ["each", "never"]},
    ]
    made = simulate_stream(resolve(stream(adaptation=methods)), runs=None)
    plain = simulate_stream(resolve(stream()), runs=None)
    assert made["accuracy_matrix"] == plain["accuracy_matrix"]
    told = made["adaptation"]
    assert told["of"] == "experiences"
    last = made["accuracy_matrix"][-1]
    assert told["without"] == {"per_experience": {"1": last[0], "2": last[1]}, "mean": sum(last) / 2}
    assert told["methods"][0]["per_experience"] == told["without"]["per_experience"]
    each, never = (row["per_experience"] for row in told["methods"][2:])
    assert each["1"] == never["1"]
    bench = ContinualWorkbench(resolve(stream(adaptation=methods)))
    for experience in bench.training:
        bench.learner.train(experience)
    how = made_adaptations(bench.config.evaluate)[3]
    adapted = Adapted(how, bench.model, {})
    shares = [adapted.accuracy(e.test, 1, "experience", e.number) for e in bench.stream]
    assert list(never.values()) == shares


# Records and tables ---------------------------------------------------------------------------------------------------


def test_results_are_read_back_and_told(tmp_path: Path) -> None:
    for seed in (1, 2):
        simulate(resolve(values(evaluate={"adaptation": METHODS[:2]}) | {"seed": seed}), runs=tmp_path)
    loaded = load([tmp_path]).results
    assert len(loaded) == 2
    table = adaptation_table(loaded)
    assert table.columns == ("method", "adaptation", "order", "batch", "mean", "change")
    assert [row[:4] for row in table.rows] == [
        ("fedavg", "none", "–", "–"),
        ("fedavg", "bn_alpha (alpha 0)", "shuffled", "32"),
        ("fedavg", "bn_alpha (alpha 1)", "shuffled", "32"),
        ("fedavg", "bn_alpha (alpha 1)", "class sorted", "32"),
    ]
    assert table.rows[1][4] == table.rows[0][4]
    assert table.rows[1][5] == "0.0 ± 0.0"
    assert "held-out clients of photo" in table.notes[0]
    frame = records(loaded)
    assert set(frame["statistics"].drop_nulls()) >= {
        "no adaptation",
        "bn_alpha (alpha 1), batches of 32, class sorted",
    }


def test_several_batch_sizes_are_columns_of_changes() -> None:
    told = held_out()
    table = adaptation_table([told])
    assert table.columns == ("method", "adaptation", "order", "without (%)", "batch 1", "batch 16", "batch 32")
    rows = {row[1:3]: row[3:] for row in table.rows}
    without = percent(told["adaptation"]["without"]["mean"])
    by_hand = [signed(row["change"]) for row in told["adaptation"]["methods"]]
    assert rows[("tent (learning_rate 0.01)", "shuffled")] == (without, by_hand[3], by_hand[4], "–")
    assert rows[("bn_alpha (alpha 1)", "class sorted")] == (without, "–", "–", by_hand[2])


@pytest.mark.parametrize(
    "damage",
    [
        {"methods": []},
        {"without": 3},
        {"methods": [{"mean": "x"}] * 4},
        {"of": None},
    ],
)
def test_a_damaged_result_is_refused_in_a_sentence(damage: dict[str, Any], tmp_path: Path) -> None:
    result = json.loads(json.dumps(held_out()))
    result["adaptation"] |= damage
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"format": 1, "results": [result]}), encoding="utf-8")
    with pytest.raises(RecordError, match=r"was left out: .*adaptation"):
        load([path])


def test_the_command_line_shows_the_scores_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--held-out", "photo", "--train-per-client", "16", "--rounds", "1", "--set", "model.width=4"]
    given += ["--set", "data.test_per_domain=20", "--set", "evaluate.adaptation=bn_alpha,tent"]
    done = CliRunner().invoke(app, ["federated", *given])
    assert done.exit_code == 0, done.output
    assert "Test-time adaptation" in done.output
    assert "tent" in done.output
    done = CliRunner().invoke(app, ["federated", *given, "--json"])
    assert [row["name"] for row in json.loads(done.stdout)["adaptation"]["methods"]] == ["bn_alpha", "tent"]


def test_python_has_them_too() -> None:
    small = {"data": {"held_out": "photo", "train_per_client": 8, "test_per_domain": 8}, "model": {"width": 4}}
    made = fednorm.federated(rounds=1, config={**small, "evaluate": {"adaptation": "rotta"}})
    assert made["adaptation"]["methods"][0]["name"] == "rotta"


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("tnt", "no adaptation named 'tnt'. Did you mean 'tent'"),
        (3, "evaluate.adaptation takes methods"),
        ([["tent"]], "evaluate.adaptation takes methods"),
        ({"batch_size": 3}, "a table has the name of its method"),
        ({"name": "tent", "rate": 1}, "'evaluate.adaptation.rate'"),
        ({"name": "tent", "batch_size": 0}, "tent.batch_size must be an integer of 1 or more"),
        ({"name": "tent", "batch_size": []}, "batch_size takes a value, or a list"),
        ({"name": "tent", "batch_size": [[1]]}, "batch_size takes a value, or a list"),
        ({"name": "tent", "order": "sorted"}, "tent.order must be one of shuffled, class_sorted, as_given"),
        ({"name": "tent", "learning_rate": -1.0}, "tent.learning_rate must be greater than 0"),
        ({"name": "tent", "reset": "never"}, "reset 'never' carries adaptation"),
        ({"name": "rotta", "momentum": 2.0}, "rotta.momentum"),
        (["tent", {"name": "tent", "batch_size": 32}], "twice, defaults filled in"),
        ({"name": "tent", "batch_size": list(range(1, 202))}, "more than 200 adaptations"),
    ],
)
def test_a_mistake_is_a_sentence(given: Any, says: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError)) as caught:
        resolve({"evaluate": {"adaptation": given}})
    assert says in str(caught.value)


@pytest.mark.parametrize("kind", ["federated", "continual"])
def test_a_network_that_cannot_be_adapted_is_refused_before_training(kind: str) -> None:
    base = values() if kind == "federated" else stream()
    config = resolve(merge(base, {"norm": {"name": "group_norm"}, "evaluate": {"adaptation": "bn_alpha"}}))
    run = simulate if kind == "federated" else simulate_stream
    with pytest.raises(FedNormError, match=r"'bn_alpha'.*has none\. Take norm 'batch_norm'"):
        run(config, runs=None)


def test_an_option_s_list_is_each_of_its_values_and_what_is_default_has_no_part_in_the_hash() -> None:
    several = {"name": "tent", "batch_size": [1, 32], "order": ["shuffled", "class_sorted"]}
    config = resolve({"evaluate": {"adaptation": several}})
    assert config.evaluate.adaptation == (
        {"name": "tent", "batch_size": 1},
        {"name": "tent", "batch_size": 1, "order": "class_sorted"},
        {"name": "tent"},
        {"name": "tent", "order": "class_sorted"},
    )
    assert resolve(config.to_dict()).hash == config.hash
    plain = resolve({"evaluate": {"adaptation": {"name": "tent", "batch_size": 32}}})
    assert plain.hash == resolve({"evaluate": {"adaptation": "tent"}}).hash != resolve({}).hash
    assert resolve({}).hash == "76ce0c3de10c"
