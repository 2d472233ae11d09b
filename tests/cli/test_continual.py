"""``fednorm continual`` from the command line: what scripts rely on, and what every mistake gets."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import nn

import fednorm
from fednorm.cards import LEARNERS
from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.streams.learner import Learner

Call = Callable[..., Any]
Refused = Callable[..., None]

TINY = (
    *("--experiences", "2", "--set", "scenario.train_per_experience=12", "--set", "scenario.test_per_experience=6"),
    *("--set", "data.image_size=8", "--set", "model.width=4", "--set", "evaluate.probe_images=8"),
)
SMALL = (*TINY, "--epochs", "1", "--batch-size", "4", "--memory-size", "20")


# What scripts rely on -------------------------------------------------------------------------------------------------


def test_continual_prints_one_document(call: Call, tmp_path: Path) -> None:
    arguments = ("continual", "--norm", "adab2n", "--online", "--json", *TINY, "--memory-size", "20")
    outcome = call(*arguments)
    assert outcome.code == 0
    result = outcome.document
    assert {
        *("kind", "hash", "config", "norm", "learner", "scenario", "parameters", "data", "experiences"),
        *("accuracy_matrix", "untrained_accuracy", "final", "seconds", "run"),
    } <= set(result)
    assert result["kind"] == "continual"
    assert [len(row) for row in result["accuracy_matrix"]] == [2, 2]
    assert {
        *("average_accuracy", "average_incremental_accuracy", "forgetting_max_minus_last"),
        *("forgetting_first_minus_last", "backward_transfer", "forward_transfer", "online_accuracy"),
        "average_online_accuracy",
        *("task_incremental_accuracy", "train_accuracy", "plasticity", "drift", "selection"),
    } == set(result["final"])
    assert {
        *("experience", "title", "accuracy", "task_accuracy", "online_accuracy", "train_accuracy", "train_loss"),
        "average_online_accuracy",
        *("steps", "learning_rate", "seconds", "diagnostics"),
    } == set(result["experiences"][0])
    assert {
        *("dead_units", "dormant_units", "entropy_rank", "threshold_rank", "weight_norm", "effective_learning_rate"),
        "drift",
    } == set(result["experiences"][0]["diagnostics"])
    assert (result["config"]["train"]["epochs"], result["config"]["train"]["batch_size"]) == (1, 10)
    assert resolve(result["config"]) == resolve(result["config"])
    folder = Path(result["run"])
    assert folder.parent == tmp_path / "runs"
    written = json.loads((folder / "result.json").read_text())
    assert {key: written[key] for key in result} == result
    assert set(written) - set(result) == {"format", "digest", "files"}

    again = call(*arguments)
    assert again.document == result
    assert "has finished before" in again.err


def test_tables_go_to_standard_output_and_progress_to_the_other(call: Call) -> None:
    outcome = call("continual", "--norm", "adab2n", *SMALL)
    assert outcome.code == 0
    assert "experience 2/2" in outcome.err
    assert "er_ace with norm adab2n" in outcome.err
    assert outcome.out.startswith("er_ace + adab2n (memory_size=20): ")  # the answer comes first
    for title in ("Accuracy (%): split", "forgetting", "--details: 2 more tables", "record: "):
        assert title in outcome.out
    assert "Accuracy matrix" not in outcome.out
    whole = call("continual", "--norm", "adab2n", *SMALL, "--details", "--notes")  # reads the record back
    for title in ("Accuracy (%): split", "Accuracy matrix (%): split", "Drift by layer", "Forgetting: percentage"):
        assert title in whole.out
    assert "--details:" not in whole.out
    assert "experience 1/2" not in outcome.out
    separate = call("continual", *SMALL, "--set", "learner.passes=separate", "--dry-run")
    assert "separate passes" in separate.out


def test_a_dry_run_prints_the_same_document_without_training(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = call("continual", "--json", *SMALL).document
    monkeypatch.setattr("fednorm.cli.continual.simulate", lambda *_, **__: pytest.fail("it trained"))
    dry = call("continual", "--json", "--dry-run", "--runs", tmp_path / "dry", *SMALL)
    document = dry.document
    assert document.pop("estimated_seconds") >= 0
    assert document == {key: whole[key] for key in document}
    assert {"config", "hash", "parameters", "data", "steps", "norm", "learner", "scenario"} <= set(document)
    assert not (tmp_path / "dry").exists()
    plain = call("continual", "--dry-run", *SMALL)
    assert plain.code == 0
    assert "experience 2: classes" in plain.out
    assert "12 train, 6 test images" in plain.out
    assert "estimated time: " in plain.out


def test_the_learner_and_the_norm_are_the_same_in_any_spelling(call: Call) -> None:
    hashes = {
        call("continual", "--dry-run", "--json", *SMALL, "--learner", learner, "--scenario", scenario).document["hash"]
        for learner, scenario in (("er-ace", "split-digits"), ("er_ace", "split_digits"), ("ER-ACE", "Split_Digits"))
    }
    assert len(hashes) == 1


def test_options_override_the_file_and_settings_override_options(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "stream.toml"
    path.write_text(
        'kind = "continual"\nseed = 5\n[learner]\nname = "derpp"\nalpha = 0.25\nmemory_size = 30\n'
        '[train]\nepochs = 3\nmomentum = 0.5\n[norm]\nname = "group-norm"\n'
    )
    arguments = ("continual", "--config", path, "--dry-run", "--json", *TINY, "--seed", "6", "--epochs", "2")
    config = call(*arguments, "--set", "seed=7", "--set", "learner.beta=1").document["config"]
    assert config["learner"] == {"name": "derpp", "alpha": 0.25, "beta": 1.0, "memory_size": 30}
    assert (config["seed"], config["train"]["epochs"], config["train"]["momentum"]) == (7, 2, 0.5)
    assert config["norm"] == {"name": "group_norm"}


def test_online_is_one_pass_of_ten_images_wherever_nothing_else_is_said(call: Call, tmp_path: Path) -> None:
    def train(*arguments: str) -> tuple[int, int]:
        config = call("continual", "--dry-run", "--json", *TINY, *arguments).document["config"]["train"]
        return config["epochs"], config["batch_size"]

    assert train() == (5, 32)
    assert train("--online") == (1, 10)
    assert train("--online", "--batch-size", "5", "--epochs", "1") == (1, 5)
    (tmp_path / "own.toml").write_text("[train]\nbatch_size = 8")
    assert train("--online", "--config", str(tmp_path / "own.toml")) == (1, 8)


def test_learners_are_listed_and_explained(call: Call, refused: Refused) -> None:
    document = call("list", "learners", "--json").document
    assert [row["name"] for row in document["learners"]] == list(LEARNERS.names)
    assert all(row["summary"].endswith(".") for row in document["learners"])
    plain = call("list", "learners")
    assert [line.split()[0] for line in plain.out.splitlines()] == list(LEARNERS.names)
    card = call("explain", "er-ace", "--json").document
    assert (card["what"], card["name"]) == ("learner", "er_ace")
    assert card["options"] == LEARNERS["er_ace"].options
    assert "memory_size: Samples that the memory holds" in call("explain", "ER_ACE").out
    refused(call("explain", "er-ac"), "'er_ac'", "Did you mean 'er_ace'")


@pytest.mark.parametrize("name", LEARNERS.names)
def test_explain_tells_of_every_learner_s_options(name: str, call: Call) -> None:
    outcome = call("explain", name.replace("_", "-"))
    assert outcome.code == 0
    assert outcome.out.startswith(f"{name} (")
    for option in LEARNERS[name].options:
        assert f"\n    {option}: " in outcome.out


@pytest.mark.parametrize(("section", "words"), [("train", "schedule_over"), ("evaluate", "probe_images")])
def test_explain_tells_of_the_stream_s_keys_too(section: str, words: str, call: Call) -> None:
    assert words in call("explain", section).out
    assert words in call("explain", section, "--json").document["options"]


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--experiences", "11"), ("10 classes", "11", "a class of its own", "num_experiences to 10 or less")),
        (("--experiences", "0"), ("num_experiences", "0")),
        (("--memory-size", "5"), ("capacity 5", "10 classes", "10 or more")),
        (("--memory-size", "0"), ("learner.memory_size is 0", "naive")),
        (("--memory-size", "-1"), ("learner.memory_size", "-1")),
        (("--batch-size", "1"), ("batch_norm", "train.batch_size is 1", "group_norm")),
        (("--set", "learner.memory_batch=1", "--set", "learner.passes=separate"), ("memory_batch is 1", "'separate'")),
        (("--set", "scenario.train_per_experience=1"), ("batch_norm", "Experience 0", "one training image")),
        (("--online", "--epochs", "3"), ("--online is one pass", "train.epochs is 3")),
        (("--online", "--set", "train.epochs=some"), ("train.epochs must be an integer", "'some'")),
        (("--set", "train=3"), ("train is a table", "3")),
        (("--online", "--set", "train=3"), ("train is a table", "3")),
        (("--learner", "er-ase"), ("no learner named 'er_ase'", "Did you mean 'er_ace'")),
        (("--learner", "naive"), ("learner naive has no option 'memory_size'",)),
        (("--scenario", "split-digit"), ("no scenario named 'split_digit'", "Did you mean 'split_digits'")),
        (("--scenario", "domain-digits"), ("scenario domain_digits has no option 'num_experiences'", "domain_order")),
        (("--norm", "adab2m"), ("no norm named 'adab2m'", "'adab2n'")),
        (("--model", "resnet"), ("resnet", "resnet18")),
        (("--data", "cifar10"), ("split_digits is made of digits_mini", "'cifar10'")),
        (("--set", "norm.kapa=1", "--norm", "adab2n"), ("adab2n", "'kapa'", "kappa")),
        (("--set", "norm.kappa=2", "--norm", "adab2n"), ("adab2n.kappa", "2")),
        (("--set", "learner.pases=separate"), ("learner er_ace", "'pases'", "passes")),
        (("--set", "learner.passes=both"), ("learner.passes", "'both'", "joint", "separate")),
        (("--set", "learner.recalibrate=1"), ("learner.recalibrate", "1")),
        (("--set", "learner.recalibrate=true", "--norm", "none"), ("learner.recalibrate", "this network has none")),
        (("--set", "learner.statistics=balanced", "--norm", "nap"), ("balanced", "this network has none")),
        (("--set", "scenario.clas_order=sorted"), ("split_digits", "'clas_order'", "class_order")),
        (("--set", "scenario.class_order=random"), ("class_order", "'random'", "shuffled")),
        (("--set", "train.learning_rte=1"), ("'train.learning_rte'", "'learning_rate'")),
        (("--set", "train.augment=flop"), ("train.augment", "'flop'", "crop_flip")),
        (("--set", "train.momentum=0.9", "--optimizer", "adam"), ("train.momentum is SGD's",)),
        (("--optimizer", "sdg"), ("no optimizer named", "'sdg'", "'sgd'")),
        (("--learning-rate", "-1"), ("train.learning_rate", "-1")),
        (("--set", "data.alpha=0.1"), ("data.alpha", "a stream has no clients")),
        (("--set", "strategy.name=fedbn"), ("'strategy'", "Known here")),
        (("--set", "kind=federated"), ("kind must be one of continual", "'federated'")),
        (("--set", "model.width=3"), ("width", "3")),
        (("--set", "model.activation=rely"), ("model.activation", "'rely'")),
        (("--set", "evaluate.split=validation"), ("evaluate.split", "data.validation")),
        (("--set", "evaluate.probe_images=1"), ("evaluate.probe_images", "1")),
        (("--set", "train.project=true", "--norm", "none"), ("no weight to project", "norm 'nap'")),
        (("--set", "train.redo_every=5", "--set", "train.redo_tau=2"), ("tau", "2")),
        (("--norm", "continual_norm", "--set", "norm.num_groups=32"), ("4 channels", "num_groups is 32")),
        (("--config", "nowhere.toml"), ("nowhere.toml", "No such file")),
    ],
)
@pytest.mark.parametrize("json_flag", [(), ("--json",)], ids=["plain", "json"])
def test_a_mistake_is_named(
    arguments: tuple[str, ...], words: tuple[str, ...], json_flag: Any, call: Call, refused: Refused, tmp_path: Path
) -> None:
    refused(call("continual", *SMALL, *arguments, *json_flag), *words)
    assert not list(tmp_path.rglob("run.json"))


OWN = SMALL[:-2]  # a memory is not every learner's


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scenario", "permuted-labels", "--learner", "joint"), ("different labels", "cannot be learned jointly")),
        (("--learner", "ewc", "--set", "learner.strength=0"), ("learner.strength", "greater than 0", "0")),
        (("--learner", "gdumb", "--set", "learner.memory_size=9"), ("capacity 9", "10 classes")),
        (("--learner", "lwf", "--set", "learner.temperature=-1"), ("learner.temperature", "-1")),
    ],
)
def test_a_mistake_of_one_method_is_named(
    arguments: tuple[str, ...], words: tuple[str, ...], call: Call, refused: Refused
) -> None:
    refused(call("continual", *OWN, *arguments), *words)


def test_random_labels_have_no_union_and_no_validation(call: Call, refused: Refused) -> None:
    few = ("--scenario", "random-labels", "--experiences", "2", "--set", "scenario.train_per_experience=12")
    refused(call("continual", *few, "--learner", "joint"), "different labels", "cannot be learned jointly")
    refused(call("continual", *few, "--set", "data.validation=0.1"), "random_labels", "data.validation to 0")
    refused(call("continual", *few, "--set", "evaluate.split=validation"), "evaluate.split")


@pytest.mark.slow
def test_groups_of_continual_norm_that_do_not_divide_20_channels(call: Call, refused: Refused) -> None:
    slim = ("--model", "resnet18", "--set", "model.width=20", "--norm", "continual_norm")
    groups = ("--set", "norm.num_groups=32")  # the official class-incremental runs have them
    refused(call("continual", *SMALL, *slim, *groups), "20 channels", "num_groups is 32")
    assert call("continual", *SMALL, *slim, "--dry-run").code == 0


def test_nap_finds_no_layer_to_normalize() -> None:
    with pytest.raises(ConfigError, match="nothing that NaP could normalize"):
        fednorm.convert(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), "nap")


@pytest.mark.slow
def test_a_task_that_is_absent_from_the_batch_is_the_documented_behaviour(call: Call) -> None:
    """Naive batches have the present task alone: AdaB2N's weights sum to less than 1, the corrected ones to 1."""
    documents = [
        call("continual", *OWN, "--learner", "naive", "--norm", norm, "--seed", "6", "--json", *more).document
        for norm, more in (
            ("batch_norm", ()),
            ("adab2n", ("--set", "norm.corrected=true", "--set", "norm.lambd=0", "--set", "norm.kappa=1")),
            ("adab2n", ("--set", "norm.lambd=0", "--set", "norm.kappa=1")),
        )
    ]
    losses = [[line["train_loss"] for line in document["experiences"]] for document in documents]
    plain, corrected, published = losses
    # With one task, and with the absent one left out, it is batch normalization.
    assert corrected == pytest.approx(plain, rel=1e-4)
    assert published[0] == pytest.approx(plain[0], rel=1e-4)
    assert abs(published[1] - plain[1]) > 1e-2


# Data and folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a look-alike of CIFAR-10, three training and two test images for each label."""
    monkeypatch.setenv("FEDNORM_CACHE", str(tmp_path / "cache"))

    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": [f"class {k}" for k in range(10)]}}}}

    def write_folder(labels: list[int]) -> Path:
        rng = np.random.default_rng(0)
        for split, each in (("train", 3), ("test", 2)):
            rows = []
            for _ in range(each * len(labels)):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
                rows.append({"bytes": buffer.getvalue(), "path": None})
            path = tmp_path / "data" / "cifar10" / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table = pa.table({"img": rows, "label": labels * each})
            pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), path)
        return tmp_path / "data"

    return write_folder


CIFAR = ("--scenario", "split-cifar10", "--model", "digits_cnn", *SMALL)


def test_a_folder_of_cifar_is_a_stream(write: Any, call: Call) -> None:
    result = call("continual", *CIFAR, "--data-dir", write(list(range(10))), "--json").document
    assert [row["train"] for row in result["data"]["experiences"]] == [12, 12]


@pytest.mark.parametrize(("labels", "word"), [([*range(9), 10], "10"), ([-1, *range(1, 10)], "-1")])
def test_a_label_out_of_range_is_named(labels: list[int], word: str, write: Any, call: Call, refused: Refused) -> None:
    refused(call("continual", *CIFAR, "--data-dir", write(labels)), f"label {word}", "0 to 9")


def test_a_class_without_images_is_named(write: Any, call: Call, refused: Refused) -> None:
    refused(call("continual", *CIFAR, "--experiences", "10", "--data-dir", write(list(range(9)))), "has no", "images")


def test_a_missing_or_corrupt_folder_is_named(write: Any, call: Call, refused: Refused, tmp_path: Path) -> None:
    refused(call("continual", *CIFAR), "data", "--data-dir")
    refused(call("continual", *CIFAR, "--data-dir", "/nowhere"), "/nowhere")
    (tmp_path / "empty").mkdir()
    refused(call("continual", *CIFAR, "--data-dir", tmp_path / "empty"), str(tmp_path / "empty"), "cifar10")
    path = write(list(range(10))) / "cifar10" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:200])
    refused(call("continual", *CIFAR, "--data-dir", tmp_path / "data"), str(path))


def test_a_folder_that_cannot_be_written_is_named(call: Call, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    refused(call("continual", *SMALL, "--runs", tmp_path / "file" / "runs"), "Not a directory", "--runs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(call: Call, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(call("continual", *SMALL, "--runs", tmp_path / "locked" / "runs"), "Permission denied", "--runs")


@pytest.mark.slow
def test_a_damaged_result_is_named(call: Call, refused: Refused) -> None:
    folder = Path(call("continual", *SMALL, "--json").document["run"])
    (folder / "result.json").write_text('{"kind": "continual", "final": ')
    refused(call("continual", *SMALL), str(folder / "result.json"), "is not a result")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_loses_nothing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = call("continual", *SMALL, "--runs", "whole", "--json").document
    train = Learner._train_on

    def interrupted(self: Any, *arguments: Any, **kwargs: Any) -> None:
        if self.progress.step == 4:
            raise KeyboardInterrupt
        train(self, *arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_train_on", interrupted)
        outcome = call("continual", *SMALL)
    assert outcome.code == 130
    assert outcome.out == ""
    assert "Run the same command again to go on from the last checkpoint" in outcome.err
    again = call("continual", *SMALL)
    assert again.code == 0
    assert "going on from step 3 of 6" in again.err
    result = call("continual", *SMALL, "--json").document
    assert result["accuracy_matrix"] == whole["accuracy_matrix"]
    assert result["final"] == whole["final"]


def test_a_run_that_diverges_is_an_error(call: Call) -> None:
    for _ in range(2):  # a second call goes on from the same place, to the same end
        outcome = call("continual", *SMALL, "--learning-rate", "1e30")
        assert outcome.code == 2
        assert outcome.out == ""
        assert "diverged: the loss is not a number from experience 1, step 2 on" in " ".join(outcome.err.split())
    assert "in which networks compute, at most 3.4e+38" in call("continual", *SMALL, "--learning-rate", "1e300").err
