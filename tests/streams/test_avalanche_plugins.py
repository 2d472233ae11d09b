"""Avalanche's plugins and arguments on fednorm's learners: they work as there, or are refused when one is made."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import Naive as AvalancheNaive
from avalanche.training import plugins as avalanche_plugins
from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin
from torch import Tensor, nn

from fednorm.avalanche.benchmark import to_avalanche
from fednorm.avalanche.foreign import REFUSED
from fednorm.avalanche.table import tiny_stream
from fednorm.data.domain import pixels
from fednorm.errors import ConfigError, DataError
from fednorm.streams.buffer import Samples
from fednorm.training.schedule import Schedule
from scenarios.learners.er import ER
from scenarios.learners.naive import Naive

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore:Call to deprecated function"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept"),
]
BENCHMARK = to_avalanche(tiny_stream())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6))


def learner(kind: Any = Naive, **template: Any) -> Any:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return kind(model=model, optimizer=optimizer, num_classes=6, train_mb_size=8, seed=1, **template)


class InOurOrder(AvalancheNaive):
    """Avalanche's strategy on batches that a learner of ours was given."""

    batches: list[Samples]

    def make_train_dataloader(self, **_: Any) -> None:
        self.dataloader = [[pixels(b.images), b.labels.clone(), torch.zeros_like(b.labels)] for b in self.batches]


def both(make: Any, **template: Any) -> tuple[nn.Module, nn.Module]:
    """Train our learner and Avalanche's strategy on the same batches with plugins of the same kind."""
    ours, model = learner(plugins=[make()], **template), network()
    theirs = InOurOrder(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        train_mb_size=8,
        plugins=[make()],
        evaluator=EvaluationPlugin(),
        **{"criterion": nn.CrossEntropyLoss(), **template},
    )
    observe = ours.observe

    def keep(new: Samples) -> Tensor:
        theirs.batches.append(new)
        return observe(new)

    ours.observe = keep
    for experience in BENCHMARK.train_stream:
        theirs.batches = []
        ours.train(experience)
        theirs.train(experience, [])
    return ours.model, model


class Darker(SupervisedPlugin):
    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        strategy.mbatch[0] = strategy.mbatch[0] * 0.5


class DarkerInPlace(SupervisedPlugin):
    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        strategy.mb_x.mul_(0.5)


class OtherLabels(SupervisedPlugin):
    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        strategy.mb_y.copy_((strategy.mb_y + 1) % 6)


class Mixed(SupervisedPlugin):
    """Mixup: another batch, with soft labels."""

    def before_forward(self, strategy: Any, **_: Any) -> None:
        x, y = strategy.mb_x, nn.functional.one_hot(strategy.mb_y, 6).float()
        strategy.mbatch = [0.7 * x + 0.3 * x.flip(0), 0.7 * y + 0.3 * y.flip(0), strategy.mbatch[-1]]


class LateLabels(SupervisedPlugin):
    def after_forward(self, strategy: Any, **_: Any) -> None:
        strategy.mbatch[1] = (strategy.mb_y + 2) % 6


class OtherOutput(SupervisedPlugin):
    def after_forward(self, strategy: Any, **_: Any) -> None:
        strategy.mb_output = strategy.mb_output * 2


class OwnGradient(SupervisedPlugin):
    def before_backward(self, strategy: Any, **_: Any) -> None:
        next(strategy.model.parameters()).grad = torch.ones_like(next(strategy.model.parameters()))


class Nothing(SupervisedPlugin):
    pass


WORKING = {
    "EWCPlugin": lambda: avalanche_plugins.EWCPlugin(1.0),
    "LwFPlugin": lambda: avalanche_plugins.LwFPlugin(),
    "MASPlugin": lambda: avalanche_plugins.MASPlugin(10.0),
    "FromScratchTrainingPlugin": lambda: avalanche_plugins.FromScratchTrainingPlugin(),
    **{
        kind.__name__: kind
        for kind in (Darker, DarkerInPlace, OtherLabels, Mixed, LateLabels, OtherOutput, OwnGradient)
    },
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", WORKING)
def test_plugins_do_what_they_do_in_avalanche(name: str) -> None:
    ours, theirs = both(WORKING[name])
    plain, _ = both(Nothing)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_the_criterion_counts() -> None:
    ours, theirs = both(Nothing, criterion=nn.CrossEntropyLoss(label_smoothing=0.3))
    plain, _ = both(Nothing)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(next(ours.parameters()), next(plain.parameters()))


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"NormPlugin"}))
def test_plugins_that_cannot_work_are_refused_with_what_to_take(name: str) -> None:
    kind = getattr(avalanche_plugins, name)
    plugin = kind.__new__(kind)  # what it is, and not how it is made, is what counts
    with pytest.raises(ConfigError, match=rf"{name} .*(learner|Avalanche's own strategies)"):
        learner(plugins=[plugin])


class OwnLoader(SupervisedPlugin):
    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        strategy.dataloader = []


class OwnModel(SupervisedPlugin):
    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.put(strategy)

    def put(self, strategy: Any) -> None:
        setattr(strategy, "model", network())  # noqa: B010 - hidden from a look at assignments


class Hidden(SupervisedPlugin):
    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        vars(strategy)["optimizer"] = torch.optim.SGD(strategy.model.parameters(), lr=1.0)


class Longer(SupervisedPlugin):
    def before_forward(self, strategy: Any, **_: Any) -> None:
        strategy.mbatch = [torch.cat([part, part]) for part in strategy.mbatch]


def test_strangers_plugins_are_refused_by_what_they_assign() -> None:
    with pytest.raises(ConfigError, match="OwnLoader replaces the strategy's dataloader"):
        learner(plugins=[OwnLoader()])
    with pytest.raises(ConfigError, match="OwnModel replaces the strategy's model"):
        learner(plugins=[OwnModel()])
    one = learner()
    one.plugins.append(OwnLoader())
    with pytest.raises(ConfigError, match="OwnLoader"):
        one.train(BENCHMARK.train_stream[0])
    with pytest.raises(ConfigError, match="replaced the learner's optimizer"):
        learner(plugins=[Hidden()]).train(BENCHMARK.train_stream[0])
    with pytest.raises(DataError, match="batch of 8 samples one of 16"):
        learner(plugins=[Longer()]).train(BENCHMARK.train_stream[0])


def test_those_that_are_refused_are_plugins_of_avalanche() -> None:
    names = {
        name
        for name, kind in vars(avalanche_plugins).items()
        if inspect.isclass(kind) and issubclass(kind, SupervisedPlugin) and kind is not SupervisedPlugin
    }
    assert names >= REFUSED.keys() - {"NormPlugin"}


@pytest.mark.slow
def test_streams_are_evaluated_during_training_as_often_as_asked() -> None:
    class Count(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.evaluations, self.modes = 0, set[bool]()

        def before_eval(self, *_: Any, **__: Any) -> None:
            self.evaluations += 1

        def before_update(self, strategy: Any, **_: Any) -> None:
            self.modes.add(all(module.training for module in strategy.model.modules()))

    for every, mode, expected in ((-1, "epoch", 0), (0, "epoch", 2), (1, "epoch", 4), (3, "iteration", 5)):
        for kind in (Naive, ER):
            count = Count()
            one = learner(kind, train_epochs=3, eval_every=every, peval_mode=mode, plugins=[count])
            plain = learner(kind, train_epochs=3)
            one.train(BENCHMARK.train_stream[0], eval_streams=[BENCHMARK.test_stream])
            plain.train(BENCHMARK.train_stream[0])
            assert count.evaluations == expected
            assert count.modes == {True}
            for a, b in zip(one.model.parameters(), plain.model.parameters(), strict=True):
                assert torch.equal(a, b)


def test_metrics_of_avalanche_come_back_from_train_and_eval() -> None:
    one = learner(evaluator=EvaluationPlugin(accuracy_metrics(experience=True)), eval_every=0)
    results = one.train(BENCHMARK.train_stream[0], eval_streams=[BENCHMARK.test_stream])
    assert "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp002" in results


def test_loader_arguments_count_or_have_no_meaning() -> None:
    one = learner()
    kept: list[Tensor] = []
    observe = one.observe
    one.observe = lambda new: (kept.append(new.labels), observe(new))[1]
    one.train_mb_size = 10
    one.train(BENCHMARK.train_stream[0], shuffle=False, drop_last=True, num_workers=4)
    assert torch.cat(kept).tolist() == list(BENCHMARK.train_stream[0].dataset.targets)[:20]


def test_other_devices_and_two_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"device = 'cuda:0', and its network is on 'cpu'"):
        learner(device="cuda:0")
    plugin = LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(torch.optim.SGD(network().parameters(), lr=1.0), 1))
    schedule = Schedule(rate=0.1, kind="constant", over="stream", warmup=0, final=0.0, total=9)
    with pytest.raises(ConfigError, match="both set the learning rate"):
        learner(plugins=[plugin], schedule=schedule)
