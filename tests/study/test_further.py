"""A finished run goes on for more rounds, to the very numbers of a run that was as long from the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fednorm.config import merge, resolve
from fednorm.federation.simulate import simulate
from fednorm.records import further

METHODS: dict[str, dict[str, Any]] = {
    "clients' local tensors": {},
    "optimizer of the server": {"strategy": {"name": "fedadam"}},
    "control variates": {"strategy": {"name": "scaffold"}},
    "personal models": {"strategy": {"name": "ditto"}},
    "clients' momentum": {"train": {"momentum": 0.9, "reset_optimizer": False}},
    "clients that are not sampled": {"rounds": {"fraction": 0.4}},
    "evaluation each second round": {"rounds": {"evaluate_every": 2}, "evaluate": {"kinds": ["own", "averaged"]}},
    "a rate that falls by steps": {"train": {"schedule": "step", "decay": 0.5, "decay_every": 2, "warmup_steps": 1}},
}


class Watch:
    """Remembers which rounds were run."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def begin(self, bench: Any, first_round: int) -> None:
        del bench, first_round

    def round(self, line: Any) -> None:
        self.rounds.append(line["round"])


def run(small: Any, runs: Path, length: int, /, **values: Any) -> tuple[dict[str, Any], list[int]]:
    watch = Watch()
    config = resolve(merge(small(), values, {"rounds": {"num_rounds": length}}))
    return simulate(config, runs=runs, observer=watch), watch.rounds


def lines_of(folder: str) -> list[dict[str, Any]]:
    """Return what a record says of its rounds, but for the time they took and the seals."""
    lines = [json.loads(line) for line in (Path(folder) / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "digest", "hash")} for line in lines]


QUICK = ("clients' momentum", "optimizer of the server", "evaluation each second round")


@pytest.mark.few(1)
@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_more_rounds_end_with_the_bits_of_as_many_at_once(method: str, small: Any, tmp_path: Path) -> None:
    values = METHODS[method]
    at_once, rounds = run(small, tmp_path / "a", 5, **values)
    assert rounds == [1, 2, 3, 4, 5]
    run(small, tmp_path / "b", 1, **values)
    run(small, tmp_path / "b", 3, **values)
    gone_on, rounds = run(small, tmp_path / "b", 5, **values)
    assert rounds == [4, 5]
    assert gone_on["hash"] == at_once["hash"]
    assert gone_on["final"] == at_once["final"]
    assert gone_on["evaluation"] == at_once["evaluation"]
    for name in ("model", "clients", "personal", "further"):
        ours, theirs = (Path(result["run"]) / f"{name}.safetensors" for result in (gone_on, at_once))
        assert ours.exists() == theirs.exists()
        if ours.exists():
            left, right = load_file(ours), load_file(theirs)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)
    assert lines_of(gone_on["run"]) == lines_of(at_once["run"])


def test_the_longest_shorter_run_is_gone_on_with(small: Any, tmp_path: Path) -> None:
    for rounds in (1, 3, 2):
        run(small, tmp_path, rounds)
    found = further.shorter(resolve(merge(small(), {"rounds": {"num_rounds": 4}})), tmp_path)
    assert found is not None
    assert found.rounds == 3
    assert further.shorter(resolve(merge(small(), {"rounds": {"num_rounds": 1}})), tmp_path) is None
    other = resolve(merge(small(), {"rounds": {"num_rounds": 4}, "train": {"learning_rate": 0.5}}))
    assert further.shorter(other, tmp_path) is None
    assert further.shorter(resolve({"kind": "continual"}), tmp_path) is None


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"schedule": "cosine"}}, "its learning rate has fallen over all of them"),
        (
            {"evaluate": {"best_round": True}, "data": {"validation": 0.2}, "rounds": {"evaluate_every": 2}},
            "has scored a round that the longer one does not",
        ),
    ],
)
def test_where_the_length_counts_a_longer_run_begins_anew_and_says_why(
    values: dict[str, Any], words: str, small: Any, tmp_path: Path
) -> None:
    run(small, tmp_path, 1, **values)
    config = resolve(merge(small(), values, {"rounds": {"num_rounds": 2}}))
    finished = further.shorter(config, tmp_path)
    assert finished is not None
    told = further.why_not(config, finished)
    assert words in told
    assert told.endswith("so these 2 rounds are another run, and begin anew.")
    assert run(small, tmp_path, 2, **values)[1] == [1, 2]


@pytest.mark.few(2)
@pytest.mark.parametrize("what", ["versions", "further", "data", "damaged"])
def test_what_would_not_give_the_bits_is_not_gone_on_with(
    what: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(run(small, tmp_path, 1)[0]["run"])
    if what == "versions":
        monkeypatch.setattr(further, "versions", lambda: {**dict.fromkeys(further.SAME, ""), "torch": "9.9"})
    elif what == "further":
        (folder / "further.safetensors").unlink()
    elif what == "data":
        about = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**about, "data": {**about["data"], "digest": "other"}}))
    else:
        (folder / "model.safetensors").write_bytes(b"")
    assert run(small, tmp_path, 2)[1] == [1, 2]


def test_the_command_line_says_that_it_goes_on(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fednorm.cli.federated import run_federated

    def call(rounds: int, **values: Any) -> str:
        config = resolve(merge(small(), {"rounds": {"num_rounds": rounds}}, values))
        run_federated(config, runs=tmp_path, runtime="in-process", dry_run=False, layers=False, as_json=True)
        return capsys.readouterr().err

    assert "has finished" not in call(1)
    told = call(2)
    assert "A run of 1 rounds has finished; this one goes on from its end" in told
    assert "going on from round 1" in told
    call(1, train={"schedule": "linear"})
    assert "begin anew" in call(2, train={"schedule": "linear"})
