"""A misspelt name gets the nearest ones, at once; names complete; what a key means is explained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import shellingham

from fednorm.cards import NORMS
from fednorm.config.keys import find_key, keys_of, section_names
from fednorm.config.run import SECTIONS
from fednorm.errors import UnknownNameError, suggestions, unknown_name

SCRIPT = """
import sys
from fednorm.cli.app import main
sys.argv[0] = "fednorm"
try:
    main()
finally:
    print("imported", sorted({"torch", "flwr", "avalanche"} & set(sys.modules)))
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("federated", "--norm", "bach_norm"), "Did you mean 'batch_norm', 'batch_renorm', 'switch_norm'"),
        (("continual", "--set", "learner.name=er-ase"), "Did you mean 'er_ace'"),
        (("data", "digit"), "Did you mean 'digits', 'digits_mini' or 'digits_five'"),
        (("compare", "digit-tuning"), "Did you mean 'digits_tuning'"),
        (("explain", "trian"), "Did you mean 'train'"),
    ],
)
def test_a_misspelt_name_is_told_before_pytorch_is_imported(arguments: tuple[str, ...], words: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert words in " ".join(ended.stderr.split())
    assert ended.stdout == "imported []\n"


def test_suggestions() -> None:
    assert suggestions("bn", NORMS.names)[0] == "batch_norm"
    assert "batch_renorm" in suggestions("renorm", NORMS.names)[:3]
    assert suggestions("zzz", NORMS.names) == []
    assert 3 <= len(suggestions("Batch-Nrom", NORMS.names)) <= 5
    many = [f"name_{number}" for number in range(20)]
    message = str(unknown_name("thing", "name_x", many, "fednorm list things"))
    assert message.endswith("All 20: fednorm list things.")
    assert message.count("'name_") == 6  # the one given, and five
    assert str(unknown_name("thing", "x", ["a", "b"])) == "There is no thing named 'x'. Known: a, b."


def test_names_complete_in_a_shell() -> None:
    ended = run(_FEDNORM_COMPLETE="complete_bash", COMP_WORDS="fednorm federated --norm bat", COMP_CWORD="3")
    assert "batch_norm\n" in ended.stdout
    assert "group_norm" not in ended.stdout
    assert "imported []" in ended.stdout
    ended = run(_FEDNORM_COMPLETE="complete_bash", COMP_WORDS="fednorm compare office", COMP_CWORD="2")
    assert "office_small\n" in ended.stdout


def test_completion_is_installed(tmp_path: Any) -> None:
    try:
        shellingham.detect_shell()
    except shellingham.ShellDetectionFailure:
        pytest.skip("Typer asks which shell has started this process, and none has")
    ended = run("--install-completion", "bash", HOME=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "complete_bash" in (tmp_path / ".bash_completions/fednorm.sh").read_text()


def test_lr_is_the_learning_rate(call: Callable[..., Any]) -> None:
    document = call("federated", "--lr", "0.5", "--dry-run", "--json", "--set", "data.train_per_client=8").document
    assert document["config"]["train"]["learning_rate"] == 0.5


def test_every_key_is_explained_with_its_runs(call: Callable[..., Any]) -> None:
    for section in section_names():
        told = call("explain", section)
        assert told.code == 0
        for key in keys_of(section):
            assert f"{key.name} = " in told.out
            assert key.about
            assert set(key.kinds) <= {kind for kind, names in SECTIONS.items() if section in names}
    assert "num_rounds = 10    [federated runs; an integer, at least 1]" in call("explain", "rounds").out
    assert "epochs = 5    [streams; an integer, at least 1]" in call("explain", "train").out


def test_a_key_is_explained_without_its_section(call: Callable[..., Any]) -> None:
    told = call("explain", "feature-norm")
    assert (told.code, "model.feature_norm (key of the configuration)" in told.out) == (0, True)
    assert told.out == call("explain", "model.feature_norm").out
    several = call("explain", "checkpoint_every").out
    assert "train.checkpoint_every (key" in several
    assert "rounds.checkpoint_every (key" in several
    assert "momentum = 0    [all runs" in call("explain", "momentum").out
    assert "batch_norm (norm)" in call("explain", "batch_norm").out, "a method comes before a key"


def test_a_key_that_is_taken_for_a_method_is_told_as_a_key(call: Callable[..., Any]) -> None:
    told = call("federated", "--norm", "feature-norm", "--dry-run")
    assert told.code == 2
    assert "no norm named 'feature-norm'; it is a key of the configuration: --set model.feature_norm=VALUE" in told.err


def test_a_key_is_explained_by_what_people_call_it(call: Callable[..., Any]) -> None:
    told = call("explain", "train.lr")
    assert told.out.startswith("train.learning_rate (key of the configuration)\n")
    assert "learning_rate = 0.01 (streams: 0.03)    [all runs; a finite number, greater than 0]" in told.out
    assert find_key("train.lr") == find_key("train.learning-rate")
    assert find_key("seed").default == 1
    with pytest.raises(UnknownNameError, match=r"no key of section train named 'momentun'\. Did you mean 'momentum'"):
        find_key("train.momentun")


def test_a_file_of_this_folder_is_told_how_it_is_named(call: Callable[..., Any], tmp_path: Any) -> None:
    (tmp_path / "mynorm.py").write_text("")
    ended = call("federated", "--norm", "mynorm")
    assert ended.code == 2
    assert "mynorm.py is a file of this folder: an object in it is mynorm:OBJECT, e.g. mynorm:SPEC." in ended.err
