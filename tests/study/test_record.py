"""The record on disk: what it holds, what damage and a full or forbidden disk do to it, and what names a run."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fednorm.config import RunConfig, merge, resolve
from fednorm.errors import AggregationError, DamageWarning, DivergedError, RecordError
from fednorm.federation import client, server
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import Workbench
from fednorm.records.checkpoint import Checkpoint
from fednorm.records.formats import FORMAT
from fednorm.records.integrity import unsealed
from fednorm.records.record import RunRecord
from fednorm.records.versions import versions

Make = Callable[..., RunConfig]


class Act:
    """Does something after a round."""

    def __init__(self, server_round: int, act: Callable[[], None]) -> None:
        self._server_round, self._act = server_round, act

    def begin(self, _: Workbench, first_round: int) -> None:
        self.first = first_round

    def round(self, line: Any) -> None:
        if line["round"] == self._server_round:
            self._act()


# What a record holds --------------------------------------------------------------------------------------------------


def test_a_record_says_what_was_run_and_what_came_out(make: Make, tmp_path: Path) -> None:
    config = make(seed=3)
    result = simulate(config, runs=tmp_path)
    folder = tmp_path / f"fedbn-batch_norm-digits_mini-seed3-{config.hash}"
    assert result["run"] == str(folder)
    names = {path.name for path in folder.iterdir()} - {".lock"}
    tensors = {f"{name}.safetensors" for name in ("model", "clients", "further")}
    assert names == {"run.json", "rounds.jsonl", "result.json", *tensors}
    run = unsealed(json.loads((folder / "run.json").read_text()))
    assert resolve(run["config"]) == config
    assert run["hash"] == config.hash
    assert run["versions"] == versions()
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or run["versions"]["torch"] == torch.__version__
    written = unsealed(json.loads((folder / "result.json").read_text()))
    assert written.pop("format") == run["format"] == FORMAT
    assert set(written.pop("files")) == names - {"result.json"}
    assert written == result
    plan = Workbench(config).plan
    assert set(load_file(folder / "model.safetensors")) == set(plan.sent)
    local = {f"{client}/{key}" for client in range(5) for key in plan.local}
    assert set(load_file(folder / "clients.safetensors")) == local


def test_a_round_s_line_holds_every_client(make: Make, tmp_path: Path) -> None:
    result = simulate(make(), runs=tmp_path)
    text = (Path(result["run"]) / "rounds.jsonl").read_text()
    assert [json.loads(line)["line"] for line in text.splitlines()] == [1, 2, 3, 4]
    assert {json.loads(line)["hash"] for line in text.splitlines()} == {make().hash}
    lines = RunRecord(tmp_path, make()).lines()
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    for line, round_ in zip(lines, result["rounds"], strict=True):
        clients = line["clients"]
        assert [c["client"] for c in clients["train"]] == [c["client"] for c in clients["evaluate"]] == [0, 1, 2, 3, 4]
        assert [c["domain"] for c in clients["train"]] == ["scans", "photo", "fonts", "street", "faint"]
        assert {c["num-examples"] for c in clients["train"]} == {24}
        mean_loss = sum(c["loss"] for c in clients["train"]) / 5  # equally many images each
        assert line["train_loss"] == pytest.approx(mean_loss, rel=1e-12)
        accuracies = {c["domain"]: c["accuracy"] for c in clients["evaluate"]}
        assert line["per_domain"] == accuracies
        assert line["mean"] == pytest.approx(sum(accuracies.values()) / 5, rel=1e-12)
        assert line["worst"] == min(accuracies.values())
        assert round_ == {key: value for key, value in line.items() if key != "clients"}
    assert result["final"]["per_domain"] == lines[-1]["per_domain"]


def test_bytes_of_a_round_are_those_of_the_tensors_that_travel(make: Make) -> None:
    result = simulate(make(rounds={"fraction": 0.4}), runs=None)
    state = Workbench(make()).model.state_dict()
    shared = sum(tensor.nbytes for key, tensor in state.items() if "norm" not in key)  # digits_cnn's names
    for line in result["rounds"]:
        assert len(line["sampled"]) == 2
        assert line["bytes_down"] == line["bytes_up"] == 2 * shared
    assert result["plan"]["bytes_per_round"] == 4 * shared


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_once(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with a run that was cut short after its second round."""

    def stop() -> None:
        raise KeyboardInterrupt

    runs = tmp_path_factory.mktemp("cut")
    with pytest.raises(KeyboardInterrupt):
        simulate(make(), runs=runs, observer=Act(2, stop))
    return runs


@pytest.fixture
def cut(cut_once: Path, tmp_path: Path) -> Path:
    """The folder of a run that was cut short after its second round."""
    shutil.copytree(cut_once, tmp_path, dirs_exist_ok=True)
    return next(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished_once(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a run that was not cut, and has a record."""
    return simulate(make(), runs=tmp_path_factory.mktemp("finished"))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "other bytes": lambda _: b"not a checkpoint",
    "half": lambda whole: whole[: len(whole) // 2],
    "no round": lambda whole: whole.replace(b'"ended"', b'"enden"', 1),
    "round no number": lambda whole: whole.replace(b'"ended":"2"', b'"ended":"x"', 1),
    "client no number": lambda whole: whole.replace(b"client/0/", b"client/q/"),
}


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture
def whole(finished_once: dict[str, Any]) -> dict[str, Any]:
    """The result of the run that was not cut."""
    return finished_once


def slow(*cases: Any) -> list[Any]:
    """Leave cases to the slow tier, which are like others of the default tier."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "how", ["half", "no round", *slow(*(how for how in DAMAGES if how not in ("half", "no round")))]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    how: str, cut: Path, make: Make, whole: dict[str, Any], tmp_path: Path
) -> None:
    path = cut / "checkpoint.safetensors"
    content = DAMAGES[how](path.read_bytes())
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.warns(DamageWarning, match=r"is damaged .*the checkpoint before it, after round 1\.") as caught:
        result = simulate(make(), runs=tmp_path)
    assert str(path) in str(caught[0].message)
    assert timeless(result["rounds"]) == timeless(whole["rounds"])
    assert len((cut / "rounds.jsonl").read_text().splitlines()) == 4
    assert not list(cut.glob("*checkpoint*")) + list(cut.glob("previous*"))


def test_after_a_damaged_checkpoint_the_good_one_is_the_last(cut: Path, make: Make, tmp_path: Path) -> None:
    """Else the next checkpoint would put the damaged one in the good one's place."""
    last, before = cut / "checkpoint.safetensors", cut / "previous.safetensors"
    good = before.read_bytes()
    last.write_bytes(b"damaged")
    with pytest.warns(DamageWarning):
        assert RunRecord(tmp_path, make()).load_checkpoint() is not None
    assert (last.read_bytes(), before.exists()) == (good, False)


def test_where_both_checkpoints_are_damaged_both_are_named_and_removing_them_starts_over(
    cut: Path, make: Make, whole: dict[str, Any], tmp_path: Path
) -> None:
    last, before = cut / "checkpoint.safetensors", cut / "previous.safetensors"
    for path in (last, before):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RecordError, match=f"{last} is damaged .*Remove {last} and {before} to start this run over"):
        simulate(make(), runs=tmp_path)
    for path in (last, before):
        path.unlink()
    assert timeless(simulate(make(), runs=tmp_path)["rounds"]) == timeless(whole["rounds"])


def test_a_kill_between_the_two_names_leaves_the_last_checkpoint_under_the_other(
    cut: Path, make: Make, whole: dict[str, Any], tmp_path: Path
) -> None:
    (cut / "checkpoint.safetensors").replace(cut / "previous.safetensors")
    watch = Act(3, lambda: None)
    result = simulate(make(), runs=tmp_path, observer=watch)
    assert watch.first == 3
    assert timeless(result["rounds"]) == timeless(whole["rounds"])


@pytest.mark.parametrize("how", ["is lost", "has another shape"])
@pytest.mark.parametrize("key", ["server/fc1.weight", "client/0/norm1.running_mean"])
def test_a_checkpoint_with_a_tensor_lost_or_misshapen_is_named(key: str, how: str, cut: Path, make: Make) -> None:
    path = cut / "checkpoint.safetensors"
    tensors = load_file(path)
    tensors[key] = tensors[key].flatten()[:-1].clone()
    if how == "is lost":
        del tensors[key]
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path, file.metadata())
    with pytest.warns(DamageWarning, match="is damaged") as caught:
        checkpoint = RunRecord(cut.parent, make()).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint.ended == 1
    assert str(path) in str(caught[0].message)
    assert key in str(caught[0].message)


def test_a_checkpoint_of_an_older_fednorm_is_refused(cut: Path, make: Make, tmp_path: Path) -> None:
    path = cut / "checkpoint.safetensors"
    save_file(load_file(path), path, {"round": "2"})
    with pytest.raises(RecordError, match=r"tells no format.*reads format 2\. An older fednorm wrote it\).*Remove"):
        RunRecord(tmp_path, make()).load_checkpoint()


def test_other_data_than_the_checkpoint_s_are_refused(make: Make, tmp_path: Path) -> None:
    record = RunRecord(tmp_path, make())
    record.prepare()
    record.save_checkpoint(Checkpoint(0, {"a": torch.ones(1)}, data="0123"))
    for present in ("0123", None):
        checkpoint = record.load_checkpoint(present)
        assert checkpoint is not None
        assert checkpoint.data == "0123"
    with pytest.raises(RecordError, match=r"checkpoint\.safetensors.*0123.*4567.*--data-dir.*--runs.*Remove"):
        record.load_checkpoint("4567")


def test_lines_that_are_lost_are_noticed(cut: Path, make: Make, whole: dict[str, Any], tmp_path: Path) -> None:
    path = cut / "rounds.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    words = r"rounds\.jsonl has the lines of 1 rounds, .* after round 2\. .*goes on .* before it, after round 1"
    with pytest.warns(DamageWarning, match=words):
        result = simulate(make(), runs=tmp_path)
    assert timeless(result["rounds"]) == timeless(whole["rounds"])


def test_lines_that_are_all_lost_leave_nothing_to_go_on_from(cut: Path, make: Make, tmp_path: Path) -> None:
    (cut / "rounds.jsonl").write_text("")
    with pytest.raises(RecordError, match=r"has the lines of 0 rounds, .* after round 2\. Remove .* and .*previous"):
        simulate(make(), runs=tmp_path)


@pytest.mark.few(1)
@pytest.mark.parametrize("text", ["", '{"hash": 1}', *slow("{", "[]", "{}")])
def test_a_damaged_result_is_named_and_removing_it_helps(
    text: str, make: Make, whole: dict[str, Any], tmp_path: Path
) -> None:
    first, folder = whole, Path(whole["run"])
    shutil.copytree(folder.parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / folder.name / "result.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"result\.json is not a result"):
        simulate(make(), runs=tmp_path)
    path.unlink()
    again = simulate(make(), runs=tmp_path)
    for key in ("final", "evaluation", "config"):
        assert again[key] == first[key]


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "result.json", *slow("rounds.jsonl", "model.safetensors")])
def test_whatever_a_full_disk_hits_the_run_goes_on_when_there_is_space(
    name: str, make: Make, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = whole
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill() -> None:
        def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
            if path.name == f"{name}.part":
                path.write_bytes(b"half of it")
                raise full
            saving(tensors, path, metadata)

        def replaced(self: Path, *args: Any, **kwargs: Any) -> Any:
            if self.name in (name, f"{name}.part"):
                raise full
            return writing(self, *args, **kwargs)

        saving, writing = safetensors.torch.save_file, Path.open
        patch.setattr(safetensors.torch, "save_file", save_file)
        patch.setattr(Path, "open", replaced)

    with monkeypatch.context() as patch, pytest.raises(RecordError, match="No space left on device") as caught:
        simulate(make(), runs=tmp_path / "runs", observer=Act(2, fill))
    assert name in str(caught.value)
    folder = next((tmp_path / "runs").iterdir())
    assert not list(folder.glob("*.part"))
    rounds = 2 if name in ("checkpoint.safetensors", "rounds.jsonl") else 4
    checkpoint = RunRecord(tmp_path / "runs", make()).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint.ended == rounds
    result = simulate(make(), runs=tmp_path / "runs")
    assert [line["mean"] for line in result["rounds"]] == [line["mean"] for line in reference["rounds"]]
    models = [load_file(Path(r["run"]) / "model.safetensors") for r in (result, reference)]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[1])


def test_a_line_that_does_not_fit_the_disk_leaves_nothing(make: Make, tmp_path: Path) -> None:
    record = RunRecord(tmp_path, make())
    record.prepare()
    record.append_line({"round": 1})
    path, before = record.folder / "rounds.jsonl", (record.folder / "rounds.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
        with pytest.raises(RecordError, match=r"Cannot append to rounds\.jsonl in .*File too large"):
            record.append_line({"round": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    record.append_line({"round": 2})
    assert RunRecord(tmp_path, make()).lines() == [{"round": 1}, {"round": 2}]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_all_files_of_a_record_have_the_mode_that_the_user_wants(mask: int, make: Make, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        folder = Path(simulate(make(rounds={"num_rounds": 1}), runs=tmp_path)["run"])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)
    assert len(modes) == 7


def test_what_is_removed_or_relied_on_is_on_the_disk_before(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a power cut a name may last longer than what is behind it; so may a checkpoint than the lines before it."""
    events: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def synced(number: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        fsync(number)

    def replaced(part: Any, path: Any) -> None:
        events.append(("replace", Path(path).name))
        replace(part, path)

    def unlinked(path: Path, *args: Any, **options: Any) -> None:
        events.append(("unlink", path.name))
        unlink(path, *args, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    folder = Path(simulate(make(rounds={"num_rounds": 1}), runs=tmp_path)["run"])
    places = [n for n, event in enumerate(events) if event == ("replace", "checkpoint.safetensors")]
    assert events[places[0] - 2 : places[0]] == [
        *[("unlink", "checkpoint.safetensors.part"), ("sync", "checkpoint.safetensors.part")]
    ]
    assert ("sync", "rounds.jsonl") in events[: places[0]]
    for name in ("run.json", "checkpoint.safetensors", "model.safetensors", "clients.safetensors", "result.json"):
        place = events.index(("replace", name))
        assert events[place - 1] == ("sync", f"{name}.part")
        assert events[place + 1] == ("sync", folder.name)
    assert events.index(("unlink", "checkpoint.safetensors")) > events.index(("replace", "result.json")) + 1


def test_a_folder_that_cannot_be_made_is_an_error_before_training(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("I am no folder")
    monkeypatch.setattr(server, "_serve", lambda *_: pytest.fail("training started"))
    with pytest.raises(RecordError, match=r"Cannot make the run's folder in .*: Not a directory.*--runs"):
        simulate(make(), runs=tmp_path / "file" / "runs")


def test_a_read_only_folder_is_an_error_before_training(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(server, "_serve", lambda *_: pytest.fail("training started"))
    with pytest.raises(RecordError, match="Read-only file system"):
        simulate(make(), runs=tmp_path)


def test_two_processes_may_make_one_folder_at_once(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch = Path.touch

    def probed_by_another(self: Path, *args: Any, **kwargs: Any) -> None:
        touch(self, *args, **kwargs)
        self.unlink()  # as the other's probe does

    monkeypatch.setattr(Path, "touch", probed_by_another)
    record = RunRecord(tmp_path, make())
    assert not record.folder.exists()
    record.prepare()
    assert record.folder.is_dir()


def test_a_lock_ends_with_its_process(make: Make, tmp_path: Path) -> None:
    with RunRecord(tmp_path, make()).locked():
        with pytest.raises(RecordError, match="Another process"), RunRecord(tmp_path, make()).locked():
            pass
        with RunRecord(tmp_path, make(seed=2)).locked():
            pass  # another run is free
    with RunRecord(tmp_path, make()).locked():
        pass


# Diverging ------------------------------------------------------------------------------------------------------------


def test_where_all_clients_fail_the_record_keeps_its_last_good_round(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(train={"learning_rate": 1e30, "local_epochs": 2}, strategy={"name": "fedavg"})
    with pytest.raises(AggregationError, match=r"Round 1: none of the 5 sampled clients .*NaN or infinite"):
        simulate(config, runs=tmp_path)
    record = RunRecord(tmp_path, config)
    assert record.lines() == []
    assert record.load_checkpoint() is None

    fit, rare = client.fit, make(rounds={"num_rounds": 4, "checkpoint_every": 3})

    def poisoned(bench: Workbench, who: Any, *, server_round: int, turn: Any = None) -> dict[str, float]:
        metrics = fit(bench, who, server_round=server_round, turn=turn)
        if server_round == 3:
            bench.model.fc1.weight.data[0, 0] = math.nan
        return metrics

    monkeypatch.setattr(client, "fit", poisoned)
    with pytest.raises(AggregationError, match=r"Round 3: none of the 5 .*client 0: fc1\.weight has NaN"):
        simulate(rare, runs=tmp_path)
    record = RunRecord(tmp_path, rare)
    assert [line["round"] for line in record.lines()] == [1, 2]
    checkpoint = record.load_checkpoint()
    assert checkpoint is not None
    assert checkpoint.ended == 2
    monkeypatch.setattr(client, "fit", fit)
    result = simulate(rare, runs=tmp_path)
    assert result["rounds"][2:] == [
        {**line, "seconds": again["seconds"]}
        for line, again in zip(simulate(rare, runs=None)["rounds"][2:], result["rounds"][2:], strict=True)
    ]


@pytest.mark.cover(1)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["fc1.weight", "norm1.running_var"])
def test_one_client_s_bad_update_is_rejected_and_counted_and_the_round_goes_on(
    key: str, value: float, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, values = client.fit, {"strategy": {"name": "fedavg"}, "rounds": {"num_rounds": 2}}

    def poisoned(bench: Workbench, who: Any, *, server_round: int, turn: Any = None) -> dict[str, float]:
        metrics = fit(bench, who, server_round=server_round, turn=turn)
        if (server_round, who.partition_id) == (1, 2):
            bench.model.state_dict()[key].view(-1)[0] = value
        return metrics

    monkeypatch.setattr(client, "fit", poisoned)
    result = simulate(make(**values), runs=tmp_path)
    assert result["rejected_updates"] == 1
    first, second = result["rounds"]
    assert first["rejected"] == [{"client": 2, "reason": f"{key} has NaN or infinite values"}]
    assert second["rejected"] == []
    lines = RunRecord(tmp_path, make(**values)).lines()
    assert [c["client"] for c in lines[0]["clients"]["train"]] == [0, 1, 3, 4]
    assert first["bytes_up"] * 5 == first["bytes_down"] * 4
    model = load_file(Path(result["run"]) / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in model.values())


def test_a_rejected_client_goes_on_with_the_local_tensors_it_had(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FedBN client whose training diverged once must not carry NaN in its own layers for ever after."""
    fit = client.fit

    def poisoned(bench: Workbench, who: Any, *, server_round: int, turn: Any = None) -> dict[str, float]:
        metrics = fit(bench, who, server_round=server_round, turn=turn)
        if (server_round, who.partition_id) == (2, 1):
            for tensor in bench.model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.fill_(math.nan)
        return metrics

    monkeypatch.setattr(client, "fit", poisoned)
    result = simulate(make(), runs=tmp_path)
    assert [[r["client"] for r in line["rejected"]] for line in result["rounds"]] == [[], [1], [], []]
    tensors = load_file(Path(result["run"]) / "clients.safetensors")
    assert len(tensors) == 5 * result["plan"]["local"]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_loss_that_is_no_number_ends_the_run_and_its_record_is_json(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, config = client.score, make(rounds={"num_rounds": 2})
    wrong = {"loss": math.nan, "spread": math.inf}
    monkeypatch.setattr(client, "score", lambda *args, **named: score(*args, **named) | wrong)
    with pytest.raises(DivergedError, match=r"diverged: the loss is not a number from round 1 on.*learning_rate"):
        simulate(config, runs=tmp_path)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    record = RunRecord(tmp_path, config)
    for text in (record.folder / "rounds.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=refuse)
    assert not (record.folder / "result.json").exists()
    reason = "evaluation failed: the loss is not a number: it is nan"
    for line in record.lines():
        assert line["rejected"] == [{"client": pid, "reason": reason} for pid in range(5)]
        assert (line["answered"], line["missing"]["clients"]) == (0, [0, 1, 2, 3, 4])


def test_other_metrics_that_are_no_numbers_are_null(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, config = client.score, make(rounds={"num_rounds": 1})
    monkeypatch.setattr(client, "score", lambda *args, **named: {**score(*args, **named), "spread": math.inf})
    simulate(config, runs=tmp_path)
    line = RunRecord(tmp_path, config).lines()[0]
    assert [c["spread"] for c in line["clients"]["evaluate"]] == [None] * 5


def test_a_run_whose_clients_all_fail_to_evaluate_says_so(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory for the images")

    with monkeypatch.context() as patch:
        patch.setattr(client, "score", fail)
        with pytest.raises(AggregationError, match=r"No client could be evaluated.*no memory for the images"):
            simulate(make(rounds={"num_rounds": 1}), runs=tmp_path)


# What names a run -----------------------------------------------------------------------------------------------------

LEAVES: dict[str, Any] = {
    "train.scale_init": "uniform",
    "model.feature_norm": True,
    "engine": "cohort",
    "seed": 2,
    "threads": 2,
    "data.name": "digits",
    "data.domains": ["scans", "photo"],
    "data.image_size": 32,
    "data.train_per_client": 7,
    "data.test_per_domain": 7,
    "data.clients_per_domain": 2,
    "data.partition": "dirichlet",
    "data.alpha": 0.1,
    "data.shards_per_client": 3,
    "data.held_out": "scans",
    "data.validation": 0.5,
    "data.merge": True,
    "data.split_seed": 5,
    "data.normalize": "none",
    "model.name": "alexnet",
    "model.width": 8,
    "norm.name": "group_norm",
    "norm.eps": 0.1,
    "strategy.name": "fedprox",
    "train.learning_rate": 0.02,
    "train.batch_size": 7,
    "train.local_epochs": 2,
    "train.momentum": 0.5,
    "train.weight_decay": 0.5,
    "train.agc": 0.5,
    "train.agc_on": "linear",
    "train.private_noise": 0.5,
    "train.private_clip": 0.5,
    "train.private_delta": 0.5,
    "train.optimizer": "adam",
    "train.local_steps": 3,
    "train.label_smoothing": 0.1,
    "train.clip_norm": 2.0,
    "train.augment": "crop",
    "train.rotate_degrees": 45.0,
    "train.jitter": 0.2,
    "train.schedule": "cosine",
    "train.warmup_steps": 2,
    "train.final_rate": 0.1,
    "train.decay": 0.5,
    "train.decay_every": 2,
    "train.reset_optimizer": False,
    "train.project": True,
    "train.l2_init": 0.1,
    "train.l2_scales": 0.1,
    "train.weight_clip": 2.0,
    "train.hyperspherical": True,
    "train.cbp_rate": 0.1,
    "train.cbp_maturity": 5,
    "train.cbp_decay": 0.5,
    "train.snr_eta": 0.1,
    "train.snr_longest": 5,
    "train.redo_every": 5,
    "train.redo_tau": 0.1,
    "rounds.num_rounds": 11,
    "rounds.fraction": 0.5,
    "rounds.weighting": "equal",
    "model.activation": "leaky_relu",
    "rounds.evaluate_every": 2,
    "rounds.max_update_norm": 3.5,
    "evaluate.kinds": ["own", "cross"],
    "evaluate.clients": "sampled",
    "evaluate.images": 64,
    "evaluate.fallback": "pooled",
    "evaluate.split": "validation",
    "evaluate.batch_size": 32,
    "evaluate.diagnostics": False,
    "evaluate.best_round": True,
    "evaluate.central": True,
    "evaluate.adaptation": [{"name": "tent"}],
}

TOGETHER: dict[str, dict[str, Any]] = {
    "train.nesterov": {"momentum": 0.9, "nesterov": True},
    "train.wd_ratio": {"optimizer": "sgdp", "wd_ratio": 0.5},
    "train.delta": {"optimizer": "sgdp", "delta": 0.5},
    "train.beta_utility": {"optimizer": "upgd", "beta_utility": 0.5},
    "train.sigma": {"optimizer": "upgd", "sigma": 0.5},
    "train.trainable": {"trainable": "norm"},
    "train.head": {"trainable": "head", "head": "fc3"},
    "train.linear_probe_rounds": {"linear_probe_rounds": 1},
}
"""Keys of the training that are refused where no other needs them, with those."""

ELSEWHERE: dict[str, Any] = {
    "data.dir": "/elsewhere",
    "data.download": True,
    "evaluate.central_dir": "/elsewhere",
    "rounds.checkpoint_every": 7,
    "rounds.min_answered": 0.5,
    "rounds.min_nodes": 2,
    "rounds.wait": 5.0,
    "rounds.timeout": 7.0,
}


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def dotted(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_whatever_changes_numbers_changes_the_hash() -> None:
    every = {key for key, _ in dotted(resolve({}).to_dict())} - {"kind"}
    unsaid = {"norm.eps", "model.feature_norm", "engine"}  # left out at their default
    assert every | unsaid == set(LEAVES) | set(TOGETHER) | set(ELSEWHERE)
    hashes = [resolve(nested(key, value)).hash for key, value in LEAVES.items()]
    hashes += [resolve({"train": values}).hash for values in TOGETHER.values()]
    hashes.append(resolve({"engine": "cohort", "cohort_size": 3}).hash)
    assert len({resolve({}).hash, *hashes}) == len(LEAVES) + len(TOGETHER) + 2
    for key, values in TOGETHER.items():
        name = key.removeprefix("train.")
        without = {other: value for other, value in values.items() if other != name}
        assert resolve({"train": values}).hash != resolve({"train": without}).hash


@pytest.mark.parametrize("key", ELSEWHERE)
def test_where_a_run_happens_leaves_the_hash_alone(key: str) -> None:
    changed = resolve(nested(key, ELSEWHERE[key]))
    assert changed != resolve({})
    assert changed.hash == resolve({}).hash


@given(st.sets(st.sampled_from([key for key, _ in dotted(resolve({}).to_dict())])), st.integers(1, 99))
def test_writing_a_default_out_leaves_the_hash_alone(keys: set[str], seed: int) -> None:
    defaults = dict(dotted(resolve({}).to_dict()))
    values: dict[str, Any] = {"seed": seed, "strategy": {"name": "fedbn"}}
    written: dict[str, Any] = {}
    for key in keys:
        written = merge(written, nested(key, defaults[key]))
    assert resolve(merge(written, values)).hash == resolve(values).hash


def test_the_default_of_an_option_leaves_the_hash_alone() -> None:
    plain = resolve({"strategy": {"name": "fedprox"}, "norm": {"name": "group_norm"}})
    spelled = resolve({"strategy": {"name": "FedProx", "mu": plain_mu()}, "norm": {"name": "group-norm"}})
    assert plain.hash == spelled.hash
    assert resolve({"strategy": {"name": "fedprox", "mu": 2}}) == resolve({"strategy": {"name": "fedprox", "mu": 2.0}})


def plain_mu() -> Any:
    from fednorm.cards import STRATEGIES

    return STRATEGIES["fedprox"].options["mu"]


def test_hashes_are_those_of_records_already_written() -> None:
    """Records outlive versions: these hashes were made by version 0.1.0."""
    assert {name: resolve({"strategy": {"name": name}}).hash for name in ("fedavg", "fedbn", "fedwon")} == HASHES
    assert resolve(resolve({}).to_dict()).hash == HASHES["fedavg"]


HASHES = {"fedavg": "76ce0c3de10c", "fedbn": "0fce69fee01e", "fedwon": "895bb107f5cf"}


def test_a_checkpoint_comes_back_as_it_was(make: Make, tmp_path: Path) -> None:
    record = RunRecord(tmp_path, make())
    record.prepare()
    draw = torch.Generator().manual_seed(1)
    tensors = [torch.randn(3, 4, generator=draw), torch.tensor(2**53 + 1), torch.randn(4, 3, generator=draw).T]
    named = dict(zip(("server/a/b", "strategy/first/a", "client/7/x/y.z"), tensors, strict=True))
    record.save_checkpoint(Checkpoint(0, named, {"progress": [1, None, 0.1]}, "0123"))
    back = record.load_checkpoint()
    assert back is not None
    assert back.tensors.keys() == named.keys()
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in named.items())
    assert (back.ended, back.state, back.data) == (0, {"progress": [1, None, 0.1]}, "0123")
