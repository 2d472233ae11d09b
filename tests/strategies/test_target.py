"""TARGET: its terms against formulas in float64, a client's step in plain PyTorch, whole runs, resuming, bad input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.nn import functional

from fednorm.config import resolve
from fednorm.data.scaling import HALF, Scaling
from fednorm.errors import ConfigError, DivergedError, FedNormError, IncompleteError, RoleError
from fednorm.federated_continual.between import Images
from fednorm.federated_continual.measures import means
from fednorm.federated_continual.synthesis import (
    Among,
    Generator,
    Recipe,
    Synthesis,
    Watched,
    divergence,
    moment_distance,
    student_term,
    to_input,
)
from fednorm.federated_continual.workbench import GridWorkbench
from fednorm.federation.pooling import pool_moments
from fednorm.federation.simulate import plan, simulate
from fednorm.records.integrity import read_tensors
from fednorm.records.record import RunRecord
from fednorm.rng import torch_seeded, torch_stream
from fednorm.roles import Role
from strategies.target import ANSWERS, CLASSES, IMAGES, TARGET, of_new_classes

# The terms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (7, 3)])
def test_the_distance_of_moments_is_the_formula(shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(1)
    inputs, mean, var = draw.normal(2, 3, shape), draw.normal(size=3), draw.uniform(1, 4, 3)
    rows = np.moveaxis(inputs, 1, 0).reshape(3, -1)
    own = rows.sum(1) / rows.shape[1]
    biased = ((rows - own[:, None]) ** 2).sum(1) / rows.shape[1]
    expected = np.sqrt(((own - mean) ** 2).sum()) + np.sqrt(((biased - var) ** 2).sum())
    value = moment_distance(*(torch.from_numpy(each) for each in (inputs, mean, var)))
    assert value.dtype == torch.float64
    assert_allclose(value.item(), expected, rtol=1e-13)


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted: np.ndarray[Any, Any] = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def test_the_divergence_and_the_students_term_are_the_formulas() -> None:
    draw = np.random.default_rng(2)
    own, wanted = draw.normal(0, 3, (6, 4)), draw.normal(0, 3, (6, 4))
    own[:3] = wanted[:3] + draw.normal(0, 0.01, (3, 4))  # agree on the class

    def expected(temperature: float) -> Any:
        p, q = softmax(wanted / temperature), softmax(own / temperature)
        return (p * (np.log(p) - np.log(q))).sum(1)

    a, b = torch.from_numpy(own), torch.from_numpy(wanted)
    for temperature in (1.0, 2.0, 20.0):
        assert_allclose(divergence(a, b, temperature), expected(temperature), rtol=1e-9, atol=1e-15)
    agree = own.argmax(1) == wanted.argmax(1)
    assert 3 <= agree.sum() < 6
    assert_allclose(student_term(a, b), -(expected(1.0) * agree).sum() / 6, rtol=1e-9)


def test_the_cross_entropy_is_over_new_classes_where_there_are_no_others() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 4, 4, 1])
    narrow = functional.cross_entropy(logits[:, [1, 4]], torch.tensor([0, 1, 1, 0]))
    assert torch.equal(of_new_classes(functional.cross_entropy, [4, 1], logits, labels), narrow)
    with_old = torch.tensor([1, 4, 0, 1])
    wide = functional.cross_entropy(logits, with_old)
    assert torch.equal(of_new_classes(functional.cross_entropy, [4, 1], logits, with_old), wide)


def test_an_image_in_the_unit_range_is_scaled_as_its_pixels_are() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    for scaling in (HALF, Scaling(((0.4, 0.5, 0.6),), ((0.2, 0.25, 0.3),))):
        scale = to_input(scaling, torch.device("cpu"))
        torch.testing.assert_close(scale(pixels.float() / 255), scaling(pixels), rtol=0, atol=1e-6)


# The synthesis ----------------------------------------------------------------------------------------------------

LIKE = Images((3, 10, 9), 4, HALF)


def recipe(**values: Any) -> Recipe:
    usual: dict[str, Any] = {"batches": 3, "batch_size": 8, "steps": 30, "label_weight": 0.5, "moment_weight": 10.0}
    return Recipe(**usual | {"student_weight": 1.0, "student_steps": 2, "rate": 0.01, "width": 4} | values)


def network() -> nn.Sequential:
    with torch_seeded(3, "network"):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)
        )


def synthesis(moments: bool = True, seed: int = 1, **values: Any) -> Synthesis:
    teacher = network()
    norm = teacher[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean, norm.running_var = torch.linspace(-0.5, 0.5, 6), torch.linspace(0.05, 0.3, 6)
    aims = {"1": (norm.running_mean.clone(), norm.running_var.clone())} if moments else {}
    return Synthesis(
        teacher.eval(), network(), aims, classes=(0, 2), images=LIKE, recipe=recipe(**values), seed=seed, names=("a",)
    )  # fmt: skip


def test_a_generator_draws_images_of_any_size() -> None:
    for shape in ((3, 28, 28), (1, 5, 9)):
        images = Generator(shape, 4)(torch.randn(2, 256))
        assert images.shape == (2, *shape)
        assert 0 <= images.min() < images.max() <= 1


def test_a_student_answers_among_the_classes_that_it_knows() -> None:
    inputs = torch.rand(4, 3, 10, 9)
    answers, logits = Among(network(), (0, 2))(inputs), network()(inputs)
    assert torch.equal(answers[:, [0, 2]], logits[:, [0, 2]])
    assert answers[:, [1, 3]].eq(-torch.inf).all()


def test_the_generators_loss_is_its_terms() -> None:
    made = synthesis(student_weight=3.0)
    images, places = torch.rand(8, 3, 10, 9), torch.tensor([0, 1] * 4)
    inputs = images * 2 - 1
    with torch.no_grad(), made.watched.hooks():
        hidden, logits = made.teacher[0](inputs), made.teacher(inputs)[:, [0, 2]]
        own = made.student.eval()(inputs)[:, [0, 2]]
        norm = made.teacher[1]
        distance = moment_distance(hidden, norm.running_mean, norm.running_var)
        expected = 0.5 * functional.cross_entropy(logits, places) + 10 * distance
        torch.testing.assert_close(made.loss(images, places), expected)  # the first batch: no student yet
        made.pool.append(torch.zeros(1))
        torch.testing.assert_close(made.loss(images, places), expected + 3 * student_term(own, logits))


@pytest.mark.slow
def test_the_images_come_nearer_to_what_they_are_drawn_for_and_no_stream_is_shared() -> None:
    state = torch.random.get_rng_state()
    short, long, again = (synthesis(steps=steps).run() for steps in (1, 30, 30))
    assert torch.equal(state, torch.random.get_rng_state())
    assert long.images.shape == (24, 3, 10, 9)
    assert long.images.dtype == torch.uint8
    assert set(long.labels.tolist()) == {0, 2}
    assert short.distance is not None
    assert long.distance is not None
    assert long.distance < short.distance / 2
    assert torch.equal(long.images, again.images)
    assert torch.equal(long.logits, again.logits)
    assert not torch.equal(long.images, synthesis(seed=2).run().images)
    teacher = synthesis().teacher
    torch.testing.assert_close(long.logits, teacher(HALF(long.images)))  # of the pixels that travel


def test_without_moments_there_is_no_distance_and_without_steps_no_student() -> None:
    made = synthesis(moments=False, student_steps=0, steps=2).run()
    assert (made.distance, made.student) == (None, None)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    made = synthesis(moment_weight=1e38)
    made.watched.moments["1"][1].fill_(1e10)  # type: ignore[index]
    with pytest.raises(DivergedError, match=r"from batch 1 of 3 on.*strategy\.moment_weight"):
        made.run()


def test_moments_of_something_else_than_the_input_are_refused() -> None:
    teacher = network()
    watched = Watched(teacher, {"1": (torch.zeros(2, 6), torch.ones(2, 6))})
    with watched.hooks(), pytest.raises(ConfigError, match=r"layer '1' \(BatchNorm2d\).*\(2, 6\)"):
        teacher(torch.zeros(2, 3, 10, 9))


# Whole runs -------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"batches": 2, "batch": 8, "steps": 2, "student_steps": 1, "generator_width": 4}
RUN: dict[str, Any] = {
    "kind": "federated_continual",
    "scenario": {"name": "split_digits", "num_experiences": 2, "train_per_experience": 24, "test_per_experience": 10},
    "model": {"width": 4},
    "learner": {"name": "naive"},
    "norm": {"name": "batch_norm"},
    "grid": {"clients": 2},
    "rounds": {"per_experience": 2},
    "train": {"batch_size": 6, "learning_rate": 0.05},
    "workers": 1,
}


def values(**options: Any) -> dict[str, Any]:
    return {**RUN, "strategy": {"name": "target", **SMALL, **options}}


def run(tmp_path: Any, configuration: dict[str, Any], **more: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = resolve(configuration)
    result = simulate(config, runs=tmp_path, **more)
    return read_tensors(RunRecord(tmp_path, config).folder / "model.safetensors", config.hash)[0], result


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_to_the_same_bits(tmp_path: Any) -> None:
    """Before the images are drawn, just after, and in the middle of the experience that has them."""
    whole, result = run(tmp_path / "whole", values())

    class Cut:
        def __init__(self, after: int) -> None:
            self.after = after

        def begin(self, bench: Any, first_round: int) -> None: ...

        def round(self, line: Any) -> None:
            if line["round"] == self.after:
                raise KeyboardInterrupt

    for after in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", values(), observer=Cut(after))
    tensors, again = run(tmp_path / "cut", values())
    for key, tensor in whole.items():
        assert torch.equal(tensor, tensors[key]), key
    assert again["accuracy_tensor"] == result["accuracy_tensor"]
    assert again["final"]["between"] == result["final"]["between"]
    bare, _ = run(tmp_path / "bare", values(distillation=0.0))
    assert not all(torch.equal(tensor, bare[key]) for key, tensor in whole.items())


def test_the_plan_counts_the_images_and_says_whose_statistics_they_are_drawn_by() -> None:
    result = simulate(resolve(values()), runs=None)
    size = 16 * (3 * 28 * 28 + 4 * 10) + 10  # pixels, answers, which classes
    about, plain = result["between"], result["rounds"][0]["bytes_down"]
    assert (about["images"], about["bytes"], about["statistics"]) == (16, size, "averaged")
    assert about["layers"] == 5
    assert [line["bytes_down"] - plain for line in result["rounds"]] == [0, 0, 2 * size, 2 * size]
    last = result["rounds"][-1]
    assert last["bytes_down"] + last["bytes_up"] == result["plan"]["bytes_per_round"]
    assert plan(resolve(values()))["plan"]["bytes_per_round"] == result["plan"]["bytes_per_round"]
    measured = result["rounds"][1]["between"]
    assert result["final"]["between"] == measured
    assert measured["images"] == 16
    assert 0 < measured["teacher_confidence"] <= 1
    assert measured["moment_distance"] > 0
    assert not any("between" in line for i, line in enumerate(result["rounds"]) if i != 1)


def test_means_are_of_what_all_boundaries_have() -> None:
    assert means([{"a": 1.0, "b": None, "c": 2.0}, {"a": 2.0, "b": 1.0}]) == {"a": 1.5, "b": None}


def test_a_clients_step_is_plain_pytorchs() -> None:
    """The gradient of both terms, by one update of stochastic gradient descent."""
    config = resolve(
        {**values(replay_batch=4), "grid": {"clients": 1}, "train": {"batch_size": 24, "learning_rate": 0.1}}
    )
    bench = GridWorkbench(config)
    strategy, model = bench.strategy, bench.model
    assert isinstance(strategy, TARGET)
    draw = torch.Generator().manual_seed(5)
    images = torch.randint(256, (16, 3, 28, 28), generator=draw).to(torch.uint8)
    old, answers = torch.tensor([1] * 5 + [0] * 5, dtype=torch.uint8), torch.randn(16, 10, generator=draw)
    strategy.load_state_dict({IMAGES: images, ANSWERS: answers, CLASSES: old})
    cell = bench.grid.cells[0][1]
    assert cell is not None
    assert cell.classes == (5, 6, 7, 8, 9)
    twin = copy.deepcopy(model)
    turn = bench.turn(bench.federation.clients[0], 3)
    turn.fit(strategy.local(strategy))
    order = torch.randperm(24, generator=torch_stream(config.seed, "experience", 0, "epoch", 0, "order"))
    own, labels = cell.train.inputs(order)
    rows = torch.randperm(16, generator=torch_stream(config.seed, "client", 0, "round", 3, "synthetic"))[:4]
    loss = functional.cross_entropy(twin(own)[:, 5:], labels - 5)
    p = (answers[rows, :5] / 2).softmax(1)
    log_q = (twin(images[rows].float() / 127.5 - 1)[:, :5] / 2).log_softmax(1)
    (loss + 25 * (p * (p.log() - log_q)).sum(1).mean()).backward()
    for key, parameter in twin.named_parameters():
        assert parameter.grad is not None
        stepped = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(model.state_dict()[key], stepped, rtol=1e-4, atol=1e-5)
    for key, buffer in twin.named_buffers():
        torch.testing.assert_close(model.state_dict()[key], buffer, rtol=1e-5, atol=1e-6)


def test_pooled_statistics_are_pooled_and_aimed_at(lab: Any) -> None:
    strategy = lab.make("target", statistics="pooled")
    updates = {pid: (lab.update(strategy, pid), 3 + pid) for pid in range(2)}
    new = lab.rounds(strategy, [updates])
    means_, variances = ([updates[pid][0][f"1.running_{what}"] for pid in range(2)] for what in ("mean", "var"))
    mean, var = pool_moments(means_, variances, [3, 4])
    torch.testing.assert_close(new["1.running_mean"], mean.float())
    torch.testing.assert_close(new["1.running_var"], var.float())
    assert strategy.term == ("1",)


def test_one_client_is_asked_for_its_own_and_nobody_else() -> None:
    config = resolve(values(keeps="norm", statistics="client", client=1))
    bench = GridWorkbench(config)
    asked: list[int] = []
    aims: list[Any] = []
    strategy = bench.strategy
    assert isinstance(strategy, TARGET)
    between, moments = strategy.between, strategy._moments

    def noting(boundary: Any) -> Any:
        ask = boundary.ask
        object.__setattr__(boundary, "ask", lambda client: (asked.append(client), ask(client))[1])
        return between(boundary)

    def aiming(network: Any) -> Any:
        aims.append(moments(network))
        return aims[-1]

    strategy.between, strategy._moments = noting, aiming  # type: ignore[method-assign]
    result = simulate(config, runs=None, bench=bench)
    assert asked == [1]
    assert result["rounds"][1]["bytes_up"] - result["rounds"][0]["bytes_up"] == sum(
        entry.nbytes for entry in strategy.plan.entries if entry.role is Role.LOCAL
    )
    assert "client 1's own" in result["between"]["text"]
    mean, var = aims[-1]["norm1"]
    assert mean.abs().sum() > 0  # not the initial ones, which are 0 and 1
    assert not torch.equal(var, torch.ones_like(var))


def test_a_client_that_has_never_trained_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: Any) -> None:
        del args

    monkeypatch.setattr("fednorm.federated_continual.workbench.local_of", nothing)
    with pytest.raises(IncompleteError, match=r"Client 0 \(strategy\.client\).*has not trained"):
        simulate(resolve(values(keeps="statistics", statistics="client")), runs=None)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("options", "norm", "why"),
    [
        ({}, "sws", "the network has no running moments"),
        ({"statistics": "none", "keeps": "statistics"}, "batch_norm", "strategy.statistics = 'none'"),
        ({"moment_weight": 0.0}, "batch_norm", "strategy.moment_weight = 0"),
    ],
)
def test_without_moments_the_plan_says_that_the_term_is_absent(options: dict[str, Any], norm: str, why: str) -> None:
    result = simulate(resolve({**values(**options), "norm": {"name": norm}}), runs=None)
    assert result["between"]["layers"] == 0
    assert f"no term of moments: {why}" in result["between"]["text"]
    assert "moment_distance" not in result["rounds"][1]["between"]


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"statistics": "mean"}, "must be one of averaged, pooled, client, none"),
        ({"keeps": "statistics"}, r"tensors stay on clients \(norm1\.running_mean first\).*asks one client"),
        ({"keeps": "norm", "statistics": "pooled"}, r"strategy\.keeps = 'norm' leaves them on clients"),
        ({"local": "norm1"}, "tensors stay on clients"),
        ({"statistics": "client"}, r"clients keep nothing\. Take strategy\.keeps"),
        ({"statistics": "client", "keeps": "norm", "client": 2}, "the run has the clients 0 to 1"),
        ({"batch": 1}, r"strategy\.batch must be an integer of 2 or more"),
        ({"replay_batch": 1}, "to estimate a variance"),
        ({"distillation": -1.0}, "the weight of a term, 0 or more"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
    ],
)
def test_bad_options_are_refused_before_training(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GridWorkbench(resolve(values(**options)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"norm": {"name": "adab2n"}, "learner": {"name": "er", "memory_size": 8}}, "synthetic images are of no task"),
        ({"learner": {"name": "scr", "memory_size": 8}}, "learner scr trains and classifies by something else"),
        ({"train": {"heads": "task"}, "evaluate": {"task_identity": True}}, "Leave train.heads at 'one'"),
        ({"scenario": {"name": "domain_digits"}, "data": {"normalize": "domain"}}, "Take 'half', 'none' or 'global'"),
    ],
)
def test_what_synthetic_images_cannot_be_given_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GridWorkbench(resolve({**values(), **change}))


def test_pooling_needs_moments_and_a_plain_federation_has_no_experiences() -> None:
    with pytest.raises(RoleError, match="TARGET with statistics='pooled'"):
        GridWorkbench(resolve({**values(statistics="pooled"), "norm": {"name": "group_norm", "num_groups": 2}}))
    with pytest.raises(FedNormError, match=r"what comes between two experiences.*would be FedAvg"):
        plan(resolve({"strategy": {"name": "target"}, "data": {"name": "digits_mini"}}))


def test_a_checkpoint_of_something_else_is_refused(lab: Any) -> None:
    with pytest.raises(ConfigError, match="do not fit TARGET: it has images"):
        lab.make("target").load_state_dict({IMAGES: torch.zeros(1)})
