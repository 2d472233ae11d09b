"""``fednorm data prepare`` as a user types it; ``fednorm data NAME`` is as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import replicas

from fednorm.cli.app import app
from fednorm.errors import FedNormError


def call(*arguments: object) -> None:
    """Carry out a command in this process; what it refuses is raised."""
    app([str(argument) for argument in arguments], standalone_mode=False)


def spawn(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fednorm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_officehome_is_prepared_and_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replicas.zipped(tmp_path / "downloads/OfficeHomeDataset_10072016.zip", replicas.officehome())
    call("data", "prepare", "officehome", tmp_path / "downloads", tmp_path / "data")
    said = capsys.readouterr()
    assert "real_world" in said.out
    assert said.out.rstrip().endswith(f"fednorm data officehome --data-dir {tmp_path / 'data'}")
    assert said.err == ""
    words = ("--data", "officehome", "--data-dir", tmp_path / "data", "--rounds", "1", "--runs", tmp_path / "runs")
    call("federated", *words, "--set", "model.width=4", "--set", "data.image_size=16", "--json")
    final = json.loads(capsys.readouterr().out)["final"]
    assert set(final["per_domain"]) == {"art", "clipart", "product", "real_world"}


@pytest.mark.slow
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "data/officehome").mkdir(parents=True)
    told = spawn("data", "prepare", "officehome", tmp_path, tmp_path / "data")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("error: ")
    assert "is there already" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("officehom",), "Did you mean 'officehome'"),
        (("camelyon17",), "fednorm data prepare camelyon17 SRC DIR"),
        (("camelyon17", "nowhere", "data"), "The source nowhere does not exist"),
    ],
)
def test_what_is_missing_is_said(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(FedNormError, match=said):
        call("data", "prepare", *words)


def test_without_a_name_all_that_can_be_prepared_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    call("data", "prepare", "--json")
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [row["name"] for row in listed][:3] == ["domainnet", "officehome", "camelyon17"]
    assert next(row for row in listed if row["name"] == "tiny_imagenet")["archives"] == [
        {"name": "tiny-imagenet-200.zip", "md5": "90528d7ca1a48142e341f4ef8d21d0de"}
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize("words", [("data",), ("data", "show")])
def test_a_benchmark_is_shown_by_its_name_alone(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    call(*words, "--image-size", "8", "--json", "digits-mini")
    assert len(json.loads(capsys.readouterr().out)["clients"]) == 5
    call("data", "--help")
    assert "--image-size" in capsys.readouterr().out
    call("data", "prepare", "--help")
    assert "SRC" in capsys.readouterr().out
