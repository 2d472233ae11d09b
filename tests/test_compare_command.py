"""``fednorm compare``: what it prints, what it says of mistakes, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fednorm.cli import compare
from fednorm.errors import AggregationError, ConfigError, DataError, UnknownNameError
from fednorm.study.estimate import Estimate

STUDY = """
[study]
title = "Two strategies"
baseline = { strategy = { name = "fedavg" } }
[base]
model = { width = 4 }
data = { train_per_client = 16, test_per_domain = 10 }
rounds = { num_rounds = 1 }
[[points]]
strategy.name = "fedbn"
[[points]]
strategy.name = "fedavg"
[grid]
seed = [1, 2]
"""

SEARCH = """
[search]
train.learning_rate = [0.01, 0.1]
[select]
data.validation = 0.25
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write a study's file into the working directory, an empty one."""
    monkeypatch.chdir(tmp_path)
    return lambda text: Path("study.toml").write_text(text) and None


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Call the command; returns its exit code, its JSON document or its text, and what it said besides."""

    def run(**options: Any) -> tuple[int, Any, str]:
        told: dict[str, Any] = {
            **{"data_dir": None, "runs": None, "jobs": 1, "settings": [], "select_on_test": False},
            **{"dry_run": False, "markdown": False, "as_json": False},
            **options,
        }
        code = 0
        try:
            compare.run_compare(told.pop("study", "study.toml"), **told)
        except SystemExit as ended:
            code = int(str(ended.code))
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if told["as_json"] else captured.out, captured.err

    return run


def failing_with(error: Exception, where: Callable[[Any], bool]) -> Callable[..., Any]:
    """Return a simulation that fails where it is told to."""
    from fednorm.federation.simulate import simulate

    def run(config: Any, **options: Any) -> Mapping[str, Any]:
        if where(config):
            raise error
        return simulate(config, **options)

    return run


def test_a_study_ends_in_tables_of_what_it_ran_and_chose(
    study: Callable[[str], None], call: Callable[..., Any]
) -> None:
    study(STUDY + SEARCH)
    code, text, err = call(markdown=True)
    assert code == 0
    assert "**Chosen hyper-parameters**" in text
    rows = [line for line in text.splitlines() if line.startswith(("| fedbn | train.", "| fedavg | train."))]
    assert len(rows) == 2
    assert "Chosen by the mean validation accuracy over domains. 2 configurations a method." in text
    assert "paired" in text  # the comparison with the baseline that the file names
    assert "[4/4] fedavg, seed 2: " in err
    manifest = json.loads(Path("runs/study/study.json").read_text())
    assert len(manifest["selection"]["chosen"]) == 2

    code, document, _ = call(as_json=True)
    assert code == 0
    assert [result["hash"] for result in document["results"]] == manifest["runs"]
    assert (document["failures"], document["interrupted"], document["out"]) == ([], False, "runs/study")
    assert document["selection"] == manifest["selection"]
    code, text, _ = call()
    assert text.splitlines()[-1] == "records: runs/study"

    code, planned, _ = call(dry_run=True, as_json=True)
    assert [run["hash"] for run in planned["runs"]] == manifest["runs"]
    assert all(run["finished"] for run in (*planned["runs"], *planned["selection_runs"]))
    assert planned["estimated_seconds"] == 0


def test_test_images_choose_with_the_option_only_and_the_tables_say_so(
    study: Callable[[str], None], call: Callable[..., Any]
) -> None:
    study(STUDY + "[search]\ntrain.learning_rate = [0.1]")
    with pytest.raises(ConfigError, match="--select-on-test"):
        call()
    code, text, _ = call(select_on_test=True, markdown=True, settings=["seed=1"])
    assert code == 0
    assert text.count("(--select-on-test): the test numbers flatter every method") >= 2  # chosen, and the comparison


def test_a_dry_run_lists_runs_with_their_time_and_runs_nothing(
    study: Callable[[str], None], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimate(config: Any) -> Estimate:
        if config.evaluate.split == "validation" and config.seed == 2:
            raise DataError("there is no data")
        return Estimate(100.0 * config.seed, "A guess.")

    monkeypatch.setattr("fednorm.study.estimate.estimate_seconds", estimate)
    study(STUDY + SEARCH)
    code, document, _ = call(dry_run=True, as_json=True, jobs=2)
    assert code == 0
    assert [(run["hash"], run["estimated_seconds"], run["finished"]) for run in document["runs"]] == [
        (None, seconds, False) for seconds in (100.0, 200.0, 100.0, 200.0)
    ]
    assert [run["config"]["train"]["learning_rate"] for run in document["selection_runs"]] == [0.01, 0.1] * 2
    assert all(len(run["hash"]) == 12 for run in document["selection_runs"])
    assert document["estimated_seconds"] == (600 + 4 * 100) / 2
    assert (document["jobs"], document["study"], document["out"]) == (2, "study", "runs/study")
    assert call(dry_run=True, as_json=True, jobs=9)[1]["estimated_seconds"] == 100 + 200  # the longest of each

    _, text, _ = call(dry_run=True, markdown=True, jobs=2)
    assert "| fedbn, seed 2 | to be chosen | 3 min |" in text
    assert "Estimated time with 2 at a time: about 8 min." in text
    assert "A guess." in text
    study(STUDY + SEARCH + "seed = 2")
    _, text, _ = call(dry_run=True, markdown=True)
    assert "Estimated time with 1 at a time: not known." in text
    assert "Not known: there is no data." in text
    assert not Path("runs").exists()


def test_failures_are_named_at_the_end_and_the_others_are_shown(
    study: Callable[[str], None], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = failing_with(DataError("its data is gone"), lambda config: config.seed == 2)
    monkeypatch.setattr("fednorm.federation.simulate.simulate", broken)
    study(STUDY)
    code, document, err = call(as_json=True)
    assert code == 2
    assert len(document["results"]) == 2
    assert [failure["reason"] for failure in document["failures"]] == ["its data is gone"] * 2
    lines = err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines if line.startswith("failed: ")] == [
        "fedbn, seed 2: its data is gone",
        "fedavg, seed 2: its data is gone",
    ]
    assert lines[-1] == "error: 2 of 4 runs failed; the first, fedbn, seed 2: its data is gone"
    assert "Traceback" not in err


def test_a_configuration_that_diverges_in_the_search_is_no_failure(
    study: Callable[[str], None], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = failing_with(AggregationError("NaN"), lambda config: config.train.learning_rate == 0.1)
    monkeypatch.setattr("fednorm.federation.simulate.simulate", broken)
    study(STUDY + SEARCH)
    code, text, err = call(markdown=True)
    assert code == 0
    assert "2 configurations a method; 2 diverged." in text
    assert "diverged: NaN" in err
    planned = call(dry_run=True, as_json=True)[1]["selection_runs"]
    assert [(run["finished"], run["diverged"]) for run in planned] == [(True, False), (False, True)] * 2


def test_a_study_that_is_stopped_says_how_far_it_is(
    study: Callable[[str], None], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = failing_with(KeyboardInterrupt(), lambda config: config.seed == 2)  # type: ignore[arg-type]
    monkeypatch.setattr("fednorm.federation.simulate.simulate", stopped)
    study(STUDY)
    code, document, err = call(as_json=True)
    assert code == 130
    assert document["interrupted"]
    assert len(document["results"]) == 1
    assert "Finished and whole: 1 of the study's 4 runs. The same command goes on with the others" in err


def test_mistakes_are_named_before_anything_runs(study: Callable[[str], None], call: Callable[..., Any]) -> None:
    study(STUDY)
    for options, kind, message in (
        ({"jobs": 0}, ConfigError, r"--jobs must be at least 1; got 0"),
        ({"study": "nowhere.toml"}, ConfigError, r"There is no study file nowhere\.toml"),
        ({"study": "digit-tuning"}, UnknownNameError, r"no study named 'digit-tuning'"),
        ({"settings": ["train.learnin_rate=1"]}, ConfigError, "Did you mean 'learning_rate'"),
        ({"settings": ["strategy.name=fedbn"]}, ConfigError, r"one and the same.*strategy\.name was set for both"),
        ({"select_on_test": True}, ConfigError, "there is nothing to select"),
    ):
        with pytest.raises(kind, match=message):
            call(**options)
    assert not Path("runs").exists()


def test_jobs_are_as_many_as_the_cores_by_default(
    study: Callable[[str], None], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "default_jobs", lambda: 7)
    monkeypatch.setattr("fednorm.study.estimate.estimate_seconds", lambda _: Estimate(1.0, "A guess."))
    study(STUDY)
    assert call(dry_run=True, as_json=True, jobs=None, data_dir=Path("/d"))[1]["jobs"] == 7
    assert call(dry_run=True, as_json=True, data_dir=Path("/d"))[1]["runs"][0]["config"]["data"]["dir"] == "/d"
