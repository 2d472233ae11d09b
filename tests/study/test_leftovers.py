"""A run that never began leaves nothing; a finished one has no checkpoint beside it; what stands, stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fednorm.config import resolve
from fednorm.errors import RecordError
from fednorm.federation import simulate as simulate_module
from fednorm.federation.simulate import simulate
from fednorm.records.record import RunRecord

CONFIG = resolve(
    {
        "model": {"width": 4},
        "data": {"train_per_client": 16, "test_per_domain": 10},
        "rounds": {"num_rounds": 1},
    }
)


@pytest.mark.parametrize("error", [RecordError, KeyboardInterrupt, SystemExit, ValueError])
def test_a_run_that_fails_before_anything_stands_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a" / "b", CONFIG)
    with pytest.raises(error), record.locked():  # noqa: PT012
        record.describe({})
        record.keep_lines(0)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_stands_is_kept_and_so_is_what_is_not_ours(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    record = RunRecord(runs, CONFIG)
    with pytest.raises(KeyError), record.locked():  # noqa: PT012
        record.append_line({"round": 1})
        raise KeyError
    assert record.lines() == [{"round": 1}]
    (record.folder / "rounds.jsonl").unlink()
    (record.folder / "notes.txt").write_text("mine")
    with pytest.raises(KeyError), record.locked():
        raise KeyError
    assert [path.name for path in record.folder.iterdir()] == ["notes.txt"]
    (record.folder / "notes.txt").unlink()
    with pytest.raises(KeyError), record.locked():
        raise KeyError
    assert list(tmp_path.iterdir()) == [runs], "a folder that was there before stays"


def test_a_refused_second_takes_nothing_from_the_first(tmp_path: Path) -> None:
    first, second = RunRecord(tmp_path, CONFIG), RunRecord(tmp_path, CONFIG)
    with first.locked():
        with pytest.raises(RecordError, match="Another process"), second.locked():
            pass
        assert (first.folder / ".lock").exists()


def test_a_name_that_is_too_long_leaves_no_folder_before_it(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a" / ("b" * 300), CONFIG)
    with pytest.raises(RecordError, match="File name too long"), record.locked():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_beside_a_result_goes_when_the_run_is_opened_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def dies(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "checkpoint.safetensors":
            raise SystemExit(9)
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(SystemExit):
            simulate(CONFIG, runs=tmp_path)
    folder = RunRecord(tmp_path, CONFIG).folder
    before = (folder / "result.json").read_bytes()
    assert (folder / "checkpoint.safetensors").exists()
    (folder / "model.safetensors.part").write_bytes(b"half")
    monkeypatch.setattr(simulate_module, "Workbench", lambda *_: pytest.fail("it ran again"))
    assert simulate(CONFIG, runs=tmp_path)["final"]["round"] == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "further.safetensors",
        "model.safetensors",
        "result.json",
        "rounds.jsonl",
        "run.json",
    ]
    assert (folder / "result.json").read_bytes() == before
