"""``fednorm report`` over records of both kinds: the same tables from records and from their small summaries."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fednorm.cli.report import run_report
from fednorm.config import resolve
from fednorm.errors import ConfigError, FedNormError, RecordError, UnknownNameError
from fednorm.records.integrity import sealed
from fednorm.records.results import FORMAT, load
from fednorm.report.comparison import comparison_table, comparisons, paper_table
from fednorm.report.frame import frame, records
from fednorm.report.stream_table import average_table, drift_table, matrix_table, plasticity_table, stream_table
from fednorm.report.table import accuracy_table

Make = Callable[..., dict[str, Any]]
Report = Callable[..., str]

FEDERATED = Path(__file__).resolve().parents[2] / ".records" / "digits.json"


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Return a function that gives the standard output of a report."""

    def call(*paths: Path, **options: Any) -> str:
        capsys.readouterr()
        run_report(paths, **{"style": "markdown", **options})
        return capsys.readouterr().out

    return call


def record(folder: Path, results: Sequence[dict[str, Any]]) -> Path:
    for result in results:
        path = folder / result["hash"] / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(sealed(result), indent=1), encoding="utf-8")
    return folder


def compared(results: Sequence[dict[str, Any]]) -> Any:
    """Return the table that compares results on the same data."""
    (comparison,) = comparisons(results)
    return comparison_table(comparison)


def printed(*tables: Any) -> str:
    return "".join(f"{table.markdown()}\n" for table in tables)


DIAGNOSTICS = [
    {"weight_norm": {"0": n, "1": 1.0}, "effective_learning_rate": {"0": 1 / n, "1": 1.0}, "drift": {"bn": n / 10}}
    for n in (2.0, 3.0, 5.0)
]


def test_both_kinds_stand_in_tables_of_their_own(
    stream_result: Make, memorized: Make, report: Report, tmp_path: Path
) -> None:
    pair = [stream_result(config={"seed": seed}) for seed in (1, 2)]
    other = stream_result(title="Split CIFAR-100 (10×10)", norm={"name": "group_norm"}, final={"drift": None})
    chosen = stream_result(config={"evaluate": {"split": "validation"}}, final={"average_accuracy": 0.3, "drift": None})
    labels = memorized([0.9, 0.8, 0.7], diagnostics=DIAGNOSTICS)
    runs = record(tmp_path, [labels, other, *pair, chosen])
    federated = sorted(json.loads(FEDERATED.read_text())["results"], key=lambda r: str(r["config"]["strategy"]["name"]))
    alone = tmp_path / "federated.json"  # without the study that they are of
    alone.write_text(json.dumps({"results": federated}))
    assert report(runs, alone) == printed(
        compared(federated),
        accuracy_table(federated),
        compared(pair),
        stream_table(pair),
        stream_table([chosen]),
        matrix_table(chosen),
        stream_table([other]),
        matrix_table(other),
        stream_table([labels]),
        plasticity_table([labels]),
    )


def test_a_single_run_shows_its_matrix_and_its_drift(stream_result: Make, report: Report, tmp_path: Path) -> None:
    result = stream_result(diagnostics=DIAGNOSTICS[:2])
    runs = record(tmp_path, [result])
    assert report(runs) == printed(stream_table([result]), matrix_table(result), drift_table([result]))
    assert report(runs, curve=True) == printed(
        stream_table([result]), average_table([result]), matrix_table(result), drift_table([result])
    )


def test_methods_are_in_order_whatever_the_folders(stream_result: Make, report: Report, tmp_path: Path) -> None:
    results = [
        stream_result(learner={"name": learner}, norm={"name": norm}, config={"train": {"learning_rate": rate}})
        for learner in ("er_ace", "naive")
        for norm in ("adab2n", "batch_norm")
        for rate in (0.03, 0.1)
    ]
    assert report(record(tmp_path, results[::-1])) == printed(compared(results), stream_table(results))


def test_summaries_are_small_and_give_the_same_tables(
    stream_result: Make, memorized: Make, report: Report, tmp_path: Path
) -> None:
    single = stream_result(matrix=[[0.9, 0.1, None], [0.5, 0.6, 0.1], [0.3, 0.3, 0.6]], diagnostics=DIAGNOSTICS)
    many = [i / 200 for i in range(200)]
    middle = [{"dead_units": dict.fromkeys(map(str, range(20)), 0.123456789)}]
    labels = memorized(many, diagnostics=[DIAGNOSTICS[0], *(198 * middle), DIAGNOSTICS[2]])
    single["config"]["data"]["dir"] = "/somewhere/of/mine"
    runs, small = record(tmp_path / "runs", [single, labels]), tmp_path / "small" / "results.json"
    for options in ({}, {"curve": True}, {"style": "table"}, {"style": "latex"}):
        shown = report(runs, FEDERATED, summary=small, **options)
        assert report(small, **options) == shown
    assert report(small, summary=tmp_path / "again.json", as_json=True) == report(small, as_json=True)
    assert json.loads(small.read_text())["format"] == FORMAT
    assert (tmp_path / "again.json").read_text() == small.read_text()

    kept = {result["data"]["title"]: result for result in json.loads(small.read_text())["results"]}
    ours, long = kept[single["data"]["title"]], kept[labels["data"]["title"]]
    for key in ("kind", "hash", "norm", "learner", "scenario", "final", "accuracy_matrix", "seconds", "parameters"):
        assert ours[key] == single[key]
    assert ours["config"] == {**single["config"], "data": {**single["config"]["data"], "dir": ""}}
    assert ours["data"] == {key: single["data"][key] for key in ("title", "notes", "memorization")}
    assert [line.get("diagnostics") for line in ours["experiences"]] == [DIAGNOSTICS[0], None, DIAGNOSTICS[2]]
    assert [line["train_accuracy"] for line in long["experiences"]] == many
    assert [line["online_accuracy"] for line in long["experiences"]] == [0.5] * 200
    assert len(json.dumps(long)) < 25_000 < 200_000 < len(json.dumps(labels))


def test_a_joint_learner_stands_beside_the_others(stream_result: Make, report: Report, tmp_path: Path) -> None:
    joint = stream_result(learner={"name": "joint"}, matrix=[[0.9, 0.8]] * 2, diagnostics=DIAGNOSTICS[:1])
    results = [stream_result(), joint]
    runs, small = record(tmp_path / "runs", results), tmp_path / "small.json"
    shown = report(runs, curve=True, summary=small)
    assert shown == printed(compared(results), stream_table(results), average_table(results))
    assert report(small, curve=True) == shown
    assert "| joint + batch_norm | – | 85.0 |" in shown


def test_the_best_of_each_method_is_chosen_by_a_rule_that_is_said(
    stream_result: Make, memorized: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"evaluate": {"split": "validation"}}
    rates = [
        stream_result(config={**held, "train": {"learning_rate": rate}}, final={"average_accuracy": score})
        for rate, score in ((0.01, 0.4), (0.03, 0.6), (0.1, 0.5))
    ]
    labels = [
        memorized([0.5, plasticity], config={"train": {"learning_rate": rate}}, final={"plasticity": plasticity})
        for rate, plasticity in ((0.01, 0.9), (0.1, 0.2))
    ]
    runs = record(tmp_path, [*rates, *labels])
    run_report([runs], select=True, as_json=True)
    captured = capsys.readouterr()
    chosen = [result["hash"] for result in json.loads(captured.out)["results"]]
    assert chosen == [rates[1]["hash"], labels[0]["hash"]]
    assert captured.err == (
        "Chosen by the average accuracy on validation images after the last experience. Chosen by plasticity, the "
        "training accuracy in the last tenth of the experiences: a memorization stream has no images to hold out.\n"
    )
    with pytest.raises(ConfigError, match="was scored on test images"):
        run_report([record(tmp_path, [stream_result()])], select=True)


def a_study(results: Sequence[dict[str, Any]], **values: Any) -> dict[str, Any]:
    return {"study": "s", "runs": [result["hash"] for result in results], "selection_runs": [], **values}


def test_a_study_brings_its_baseline_and_its_papers_numbers(
    stream_result: Make, report: Report, tmp_path: Path
) -> None:
    results = [
        stream_result(norm={"name": norm}, config={"seed": seed}, final={"average_accuracy": score + seed / 100})
        for norm, score in (("batch_norm", 0.5), ("group_norm", 0.6))
        for seed in (1, 2, 3)
    ]
    paper = [{"match": {"norm": {"name": "group_norm"}}, "score": "average_accuracy", "value": 0.7, "source": "Us, 1"}]
    study = a_study(results, baseline={"norm": {"name": "batch_norm"}}, paper=paper)
    runs, small = record(tmp_path / "runs", results), tmp_path / "small.json"
    (runs / "study.json").write_text(json.dumps(sealed(study)), encoding="utf-8")
    (comparison,) = comparisons(results, studies=[study])
    shown = report(runs, summary=small)
    assert shown == printed(comparison_table(comparison), paper_table(comparison), stream_table(results))
    assert "+10.0" in shown
    assert "−8.0" in shown  # ours, 0.62, minus the paper's
    assert report(small) == shown
    other = report(runs, baseline="er_ace + group_norm")
    assert "−10.0" in other
    told = json.loads(report(runs, as_json=True))["comparisons"][0]
    assert told["methods"][1]["differences"]["average_accuracy"]["mean"] == pytest.approx(0.1)
    assert told["methods"][1]["results"] == [result["hash"] for result in results[3:]]
    with pytest.raises(UnknownNameError, match="er_ace"):
        report(runs, baseline="er_ace + grup_norm")


def test_a_study_is_reported_without_its_search(stream_result: Make, report: Report, tmp_path: Path) -> None:
    searched = [
        stream_result(
            config={"evaluate": {"split": "validation"}, "train": {"learning_rate": rate}},
            final={"average_accuracy": 10 * rate},
        )
        for rate in (0.01, 0.03)
    ]
    final = [stream_result()]
    study = a_study(
        final,
        selection_runs=[result["hash"] for result in searched],
        selection={"rule": "Chosen.", "split": "validation", "configurations": 2, "chosen": []},
    )
    runs = record(tmp_path, [*searched, *final])
    (runs / "study.json").write_text(json.dumps(sealed(study)), encoding="utf-8")
    documents = [json.loads(report(runs, as_json=True, select=select)) for select in (False, True)]
    assert [[result["hash"] for result in document["results"]] for document in documents] == [
        [final[0]["hash"]],
        [searched[1]["hash"]],
    ]


def test_everything_is_written_and_told(
    stream_result: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = record(tmp_path / "runs", [stream_result(config={"seed": seed}) for seed in (1, 2)])
    out = tmp_path / "out"
    run_report(
        [runs],
        style="latex",
        summary=out / "s.json",
        export=[out / "r.csv", out / "r.parquet"],
        tensorboard=out / "events",
        figures=out / "figures",
        figure_format="svg",
    )
    captured = capsys.readouterr()
    assert captured.out.count(r"\begin{table}") == captured.out.count(r"\end{table}") == 2
    lines = captured.err.splitlines()
    assert lines[:4] == [
        f"summaries: {out / 's.json'}",
        f"records: {out / 'r.csv'}",
        f"records: {out / 'r.parquet'}",
        f"TensorBoard: {out / 'events'} (2 runs)",
    ]
    told = {line.removeprefix("figure: ").split(" (")[0] for line in lines[4:]}
    assert told == {str(path) for path in (out / "figures").iterdir()}
    assert f"{out / 'figures' / 'split-cifar-10-average_accuracy_by_experience.svg'}" in told
    assert len(list((out / "events").iterdir())) == 2


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_left_out_is_told_last_with_exit_code_1(
    as_json: bool, stream_result: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = record(tmp_path, [stream_result()])
    for name in ("bad", "worse"):
        (runs / name).mkdir()
        (runs / name / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        run_report([runs], as_json=as_json, summary=tmp_path / "s.json")
    assert left.value.code == 1
    captured = capsys.readouterr()
    assert (len(json.loads(captured.out)["problems"]) == 2) if as_json else ("er_ace" in captured.out)
    assert (tmp_path / "s.json").exists()
    first, second, third = captured.err.splitlines()
    assert first.startswith("summaries")
    assert str(runs / "bad") in second
    assert third.startswith(f"error: {runs / 'worse'}")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"style": "html"}, "style is one of table, markdown, latex; got 'html'"),
        ({"interval": "z"}, "interval is one of t, bootstrap; got 'z'"),
        ({"figure_format": "gif"}, "figure format is one of pdf, svg, png; got 'gif'"),
        ({"export": [Path("x.xlsx")]}, r"ends in .csv or .parquet; got x.xlsx"),
    ],
)
def test_options_are_checked_before_any_work(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        run_report([tmp_path / "nothing is read"], **options)


@pytest.mark.few(2)
@pytest.mark.parametrize("option", ["summary", "export", "tensorboard", "figures", "page"])
def test_a_place_that_cannot_be_written_is_named(option: str, stream_result: Make, tmp_path: Path) -> None:
    runs = record(tmp_path / "runs", [stream_result()])
    (tmp_path / "file").write_text("", encoding="utf-8")
    place = tmp_path / "file" / "x.csv"
    with pytest.raises(RecordError, match=r"Cannot write .*file"):
        run_report([runs], **{option: [place] if option == "export" else place})


def a_federated_result() -> dict[str, Any]:
    config = resolve({"norm": {"name": "batch_norm"}})
    own = {"per_domain": {"a": 0.5, "b": 0.9}, "mean": 0.7, "worst": 0.5}
    diagnostics = {"drift": {"a": {"bn": 0.1}}, "weight_norm": {"c": 1.0, "d": 2.0}}
    line = {"train_loss": 1.0, "bytes_down": 10, "bytes_up": 5, "seconds": 1.5, **own, "diagnostics": diagnostics}
    return {
        "kind": "federated",
        "hash": config.hash,
        "config": config.to_dict(),
        "data": {"title": "two domains", "notes": ["A note."]},
        "rounds": [{"round": number, **line} for number in (1, 2)],
        "final": {**own, "round": 2, "selection": "last round, test images"},
        "evaluation": {"own": own, "averaged": own},
        "seconds": 3.0,
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every key and to the first element of every list."""
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value[:1])) if value else []
    found = []
    for key, below in inner:
        found.append((*path, key))
        if isinstance(below, dict | list):
            found += places(below, (*path, key))
    return found


def ending(path: Path, report: Report) -> str:
    """Return how a report of one record ends: in tables, in a sentence, or as it must not."""
    try:
        report(path, curve=True)
        (result,) = load([path]).results
        assert frame([result]).height == 1
        assert records([result]).height > 5
    except FedNormError as error:
        return "a sentence" if str(error) else "nothing said"
    except Exception as error:  # what the test is about
        return f"{type(error).__name__}: {error}"
    return "tables"


@pytest.mark.few(2)
@pytest.mark.parametrize("junk", [None, "x", [], {}, 3, True, "missing"])
@pytest.mark.parametrize("kind", ["federated", "continual"])
def test_no_damage_to_a_record_ends_in_a_traceback(
    kind: str, junk: Any, stream_result: Make, tmp_path: Path, report: Report
) -> None:
    whole = a_federated_result() if kind == "federated" else stream_result(diagnostics=DIAGNOSTICS[:2])
    path = tmp_path / "result.json"
    endings: dict[str, tuple[Any, ...]] = {}
    for place in places(whole):
        inner: Any = (damaged := copy.deepcopy(whole))
        for key in place[:-1]:
            inner = inner[key]
        if junk == "missing":
            del inner[place[-1]]
        else:
            inner[place[-1]] = junk
        path.write_text(json.dumps(sealed(damaged)), encoding="utf-8")
        endings.setdefault(ending(path, report), place)
    assert endings.keys() <= {"tables", "a sentence"}, endings
