"""NormPlugin: Avalanche's strategies do for a norm what fednorm's training step does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from avalanche.training import MIR, Replay
from avalanche.training import Naive as AvalancheNaive
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn

import fednorm
from fednorm.avalanche import NormPlugin
from fednorm.avalanche.benchmark import to_avalanche
from fednorm.avalanche.table import EXPERIENCES, tiny_stream
from fednorm.data.domain import pixels
from fednorm.errors import ConfigError, DataError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.norms.adab2n import AdaB2NLayer
from fednorm.optim.projection import WeightProjection
from fednorm.rng import torch_seeded
from fednorm.streams.buffer import Samples
from fednorm.streams.stream import Experience, Stream
from fednorm.training.step import TrainingStep
from scenarios.learners.naive import Naive

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore:Call to deprecated function"),
]
OPTIONS: dict[str, dict[str, Any]] = {"adab2n": {"num_tasks": 3}, "task_balanced_norm": {"batch_ratio": 1}, "nap": {}}


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return to_avalanche(tiny_stream())


def network(norm: str) -> nn.Module:
    return make_model("digits_cnn", make_norm(norm, OPTIONS[norm]), num_classes=6, image_size=8, width=4, seed=3)


def settings(model: nn.Module, plugins: list[Any]) -> dict[str, Any]:
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "train_mb_size": 8,
        "plugins": plugins,
        "evaluator": EvaluationPlugin(),
    }


class InOurOrder(AvalancheNaive):
    """Avalanche's strategy on batches that a learner of ours was given."""

    batches: list[Samples]

    def make_train_dataloader(self, **_: Any) -> None:
        self.dataloader = [[pixels(b.images), b.labels, torch.zeros_like(b.labels)] for b in self.batches]


@pytest.mark.few(3)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 1, 2)], ids=["in order", "one comes again"])
@pytest.mark.parametrize("norm", OPTIONS)
def test_avalanches_naive_with_it_ends_where_ours_does(norm: str, order: tuple[int, ...], benchmark: Any) -> None:
    model, twin = network(norm), network(norm)
    projection = make_norm(norm, OPTIONS[norm]).after_update(model)
    effects = [projection] if projection else []
    learner = Naive(**settings(model, []), num_classes=6, seed=1, after=effects)
    strategy = InOurOrder(**settings(twin, [NormPlugin()]), criterion=nn.CrossEntropyLoss())
    observe = learner.observe

    def keep(new: Samples) -> Tensor:
        strategy.batches.append(new)
        return observe(new)

    learner.observe = keep
    for number in order:
        strategy.batches = []
        learner.train(benchmark.train_stream[number])
        strategy.train(benchmark.train_stream[number], [])
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


@pytest.mark.parametrize("kind", [AvalancheNaive, Replay])
def test_weight_norms_stay_under_nap_and_grow_without_it(kind: Any, benchmark: Any) -> None:
    growth = []
    for plugins in ([NormPlugin()], []):
        model = network("nap")
        radii = WeightProjection(model).radii
        strategy = kind(**settings(model, plugins), criterion=nn.CrossEntropyLoss())
        for experience in benchmark.train_stream:
            strategy.train(experience, [])
        weights = {path: float(model.get_parameter(f"{path}.weight").detach().norm()) for path in radii}
        growth.append(max(abs(weights[path] / radii[path] - 1) for path in radii))
    assert growth[0] < 1e-5 < 1e-3 < growth[1]


def test_replay_tells_memory_samples_from_new_ones(benchmark: Any) -> None:
    seen: list[tuple[list[int], int]] = []
    model = network("adab2n")
    layer = next(module for module in model.modules() if isinstance(module, AdaB2NLayer))
    layer.register_forward_pre_hook(
        lambda module, _: seen.append((module._now.tasks.tolist(), module._now.seen)) if module.training else None
    )
    strategy = Replay(**settings(model, [NormPlugin()]), criterion=nn.CrossEntropyLoss(), mem_size=30)
    for experience in benchmark.train_stream:
        strategy.train(experience, [])
    assert {number for _, number in seen} == {1, 2, EXPERIENCES}
    for tasks, number in seen:
        assert max(tasks) < number
    assert {task for tasks, number in seen if number == 3 for task in tasks} == {0, 1, 2}
    assert all(bool(module.task_weight.any()) for module in model.modules() if isinstance(module, AdaB2NLayer))


def test_passes_that_are_not_over_the_batch_are_one_task(benchmark: Any) -> None:
    model = network("adab2n")
    strategy = MIR(
        **settings(model, [NormPlugin()]), criterion=nn.CrossEntropyLoss(), mem_size=30, subsample=8, batch_size_mem=4
    )
    with torch_seeded(1, "mir"):
        for experience in benchmark.train_stream:
            strategy.train(experience, [])
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert not model._forward_pre_hooks
    copy.deepcopy(strategy.model)


def test_where_nothing_tells_the_task_it_asks() -> None:
    stream = tiny_stream()
    same = [
        Experience(n, "again", e.classes, e.train, e.validation, e.test)
        for n, e in enumerate([stream.experiences[0]] * 3)
    ]
    benchmark = to_avalanche(Stream("repeated", 6, 8, tuple(same), tuple(range(6))))

    def train(kind: Any, by: Any, **more: Any) -> None:
        model = network("adab2n")
        strategy = kind(**settings(model, [NormPlugin(by=by)]), criterion=nn.CrossEntropyLoss(), **more)
        for experience in benchmark.train_stream:
            strategy.train(experience, [])

    train(AvalancheNaive, "auto")
    with pytest.raises(DataError, match="by='experience'"):
        train(Replay, "auto", mem_size=10)
    train(Replay, "experience", mem_size=10)
    train(Replay, lambda strategy: [0] * len(strategy.mb_y), mem_size=10)
    with pytest.raises(ConfigError, match="auto, label, task_label, experience"):
        NormPlugin(by="class")


def test_it_is_refused_on_our_learners() -> None:
    with pytest.raises(ConfigError, match=r"NormPlugin.*leave it out"):
        Naive(**settings(network("adab2n"), [NormPlugin()]), num_classes=6)


@pytest.mark.parametrize("norm", ["adab2n", "task_balanced_norm"])
def test_a_layer_that_is_never_told_its_tasks_says_so_once(norm: str, benchmark: Any) -> None:
    def told(train: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as kept:
            warnings.simplefilter("always")
            train()
        return [str(w.message) for w in kept if "never told the tasks" in str(w.message)]

    def fresh() -> nn.Module:
        plain = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
            nn.Flatten(), nn.Linear(64, 6),
        )  # fmt: skip
        return fednorm.convert(plain, norm)

    def avalanche(plugins: list[Any]) -> None:
        strategy = AvalancheNaive(**settings(fresh(), plugins), criterion=nn.CrossEntropyLoss())
        strategy.train(benchmark.train_stream[0], [])
        strategy.train(benchmark.train_stream[1], [])

    def in_a_federation() -> None:
        model = fresh()
        step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.1))
        step(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))

    (message,) = told(lambda: avalanche([]))
    assert message.startswith(norm)
    assert "NormPlugin" in message
    assert told(lambda: fresh().eval()(torch.zeros(2, 3, 8, 8))) == []
    assert told(lambda: avalanche([NormPlugin()])) == []
    assert told(in_a_federation) == []
