"""Results read back: what is found, what is left out and named, older formats, studies, and nothing that surprises."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fednorm.config import resolve
from fednorm.errors import RecordError
from fednorm.records.integrity import sealed
from fednorm.records.results import FORMAT, load

Make = Callable[..., dict[str, Any]]

SCORES = {"a": 0.5, "b": 0.9}


def federated(seed: int = 1, strategy: str = "fedbn", split: str = "test", **final: Any) -> dict[str, Any]:
    """Return the result of a federated run, as fednorm writes it, of as many keys as tables need."""
    config = resolve(
        {"seed": seed, "strategy": {"name": strategy}, "norm": {"name": "batch_norm"}, "evaluate": {"split": split}}
    )
    own = {"per_domain": SCORES, "mean": 0.7, "worst": 0.5}
    return {
        "kind": "federated",
        "hash": config.hash,
        "config": config.to_dict(),
        "data": {"title": "two domains", "notes": ["A note."], "clients": []},
        "rounds": [
            {"round": n, "train_loss": 1.0, "bytes_down": 10, "bytes_up": 5, "seconds": 1.5, **own} for n in (1, 2)
        ],
        "final": {**own, "round": 2, "selection": f"last round, {split} images", **final},
        "evaluation": {"own": own},
        "seconds": 3.0,
        "parameters": 7,
    }


def continual(seed: int = 1) -> dict[str, Any]:
    """Return the result of a continual run, likewise."""
    config = resolve({"kind": "continual", "seed": seed, "norm": {"name": "batch_norm"}})
    matrix = [[0.9, 0.1], [0.5, 0.8]]
    return {
        "kind": "continual",
        "hash": config.hash,
        "config": config.to_dict(),
        "learner": {"name": "er_ace", "memory_size": 500},
        "data": {"title": "a stream", "notes": [], "memorization": False},
        "experiences": [
            {"experience": n, "title": f"classes {n}", "accuracy": row, "train_accuracy": 0.9, "seconds": 2.0}
            for n, row in enumerate(matrix)
        ],
        "accuracy_matrix": matrix,
        "final": {"average_accuracy": 0.65, "selection": "after the last experience, test images"},
        "seconds": 4.0,
    }


def write(folder: Path, *results: Mapping[str, Any]) -> Path:
    for result in results:
        path = folder / f"run-{result['hash']}" / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sealed(result)), encoding="utf-8")
    return folder


def summary(path: Path, *results: Mapping[str, Any]) -> Path:
    """Write a summary as older versions did: without a format."""
    path.write_text(json.dumps({"results": results}), encoding="utf-8")
    return path


def without(result: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return a result without some dotted keys."""
    small: dict[str, Any] = copy.deepcopy(dict(result))
    for key in keys:
        *place, last = key.split(".")
        inner = small
        for name in place:
            inner = inner[name]
        del inner[last]
    return small


def hashes(*paths: Path, **options: Any) -> list[str]:
    return [result["hash"] for result in load(paths, **options).results]


def test_records_folders_and_summaries_are_read_in_one_order(tmp_path: Path) -> None:
    results = [federated(1, "fedavg"), federated(2, "fedavg"), federated(1), continual()]
    expected = [result["hash"] for result in results]
    runs = write(tmp_path / "deep" / "runs", *results[::-1])
    small = summary(tmp_path / "summary.json", *results[2:0:-1])
    assert hashes(runs) == hashes(tmp_path / "deep") == hashes(runs, runs) == hashes(small, runs) == expected
    assert hashes(small) == expected[1:3]
    record = runs / f"run-{expected[2]}"
    assert hashes(record) == hashes(record / "result.json") == expected[2:3]
    assert load([small, runs]).results[1]["run"] == str(runs / f"run-{expected[1]}")  # the record, not its summary
    assert "run" not in load([small]).results[0]
    loaded = load([runs])
    assert loaded.problems == []
    assert loaded.studies == []
    assert [without(found, "run") for found in loaded.results] == results


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read"),
        ('{"kind": "federated"', "cannot be read"),
        ("\xff\x00", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1, 2]", "no table of keys but [1, 2]"),
        ("{}", "tells no format, and this fednorm reads format 2. An older fednorm wrote it"),
        ('{"format": 1, "config": {}}', "format 1, and this fednorm reads format 2. An older fednorm wrote it"),
        ('{"format": 99, "config": {}}', "format 99, and this fednorm reads format 2. A newer fednorm wrote it"),
        ('{"format": "x"}', "format 'x', which no fednorm has written"),
        ('{"format": 2, "config": {}}', "its content is not what was written"),
        (json.dumps(sealed({})), "'config'"),
        (json.dumps(sealed({"config": {}})), "'data'"),
        (json.dumps(sealed({"config": {}, "kind": "quantum"})), "'quantum'"),
    ],
    ids=range(13),
)
def test_a_damaged_record_is_left_out_and_named(text: str, told: str, tmp_path: Path) -> None:
    good = federated()
    write(tmp_path, good)
    bad = tmp_path / "bad" / "result.json"
    bad.parent.mkdir()
    bad.write_text(text, encoding="latin-1")
    loaded = load([tmp_path])
    assert [result["hash"] for result in loaded.results] == [good["hash"]]
    (problem,) = loaded.problems
    assert str(bad) in problem
    assert told in problem
    with pytest.raises(RecordError, match="There is no finished run") as error:
        load([bad])
    assert told in str(error.value)


def test_no_result_at_all_says_where_it_looked(tmp_path: Path) -> None:
    begun = tmp_path / "begun" / "run.json"
    begun.parent.mkdir()
    begun.write_text("{}", encoding="utf-8")
    with pytest.raises(RecordError, match=r"no finished run \(result.json\) in .*1 run has begun there"):
        load([tmp_path])
    with pytest.raises(RecordError, match="no folder at all"):
        load([])
    with pytest.raises(RecordError, match=r"There is no .*nowhere\. Give a record's folder"):
        load([tmp_path / "nowhere"])


FILLED = {
    "kind": federated()["kind"],
    "config.kind": "federated",
    "config.model.activation": "",
    "config.train.agc": 0.0,
    "data.title": "digits_mini",
    "data.notes": [],
    "final.mean": 0.7,
    "final.worst": 0.5,
    "final.round": 2,
    "final.selection": "last round, test images",
    "evaluation": {"own": {"per_domain": SCORES, "mean": 0.7, "worst": 0.5}},
    "seconds": 3.0,
}


@pytest.mark.parametrize("key", FILLED)
def test_what_an_older_federated_record_lacks_follows_from_the_rest(key: str, tmp_path: Path) -> None:
    (result,) = load([summary(tmp_path / "s.json", without(federated(), key))]).results
    for name in key.split("."):
        result = result[name]
    assert result == pytest.approx(FILLED[key]) if isinstance(FILLED[key], float) else result == FILLED[key]


@pytest.mark.parametrize(
    ("key", "filled"),
    [
        ("kind", "continual"),
        ("learner", {"name": "er_ace"}),
        ("accuracy_matrix", [[0.9, 0.1], [0.5, 0.8]]),
        ("data.memorization", False),
        ("final.selection", "after the last experience, test images"),
        ("config.train.redo_tau", 0.025),
    ],
)
def test_what_an_older_stream_lacks_follows_from_the_rest(key: str, filled: Any, tmp_path: Path) -> None:
    (result,) = load([summary(tmp_path / "s.json", without(continual(), key))]).results
    for name in key.split("."):
        result = result[name]
    assert result == filled


@pytest.mark.parametrize("written", [0, -1, True, None, 3, 2.0, "1"])
def test_a_summary_of_a_format_that_this_fednorm_does_not_know_is_refused(written: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"format": written, "results": [federated()]}), encoding="utf-8")
    with pytest.raises(RecordError, match="is of format"):
        load([path])


def test_one_result_as_a_command_prints_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "printed.json"
    path.write_text(json.dumps(federated()), encoding="utf-8")
    assert load([path]).results == [federated()]
    path.write_text(json.dumps(sealed(federated())), encoding="utf-8")
    assert load([path]).results == [federated()]
    path.write_text(json.dumps(sealed(federated())).replace("0.5", "0.6"), encoding="utf-8")
    with pytest.raises(RecordError, match="not what was written"):
        load([path])


@pytest.mark.parametrize(
    ("make", "key"),
    [
        *((federated, key) for key in ("hash", "config", "data", "rounds", "final", "final.per_domain")),
        *((continual, key) for key in ("hash", "config", "data", "experiences", "final")),
    ],
)
def test_what_cannot_be_filled_in_is_named(make: Make, key: str, tmp_path: Path) -> None:
    good, bad = federated(9), without(make(), key)
    write(tmp_path, good)
    path = tmp_path / "old" / "result.json"
    path.parent.mkdir()
    path.write_text(json.dumps(sealed(bad)), encoding="utf-8")
    loaded = load([tmp_path])
    assert [result["hash"] for result in loaded.results] == [good["hash"]]
    (problem,) = loaded.problems
    assert str(path) in problem
    assert key.split(".")[-1] in problem


def test_a_bad_result_of_a_summary_leaves_the_others(tmp_path: Path) -> None:
    summary = tmp_path / "s.json"
    document = {"format": FORMAT, "results": [federated(1), 7, federated(2)], "studies": [[]]}
    summary.write_text(json.dumps(document), encoding="utf-8")
    loaded = load([summary])
    assert [result["config"]["seed"] for result in loaded.results] == [1, 2]
    assert [problem.split(" was left out")[0] for problem in loaded.problems] == [
        f"result 2 of {summary}", f"study 1 of {summary}"
    ]  # fmt: skip


def test_two_files_that_say_different_numbers_of_one_run_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a", federated())
    write(tmp_path / "b", federated(mean=0.71))
    loaded = load([tmp_path / "a", tmp_path / "b"])
    assert [result["final"]["mean"] for result in loaded.results] == [0.7]
    (problem,) = loaded.problems
    assert "says other numbers of run" in problem
    assert str(tmp_path / "b") in problem


def study(**values: Any) -> dict[str, Any]:
    return {"format": FORMAT, "study": "s", "title": "S", "runs": [], "selection_runs": [], **values}


def test_runs_that_a_study_only_chose_by_are_left_out(tmp_path: Path) -> None:
    searched, both, reported, other = federated(1, split="validation"), federated(1), federated(2), federated(3)
    runs = write(tmp_path, searched, both, reported, other)
    manifest = study(
        runs=[both["hash"], reported["hash"]],
        selection_runs=[searched["hash"], both["hash"]],
        selection={"rule": "Chosen.", "split": "validation", "configurations": 2, "chosen": []},
    )
    (tmp_path / "study.json").write_text(json.dumps(sealed(manifest)), encoding="utf-8")
    assert hashes(runs) == [both["hash"], reported["hash"], other["hash"]]
    assert len(hashes(runs, select=True)) == 4
    filled = {"about": "", "baseline": None, "paper": [], "reduced": None, "departs": {}}
    assert load([runs, runs]).studies == [{**filled, **manifest}]
    record = runs / f"run-{searched['hash']}"
    assert hashes(record) == [searched["hash"]]  # asked for by name
    for result in (both, reported, other):
        (runs / f"run-{result['hash']}" / "result.json").unlink()
    with pytest.raises(RecordError, match=r"but those of a study's search.*--select"):
        load([runs])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"format": 1}, "format 1"),
        ({"format": 3}, "format 3"),
        ({"runs": "abc"}, "'runs'"),
        ({"runs": [1]}, "hashes"),
        ({"study": None}, "'study'"),
        ({"baseline": "fedavg"}, "'baseline'"),
        ({"paper": [{"score": "mean"}]}, "'match'"),
        ({"paper": [{"match": {}, "score": "mean", "value": "1", "source": ""}]}, "'value'"),
        ({"selection": {"rule": "r"}}, "'split'"),
    ],
)
def test_a_damaged_manifest_is_named_and_its_runs_still_read(values: dict[str, Any], told: str, tmp_path: Path) -> None:
    write(tmp_path, federated())
    (tmp_path / "study.json").write_text(json.dumps(sealed(study(**values))), encoding="utf-8")
    loaded = load([tmp_path])
    assert len(loaded.results) == 1
    assert loaded.studies == []
    (problem,) = loaded.problems
    assert "study.json" in problem
    assert told in problem
