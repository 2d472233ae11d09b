"""Live logging: what each tool is told, by fakes where a package is missing, and by the package where it is there."""

from __future__ import annotations

import importlib.util
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import fednorm
from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.report import live
from fednorm.report.live import Live, Several, require_folder, require_tools

SMALL = {"data": {"train_per_client": 8, "test_per_domain": 4, "domains": ["scans", "photo"]}, "model": {"width": 4}}


class Kept:
    """A tool that keeps what it is told."""

    made: list[Kept]

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run: str) -> None:
        self.folder, self.name, self.config, self.run = folder, name, config, run
        self.logged: dict[int, dict[str, float]] = {}
        self.final: dict[str, float] | None = None
        self.finished: bool | None = None
        Kept.made.append(self)

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged[step] = values

    def close(self, final: dict[str, float], *, finished: bool) -> None:
        self.final, self.finished = final, finished


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    Kept.made = []
    monkeypatch.setitem(live.SINKS, "kept", (Kept, "json", ""))  # type: ignore[arg-type]
    return Kept


def test_a_federation_is_told_round_by_round(kept: type[Kept], tmp_path: Path) -> None:
    with Live(["kept"], tmp_path) as told:
        result = fednorm.federated(strategy="fedbn", rounds=2, config=SMALL, observer=told)
        told.end(result)
    (tool,) = kept.made
    assert tool.run == result["hash"]
    assert tool.name == f"fedbn-batch_norm-seed1-{result['hash']}"
    assert sorted(tool.logged) == [1, 2]
    for line in result["rounds"]:
        values = tool.logged[line["round"]]
        assert values["mean"] == line["mean"]
        assert values["train_loss"] == line["train_loss"]
        assert values["accuracy/photo"] == line["per_domain"]["photo"]
    assert tool.final is not None
    assert tool.final["final/mean"] == result["final"]["mean"]
    assert tool.finished


def test_a_stream_is_told_experience_by_experience(kept: type[Kept], tmp_path: Path) -> None:
    few = {"train_per_experience": 8, "test_per_experience": 4}
    config = {"model": {"width": 4}, "train": {"epochs": 1}, "scenario": few}
    with Live(["kept"], tmp_path) as told:
        result = fednorm.continual(scenario="split_digits", learner="naive", config=config, observer=told)
        told.end(result)
    (tool,) = kept.made
    assert sorted(tool.logged) == [1, 2, 3, 4, 5]
    assert tool.logged[3]["accuracy/experience 2"] == result["accuracy_matrix"][2][1]
    assert tool.final is not None
    assert tool.final["final/average_accuracy"] == result["final"]["average_accuracy"]


def test_a_run_that_ends_early_is_told_as_such(kept: type[Kept], tmp_path: Path) -> None:
    def stopped() -> None:
        with Live(["kept"], tmp_path) as told:
            told.begin(types.SimpleNamespace(config=resolve({})), 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    (tool,) = kept.made
    assert (tool.final, tool.finished) == ({}, False)


def test_a_tool_that_fails_is_left_out_and_the_run_goes_on(
    kept: type[Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Kept, values: dict[str, float], step: int) -> None:
        del values
        if step == 2:
            raise ConnectionError("the server is gone")
        self.logged[step] = {}

    monkeypatch.setattr(Kept, "log", fail)

    def run() -> dict[str, Any]:
        with Live(["kept"], tmp_path) as told:
            return fednorm.federated(rounds=3, config=SMALL, observer=told)

    with pytest.warns(UserWarning, match="kept is told no more of this run, which goes on: ConnectionError"):
        result = run()
    assert len(result["rounds"]) == 3
    assert list(kept.made[0].logged) == [1]
    assert kept.made[0].finished is None


def test_several_observers_are_one() -> None:
    heard: list[tuple[str, Any]] = []

    class Ear:
        def begin(self, *numbers: Any) -> None:
            heard.append(("begin", numbers))

        def round(self, line: Any) -> None:
            heard.append(("round", line))

        step = experience = round

    both = Several(Ear(), Ear())
    both.begin("bench", 1)
    both.round({"round": 1})
    both.step(3)
    both.experience({"experience": 0})
    assert [name for name, _ in heard] == ["begin"] * 2 + ["round"] * 6


def test_unknown_and_missing_tools_are_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--log takes tensorboard, wandb, mlflow; got 'tensorbord'"):
        Live(["tensorbord"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'needs the package mlflow.*pip install "fednorm\[mlflow\]"'):
        require_tools(["mlflow"])


# Each tool ------------------------------------------------------------------------------------------------------------


def tell(tool: str, folder: Path, rounds: Sequence[int] = (1, 2), *, cut: bool = False) -> None:
    """Tell a tool of a run of two rounds, or of some of its rounds."""
    config = resolve({"strategy": {"name": "fedbn"}})
    with Live([tool], folder) as told:
        told.begin(types.SimpleNamespace(config=config), rounds[0])
        for number in rounds:
            mean = number / 4
            told.round({"round": number, "mean": mean, "per_domain": {"mnist-m (a)": mean}, "seconds": 1.0})
        if not cut:
            told.end({"final": {"mean": 0.5, "per_domain": {}}, "seconds": 2.0})


def test_a_folder_that_is_none_or_of_no_tool_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for tools, folder, message in (
        ((), tmp_path, "no --log names a tool. Add --log tensorboard or --log wandb or --log mlflow"),
        (("tensorboard",), tmp_path / "file", "file is a file. Name another"),
        (("tensorboard",), tmp_path / "file/logs", "file is a file. Name another"),
        (("tensorboard",), "x" * 300, "--log-dir names a path that no file system takes"),
    ):
        with pytest.raises(ConfigError, match=message):
            Live(tools, folder)
    assert require_folder((), None) == Path("logs")
    assert require_folder(("tensorboard",), tmp_path / "new/one") == tmp_path / "new/one"
    assert not (tmp_path / "new").exists()


def test_tensorboard_reads_it_while_it_goes(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell("tensorboard", tmp_path)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("mean")] == [(1, 0.25), (2, 0.5)]
    assert [event.value for event in events.Scalars("final/mean")] == [0.5]
    assert "accuracy/mnist-m (a)" in events.Tags()["scalars"]


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.slow
def test_a_run_that_goes_on_has_each_step_once_in_tensorboard(tmp_path: Path) -> None:
    """It was cut after round 5 and goes on from its checkpoint after round 3; then all of it is run anew."""
    tell("tensorboard", tmp_path, (1, 2, 3, 4, 5), cut=True)
    time.sleep(1)  # TensorBoard orders files by the second
    tell("tensorboard", tmp_path, (4, 5, 6))
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert points(folder, "mean") == [(number, number / 4) for number in range(1, 7)]
    assert points(folder, "final/mean") == [(6, 0.5)]
    time.sleep(1)
    tell("tensorboard", tmp_path, (1, 2))
    assert points(folder, "mean") == [(1, 0.25), (2, 0.5)]
    assert points(folder, "final/mean") == [(2, 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("last", [3, 4])
def test_a_run_cut_in_earnest_goes_on_without_doubled_steps(last: int, tmp_path: Path) -> None:
    class Cut:
        def begin(self, *_: Any) -> None: ...

        def round(self, line: Mapping[str, Any]) -> None:
            if line["round"] == last:
                raise KeyboardInterrupt

    config = {**SMALL, "rounds": {"num_rounds": 4, "checkpoint_every": 2}}
    with pytest.raises(KeyboardInterrupt), Live(["tensorboard"], tmp_path) as told:
        fednorm.federated(config=config, runs=tmp_path / "runs", observer=Several(told, Cut()))
    time.sleep(1)  # TensorBoard orders files by the second
    with Live(["tensorboard"], tmp_path) as told:
        result = fednorm.federated(config=config, runs=tmp_path / "runs", observer=told)
        told.end(result)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert len(list(folder.iterdir())) == 2
    means = [(line["round"], pytest.approx(line["mean"])) for line in result["rounds"]]
    assert points(folder, "mean") == means
    assert [step for step, _ in points(folder, "final/mean")] == [4]


def test_wandb_is_offline_and_goes_on_under_the_run_s_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {"log": []}

    class Run:
        def __init__(self) -> None:
            self.summary: dict[str, float] = {}
            calls["summary"] = self.summary

        def log(self, values: Any, step: int) -> None:
            calls["log"].append((step, values["mean"]))

        def finish(self, exit_code: int) -> None:
            calls["exit"] = exit_code

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)

    def init(**given: Any) -> Run:
        calls["init"] = given
        return Run()

    fake.init = init  # type: ignore[attr-defined]
    fake.Settings = lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tell("wandb", tmp_path)
    given = calls["init"]
    assert (given["mode"], given["resume"], given["dir"], given["project"]) == (
        "offline", "allow", str(tmp_path), "fednorm",
    )  # fmt: skip
    assert given["id"] == resolve({"strategy": {"name": "fedbn"}}).hash
    assert given["config"]["strategy.name"] == "fedbn"
    assert calls["log"] == [(1, 0.25), (2, 0.5)]
    assert calls["summary"]["final/mean"] == 0.5
    assert calls["exit"] == 0
    calls["log"].clear()
    tell("wandb", tmp_path, (2, 3))  # it goes on from a checkpoint after round 1
    assert calls["log"] == [(3, 0.75)]
    calls["log"].clear()
    tell("wandb", tmp_path)  # from its beginning: the record was deleted, say
    assert calls["log"] == [(1, 0.25), (2, 0.5)]
    monkeypatch.setenv("WANDB_MODE", "online")
    tell("wandb", tmp_path)
    assert calls["init"]["mode"] == "online"


class FakeClient:
    """What is used of MLflow's client."""

    runs: dict[str, dict[str, Any]]

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> Any:
        assert name == "fednorm"
        return types.SimpleNamespace(experiment_id="7") if FakeClient.runs else None

    def create_experiment(self, name: str) -> str:
        assert name == "fednorm"
        return "7"

    def search_runs(self, experiments: list[str], text: str, max_results: int) -> list[Any]:
        assert (experiments, max_results) == (["7"], 1)
        wanted = text.split("'")[1]
        return [run["made"] for run in FakeClient.runs.values() if run["tags"]["fednorm_run"] == wanted]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        assert experiment == "7"
        info, data = types.SimpleNamespace(run_id=f"r{len(FakeClient.runs)}"), types.SimpleNamespace(metrics={})
        made = types.SimpleNamespace(info=info, data=data)
        FakeClient.runs[made.info.run_id] = {"made": made, "tags": tags, "name": run_name, "params": {}, "metrics": []}
        return made

    def update_run(self, run: str, status: str) -> None:
        FakeClient.runs[run]["status"] = status

    def log_param(self, run: str, key: str, value: str) -> None:
        FakeClient.runs[run]["params"][key] = value

    def log_metric(self, run: str, key: str, value: float, step: int = 0) -> None:
        FakeClient.runs[run]["metrics"].append((key, step, value))
        FakeClient.runs[run]["made"].data.metrics[key] = value

    def get_metric_history(self, run: str, name: str) -> list[Any]:
        metrics = FakeClient.runs[run]["metrics"]
        return [types.SimpleNamespace(step=step) for key, step, _ in metrics if key == name]

    def set_terminated(self, run: str, status: str) -> None:
        FakeClient.runs[run]["status"] = status


def have_mlflow(monkeypatch: pytest.MonkeyPatch, client: type[FakeClient]) -> None:
    """Let MLflow be installed, with a client that is ours."""
    package, tracking = types.ModuleType("mlflow"), types.ModuleType("mlflow.tracking")
    package.__spec__ = importlib.util.spec_from_loader("mlflow", None)
    tracking.MlflowClient = client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)


def test_mlflow_s_run_is_found_again_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClient.runs = {}
    have_mlflow(monkeypatch, FakeClient)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tell("mlflow", tmp_path)
    (run,) = FakeClient.runs.values()
    assert run["params"]["strategy.name"] == "fedbn"
    assert ("mean", 2, 0.5) in run["metrics"]
    assert ("accuracy/mnist-m _a_", 1, 0.25) in run["metrics"]
    assert ("final/mean", 0, 0.5) in run["metrics"]
    assert run["status"] == "FINISHED"
    told = list(run["metrics"])
    tell("mlflow", tmp_path)
    assert len(FakeClient.runs) == 1
    assert run["metrics"] == told
    tell("mlflow", tmp_path, (2, 3))
    assert [step for key, step, _ in run["metrics"] if key == "mean"] == [1, 2, 3]


def test_of_runs_that_begin_at_once_one_makes_mlflow_s_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(FakeClient):
        """Another run makes the experiment between this one's looking for it and its making it."""

        made = False

        def get_experiment_by_name(self, name: str) -> Any:
            assert name == "fednorm"
            return types.SimpleNamespace(experiment_id="7") if Late.made else None

        def create_experiment(self, name: str) -> str:
            Late.made = True
            raise RuntimeError(f"{name} exists")

    FakeClient.runs = {}
    have_mlflow(monkeypatch, Late)
    monkeypatch.setattr(live._MLflow, "_PATIENCE", 0.0)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tell("mlflow", tmp_path)
    assert [run["status"] for run in FakeClient.runs.values()] == ["FINISHED"]


@pytest.mark.slow
def test_the_real_wandb_writes_its_files_and_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tell("wandb", tmp_path)
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_mlflow_writes_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="the extra mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tell("mlflow", tmp_path)
    client = tracking.MlflowClient(tracking_uri=(tmp_path / "mlruns").resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fednorm").experiment_id])
    assert run.data.metrics["mean"] == 0.5
    assert run.info.status == "FINISHED"


def test_the_command_line_logs_as_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fednorm.cli.app import app

    monkeypatch.chdir(tmp_path)
    words = ["federated", "--rounds", "1", "--log", "tensorboard", "--json", "--domains", "scans,photo"]
    less = ["--train-per-client", "8", "--set", "model.width=4", "--set", "data.test_per_domain=4"]
    app([*words, *less], standalone_mode=False)
    assert len(list((tmp_path / "logs/tensorboard").glob("fedavg-*/events.out.tfevents.*"))) == 1
    with pytest.raises(ConfigError, match="--log takes"):
        app([*words, "--log", "nope", *less], standalone_mode=False)


# A study ------------------------------------------------------------------------------------------------------------

STUDY = """\
[base]
kind = "federated"
data = { train_per_client = 8, test_per_domain = 4, domains = ["scans", "photo"] }
model.width = 4
rounds.num_rounds = 2
[[points]]
strategy.name = "fedavg"
[[points]]
strategy.name = "fedbn"
"""


def compare(folder: Path, *words: str) -> dict[str, Any]:
    from fednorm.cli.app import app

    (folder / "study.toml").write_text(STUDY, encoding="utf-8")
    app(["compare", str(folder / "study.toml"), "--out", str(folder / "runs"), *words], standalone_mode=False)
    return {path.name.split("-")[0]: path for path in (folder / "logs/tensorboard").iterdir()}


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_each_run_of_a_study_is_told_under_its_own_name(
    jobs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = compare(tmp_path, "--jobs", jobs, "--log", "tensorboard", "--json")
    assert sorted(told) == ["fedavg", "fedbn"]
    for folder in told.values():
        assert [step for step, _ in points(folder, "mean")] == [1, 2]
        assert len(points(folder, "final/mean")) == 1
    compare(tmp_path, "--jobs", jobs, "--log", "tensorboard", "--json")  # all are finished: nothing is told again
    assert [len(list(folder.iterdir())) for folder in told.values()] == [1, 1]


def test_a_study_with_a_tool_that_is_missing_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match=r"--log mlflow needs the package mlflow"):
        compare(tmp_path, "--log", "mlflow")
    with pytest.raises(ConfigError, match="--log takes tensorboard"):
        compare(tmp_path, "--log", "nope", "--dry-run")
    assert not (tmp_path / "runs").exists()
