"""The contract of every scenario x learner x norm: it trains, measures what it promises, and gives the same again."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.cards import LEARNERS, NORMS, SCENARIOS
from fednorm.errors import ConfigError
from fednorm.federation.plan import norm_plan
from fednorm.roles import STATISTICS, Kind, RoleRule
from fednorm.spec import HookedLayer
from fednorm.streams.simulate import OF_AN_ORDER, simulate
from fednorm.streams.stream import Stream
from fednorm.streams.workbench import ContinualWorkbench

NO_UNION = ("random_labels", "permuted_labels")  # an image has several labels there
REPLAY = tuple(name for name in LEARNERS.names if "passes" in LEARNERS[name].options)
STATEFUL = tuple(name for name in NORMS.names if list(NORMS[name].make().layer(4, 2).buffers()))
FROM_ALL = (
    "average_accuracy",
    "average_incremental_accuracy",
    "forgetting_max_minus_last",
    "forgetting_first_minus_last",
    "backward_transfer",
    "forward_transfer",
)  # measures that need every experience's accuracy


# Every combination ----------------------------------------------------------------------------------------------------


def _triples() -> list[Any]:
    """Return combinations in which every two meet; in the default tier, each scenario and each learner.

    All three at once are thousands, and a scenario gives images and tasks, whatever learns them or normalizes.
    """
    norms, learners = itertools.cycle(NORMS.names), itertools.cycle(LEARNERS.names)
    default = [(scenario, learner, next(norms)) for scenario in SCENARIOS.names for learner in LEARNERS.names]
    others = [
        *(("split_digits", learner, norm) for learner in LEARNERS.names for norm in NORMS.names),
        *((scenario, next(learners), norm) for scenario in SCENARIOS.names for norm in NORMS.names),
    ]
    slow = sorted(set(others) - set(default))
    return [*(pytest.param(*one) for one in default), *(pytest.param(*one, marks=pytest.mark.slow) for one in slow)]


def test_every_two_of_scenarios_learners_and_norms_meet() -> None:
    for tier in (_triples(), [triple for triple in _triples() if not triple.marks]):
        triples = [triple.values for triple in tier]
        assert {(s, learner) for s, learner, _ in triples} == set(itertools.product(SCENARIOS.names, LEARNERS.names))
        assert {norm for _, _, norm in triples} == set(NORMS.names)
    triples = [triple.values for triple in _triples()]
    assert {(learner, norm) for _, learner, norm in triples} == set(itertools.product(LEARNERS.names, NORMS.names))
    assert {(s, norm) for s, _, norm in triples} == set(itertools.product(SCENARIOS.names, NORMS.names))


@pytest.mark.few(4)
@pytest.mark.parametrize(("scenario", "learner", "norm"), _triples())
def test_it_trains_and_measures(scenario: str, learner: str, norm: str, toy: Any) -> None:
    # What is measured inside the network costs as much again as the rest, and does not depend on the scenario.
    probed = scenario == "split_digits"
    config = toy.config(scenario, learner, norm, evaluate={"probe_images": 8 if probed else 0})
    if learner == "joint" and scenario in NO_UNION:
        with pytest.raises(ConfigError, match="cannot be learned jointly"):
            toy.bench(config)
        return
    bench = toy.bench(config)
    initial = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    document = simulate(config, runs=None, bench=bench)

    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert unmeasured(document) == not_promised(bench)
    matrix, lines = document["accuracy_matrix"], document["experiences"]
    assert [len(row) for row in matrix] == [2, 2]
    assert all(0 <= share <= 1 for row in matrix for share in row if share is not None)
    # 12 images in batches of 4; the joint learner has both experiences' in one.
    assert [line["steps"] for line in lines] == ([6] if learner == "joint" else [3, 6])
    assert all(matrix[line["experience"]] == line["accuracy"] for line in lines)
    check_tensors(bench, initial)


def unmeasured(value: Any, path: str = "") -> set[str]:
    """Return the paths at which a document has None."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {found for key, inner in items for found in unmeasured(inner, f"{path}.{key}")}
    return {path.removeprefix(".")} if value is None else set()


def not_promised(bench: ContinualWorkbench) -> set[str]:
    """Return the paths at which a run without a record has None; everything else is a number."""
    stream, paths = bench.stream, {"run"}
    if stream.memorization:  # each experience is measured on itself alone
        paths |= {"untrained_accuracy", *(f"final.{name}" for name in FROM_ALL)}
        for row, column in ((0, 1), (1, 0)):
            paths |= {f"accuracy_matrix.{row}.{column}", f"experiences.{row}.accuracy.{column}"}
    if bench.joint:
        paths |= {f"final.{name}" for name in OF_AN_ORDER}
    if not stream.classes_per_task:
        numbers = range(1 if bench.joint else 2)
        paths |= {"final.task_incremental_accuracy", *(f"experiences.{n}.task_accuracy" for n in numbers)}
    if bench.config.norm.name not in STATEFUL or not bench.config.evaluate.probe_images:
        paths.add("final.drift")
    return paths


def check_tensors(bench: ContinualWorkbench, initial: dict[str, Tensor]) -> None:
    """Require that each tensor of the state is declared, and that training did to it what its kind says."""
    plan = norm_plan(bench.model, RoleRule())  # refuses a tensor that no norm declares
    state = bench.model.state_dict()
    for key, entry in plan.by_key.items():
        assert state[key].isfinite().all()
        if key.endswith("num_batches_tracked"):
            assert int(state[key]) == training_passes(bench), key
        elif key.endswith("skip_counter"):
            assert int(state[key]) >= 0, key  # of outliers, which so few batches need not have
        elif entry.kind in STATISTICS or (entry.kind is Kind.WEIGHT and key.endswith("weight")):
            assert not torch.equal(state[key], initial[key]), key


def training_passes(bench: ContinualWorkbench) -> int:
    if bench.config.learner.name == "a_gem":
        return sum(bench.steps) + bench.steps[1]  # a look at the memory before every step of the second experience
    if bench.config.learner.name != "gdumb":
        return sum(bench.steps)
    memory = len(bench.learner.buffer)
    batches = -(-memory // 4) - (memory % 4 == 1)  # a single image has no variance, and is left out
    return 3 * batches  # those of the last end: each begins with the network as it was


@pytest.mark.cover(1)
@pytest.mark.parametrize("learner", LEARNERS.names)
@pytest.mark.parametrize("norm", [name for name in NORMS.names if "num_groups" in NORMS[name].make().__dict__])
def test_groups_that_do_not_divide_are_refused_before_training(learner: str, norm: str, toy: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?=.*4 channels)(?=.*num_groups is 3)"):
        toy.bench(toy.config("split_digits", learner, norm, norm={"num_groups": 3}))


@pytest.mark.few(5)
@pytest.mark.parametrize("norm", NORMS.names)
def test_a_batch_of_one_is_refused_where_it_has_no_variance(norm: str, toy: Any) -> None:
    alone = toy.config("split_digits", "naive", norm, train={"batch_size": 1})
    memory = toy.config("split_digits", "er", norm, learner={"memory_batch": 1, "passes": "separate"})
    if NORMS[norm].batch_coupled and all(getattr(layer, "batch_coupled", True) for layer in NORMS[norm].layers):
        with pytest.raises(ConfigError, match=rf"norm '{norm}' estimates a variance.*train.batch_size is 1"):
            toy.bench(alone)
        with pytest.raises(ConfigError, match=r"memory_batch is 1 and learner.passes is 'separate'"):
            toy.bench(memory)
    else:
        assert toy.run(alone)[0]["experiences"][1]["steps"] == 24
        assert toy.run(memory)[0]["experiences"][1]["steps"] == 6


@pytest.mark.parametrize("norm", [name for name in NORMS.names if name not in STATEFUL])
@pytest.mark.parametrize("options", [{"statistics": "balanced"}, {"recalibrate": True}])
def test_controls_of_statistics_are_refused_where_there_are_none(norm: str, options: Any, toy: Any) -> None:
    if norm == "affine_scaled_attention" and "statistics" in options:
        return  # alpha_ma is a statistic, though none that images re-estimate
    with pytest.raises(ConfigError, match=rf"learner.{next(iter(options))} .*this network has none"):
        toy.bench(toy.config("split_digits", "er", norm, learner=options))


# The same again -------------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("learner", LEARNERS.names)
@pytest.mark.parametrize("norm", ["adab2n", "batch_renorm", "nap"])
def test_the_same_seed_gives_the_same_bits(learner: str, norm: str, toy: Any) -> None:
    train = {"augment": "crop_flip", "optimizer": "adam", "learning_rate": 0.003, "shrink": 0.9, "perturb": 0.1}
    torch.manual_seed(1)
    first, one = toy.run(toy.config("split_digits", learner, norm, train=train))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second, other = toy.run(toy.config("split_digits", learner, norm, train=train))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert toy.timeless(first) == toy.timeless(second)
    assert not toy.differing(one.model.state_dict(), other.model.state_dict())
    third, another = toy.run(toy.config("split_digits", learner, norm, train=train, seed=2))
    assert "conv1.weight" in toy.differing(one.model.state_dict(), another.model.state_dict())
    assert third["data"]["digest"] != first["data"]["digest"]


# What goes through the network ----------------------------------------------------------------------------------------


@dataclass
class Pass:
    """A forward pass in training mode.

    Attributes:
        images: What went in.
        told: The tasks that the layers had been told; None where there are no layers with hooks.
        num_tasks: And how many there were.
        graded: Whether it was made to be learned from.
        before: Every statistic before it, by key.
        after: And after it.
    """

    images: Tensor
    told: list[int] | None
    num_tasks: int
    graded: bool
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class Watch:
    """Notes every forward pass in training mode, and what layers with hooks were told before it."""

    def __init__(self, model: nn.Module) -> None:
        self.passes: list[Pass] = []
        self.told: tuple[Tensor, int] | None = None
        plan = norm_plan(model, RoleRule())
        self.keys = [key for key, entry in plan.by_key.items() if entry.kind in STATISTICS]
        self.layers = [module for module in model.modules() if isinstance(module, HookedLayer)]
        for layer in self.layers:
            self.listen(layer)
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end)

    def listen(self, layer: HookedLayer) -> None:
        whole = layer.set_tasks

        def set_tasks(tasks: Tensor, num_tasks: int) -> None:
            if layer is self.layers[0]:
                self.told = (tasks, num_tasks)
            assert self.told is not None
            assert tasks is self.told[0]
            whole(tasks, num_tasks)

        layer.set_tasks = set_tasks  # type: ignore[method-assign]

    def statistics(self, model: nn.Module) -> dict[str, Tensor]:
        state = model.state_dict()
        return {key: state[key].clone() for key in self.keys}

    def begin(self, model: nn.Module, args: tuple[Tensor]) -> None:
        if model.training:
            tasks, num_tasks = (self.told[0].tolist(), self.told[1]) if self.told else (None, 0)
            now = self.statistics(model)
            self.passes.append(Pass(args[0].clone(), tasks, num_tasks, torch.is_grad_enabled(), now, now))

    def end(self, model: nn.Module, *_: Any) -> None:
        if model.training:
            self.passes[-1].after = self.statistics(model)


def watched(toy: Any, *names: str, **changes: Any) -> tuple[Watch, ContinualWorkbench]:
    config = toy.config(*names, **changes)
    bench = toy.bench(config)
    watch = Watch(bench.model)
    simulate(config, runs=None, bench=bench)
    return watch, bench


class Origin:
    """Tells the experience and the label of a training image by its pixels: no image is in two experiences."""

    def __init__(self, stream: Stream) -> None:
        self.known: dict[bytes, tuple[int, int]] = {}
        for experience in stream:
            for image, label in zip(*experience.train.batch(torch.arange(len(experience.train))), strict=True):
                self.known[image.numpy().tobytes()] = (experience.number, int(label))
        assert len(self.known) == sum(len(experience.train) for experience in stream)

    def of(self, images: Tensor) -> list[tuple[int, int]]:
        values = ((images + 1) * 127.5).round().to(torch.uint8).contiguous()
        return [self.known[image.numpy().tobytes()] for image in values]


SIZES = {
    ("naive", ""): [4] * 6,
    ("lwf", ""): [4] * 6,
    ("ewc", ""): [4] * 6,
    ("si", ""): [4] * 6,
    ("joint", ""): [4] * 6,
    ("er", "joint"): [4, *[8] * 5],
    ("er", "separate"): [4, *[4, 4] * 5],
    ("er_ace", "joint"): [4, 4, 4, *[8] * 3],
    ("er_ace", "separate"): [4, 4, 4, *[4, 4] * 3],
    ("derpp", "joint"): [4, *[12] * 5],
    ("derpp", "separate"): [4, *[4, 4, 4] * 5],
    ("mir", "joint"): [4, *[8] * 5],
    ("mir", "separate"): [4, *[4, 4] * 5],
    ("scr", "joint"): [8, *[16] * 5],
    ("scr", "separate"): [4, 4, *[4, 4, 4, 4] * 5],
    ("a_gem", ""): [*[4] * 3, *[4, 4] * 3],
    ("icarl", ""): [*[4] * 3, *[8] * 3],
}
"""Images of every training forward pass, by learner and passes: 6 steps of 4 new images."""


def refused(toy: Any, scenario: str, learner: str) -> None:
    with pytest.raises(ConfigError, match="task_balanced_norm puts the memory's samples beside parts of the new ones"):
        toy.bench(toy.config(scenario, learner, "task_balanced_norm", learner={"passes": "separate"}))


@pytest.mark.few(8)
@pytest.mark.parametrize("scenario", ["split_digits", "domain_digits"])
@pytest.mark.parametrize("norm", ["adab2n", "task_balanced_norm"])
@pytest.mark.parametrize(("learner", "passes"), [*SIZES, ("gdumb", "")])
def test_norms_are_told_the_task_of_every_image(scenario: str, norm: str, learner: str, passes: str, toy: Any) -> None:
    if norm == "task_balanced_norm" and passes == "separate":
        return refused(toy, scenario, learner)
    watch, bench = watched(toy, scenario, learner, norm, learner={"passes": passes} if passes else {})
    origin = Origin(bench.stream)
    for each in watch.passes:
        assert each.told == [task for task, _ in origin.of(each.images)]
    sizes = [len(each.images) for each in watch.passes]
    seen = [each.num_tasks for each in watch.passes]
    if learner == "gdumb":  # three epochs over the memory at either end
        assert seen == sorted(seen)
        assert set(seen) == {1, 2}
        assert sum(size for size, count in zip(sizes, seen, strict=True) if count == 2) == 3 * len(bench.learner.buffer)
        return None
    halved = learner == "derpp" and norm == "task_balanced_norm"  # two draws of two
    assert sizes == ([4, *[8] * 5] if halved else SIZES[learner, passes])
    separate = {"er": 2, "er_ace": 2, "derpp": 3, "mir": 2, "scr": 4}
    groups = separate[learner] if passes == "separate" else 2 if learner == "a_gem" else 1
    late = len(sizes) if learner == "joint" else 3 * groups  # passes of the second experience, or over both at once
    assert seen == [1] * (len(sizes) - late) + [2] * late
    if passes == "joint":  # new images first
        assert all(set(each.told[:4]) == {each.num_tasks - 1} for each in watch.passes if each.told)
    return None


def test_every_learner_with_a_memory_is_in_the_table() -> None:
    assert {name for name, _ in SIZES} | {"gdumb"} == set(LEARNERS.names)
    assert {name for name, passes in SIZES if passes} == set(REPLAY)


@pytest.mark.few(3)
@pytest.mark.parametrize("learner", REPLAY)
@pytest.mark.parametrize("norm", STATEFUL)
@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_balanced_statistics_come_from_balanced_passes_alone(learner: str, norm: str, passes: str, toy: Any) -> None:
    if norm == "task_balanced_norm" and passes == "separate":
        return refused(toy, "split_digits", learner)
    options = {"statistics": "balanced", "passes": passes}
    watch, bench = watched(toy, "split_digits", learner, norm, learner=options)
    origin = Origin(bench.stream)
    last = watch.passes[0].before
    anew = set(bench.trainee.boundary.reset)  # an experience's boundary sets these back
    balanced = [each for each in watch.passes if not each.graded]
    assert len(balanced) == 5  # there is no memory yet at the first of six steps
    for each in balanced:
        assert set(toy.differing(each.before, last)) <= anew  # as the balanced pass before left them
        last = each.after
        counts = Counter(label for _, label in origin.of(each.images)).values()
        assert sum(counts) == 8
        assert max(counts) - min(counts) <= 1
        if watch.layers:
            assert each.told == [task for task, _ in origin.of(each.images)]
    assert not toy.differing(watch.statistics(bench.model), last)
    assert any(toy.differing(each.before, each.after) for each in watch.passes if each.graded)
    return None


def test_the_balanced_pass_is_batch_normalization_s_update(toy: Any) -> None:
    bench = toy.bench(toy.config("split_digits", "er", learner={"statistics": "balanced"}))
    mean = torch.zeros(4, dtype=torch.float64)
    var = torch.ones(4, dtype=torch.float64)

    def expect(layer: nn.Module, args: tuple[Tensor]) -> None:
        # A copy of the network, on which the drift is measured, has this hook too.
        if layer is bench.model.norm1 and layer.training and not torch.is_grad_enabled():
            values = args[0].double().transpose(0, 1).flatten(1)
            mean.lerp_(values.mean(1), 0.1)
            var.lerp_(values.var(1), 0.1)

    bench.model.norm1.register_forward_pre_hook(expect)
    simulate(bench.config, runs=None, bench=bench)
    torch.testing.assert_close(bench.model.norm1.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bench.model.norm1.running_var.double(), var, rtol=1e-5, atol=1e-6)


@pytest.mark.few(3)
@pytest.mark.parametrize("learner", REPLAY)
@pytest.mark.parametrize("norm", STATEFUL)
def test_recalibration_is_for_evaluation_alone(learner: str, norm: str, toy: Any) -> None:
    plain, one = toy.run(toy.config("split_digits", learner, norm))
    recalibrated, other = toy.run(toy.config("split_digits", learner, norm, learner={"recalibrate": True}))
    assert not toy.differing(one.model.state_dict(), other.model.state_dict())
    for key in ("online_accuracy", "train_loss", "steps"):
        assert [line[key] for line in plain["experiences"]] == [line[key] for line in recalibrated["experiences"]]
    drifts = [line["diagnostics"]["drift"] for line in (*plain["experiences"], *recalibrated["experiences"])]
    assert all(a != b for a, b in zip(drifts[:2], drifts[2:], strict=True))

    before = {key: tensor.clone() for key, tensor in other.model.state_dict().items()}
    with other.learner.for_evaluation() as model:
        assert not model.training
        changed = toy.differing(model.state_dict(), before)
        entries = norm_plan(model, RoleRule()).by_key
        changed = [key for key in changed if not ("fc3" in key and learner == "scr")]  # means stand in its head's place
        assert changed
        assert {entries[key].kind for key in changed} <= STATISTICS
    assert not toy.differing(other.model.state_dict(), before)
