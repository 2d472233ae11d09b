"""Exports: CSV and Parquet hold every number unchanged, TensorBoard reads its events, summaries keep their studies."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars
import pyarrow.parquet
import pytest
from polars.testing import assert_frame_equal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fednorm.errors import ConfigError, RecordError
from fednorm.records.results import load
from fednorm.report.export import export, write_summary
from fednorm.report.frame import TIDY, records
from fednorm.report.tensorboard import write_events

Make = Callable[..., dict[str, Any]]

DIAGNOSTICS = [{"weight_norm": {"fc1": 1 / 3, "fc2": 2.0}, "drift": {"bn": 0.1}}, {}]


def test_csv_and_parquet_hold_every_number_to_the_last_bit(stream_result: Make, tmp_path: Path) -> None:
    title = 'A "title", with\nall — that; is = hard'
    results = [stream_result(title=title, seconds=math.pi, diagnostics=DIAGNOSTICS)]
    rows = records(results)
    for name in ("a.csv", "deep/b.parquet", "c.CSV"):
        export(tmp_path / name, results)
    assert_frame_equal(polars.read_parquet(tmp_path / "deep" / "b.parquet"), rows)
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert (tmp_path / "c.CSV").read_bytes() == (tmp_path / "a.csv").read_bytes()
    assert list(read[0]) == list(TIDY) == pyarrow.parquet.read_table(tmp_path / "deep" / "b.parquet").column_names
    assert [float(row["value"]) for row in read] == rows["value"].to_list()
    assert {row["data"] for row in read} == {title}
    assert math.pi in rows["value"]


def test_an_export_of_another_kind_is_refused(stream_result: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.csv or \.parquet; got .*x\.xlsx"):
        export(tmp_path / "x.xlsx", [stream_result()])
    for suffix in ("csv", "parquet"):
        (tmp_path / f"folder.{suffix}").mkdir()
        with pytest.raises(RecordError, match=rf"Cannot write .*folder\.{suffix}"):
            export(tmp_path / f"folder.{suffix}", [stream_result()])


def test_event_files_are_what_tensorboard_reads(stream_result: Make, tmp_path: Path) -> None:
    result = stream_result(diagnostics=DIAGNOSTICS, config={"seed": 7})
    for _ in range(2):  # a second time replaces the first
        assert write_events(tmp_path, [result, stream_result(norm={"name": "group_norm", "num_groups": 2})]) == 2
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders[0] == f"er_ace-batch_norm-seed7-{result['hash']}"
    assert folders[1].startswith("er_ace-group_norm-num_groups=2-seed1-")
    events = EventAccumulator(str(tmp_path / folders[0])).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["accuracy/experience 1"] == [(1, pytest.approx(0.9)), (2, pytest.approx(0.5))]
    assert found["weight_norm/fc1"] == [(1, pytest.approx(1 / 3))]
    assert found["final/average_accuracy"] == [(2, pytest.approx(0.541))]
    assert sum(map(len, found.values())) == records([result]).height
    first, second = events.Scalars("train_accuracy")
    assert second.wall_time - first.wall_time == pytest.approx(17.2, abs=1e-3)
    (text,) = events.Tensors("run/text_summary")
    (shown,) = text.tensor_proto.string_val
    assert b'"memory_size"' in shown or b'"learning_rate"' in shown


def test_summaries_keep_studies_and_leave_out_what_is_large(stream_result: Make, tmp_path: Path) -> None:
    study = {"study": "s", "title": "", "about": "", "runs": ["x"], "selection_runs": [], "paper": []}
    study |= {"baseline": None, "selection": None, "reduced": None, "departs": {}}
    result = stream_result()
    write_summary(tmp_path / "deep" / "s.json", [result], [study])
    loaded = load([tmp_path / "deep" / "s.json"])
    assert loaded.studies == [study]
    assert loaded.problems == []
    assert loaded.results[0]["final"] == result["final"]
    assert "steps" not in loaded.results[0]["experiences"][0]
