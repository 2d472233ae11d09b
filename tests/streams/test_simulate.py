"""A run's numbers against the same training written out in plain PyTorch; and what a run promises besides."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.cards import LEARNERS
from fednorm.data.domain import Split
from fednorm.errors import ConfigError, DivergedError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.rng import stream_seed, torch_stream
from fednorm.streams.simulate import finite, plan, simulate, summary

# In plain PyTorch -----------------------------------------------------------------------------------------------------

FIVE = {
    "scenario": {"num_experiences": 5, "train_per_experience": 17, "test_per_experience": 9},
    "train": {"batch_size": 5, "epochs": 6, "momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.03},
    "evaluate": {"train_images": 11, "batch_size": 4},
    "seed": 7,
}


class Plain:
    """A digits CNN of width 4 with batch normalization, trained on one experience after another."""

    def __init__(self) -> None:
        self.model = nn.Sequential(
            *self.block(nn.Conv2d(3, 4, 5, padding=2), nn.BatchNorm2d(4), nn.MaxPool2d(2)),
            *self.block(nn.Conv2d(4, 4, 5, padding=2), nn.BatchNorm2d(4), nn.MaxPool2d(2)),
            *self.block(nn.Conv2d(4, 8, 5, padding=2), nn.BatchNorm2d(8), nn.Flatten()),
            *self.block(nn.Linear(8 * 2 * 2, 128), nn.BatchNorm1d(128)),
            *self.block(nn.Linear(128, 32), nn.BatchNorm1d(32)),
            nn.Linear(32, 10),
        )
        ours = make_model("digits_cnn", make_norm("batch_norm"), num_classes=10, image_size=8, width=4, seed=7)
        values = list(ours.state_dict().values())
        self.model.load_state_dict(dict(zip(self.model.state_dict(), values, strict=True)))
        # The layout of a run, lest the rounding of other kernels grow with every step.
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.03, momentum=0.9, weight_decay=0.01)

    @staticmethod
    def block(layer: nn.Module, norm: nn.Module, *after: nn.Module) -> tuple[nn.Module, ...]:
        return (layer, norm, nn.ReLU(), *after)

    @staticmethod
    def rows(split: Split) -> tuple[Tensor, Tensor]:
        """Return a split's images, as the network takes them, and labels."""
        images = split.images[split.index].float() / 127.5 - 1
        return images.contiguous(memory_format=torch.channels_last), split.labels[split.index]

    def train(self, split: Split, number: int) -> tuple[float, float, float]:
        """Return the accuracy on every batch before it is first learned, that of all passes, and the mean loss."""
        images, labels = self.rows(split)
        hits, every_hit, loss_sum, seen = 0, 0, 0.0, 0
        self.model.train()
        for epoch in range(6):
            generator = torch_stream(7, "experience", number, "epoch", epoch, "order")
            order = torch.randperm(17, generator=generator)
            for start in range(0, 17, 5):
                batch = order[start : start + 5]
                logits = self.model(images[batch])
                loss = functional.cross_entropy(logits, labels[batch])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                right = int((logits.argmax(1) == labels[batch]).sum())
                hits, every_hit = hits + (right if epoch == 0 else 0), every_hit + right
                loss_sum += loss.item() * len(batch)
                seen += len(batch)
        assert seen == 6 * 17
        return hits / 17, every_hit / seen, loss_sum / seen

    @torch.no_grad()
    def score(self, images: Tensor, labels: Tensor, classes: list[int]) -> float:
        """Return the share of right answers with the given classes to choose from."""
        barred = torch.full((10,), -math.inf)
        barred[classes] = 0.0
        self.model.eval()
        return float(((self.model(images) + barred).argmax(1) == labels).double().mean())


@pytest.fixture(scope="module")
def document(toy: Any) -> dict[str, Any]:
    return toy.run(toy.config(**FIVE))[0]


@pytest.mark.slow
def test_every_accuracy_is_that_of_plain_pytorch(document: dict[str, Any], toy: Any) -> None:
    plain, everything = Plain(), list(range(10))
    stream = toy.bench(toy.config(**FIVE)).stream
    tests = [plain.rows(experience.test) for experience in stream]
    assert document["untrained_accuracy"] == [plain.score(*test, everything) for test in tests]
    for experience, line in zip(stream, document["experiences"], strict=True):
        online, every_pass, loss = plain.train(experience.train, experience.number)
        assert line["online_accuracy"] == pytest.approx(online, abs=1e-12)
        assert line["average_online_accuracy"] == pytest.approx(every_pass, abs=1e-12)
        assert line["train_loss"] == pytest.approx(loss, rel=1e-4)
        assert line["accuracy"] == [plain.score(*test, everything) for test in tests]
        assert line["task_accuracy"] == [
            plain.score(*test, [2 * task, 2 * task + 1]) for task, test in enumerate(tests)
        ]
        images, labels = plain.rows(experience.train)
        chosen = torch.randperm(17, generator=torch_stream(7, "train accuracy", experience.number))[:11]
        assert line["train_accuracy"] == plain.score(images[chosen], labels[chosen], everything)
        assert line["steps"] == 24 * (experience.number + 1)
    assert document["accuracy_matrix"] == [line["accuracy"] for line in document["experiences"]]
    assert len({tuple(row) for row in document["accuracy_matrix"]}) == 5  # the comparison is of different rows


def test_the_final_numbers_are_their_formulas(document: dict[str, Any]) -> None:
    r, lines, final = document["accuracy_matrix"], document["experiences"], document["final"]
    last, count = r[-1], 5
    expected = {
        "average_accuracy": sum(last) / count,
        "average_incremental_accuracy": mean(sum(row[: i + 1]) / (i + 1) for i, row in enumerate(r)),
        "forgetting_max_minus_last": mean(max(r[i][j] for i in range(j, count)) - last[j] for j in range(count - 1)),
        "forgetting_first_minus_last": mean(r[j][j] - last[j] for j in range(count - 1)),
        "backward_transfer": mean(last[j] - r[j][j] for j in range(count - 1)),
        "forward_transfer": mean(r[j - 1][j] - document["untrained_accuracy"][j] for j in range(1, count)),
        "online_accuracy": mean(line["online_accuracy"] for line in lines),
        "average_online_accuracy": mean(line["average_online_accuracy"] for line in lines),
        "task_incremental_accuracy": mean(lines[-1]["task_accuracy"]),
        "train_accuracy": mean(line["train_accuracy"] for line in lines),
        "plasticity": lines[-1]["train_accuracy"],  # a tenth of five experiences is the last one
        "drift": mean(lines[-1]["diagnostics"]["drift"].values()),
    }
    assert {key: final[key] for key in expected} == pytest.approx(expected)
    assert final.keys() == {*expected, "selection"}
    assert final["forgetting_max_minus_last"] > 0.1  # there was something to forget


# What is scored -------------------------------------------------------------------------------------------------------

THREE = {"scenario": {"name": "permuted_pixels", "num_experiences": 3}}


@pytest.mark.parametrize(
    ("scored", "pattern"), [("all", "xxx xxx xxx"), ("seen", "x.. xx. xxx"), ("current", "x.. .x. ..x")]
)
def test_only_what_is_asked_for_is_scored(scored: str, pattern: str, toy: Any) -> None:
    whole, _ = toy.once(toy.config("permuted_pixels", **THREE))
    found, _ = toy.run(toy.config("permuted_pixels", **THREE, evaluate={"experiences": scored}))
    rows = ["".join("." if share is None else "x" for share in row) for row in found["accuracy_matrix"]]
    assert " ".join(rows) == pattern
    assert (found["untrained_accuracy"] is not None) == (scored == "all")
    assert (found["final"]["forward_transfer"] is not None) == (scored == "all")
    for key in ("average_accuracy", "forgetting_max_minus_last", "backward_transfer"):
        assert found["final"][key] == (None if scored == "current" else whole["final"][key])
    assert found["final"]["train_accuracy"] == whole["final"]["train_accuracy"]
    pairs = [(a, b) for one, other in zip(found["accuracy_matrix"], whole["accuracy_matrix"], strict=True)
             for a, b in zip(one, other, strict=True)]  # fmt: skip
    assert all(a in (b, None) for a, b in pairs)


def test_a_memorization_stream_is_scored_on_its_training_images(toy: Any) -> None:
    found, _ = toy.run(toy.config("random_labels"))
    assert found["data"]["memorization"]
    for number, line in enumerate(found["experiences"]):
        assert line["accuracy"][number] == line["train_accuracy"]
        assert line["accuracy"][1 - number] is None
    assert found["final"]["plasticity"] == found["experiences"][-1]["train_accuracy"]
    assert found["final"]["average_accuracy"] is None


def test_the_joint_learner_s_one_row_stands_for_every_experience(toy: Any) -> None:
    found, _ = toy.run(toy.config("split_digits", "joint", evaluate={"experiences": "seen"}))
    (line,) = found["experiences"]
    assert found["accuracy_matrix"] == [line["accuracy"]] * 2
    assert found["final"]["forgetting_first_minus_last"] is None
    assert None not in line["accuracy"]
    assert (line["experience"], line["title"], line["steps"]) == (1, "all experiences", 6)
    assert found["data"]["experiences"][0]["train"] == 12


def test_validation_images_are_scored_where_asked_for(toy: Any) -> None:
    changes = {"data": {"validation": 0.01}, "scenario": {"train_per_experience": 12}}
    found, bench = toy.run(toy.config(**changes, evaluate={"split": "validation"}))
    assert found["final"]["selection"] == "after the last experience, validation images"
    for number, experience in enumerate(bench.stream):
        held = set(experience.validation.index.tolist())
        assert held.isdisjoint(experience.train.index.tolist())
        assert found["data"]["experiences"][number]["validation"] == len(held) > 0
        images, labels = experience.validation.batch(torch.arange(len(held)))
        with torch.no_grad():
            right = bench.model.eval()(images.float() / 127.5 - 1).argmax(1) == labels
        assert found["accuracy_matrix"][-1][number] == pytest.approx(float(right.double().mean()))
    other, _ = toy.run(toy.config(**changes))
    assert other["final"]["selection"] == "after the last experience, test images"
    assert other["hash"] != found["hash"]


def test_without_probe_images_nothing_is_looked_into(toy: Any) -> None:
    found, _ = toy.run(toy.config(evaluate={"probe_images": 0}))
    assert [line["diagnostics"] for line in found["experiences"]] == [{}, {}]
    assert found["final"]["drift"] is None


# What depends on what -------------------------------------------------------------------------------------------------

EVALUATION = {
    "split": ({"split": "validation"}, {"data": {"validation": 0.01}}),
    "experiences": ({"experiences": "current"}, {}),
    "batch_size": ({"batch_size": 1}, {}),
    "train_images": ({"train_images": 1}, {}),
    "probe_images": ({"probe_images": 0}, {}),
    "online": ({"online": "eval"}, {}),
    "every_steps": ({"every_steps": 1, "every_images": 2, "average_last": 2}, {}),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("key", EVALUATION)
@pytest.mark.parametrize("learner", ["er_ace", "gdumb"])
def test_evaluation_leaves_training_alone(key: str, learner: str, toy: Any) -> None:
    evaluate, changes = EVALUATION[key]
    changes = {"train": {"augment": "crop_flip", "optimizer": "adam"}, **changes}
    _, one = toy.once(toy.config("split_digits", learner, "adab2n", **changes))
    _, other = toy.run(toy.config("split_digits", learner, "adab2n", **changes, evaluate=evaluate))
    assert not toy.differing(one.model.state_dict(), other.model.state_dict())


TRAINING: dict[str, dict[str, Any]] = {
    "optimizer": {"optimizer": "adam"},
    "learning_rate": {"learning_rate": 0.01},
    "batch_size": {"batch_size": 6},
    "epochs": {"epochs": 2},
    "momentum": {"momentum": 0.5},
    "weight_decay": {"weight_decay": 0.1},
    "agc": {"agc": 1e-4},
    "agc_on": {"agc": 1e-4, "agc_on": "linear"},
    "augment": {"augment": "crop"},
    "rotate_degrees": {"augment": "rotate", "rotate_degrees": 90},
    "jitter": {"augment": "jitter", "jitter": 0.9},
    "schedule": {"schedule": "cosine"},
    "schedule_over": {"schedule": "linear", "schedule_over": "experience"},
    "warmup_steps": {"warmup_steps": 2},
    "final_rate": {"schedule": "cosine", "final_rate": 0.5},
    "decay": {"schedule": "exponential", "decay": 0.9},
    "decay_every": {"schedule": "step", "decay": 0.5, "decay_every": 2},
    "label_smoothing": {"label_smoothing": 0.2},
    "clip_norm": {"clip_norm": 0.01},
    "reset_optimizer": {"momentum": 0.5, "reset_optimizer": True},
    "project": {"project": True},
    "l2_init": {"l2_init": 1.0},
    "shrink": {"shrink": 0.5},
    "perturb": {"perturb": 0.5},
    "l2_scales": {"l2_scales": 1.0},
    "weight_clip": {"weight_clip": 0.5},
    "hyperspherical": {"hyperspherical": True},
    "cbp_rate": {"cbp_rate": 0.5, "cbp_maturity": 1},
    "cbp_maturity": {"cbp_rate": 0.5, "cbp_maturity": 2},
    "cbp_decay": {"cbp_rate": 0.5, "cbp_maturity": 1, "cbp_decay": 0.1},
    "snr_eta": {"snr_eta": 0.6},
    "snr_longest": {"snr_eta": 0.1, "snr_longest": 1},
    "heads": {"heads": "task"},
    "redo_every": {"redo_every": 2, "redo_tau": 0.99},
    "redo_tau": {"redo_every": 2, "redo_tau": 0.9},
    "nesterov": {"momentum": 0.5, "nesterov": True},
    "wd_ratio": {"optimizer": "sgdp", "delta": 1.0, "weight_decay": 0.1, "wd_ratio": 1.0},
    "delta": {"optimizer": "sgdp", "delta": 1.0},
    "beta_utility": {"optimizer": "upgd", "beta_utility": 0.5},
    "sigma": {"optimizer": "upgd", "sigma": 0.1},
    "norms": {"norms": "freeze"},
    "trainable": {"trainable": "norm"},
    "scale_init": {"scale_init": "uniform"},
    "head": {"trainable": "head", "head": "conv1"},
    "linear_probe_epochs": {"epochs": 2, "linear_probe_epochs": 1},
}


@pytest.mark.slow
def test_every_key_of_training_reaches_the_training(toy: Any) -> None:
    def state(norm: str, **train: Any) -> Any:
        config = toy.config("split_digits", "naive", norm, train=train)
        return {"conv1.weight": toy.run(config)[1].model.conv1.weight.detach()}

    states = {"nothing": state("batch_norm"), "nothing, without a norm": state("none")}
    for key, train in TRAINING.items():
        states[key] = state("none" if key.startswith("snr") else "batch_norm", **train)  # whose units may be silent
    alike = [
        (one, other)
        for place, one in enumerate(states)
        for other in list(states)[:place]
        if "conv1.weight" not in toy.differing(states[one], states[other])
    ]
    assert alike == []
    keys = set(toy.config().to_dict()["train"]) - {"checkpoint_every"}
    assert keys == set(TRAINING)


# What would do nothing ------------------------------------------------------------------------------------------------

NO_PARTS = [
    ("derpp", {}, 10),
    ("er", {"passes": "separate"}, 10),
    ("er_ace", {"memory_batch": 4}, 10),
    pytest.param("er", {"memory_batch": 1}, 10, marks=pytest.mark.slow),
    pytest.param("er_ace", {"memory_batch": 20}, 10, marks=pytest.mark.slow),
    pytest.param("derpp", {"passes": "separate", "memory_batch": 4}, 7, marks=pytest.mark.slow),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("learner", "options", "batch"), NO_PARTS)
def test_task_balanced_norm_is_refused_where_it_would_be_batch_norm(
    learner: str, options: dict[str, Any], batch: int, toy: Any
) -> None:
    """And what the refusal says to set, each of it, makes parts: the remedy is a remedy."""
    many = {"scenario": {"num_experiences": 5, "train_per_experience": 2 * batch + 8}}
    names = ("split_digits", learner, "task_balanced_norm")
    config = toy.config(*names, learner={"memory_batch": 0, **options}, train={"batch_size": batch}, **many)
    with pytest.raises(ConfigError, match="normalized as batch_norm does, under another name") as told:
        toy.bench(config)
    remedy = str(told.value).rpartition("Set ")[2]
    size = int(found[1]) if (found := re.search(r"train.batch_size to (\d+)", remedy)) else batch
    listed = re.search(r"learner.memory_batch to one of ([\d, ]+)", remedy)
    assert listed
    sizes = [int(each) for each in listed[1].strip(", ").split(", ")]
    assert ("learner.passes to joint" in remedy) == (options.get("passes") == "separate")
    for memory_batch in sizes:
        mended = {"memory_batch": memory_batch, "passes": "joint"}
        bench = toy.bench(toy.config(*names, learner=mended, train={"batch_size": size}, **many))
        parts: list[int] = []

        def note(layer: Any, args: tuple[Tensor], into: list[int] = parts) -> None:
            into.append(layer.division(len(args[0]))[1])

        bench.model.norm1.register_forward_pre_hook(note)
        for experience in bench.training:
            bench.learner.train(experience)
        assert max(parts) > 1, (learner, memory_batch)


@pytest.mark.parametrize("key", ["learning_rate", "weight_decay", "agc", "l2_init", "redo_tau"])
def test_what_single_precision_does_not_hold_is_refused(key: str, toy: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"train.{key} must be a finite number of 32 bits, in which networks compute, at most 3.4e\+38",
    ):
        toy.config(train={key: 1e300})
    for section, name, option in (("norm", "adab2n", "lambd"), ("learner", "ewc", "strength")):
        with pytest.raises(ConfigError, match=f"{option} must be a finite number of 32 bits"):
            toy.bench(toy.config(**{section: {"name": name, option: 1e300}}))


@pytest.mark.parametrize(("norm", "project"), [("batch_norm", True), ("batch_norm", False), ("nap", False)])
def test_projected_weights_keep_their_norms(norm: str, project: bool, toy: Any) -> None:
    config = toy.config("split_digits", "er", norm, train={"project": project, "optimizer": "adam"})
    bench = toy.bench(config)
    initial = [float(layer.weight.detach().norm()) for layer in hidden(bench.model)]
    simulate(config, runs=None, bench=bench)
    final = [float(layer.weight.detach().norm()) for layer in hidden(bench.model)]
    assert (final == pytest.approx(initial, rel=1e-5)) == (project or norm == "nap")


def hidden(model: nn.Module) -> list[Any]:
    return [getattr(model, name) for name in ("conv1", "conv2", "conv3", "fc1", "fc2")]


@pytest.mark.parametrize("learner", ["naive", "er"])
def test_what_begins_with_an_experience_begins_with_all_but_the_first(learner: str, toy: Any) -> None:
    train = {"shrink": 0.75, "perturb": 0.5, "momentum": 0.9, "reset_optimizer": True}
    config = toy.config("split_digits", learner, scenario={"num_experiences": 5}, train=train)
    bench = toy.bench(config)
    before = [{key: p.detach().clone() for key, p in bench.model.named_parameters()}]
    begun: list[int] = []

    class Notice(Notes):
        def experience(self, line: Any) -> None:
            super().experience(line)
            before.append({key: p.detach().clone() for key, p in bench.model.named_parameters()})

    def begin() -> None:
        number = len(begun)
        begun.append(number)
        assert not bench.learner.optimizer.state
        seed = stream_seed(1, "perturb", number)
        fresh = dict(
            make_model("digits_cnn", bench.norm, num_classes=10, image_size=8, width=4, seed=seed).named_parameters()
        )
        for key, parameter in bench.model.named_parameters():
            expected = 0.75 * before[number][key] + 0.5 * fresh[key] if number else before[0][key]
            torch.testing.assert_close(parameter, expected)

    bench.learner.begin_experience = begin
    simulate(config, runs=None, observer=Notice(), bench=bench)
    assert begun == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_norm_is_fitted_to_the_stream_and_the_learner(toy: Any) -> None:
    many = {"scenario": {"num_experiences": 25}, "train": {"batch_size": 12}}
    found, bench = toy.run(toy.config("permuted_pixels", "naive", "adab2n", **many))
    assert found["norm"]["num_tasks"] == len(bench.model.norm1.task_weight) == 25
    short, _ = toy.run(toy.config("split_digits", "naive", "adab2n"))
    assert short["norm"]["num_tasks"] == 20  # two would do; more leave a name to compare runs by
    for memory_batch, ratio in ((0, 1), (2, 2)):
        bench = toy.bench(
            toy.config("split_digits", "er", "task_balanced_norm", learner={"memory_batch": memory_batch})
        )
        assert bench.norm.batch_ratio == ratio


# What a run says ------------------------------------------------------------------------------------------------------


class Notes:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self.steps: list[int] = []
        self.lines: list[Any] = []

    def begin(self, bench: Any, first_step: int, total_steps: int) -> None:
        assert bench.stream.title
        self.begun.append((first_step, total_steps))

    def step(self, steps_done: int) -> None:
        self.steps.append(steps_done)

    def experience(self, line: Any) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("learner", ["naive", "joint", "gdumb"])
def test_an_observer_is_told_everything_once(learner: str, toy: Any) -> None:
    notes, config = Notes(), toy.config("split_digits", learner)
    document = simulate(config, runs=None, observer=notes, bench=toy.bench(config))
    assert notes.begun == [(0, 6)]
    assert notes.steps == [1, 2, 3, 4, 5, 6]
    assert notes.lines == document["experiences"]
    assert document["seconds"] == pytest.approx(sum(line["seconds"] for line in notes.lines), abs=1e-3)


def test_the_plan_is_the_document_before_training(toy: Any) -> None:
    config = toy.config("split_digits", "er", "adab2n")
    bench = toy.bench(config)
    before = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    planned = plan(config, bench)
    assert not toy.differing(bench.model.state_dict(), before)
    document = simulate(config, runs=None, bench=bench)
    assert planned == {key: document[key] for key in planned}
    assert {
        "kind", "hash", "config", "model", "norm", "learner", "scenario", "parameters", "data", "steps"
    } == planned.keys()  # fmt: skip
    assert planned["norm"] == {"name": "adab2n", **vars(bench.norm)}
    assert planned["learner"] == {"name": "er", **vars(bench.learner.options)}
    assert planned["parameters"] == sum(parameter.numel() for parameter in bench.model.parameters())


@pytest.mark.cover(1)
@pytest.mark.parametrize("learner", LEARNERS.names)
@pytest.mark.parametrize("norm", ["adab2n", "nap", "none"])
def test_a_run_that_diverges_says_so_and_has_no_result(learner: str, norm: str, toy: Any, tmp_path: Path) -> None:
    config = toy.config("split_digits", learner, norm, train={"learning_rate": 1e30})
    with pytest.raises(
        DivergedError, match=r"diverged: the (loss|outputs).* from experience [12], step \d+ on"
    ) as told:
        simulate(config, runs=tmp_path, bench=toy.bench(config))
    assert "train.learning_rate (now 1e+30)" in str(told.value)
    folders = list(tmp_path.iterdir())  # a run of which nothing stands leaves none
    if not folders:
        return
    (folder,) = folders
    assert str(folder) in str(told.value)
    assert not (folder / "result.json").exists()
    lines = folder / "experiences.jsonl"
    for line in lines.read_text().splitlines() if lines.exists() else []:
        assert json.loads(line)["train_loss"] is not None


class Break:
    """Spoils a weight after some step, as an update that overflows would."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def __call__(self, learner: Any) -> None:
        if learner.progress.step == self.step:
            with torch.no_grad():
                next(learner.model.parameters())[0, 0, 0, 0] = self.value


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    ("at", "what", "experience", "step"),
    [(1, "loss", 1, 2), (2, "loss", 1, 3), (3, "outputs", 1, 3), (4, "loss", 2, 5), (6, "outputs", 2, 6)],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_step_from_which_the_numbers_are_none_is_named(
    at: int, what: str, experience: int, step: int, value: float, toy: Any, tmp_path: Path
) -> None:
    config = toy.config("split_digits", "er", "none")
    bench = toy.bench(config)
    bench.learner.watchers.insert(0, Break(at, value))
    words = rf"er \+ none diverged: the {what}.* from experience {experience}, step {step} on"
    with pytest.raises(DivergedError, match=words):
        simulate(config, runs=tmp_path, bench=bench)
    folders = list(tmp_path.iterdir())
    assert len(folders) == (experience > 1)  # a run of which nothing stands leaves no folder
    for folder in folders:
        assert len((folder / "experiences.jsonl").read_text().splitlines()) == experience - 1
        assert not (folder / "result.json").exists()
    # What was finished is gone on from: the same configuration without the accident ends as if there had been none.
    again = simulate(config, runs=tmp_path, bench=toy.bench(config))
    assert toy.timeless(again) == toy.timeless(toy.once(config)[0])


def test_a_network_whose_outputs_are_no_numbers_is_refused_before_training(toy: Any) -> None:
    bench = toy.bench(toy.config("split_digits", "er", "none"))
    with torch.no_grad():
        next(bench.model.parameters()).fill_(math.nan)
    with pytest.raises(DivergedError, match="outputs of the untrained network are not numbers"):
        simulate(bench.config, runs=None, bench=bench)


def test_process_wide_settings_are_as_they_were(toy: Any) -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    inside: list[int] = []

    class Stop(Notes):
        def step(self, steps_done: int) -> None:
            super().step(steps_done)
            inside.append(torch.get_num_threads())
            raise KeyboardInterrupt

    # One step: two threads of a busy machine wait for each other.
    config = toy.config(threads=threads + 1, evaluate={"experiences": "current"}, train={"augment": "crop_flip"})
    with pytest.raises(KeyboardInterrupt):
        simulate(config, runs=None, observer=Stop(), bench=toy.bench(config))
    assert inside == [threads + 1]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_was_not_measured_is_none_in_the_summary() -> None:
    line = {
        "train_accuracy": 0.5,
        "online_accuracy": 0.25,
        "task_accuracy": [None, 0.5],
        "diagnostics": {"drift": {"a": None}},
    }
    found = summary([[1.0, None], [None, 0.5]], None, [line, {**line, "train_accuracy": 1.0}])
    assert found == {
        "average_accuracy": None,
        "average_incremental_accuracy": None,
        "forgetting_max_minus_last": None,
        "forgetting_first_minus_last": None,
        "backward_transfer": None,
        "forward_transfer": None,
        "online_accuracy": 0.25,
        "average_online_accuracy": None,
        "task_incremental_accuracy": None,
        "train_accuracy": 0.75,
        "plasticity": 1.0,
        "drift": None,
    }


def test_numbers_that_are_no_json_become_none() -> None:
    value = {"a": [1.0, math.nan, {"b": -math.inf}], "c": 3, "d": "nan", "e": None, "f": True}
    assert finite(value) == {"a": [1.0, None, {"b": None}], "c": 3, "d": "nan", "e": None, "f": True}


@pytest.mark.parametrize("learner", ["naive", "er_ace"])
@pytest.mark.parametrize("norm", ["adab2n", "task_balanced_norm"])
def test_a_run_tells_its_layers_their_tasks_from_the_first_pass_on(learner: str, norm: str, toy: Any) -> None:
    """The suite as a whole ignores this warning, of layers that tests use by themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.run(toy.config("split_digits", learner, norm))
