"""The table of what clients of a large federation keep: exact, whole after a kill, named where it is damaged."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from safetensors.torch import load_file

import fednorm
from fednorm.config import merge, resolve
from fednorm.errors import ConfigError, DamageWarning, RecordError
from fednorm.federation import contexts
from fednorm.federation.simulate import simulate
from fednorm.records.columns import frame_of, reports
from fednorm.records.folder import Folder
from fednorm.records.formats import Unfit
from fednorm.records.result import FederatedResult, result_of
from fednorm.records.results import load
from fednorm.records.states import States
from fednorm.report import captions

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def table(folder: Path, run: str = "abc") -> States:
    return States(Folder(folder, run))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


# The table ------------------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    tensors = {f"client/{kind}": torch.arange(6).reshape(2, 3).to(kind) for kind in TYPES}
    tensors |= {"state/empty": torch.empty(0, 3), "state/scalar": torch.tensor(-0.0)}
    tensors["client/strided"] = torch.arange(12.0).reshape(3, 4).t()
    written = table(tmp_path)
    written.write(7, 1, tensors)
    assert same(written.read(7), tensors)
    digest = written.commit(1)
    written.close()
    again = table(tmp_path)
    again.check(1, digest)
    assert same(again.read(7), tensors)
    assert again.read(7)["state/scalar"].signbit()
    assert again.read(8) == {}
    assert again.clients() == [7]


def test_nothing_is_on_the_disk_before_a_client_keeps_anything(tmp_path: Path) -> None:
    empty = table(tmp_path)
    assert empty.read(3) == {}
    assert not empty.used
    assert not list(tmp_path.iterdir())


class Model:
    """The same by plain dictionaries: what each client keeps after each round."""

    def __init__(self) -> None:
        self.rounds: dict[int, dict[int, float]] = {0: {}}

    def after(self, ended: int) -> dict[int, float]:
        return self.rounds[max(number for number in self.rounds if number <= ended)]


steps = st.lists(st.tuples(st.dictionaries(st.integers(0, 4), st.floats(-9, 9), max_size=3), st.booleans()), max_size=9)


@settings(max_examples=10, deadline=None)
@given(steps=steps, back=st.booleans())
def test_the_last_two_checkpoints_can_be_gone_back_to(
    steps: list[tuple[dict[int, float], bool]], back: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("table")
    model, written, points = Model(), table(folder), dict[int, str]()
    for ended, (changes, checkpoint) in enumerate(steps, 1):
        for client, value in changes.items():
            written.write(client, ended, {"client/x": torch.tensor([value])})
        model.rounds[ended] = {**model.after(ended - 1), **changes}
        if checkpoint:
            points[ended] = written.commit(ended)
    if not points or not written.used:
        return
    written.write(0, len(steps) + 1, {"client/x": torch.tensor([99.0])})  # of a round that did not end
    written.close()
    ended = list(points)[-2 if back and len(points) > 1 else -1]
    again = table(folder)
    again.check(ended, points[ended])
    again.keep(ended)
    expected = model.after(ended)
    assert again.clients() == sorted(expected)
    for client, value in expected.items():
        assert again.read(client)["client/x"].item() == torch.tensor(value).item()


def test_rows_that_no_checkpoint_needs_are_dropped(tmp_path: Path) -> None:
    written = table(tmp_path)
    for ended in range(1, 9):
        written.write(1, ended, {"client/x": torch.tensor([float(ended)])})
        written.commit(ended)
    with sqlite3.connect(tmp_path / "clients.sqlite") as connection:
        rows = [row[0] for row in connection.execute("SELECT ended FROM states ORDER BY ended")]
    assert rows == [6, 7, 8]  # the one being written, the last, the one before it


def test_of_a_round_that_was_cut_short_nothing_is_committed(tmp_path: Path) -> None:
    written = table(tmp_path)
    written.write(1, 1, {"client/x": torch.tensor([1.0])})
    first = written.commit(1)
    written.write(1, 2, {"client/x": torch.tensor([2.0])})
    written.write(2, 2, {"client/x": torch.tensor([2.0])})
    assert written.commit(1) == first
    assert written.read(1)["client/x"].item() == 1
    assert written.clients() == [1]


def test_a_lost_row_a_changed_one_and_one_of_another_attempt_are_noticed(tmp_path: Path) -> None:
    written = table(tmp_path)
    for client in (1, 2):
        written.write(client, 1, {"client/x": torch.tensor([float(client)])})
    digest = written.commit(1)
    written.close()
    for sql, words in (
        ("DELETE FROM states WHERE client = 1", "lost"),
        ("UPDATE states SET tensors = zeroblob(4) WHERE client = 1", "client 1 after round 1 is not what was written"),
        ("UPDATE states SET client = 3 WHERE client = 1", "client 3 after round 1 is not what was written"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path, copy, ignore=lambda *_: ["copy"])
        with sqlite3.connect(copy / "clients.sqlite") as connection:
            connection.execute(sql)
        with pytest.raises(ValueError, match=words):
            table(copy).check(1, digest)
        shutil.rmtree(copy)
    with pytest.raises(Unfit, match="of another run"):
        table(tmp_path, "def").check(1, digest)
    with pytest.raises(ValueError, match="another attempt"):
        table(tmp_path).check(1, "0" * 32)


WRITER = """
import sys
from pathlib import Path
import torch
from fednorm.records.folder import Folder
from fednorm.records.result import FederatedResult, result_of
from fednorm.records.results import load
from fednorm.records.states import States
from fednorm.report import captions

states, draw = States(Folder(Path(sys.argv[1]), "abc")), torch.Generator().manual_seed(0)
for ended in range(1, 100000):
    for client in torch.randperm(300, generator=draw)[:30].tolist():
        states.write(client, ended, {"client/x": torch.full((2000,), float(ended))})
    print(ended, states.commit(ended), flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    moment = random.Random(5)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(0.1 + 0.3 * moment.random())
    process.kill()
    lines = [first, *process.communicate()[0].splitlines()]
    whole = [line.split() for line in lines if len(line.split()) == 2 and len(line.split()[1]) == 32]
    ended, digest = int(whole[-1][0]), whole[-1][1]
    assert ended > 1
    states = table(tmp_path)
    states.check(ended, digest)  # what was written after it, if anything, is not of it
    states.keep(ended)
    assert all(states.read(client)["client/x"].unique().numel() == 1 for client in states.clients())
    if len(whole) > 1:
        before, earlier = whole[-2]
        states.check(int(before), earlier)


# Runs -----------------------------------------------------------------------------------------------------------------

LARGE: dict[str, Any] = {
    "data": {"clients_per_domain": 110, "train_per_client": 4, "test_per_domain": 110},
    "model": {"width": 4},
    "strategy": {"name": "fedbn"},
    "rounds": {"num_rounds": 4, "fraction": 0.012},
    "train": {"batch_size": 4},
    "evaluate": {"clients": "sampled"},
}
SMALL: dict[str, Any] = {
    "data": {"train_per_client": 8, "test_per_domain": 10},
    "model": {"width": 4},
    "rounds": {"num_rounds": 3, "fraction": 0.6},
    "train": {"batch_size": 4, "learning_rate": 0.05},
}
KEEPING: dict[str, dict[str, Any]] = {
    "local tensors": {"strategy": {"name": "fedbn"}},
    "state of the strategy": {"strategy": {"name": "scaffold"}},
    "a model of its own": {"strategy": {"name": "ditto"}},
    "momentum": {"strategy": {"name": "fedbn"}, "train": {"momentum": 0.9, "reset_optimizer": False}},
    "nothing": {"strategy": {"name": "fedavg"}},
}


class Left:
    """What a finished run has left: its model, what its clients keep, its lines and its result, times left out."""

    def __init__(self, folder: Path) -> None:
        def plain(line: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in line.items() if key not in ("seconds", "digest", "files", "run")}

        self.model = load_file(folder / "model.safetensors")
        states = States(Folder(folder, folder.name[-12:]))
        self.clients = {client: states.read(client) for client in states.clients()}
        states.close()
        self.lines = [plain(json.loads(line)) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        self.reports = [reports(folder, line) for line in self.lines]
        result = plain(json.loads((folder / "result.json").read_text()))
        self.result = {key: value for key, value in result.items() if key != "rounds"}

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Left)
        assert same(self.model, other.model)
        assert self.clients.keys() == other.clients.keys()
        assert all(same(kept, other.clients[client]) for client, kept in self.clients.items())
        assert self.lines == other.lines
        assert self.reports == other.reports
        assert self.result == other.result
        return True


class Stop:
    def __init__(self, after: int) -> None:
        self.after, self.first = after, 0

    def begin(self, _: Any, first_round: int) -> None:
        self.first = first_round

    def round(self, line: Any) -> None:
        if line["round"] == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    """What the uninterrupted run of a large federation leaves."""
    return Left(Path(simulate(resolve(LARGE), runs=tmp_path_factory.mktemp("large"))["run"]))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def cut_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("cut")
    with pytest.raises(KeyboardInterrupt):
        simulate(resolve(LARGE), runs=runs, observer=Stop(3))
    return runs


@pytest.fixture
def cut(cut_once: Path, tmp_path: Path) -> Path:
    """The folder of a run of a large federation that was cut short after its third round."""
    shutil.copytree(cut_once, tmp_path, dirs_exist_ok=True)
    return next(tmp_path.iterdir())


def go_on(runs: Path) -> tuple[Path, Stop]:
    watch = Stop(-1)
    return Path(simulate(resolve(LARGE), runs=runs, observer=watch)["run"]), watch


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "kind",
    ["momentum", "a model of its own", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KEEPING if kind not in
                                         ("momentum", "a model of its own"))],
)  # fmt: skip
def test_a_table_changes_no_number(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same five clients, all in memory, and one at a time from a table."""
    config = resolve(merge(SMALL, KEEPING[kind]))
    whole = simulate(config, runs=tmp_path / "memory")
    monkeypatch.setattr(contexts, "SMALL", 1)
    monkeypatch.setattr(contexts, "AT_ONCE", 1)
    other = simulate(config, runs=tmp_path / "table")
    alone = simulate(config, runs=None)
    for result in (other, alone):
        assert result["final"] == whole["final"]
        assert [line["mean"] for line in result["rounds"]] == [line["mean"] for line in whole["rounds"]]
    one, two = Path(whole["run"]), Path(other["run"])
    assert same(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"))
    kept = {name: load_file(one / f"{name}.safetensors") for name in ("clients", "personal") if
            (one / f"{name}.safetensors").exists()}  # fmt: skip
    states = States(Folder(two, two.name[-12:]))
    for pid in range(5):
        row = states.read(pid)
        for name, place in (("clients", "client"), ("personal", "personal")):
            expected = {k.removeprefix(f"{pid}/"): t for k, t in kept.get(name, {}).items() if k.startswith(f"{pid}/")}
            assert same({k.removeprefix(f"{place}/"): t for k, t in row.items() if k.startswith(f"{place}/")}, expected)
    assert bool(states.clients()) == (kind != "nothing")
    assert not (two / "clients.safetensors").exists()
    states.close()


def test_what_clients_reported_is_in_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(merge(SMALL, KEEPING["local tensors"]))
    whole = simulate(config, runs=tmp_path / "memory")
    monkeypatch.setattr(contexts, "SMALL", 1)
    other = simulate(config, runs=tmp_path / "table")
    one, two = (frame_of(Path(result["run"])) for result in (whole, other))
    assert two.columns[:4] == ["round", "phase", "client", "domain"]
    assert len(two) == sum(3 + 5 for _ in range(3))
    assert_frame_equal(one, two.select(one.columns))
    (again,) = load([tmp_path / "table"]).results
    assert isinstance(again, FederatedResult)
    assert_frame_equal(again.clients(), two)
    lines = Left(Path(other["run"])).lines
    assert [line["clients"]["table"] for line in lines] == [f"clients/round-00000{n}.parquet" for n in (1, 2, 3)]
    path = Path(other["run"]) / lines[1]["clients"]["table"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RecordError, match=r"round-000002\.parquet is not what was written there"):
        simulate(config, runs=tmp_path / "table")


@pytest.mark.slow
def test_a_lost_file_of_columns_is_named(cut: Path, large: Left, tmp_path: Path) -> None:
    path = cut / "clients" / "round-000002.parquet"
    path.unlink()
    with pytest.raises(RecordError, match=rf"{path} cannot be read: .*Remove .*checkpoint.*to start this run over"):
        go_on(tmp_path)
    for name in ("checkpoint.safetensors", "previous.safetensors"):
        (cut / name).unlink()
    assert Left(go_on(tmp_path)[0]) == large


@pytest.mark.slow
def test_a_run_that_was_begun_with_whole_checkpoints_goes_on_with_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older fednorm began it, or one that called fewer clients many."""
    config = resolve(merge(SMALL, KEEPING["momentum"]))
    whole = simulate(config, runs=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, runs=tmp_path / "other", observer=Stop(2))
    monkeypatch.setattr(contexts, "SMALL", 1)
    result = simulate(config, runs=tmp_path / "other", observer=Stop(-1))
    assert result["final"] == whole["final"]
    one, two = (load_file(Path(r["run"]) / "model.safetensors") for r in (whole, result))
    assert same(one, two)
    states = States(Folder(Path(result["run"]), config.hash))
    for key, tensor in load_file(Path(whole["run"]) / "clients.safetensors").items():
        pid, name = key.split("/", 1)
        assert torch.equal(states.read(int(pid))[f"client/{name}"], tensor)
    states.close()


@pytest.mark.parametrize("kind", ["momentum", pytest.param("a model of its own", marks=pytest.mark.slow)])
def test_a_longer_run_goes_on_from_a_finished_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "SMALL", 1)
    values = merge(SMALL, merge(KEEPING[kind], {"rounds": {"evaluate_every": 2}}))
    watch = Stop(-1)
    simulate(resolve(values), runs=tmp_path / "runs")
    longer = resolve(merge(values, {"rounds": {"num_rounds": 5}}))
    further = simulate(longer, runs=tmp_path / "runs", observer=watch)
    assert watch.first == 4
    assert Left(Path(further["run"])) == Left(Path(simulate(longer, runs=tmp_path / "whole")["run"]))


@pytest.mark.slow
def test_workers_and_a_table_leave_the_same_bits(large: Left, tmp_path: Path) -> None:
    """Two workers whose run is cut short, and one client after the other."""
    for observer in (Stop(2), Stop(-1)):
        with suppress(KeyboardInterrupt):
            folder = Path(simulate(resolve(merge(LARGE, {"workers": 2})), runs=tmp_path, observer=observer)["run"])
    other = Left(folder)
    one, two = (
        {key: value for key, value in left.result.items() if key not in ("config", "workers")}
        for left in (large, other)
    )
    assert two == one
    other.result = large.result
    assert other == large


def test_a_client_s_model_is_read_from_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(merge(SMALL, KEEPING["local tensors"]))
    whole = simulate(config, runs=tmp_path / "memory")
    monkeypatch.setattr(contexts, "SMALL", 1)
    other = simulate(config, runs=tmp_path / "table")
    trained = sorted({pid for line in whole["rounds"] for pid in line["sampled"]})
    for pid in trained:
        one, two = (fednorm.load_model(result["run"], client=pid).state_dict() for result in (whole, other))
        assert same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "before the checkpoint",
        *(
            pytest.param(place, marks=pytest.mark.slow)
            for place in ("before the line", "in the line", "in the checkpoint")
        ),
        *(pytest.param(place, marks=pytest.mark.slow) for place in ("after the round", "before the result")),
        pytest.param("in the result", marks=pytest.mark.slow),
    ],
)
def test_a_large_run_killed_anywhere_goes_on(place: str, launcher: Any, large: Left, tmp_path: Path) -> None:
    round_of = 2 if place == "in the checkpoint" else 3
    _, how = launcher.run(LARGE, tmp_path, place, round_of)
    assert how == -signal.SIGKILL
    folder, watch = go_on(tmp_path)
    assert watch.first > 1
    assert Left(folder) == large


@pytest.mark.slow
def test_a_large_run_killed_at_random_moments_goes_on(large: Left, tmp_path: Path) -> None:
    moment, code = (
        random.Random(11),
        (
            "import sys, json; from pathlib import Path; from fednorm.config import resolve;"
            "from fednorm.federation.simulate import simulate;"
            "simulate(resolve(json.loads(sys.argv[1])), runs=Path(sys.argv[2]))"
        ),
    )
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(LARGE), str(tmp_path)], cwd=Path(__file__).parents[2]
        )
        try:
            process.wait(2 + 3 * moment.random())
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    folder, _ = go_on(tmp_path)
    assert Left(folder) == large


def test_a_full_disk_keeps_the_last_good_round(launcher: Any, large: Left, tmp_path: Path) -> None:
    _, how = launcher.run(LARGE, tmp_path, "disk full", 2)  # no file of more than 20 kB from then on
    assert how == 3
    message = (tmp_path / "error.txt").read_text()
    assert message.startswith("RecordError: Cannot write clients.sqlite in ")
    assert "goes on from the checkpoint" in message
    folder, watch = go_on(tmp_path)
    assert watch.first == 3
    assert Left(folder) == large


def test_a_table_of_another_run_is_refused_by_name(cut: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        simulate(resolve(merge(LARGE, {"seed": 2})), runs=other, observer=Stop(1))
    shutil.copyfile(next(other.iterdir()) / "clients.sqlite", cut / "clients.sqlite")
    shutil.rmtree(other)
    before = {path.name: path.read_bytes() for path in cut.iterdir() if path.is_file()}
    with pytest.raises(RecordError, match=rf"{cut / 'clients.sqlite'} .*of another run"):
        go_on(tmp_path)
    assert {path.name: path.read_bytes() for path in cut.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "what", ["no table", *(pytest.param(w, marks=pytest.mark.slow) for w in ("lost", "a directory"))]
)
def test_without_its_table_a_checkpoint_is_refused_and_the_run_starts_over(
    what: str, cut: Path, large: Left, tmp_path: Path
) -> None:
    path = cut / "clients.sqlite"
    path.unlink()
    if what == "a directory":
        path.mkdir()
    elif what == "no table":
        path.write_bytes(b"not a table" * 1000)
    with pytest.raises(RecordError, match=rf"{path} .*Remove .*checkpoint.safetensors and .*to start this run over"):
        go_on(tmp_path)
    for name in ("checkpoint.safetensors", "previous.safetensors"):
        (cut / name).unlink()
    if what == "a directory":
        with pytest.raises(RecordError, match=r"Cannot remove clients\.sqlite"):
            go_on(tmp_path)
        path.rmdir()
    folder, watch = go_on(tmp_path)
    assert watch.first == 1
    assert Left(folder) == large


def test_a_damaged_row_of_the_last_round_leaves_the_checkpoint_before(cut: Path, large: Left, tmp_path: Path) -> None:
    with sqlite3.connect(cut / "clients.sqlite") as connection:
        connection.execute("UPDATE states SET tensors = zeroblob(length(tensors)) WHERE ended = 3")
    with pytest.warns(DamageWarning, match=r"clients\.sqlite .* goes on from the checkpoint before it, after round 2"):
        folder, watch = go_on(tmp_path)
    assert watch.first == 3
    assert Left(folder) == large


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_damaged_bit_is_named_or_changes_nothing(
    place: float, bit: int, cut_once: Path, large: Left, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runs = tmp_path_factory.mktemp("bit")
    shutil.copytree(cut_once, runs, dirs_exist_ok=True)
    path = next(runs.iterdir()) / "clients.sqlite"
    content, named = bytearray(path.read_bytes()), True
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamageWarning)
            folder, _ = go_on(runs)
    except RecordError as error:
        named = "clients.sqlite" in str(error)
        for name in ("checkpoint.safetensors", "previous.safetensors"):
            (path.parent / name).unlink(missing_ok=True)
        folder, _ = go_on(runs)
    assert named
    assert Left(folder) == large


@pytest.mark.usefixtures("cut")
def test_a_finished_record_whose_table_is_damaged_is_named(tmp_path: Path) -> None:
    folder, _ = go_on(tmp_path)
    again, _ = go_on(tmp_path)  # read back
    assert again == folder
    with sqlite3.connect(folder / "clients.sqlite") as connection:
        connection.execute("DELETE FROM states WHERE rowid = (SELECT min(rowid) FROM states)")
    with pytest.raises(RecordError, match=r"clients\.sqlite is not what this run has left"):
        go_on(tmp_path)


# Whom an evaluation is made on ----------------------------------------------------------------------------------------


def test_only_the_sampled_or_drawn_clients_are_evaluated_and_the_result_says_so(tmp_path: Path) -> None:
    values = merge(LARGE, {"rounds": {"num_rounds": 2}})
    seen: Callable[[dict[str, Any]], list[list[int]]] = lambda result: [  # noqa: E731
        [client["client"] for client in each["evaluate"]] for each in Left(Path(result["run"])).reports
    ]
    sampled = simulate(resolve(values), runs=tmp_path)
    assert seen(sampled) == [line["sampled"] for line in sampled["rounds"]]
    assert sampled["final"]["selection"] == "last round, test images of the sampled clients"
    drawn = simulate(resolve(merge(values, {"evaluate": {"clients": 12}})), runs=tmp_path)
    first, second = seen(drawn)
    assert first == second
    assert [sum(pid // 110 == domain for pid in first) for domain in range(5)] == [3, 3, 2, 2, 2]
    assert drawn["final"]["selection"] == "last round, test images of 12 drawn clients"
    assert drawn["hash"] != sampled["hash"]
    for result, words in ((sampled, "of the sampled clients"), (drawn, "of 12 drawn clients")):
        assert f"test images {words}, after round 2" in captions.scored([result_of(result)])
    everybody = result_of({**drawn, "config": merge(drawn["config"], {"evaluate": {"clients": "all"}})})
    assert captions.scored([everybody]) == "test images, after round 2"
    assert captions.scored([everybody, result_of(drawn)]) == (
        "test images of all clients or of 12 drawn clients, after round 2"
    )
    assert drawn["final"]["answered"] == 1
    assert [line["train_loss"] for line in drawn["rounds"]] == [line["train_loss"] for line in sampled["rounds"]]
    other = simulate(resolve(merge(values, {"evaluate": {"clients": 12}, "seed": 2})), runs=tmp_path)
    assert seen(other)[0] != first


def test_a_draw_of_as_many_as_there_are_is_all_of_them() -> None:
    one, other = (
        simulate(resolve(merge(SMALL, {"evaluate": {"clients": which}, "strategy": {"name": "fedbn"}})), runs=None)
        for which in ("all", 5)
    )
    for key in ("per_domain", "mean", "worst", "answered"):
        assert one["final"][key] == other["final"][key]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "some", "sample", [], None, "1e3", 2**70])
def test_no_other_clients_can_be_evaluated(value: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluate\.clients is all, sampled, or a number of clients, at least 1; got"
    ):
        resolve({"evaluate": {"clients": value}})


def test_fewer_clients_than_domains_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.clients draws 4 clients, and there are 5 domains"):
        simulate(resolve({"evaluate": {"clients": 4}}), runs=None)
