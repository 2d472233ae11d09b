"""What a command imports: a word that is misspelt, a help text or a table of results must not wait for PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fednorm

ROOT = Path(__file__).resolve().parents[1]

HEAVY = (
    "avalanche",
    "flwr",
    "grpc",
    "matplotlib",
    "narwhals",
    "numpy",
    "pandas",
    "polars",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "sympy",
    "timm",
    "torch",
    "torch._dynamo",
    "torch.onnx",
    "torchvision",
)
"""Packages whose import takes a tenth of a second or more."""

RUN = """
import json, sys
from fednorm.cli.app import main
sys.argv = ["fednorm", *sys.argv[2:]]
code = 0
try:
    main()
except SystemExit as end:
    code = end.code or 0
print("", json.dumps([code, sorted(sys.modules)]), sep="\\n", file=sys.stderr)
"""


def heavy(code: str, *arguments: object, folder: Path) -> tuple[int, set[str]]:
    """Run code in a new process; return the exit code that it tells and the heavy packages that it has imported."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code, "-", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    exit_code, modules = json.loads(done.stderr.splitlines()[-1])
    return exit_code, set(HEAVY) & set(modules)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the records of a federated run and of a stream, and their summaries."""
    folder = tmp_path_factory.mktemp("finished")
    few = {"data": {"train_per_client": 8, "test_per_domain": 4}, "model": {"width": 4}}
    fednorm.federated(rounds=1, runs=folder, config=few)
    small = {"scenario": {"train_per_experience": 10, "test_per_experience": 5}, "model": {"width": 4}}
    fednorm.continual(learner="naive", norm="seednorm", online=True, runs=folder, config=small)
    return folder


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("federated", "--help"), 0),
        (("list", "norms"), 0),
        (("federated", "--strategy", "fedavgg"), 2),
        (("federated", "--set", "rounds.num_round=3"), 2),
        (("continual", "--norm", "batchnrom"), 2),
        (("continual", "--data", "cifar11"), 2),
    ],
)
def test_help_and_a_misspelt_word_import_nothing_heavy(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    assert heavy(RUN, *arguments, folder=tmp_path) == (code, set())


def test_tables_of_summaries_and_of_records_are_made_without_pytorch(finished: Path, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    code, modules = heavy(RUN, "report", finished, "--summary", summary, folder=tmp_path)
    assert (code, modules & {"torch", "sklearn", "matplotlib", "flwr"}) == (0, set())
    code, modules = heavy(RUN, "report", summary, folder=tmp_path)
    assert (code, modules & {"torch", "sklearn", "matplotlib", "flwr"}) == (0, set())


def test_runs_are_loaded_without_pytorch(finished: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys, fednorm\n"
        f"assert fednorm.load({str(finished)!r})['method'].len() == 2\n"
        "print(json.dumps([0, sorted(sys.modules)]), file=sys.stderr)"
    )
    assert heavy(code, folder=tmp_path) == (0, {"polars"})


def test_a_run_imports_what_it_uses_and_no_compiler(tmp_path: Path) -> None:
    few = ("--set", "data.train_per_client=8", "--set", "data.test_per_domain=4", "--set", "model.width=4")
    code, modules = heavy(RUN, "federated", "--rounds", 1, *few, folder=tmp_path)
    assert (code, modules - {"pyarrow", "pandas", "polars"}) == (0, {"flwr", "grpc", "numpy", "torch"})


def test_a_stream_imports_what_it_uses_and_neither_avalanche_nor_flower(tmp_path: Path) -> None:
    few = ("scenario.train_per_experience=10", "scenario.test_per_experience=5", "model.width=4")
    settings = [part for setting in few for part in ("--set", setting)]
    code, modules = heavy(RUN, "continual", "--online", *settings, folder=tmp_path)
    assert (code, modules - {"pyarrow", "pandas", "polars"}) == (0, {"numpy", "torch"})
