"""A run that is killed anywhere goes on from its last checkpoint and ends with the very same numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fednorm.config import merge, resolve
from fednorm.errors import DamageWarning, RecordError
from fednorm.records.checkpoint import TABLE_VERSION, VERSION
from fednorm.records.formats import FORMAT
from fednorm.records.integrity import tensors_metadata, unsealed
from fednorm.records.record import RunRecord
from fednorm.streams import simulate as module
from fednorm.streams.simulate import simulate
from fednorm.streams.workbench import ContinualWorkbench

Values = dict[str, Any]


def slow(*cases: tuple[Any, ...]) -> list[Any]:
    """Leave cases to the slow tier, which are like others of the default tier."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


# Five experiences of 4 steps each; checkpoints after each third step, and at the ends.
SMALL: Values = {
    "scenario": {"num_experiences": 5, "train_per_experience": 8},
    "train": {"epochs": 2, "checkpoint_every": 3, "augment": "crop_flip", "momentum": 0.9},
}
STEPS = 20

METHODS: dict[str, tuple[str, str, Values]] = {
    "memory, generators, norm counters, psi": ("er_ace", "adab2n", {}),
    "stored logits": ("derpp", "batch_renorm", {"learner": {"passes": "separate"}}),
    "springs": ("ewc", "batch_norm", {"learner": {"mode": "separate"}}),
    "projection, means for the evaluated": ("scr", "batch_norm", {}),
    "teacher": ("lwf", "batch_norm_corrected", {}),
    "balanced memory": ("gdumb", "batch_norm", {}),
    "balanced statistics": ("er", "task_balanced_norm", {"learner": {"statistics": "balanced"}}),
    "moments, radii, count of projections": (
        "er",
        "nap",
        {"norm": {"every": 4, "affine": "joint"}, "train": {"optimizer": "adam", "momentum": 0}},
    ),
    "projection of any norm": (
        "naive",
        "batch_norm",
        {"train": {"project": True, "optimizer": "adamw", "momentum": 0}},
    ),
    "moments and steps of adamp": (
        "er",
        "batch_norm",
        {"train": {"optimizer": "adamp", "momentum": 0, "weight_decay": 0.1, "delta": 9.0}},
    ),
    "momentum of sgdp, the head first": (
        "naive",
        "batch_norm",
        {"train": {"optimizer": "sgdp", "nesterov": True, "delta": 9.0, "linear_probe_epochs": 1}},
    ),
    "frozen weights": ("er_ace", "adab2n", {"train": {"trainable": "norm"}}),
    "count of updates between resets": ("naive", "none", {"train": {"redo_every": 5, "redo_tau": 0.9}}),
    "utilities and ages": ("er", "batch_norm", {"train": {"cbp_rate": 0.1, "cbp_maturity": 2, "cbp_decay": 0.9}}),
    "silences": ("naive", "none", {"train": {"snr_eta": 0.3, "snr_longest": 4}}),
    "utilities of weights, noise": (
        "er",
        "batch_norm",
        {"train": {"optimizer": "upgd", "momentum": 0, "sigma": 0.1, "beta_utility": 0.9}},
    ),
    "initial weights": ("naive", "layer_norm", {"train": {"l2_init": 0.1, "agc": 0.01}}),
    "what an experience begins with": (
        "er",
        "batch_norm",
        {"train": {"shrink": 0.8, "perturb": 0.2, "reset_optimizer": True}},
    ),
    "learning rate": ("naive", "batch_norm", {"train": {"schedule": "cosine", "warmup_steps": 3}}),
    "all experiences at once": ("joint", "adab2n", {}),
}
FIRST = next(iter(METHODS))


@pytest.fixture(scope="module")
def small(toy: Any) -> Callable[..., Values]:
    """Return what a user would write for a small run of one of the methods."""

    def values(method: str = FIRST, **changes: Any) -> Values:
        learner, norm, own = METHODS[method]
        return merge(merge(merge(toy.values("split_digits", learner, norm), SMALL), own), changes)

    return values


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, written: Any) -> Callable[[Values], Any]:
    """Return what the uninterrupted run of some values leaves, run once."""
    made: dict[str, Any] = {}

    def reference(values: Values) -> Any:
        config = resolve(values)
        if config.hash not in made:
            made[config.hash] = written(Path(simulate(config, runs=tmp_path_factory.mktemp("whole"))["run"]))
        return made[config.hash]

    return reference


class Watch:
    """Remembers at which step a run went on, and what it did from there."""

    def __init__(self, interrupt: int = 0) -> None:
        self.interrupt = interrupt
        self.first = -1
        self.steps: list[int] = []
        self.experiences: list[int] = []

    def begin(self, bench: Any, first_step: int, total_steps: int) -> None:
        assert (total_steps, bench.config.train.checkpoint_every) == (STEPS, 3)
        self.first = first_step

    def step(self, done: int) -> None:
        self.steps.append(done)
        if done == self.interrupt:
            raise KeyboardInterrupt

    def experience(self, line: Any) -> None:
        self.experiences.append(line["experience"])


def go_on(values: Values, runs: Path) -> tuple[Path, Watch]:
    watch = Watch()
    return Path(simulate(resolve(values), runs=runs, observer=watch)["run"]), watch


# Anywhere -------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("place", "n", "first"),
    [
        ("in the step", 8, 6),  # between a checkpoint and the experience's end
        ("in the line", 2, 12),
        ("before the checkpoint", 0, 3),  # the line is there
        ("in the checkpoint", 2, 3),  # of the first end, half written
        ("in the result", 0, STEPS),
        *slow(
            ("in the step", 2, 0),  # before the first checkpoint
            ("after the step", 3, 3),
            ("after the step", 12, 12),  # the last step has a checkpoint, what the end does is still to come
            ("before the line", 0, 3),
            ("before the checkpoint", 4, 18),
            ("after the experience", 0, 4),
            ("before the result", 0, STEPS),
        ),
    ],
)
def test_a_run_killed_anywhere_goes_on(
    place: str, n: int, first: int, small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small()
    _, how = launcher.run(values, tmp_path, place, n)
    assert how == -signal.SIGKILL
    folder, watch = go_on(values, tmp_path)
    assert watch.first == first
    assert watch.steps == list(range(first + 1, STEPS + 1))
    assert written(folder) == whole(values)


OF_LEARNERS = ("stored logits", "springs", "teacher", "balanced memory", "all experiences at once")
"""What the tests of learners stop and go on with too, in one process."""
KILLS = (("in the step", 8, 6), ("after the step", 12, 12))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "place", "n", "first"),
    [
        *((method, *KILLS[number % 2]) for number, method in enumerate(METHODS) if method not in OF_LEARNERS),
        *slow(*((method, *KILLS[number % 2]) for number, method in enumerate(METHODS) if method in OF_LEARNERS)),
        *slow(*((method, *KILLS[1 - number % 2]) for number, method in enumerate(METHODS))),
    ],
)
def test_every_kind_of_state_is_restored(
    method: str, place: str, n: int, first: int, small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small(method)
    _, how = launcher.run(values, tmp_path, place, n)
    assert how == -signal.SIGKILL
    folder, watch = go_on(values, tmp_path)
    assert watch.first == first
    assert written(folder) == whole(values)


@pytest.mark.slow
def test_a_memory_that_was_being_learned_is_learned_again(
    small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    """GDumb trains when an experience has ended, from its first weights."""
    values = small("balanced memory")
    _, how = launcher.run(values, tmp_path, "in an update", 8)
    assert how == -signal.SIGKILL
    folder, watch = go_on(values, tmp_path)
    assert watch.first == 6
    assert written(folder) == whole(values)


@pytest.mark.slow
def test_a_run_may_be_killed_again_and_again(
    small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small()
    for place, n in (("in the step", 5), ("before the line", 1), ("after the step", 9), ("in the checkpoint", 2)):
        assert launcher.run(values, tmp_path, place, n)[1] == -signal.SIGKILL
    folder, watch = go_on(values, tmp_path)
    assert watch.first == 12
    assert written(folder) == whole(values)


@pytest.mark.parametrize(("step", "first"), [(17, 16), *slow((2, 0), (6, 6))])
def test_an_interrupted_run_goes_on_in_the_same_process(
    step: int, first: int, small: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small()
    with pytest.raises(KeyboardInterrupt):
        simulate(resolve(values), runs=tmp_path, observer=Watch(step))
    folder, watch = go_on(values, tmp_path)
    assert watch.first == first
    assert written(folder) == whole(values)


@pytest.mark.slow
def test_how_often_checkpoints_are_taken_changes_nothing_and_may_change(
    small: Any, whole: Any, written: Any, tmp_path: Path, toy: Any
) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate(resolve(small()), runs=tmp_path, observer=Watch(10))
    other = resolve(small(train={"checkpoint_every": 7}))
    found, expected = written(Path(simulate(other, runs=tmp_path)["run"])), whole(small())
    assert found.lines == expected.lines
    assert not toy.differing(found.model, expected.model)


# What a checkpoint is -------------------------------------------------------------------------------------------------

LOST = {
    "memory, generators, norm counters, psi": (
        "own/buffer/labels",
        "own/buffer/insert",
        "num_batches_tracked",
        "task_",
    ),
    "stored logits": ("own/buffer/logits", "running_mean"),
    "springs": ("own/importance", "own/centre"),
    "teacher": ("own/teacher", "own/old_classes"),
    "balanced memory": ("own/buffer/images",),
    "moments, radii, count of projections": ("optimizer/", "exp_avg", "effect/"),
    "count of updates between resets": ("effect/",),
    "learning rate": ("optimizer/", "count/hits"),
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "lost"),
    [
        *((method, parts[0]) for method, parts in LOST.items()),
        *slow(*((method, lost) for method, parts in LOST.items() for lost in parts[1:])),
    ],
)
def test_the_comparison_would_notice_lost_state(
    method: str, lost: str, cut: Any, whole: Any, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, _ = cut(method, tmp_path, 8)
    load = RunRecord.load_checkpoint

    def forgetful(record: RunRecord, data: str) -> Any:
        loaded = load(record, data)
        assert loaded is not None
        forgotten = [tensor for key, tensor in loaded.tensors.items() if lost in key]
        for tensor in forgotten:
            tensor.fill_(0 if tensor.ndim else 3)
            if lost.endswith("insert"):
                tensor.copy_(torch.Generator().manual_seed(0).get_state())
        assert forgotten
        return loaded

    monkeypatch.setattr(RunRecord, "load_checkpoint", forgetful)
    folder, _ = go_on(values, tmp_path)
    with pytest.raises(AssertionError):
        assert written(folder) == whole(values)


@pytest.mark.slow
def test_a_checkpoint_is_plain_tensors_and_json(small: Any, launcher: Any, tmp_path: Path, toy: Any) -> None:
    launcher.run(small(), tmp_path, "in the step", 8)
    path = next(tmp_path.iterdir()) / "checkpoint.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    assert set(about) == {
        *("version", "ended", "state", "data", "journal"),
        *("shapes", "hash", "record_format", "digest"),
    }
    state, shapes = (json.loads(about[key]) for key in ("state", "shapes"))
    assert shapes == {key: list(tensor.shape) for key, tensor in tensors.items()}
    assert (about["version"], about["ended"]) == (str(VERSION), "1")
    assert state["progress"] == {"step": 6, "ended": 1, "begun": True, "epoch": 0, "batch": 2}
    model = toy.bench(resolve(small())).model.state_dict()
    assert {f"model/{key}" for key in model} == {key for key in tensors if key.startswith("model/")}
    assert int(tensors["model/norm1.num_batches_tracked"]) == 6
    assert tensors["model/norm1.task_weight"].any()
    assert {key for key in tensors if key.startswith("own/")} == {
        "own/seen_classes",
        *(f"own/buffer/{key}" for key in ("capacity", "num_seen", "insert", "draw", "images", "labels", "tasks")),
    }
    assert int(tensors["own/buffer/num_seen"]) == 24
    assert tensors["own/buffer/images"].dtype == torch.uint8
    assert {key for key in tensors if key.startswith("optimizer/")} == {
        f"optimizer/{number}/momentum_buffer"
        for number in range(len(list(toy.bench(resolve(small())).model.parameters())))
    }


def reseal(path: Path, tensors: dict[str, torch.Tensor], **changes: str | None) -> None:
    """Write a checkpoint of a run again, with a digest of what it now holds; None takes an entry away."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    about = {key: metadata[key] for key in ("version", "ended", "state", "data", "journal")} | changes
    kept = {key: text for key, text in about.items() if text is not None}
    save_file(tensors, path, tensors_metadata(tensors, metadata["hash"], kept))


def damage(path: Path, how: str) -> None:
    content, tensors = path.read_bytes(), load_file(path)
    with safe_open(path, framework="pt") as file:
        state = file.metadata()["state"]
    if how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "something else":
        path.write_text("not a checkpoint")
    elif how == "no state":
        reseal(path, tensors, state=None)
    elif how == "half a state":
        reseal(path, tensors, state=state[:50])
    else:
        reseal(path, tensors, version=None if how == "no version" else how)


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["cut short", "half a state", *slow(("empty",), ("something else",), ("no state",))])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    how: str, cut: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values, path = cut(FIRST, tmp_path, 9)
    with safe_open(path.with_name("previous.safetensors"), framework="pt") as file:
        before = json.loads(file.metadata()["state"])["progress"]["step"]
    damage(path, how)
    with pytest.warns(DamageWarning, match="is damaged") as caught:
        folder, watch = go_on(values, tmp_path)
    assert [str(path) in str(warning.message) for warning in caught] == [True]
    assert 0 < before < 9
    assert watch.first == before
    assert written(folder) == whole(values)


@pytest.mark.slow
@pytest.mark.parametrize("found", [str(TABLE_VERSION + 1), *slow(("0",), ("no version",))])
def test_a_checkpoint_of_another_version_is_refused_and_its_remedy_works(
    found: str, cut: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values, path = cut(FIRST, tmp_path, 9)
    damage(path, found)
    before = path.read_bytes()
    version = None if found == "no version" else found
    words = f"has version {version}, and this fednorm reads {VERSION}.*Remove {path} and .*previous.* to start this run"
    with pytest.raises(RecordError, match=words):
        go_on(values, tmp_path)
    assert path.read_bytes() == before
    path.unlink()
    path.with_name("previous.safetensors").unlink()
    folder, watch = go_on(values, tmp_path)
    assert watch.first == 0
    assert written(folder) == whole(values)


@pytest.fixture(scope="module")
def cut(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Values, Path]]:
    """Copy the record of a method's run that ended after a step (10: in the third experience), name its checkpoint."""
    made: dict[tuple[str, int], Path] = {}

    def copy(method: str, runs: Path, step: int = 10) -> tuple[Values, Path]:
        values = small(method)
        if (method, step) not in made:
            made[method, step] = tmp_path_factory.mktemp("cut")
            with pytest.raises(KeyboardInterrupt):
                simulate(resolve(values), runs=made[method, step], observer=Watch(step))
        shutil.copytree(made[method, step], runs, dirs_exist_ok=True)
        return values, next(runs.iterdir()) / "checkpoint.safetensors"

    return copy


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], *, manifest: bool = True) -> None:
    """Write a checkpoint again, its tensors and its state changed in place, its digest left or made to fit."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = json.loads(metadata["state"])
    change(tensors, state)
    if manifest:
        save_file(tensors, path, {**metadata, "state": json.dumps(state)})
    else:
        reseal(path, tensors, state=json.dumps(state))


PARTS = {
    FIRST: ("model/norm1.running_mean", "own/buffer/labels", "own/seen_classes", "count/hits"),
    "springs": ("own/centre",),
    "moments, radii, count of projections": ("optimizer/3/exp_avg_sq", "effect/"),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["is lost", "has another shape"])
@pytest.mark.parametrize(("method", "part"), [(method, part) for method, parts in PARTS.items() for part in parts])
def test_a_checkpoint_with_a_tensor_lost_or_misshapen_is_not_used(
    how: str, method: str, part: str, cut: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    """A moment that is lost would be no error for PyTorch, which would begin it anew, to other numbers."""
    values, path = cut(method, tmp_path)
    key = min(key for key in load_file(path) if key.startswith(part))

    def change(tensors: dict[str, Any], _: Any) -> None:
        tensors[key] = torch.cat([tensors[key].flatten()] * 2)
        if how == "is lost":
            del tensors[key]

    rewrite(path, change)
    with pytest.warns(DamageWarning, match="is damaged") as caught:
        folder, _ = go_on(values, tmp_path)
    assert [str(path) in str(warning.message) for warning in caught] == [True]
    assert key in str(caught[0].message)
    assert written(folder) == whole(values)


@pytest.mark.parametrize(
    ("lost", "of"),
    [("model/norm1.weight", "tensors"), ("own/buffer/draw", "tensors"), ("own/seen_classes", "tensors"),
     ("count/loss_sum", "tensors"), ("untrained", "state"), ("progress", "state"), ("rates", "state")],
)  # fmt: skip
def test_what_another_version_has_not_written_is_named(lost: str, of: str, cut: Any, tmp_path: Path) -> None:
    """Nor told of: the learner itself finds it missing."""
    values, path = cut(FIRST, tmp_path)
    rewrite(path, lambda tensors, state: (tensors if of == "tensors" else state).pop(lost), manifest=False)
    with pytest.raises(RecordError, match=r"The checkpoint .*Remove .* and .* to start this run over") as caught:
        go_on(values, tmp_path)
    assert str(path) in str(caught.value)
    assert lost.rsplit("/", 1)[-1] in str(caught.value)


def test_a_run_does_not_go_on_with_other_data(cut: Any, whole: Any, written: Any, toy: Any, tmp_path: Path) -> None:
    values, path = cut(FIRST, tmp_path)
    config = resolve(values)
    theirs = toy.bench(resolve(merge(values, {"seed": 2}))).stream
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(RecordError, match=r"other data.*--data-dir.*--runs.*Remove .* to start") as caught:
        simulate(config, runs=tmp_path, bench=ContinualWorkbench(config, theirs))
    for word in (str(path), theirs.digest(), toy.bench(config).stream.digest()):
        assert word in str(caught.value)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
    folder, watch = go_on(values, tmp_path)
    assert watch.first == 9
    assert written(folder) == whole(values)


@pytest.mark.parametrize("lost", ["all", "the last", "half of the last"])
def test_lost_lines_are_noticed(lost: str, cut: Any, tmp_path: Path) -> None:
    values, checkpoint = cut(FIRST, tmp_path, 15)
    path = checkpoint.with_name("experiences.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    two = "".join(lines[:2])
    path.write_text({"all": "", "the last": two, "half of the last": two + lines[2][:50]}[lost])
    found = 0 if lost == "all" else 2
    with pytest.raises(RecordError, match=rf"has the lines of {found} experiences.*after experience 3. Remove"):
        go_on(values, tmp_path)


# Other processes, other times -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_never_write_to_one_record(
    small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small()
    pid, how = launcher.run(values, tmp_path, "stop", 1)
    try:
        assert how == "stopped"
        with pytest.raises(RecordError, match="Another process is running this run now"):
            go_on(values, tmp_path)
        folder = next(tmp_path.iterdir())
        assert len((folder / "experiences.jsonl").read_text().splitlines()) == 2
        os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while not (folder / "result.json").exists() or (folder / "checkpoint.safetensors").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert written(folder) == whole(values)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(
    small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small()
    _, how = launcher.run(values, tmp_path, "disk full", 1)  # no file of more than 10 kB from then on
    assert how == 3
    message = (tmp_path / "error.txt").read_text()
    assert message.startswith("RecordError: Cannot write checkpoint.safetensors in ")
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert not list(folder.glob("*.part"))
    folder, watch = go_on(values, tmp_path)
    assert watch.first == 8
    assert written(folder) == whole(values)


def test_a_finished_run_is_read_back_and_not_run_again(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = simulate(resolve(small()), runs=tmp_path)
    monkeypatch.setattr(module, "ContinualWorkbench", lambda *_: pytest.fail("the run was made again"))
    before = {path: path.stat().st_mtime_ns for path in Path(first["run"]).iterdir()}
    assert simulate(resolve(small()), runs=tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in Path(first["run"]).iterdir()} == before
    assert {path.name for path in before} == {
        ".lock", "run.json", "experiences.jsonl", "model.safetensors", "result.json"
    }  # fmt: skip


def test_a_record_that_was_moved_says_where_it_is(small: Any, tmp_path: Path) -> None:
    first = simulate(resolve(small()), runs=tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    again = simulate(resolve(small()), runs=tmp_path / "there")
    assert again == {**first, "run": str(tmp_path / "there" / Path(first["run"]).name)}


def test_a_record_tells_what_was_run(small: Any, tmp_path: Path) -> None:
    config = resolve(small())
    result = simulate(config, runs=tmp_path)
    folder = Path(result["run"])
    assert folder.name == f"er_ace-adab2n-split_digits-seed1-{config.hash}"
    about = unsealed(json.loads((folder / "run.json").read_text()))
    assert resolve(about["config"]) == config
    assert about["versions"]["torch"] == version("torch")
    assert about["data"] == result["data"]
    written = unsealed(json.loads((folder / "result.json").read_text()))
    assert set(written.pop("files")) == {"run.json", "experiences.jsonl", "model.safetensors"}
    assert written.pop("format") == FORMAT
    assert written == result
    assert RunRecord(tmp_path, config).lines() == result["experiences"]
