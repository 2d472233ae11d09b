"""A learner and the Avalanche strategy that it becomes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch

from fednorm.avalanche import strategy_of, to_avalanche
from fednorm.avalanche.strategy import LearnerStrategy
from fednorm.avalanche.table import tiny_stream
from fednorm.cards import LEARNERS
from fednorm.errors import ConfigError, DataError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.streams.learner import Learner, LearnerSpec
from fednorm.streams.passes import Passes

NAMES = {"naive": "Naive", "joint": "Joint", "er": "ER", "er_ace": "ERACE", "derpp": "DERPP", "lwf": "LwF",
         "ewc": "EWC", "gdumb": "GDumb", "si": "SI",
         "a_gem": "AGEM", "mir": "MIR", "icarl": "ICaRL", "scr": "SCR"}  # fmt: skip
STREAM = tiny_stream()


def parts(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    size = STREAM.image_size
    model = make_model("cnn", make_norm("batch_norm"), num_classes=STREAM.num_classes, image_size=size, width=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return {"model": model, "optimizer": optimizer, "num_classes": STREAM.num_classes, "train_mb_size": 4, "seed": 3}


def test_every_learner_has_a_strategy_in_its_module() -> None:
    assert set(NAMES) == set(LEARNERS.names)
    for stem, name in NAMES.items():
        module = import_module(f"scenarios.learners.{stem}")
        strategy = getattr(module, name)
        assert strategy is getattr(module, name)
        assert issubclass(strategy, LearnerStrategy)
        assert issubclass(strategy, module.SPEC.make)
        assert (strategy.__name__, strategy.__module__) == (name, module.__name__)
        assert pickle.loads(pickle.dumps(strategy)) is strategy
        with pytest.raises(AttributeError, match="has no attribute 'Other'"):
            module.Other  # noqa: B018


QUICK = ("er_ace",)  # a memory and a mask


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("er_ace", "gdumb"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in ("joint", "er_ace", "gdumb")),
    ],
)
def test_a_strategy_learns_to_the_last_bit_what_its_learner_learns(name: str) -> None:
    spec: LearnerSpec = LEARNERS[name]
    learner = spec.make(**parts())
    for experience in STREAM:
        learner.train(experience)
    strategy = strategy_of(spec.make)(**parts())
    strategy.train(to_avalanche(STREAM).train_stream)
    one, other = learner.tensors(), strategy.tensors()
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert learner.state() == strategy.state()


def test_a_learner_trains_on_avalanches_experiences_too() -> None:
    spec: LearnerSpec = LEARNERS["er_ace"]
    own, theirs = spec.make(**parts()), spec.make(**parts())
    for experience in STREAM:
        own.train(experience)
    benchmark = to_avalanche(STREAM)
    theirs.train(benchmark.train_stream[0])
    theirs.train(list(benchmark.train_stream)[1:])
    one, other = own.tensors(), theirs.tensors()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert own.state() == theirs.state()
    with pytest.raises(DataError, match=r"or on Avalanche's; got a Tensor\. Give stream\.experiences"):
        own.train(torch.zeros(3))


def test_what_a_strategy_takes_is_named_where_a_learner_is_given_it() -> None:
    with pytest.raises(ConfigError, match=r"has no eval_every, plugins\..*strategy_of\(ERACELearner\)"):
        LEARNERS["er_ace"].make(**parts(), plugins=[], eval_every=1)
    with pytest.raises(TypeError, match="ERACELearner got unexpected arguments: plugin"):
        LEARNERS["er_ace"].make(**parts(), plugin=[])


def test_avalanches_loop_hides_nothing_of_a_learner() -> None:
    """A template stands before the learner among a strategy's bases: of what both have, the template's is called."""
    ours = {name for kind in (Learner, Passes) for name in vars(kind) if not name.startswith("__")}
    theirs = {name for kind in LearnerStrategy.__mro__[1:] for name in vars(kind)} - set(vars(object))
    looking_on = {name for name in ours if name.startswith(("_before_", "_after_"))}
    assert ours & theirs - looking_on - set(vars(LearnerStrategy)) <= {"stop_training"}


@pytest.mark.slow
def test_a_stream_is_run_without_avalanche() -> None:
    code = """
import sys
import fednorm
stream = {"num_experiences": 2, "train_per_experience": 8, "test_per_experience": 4}
fednorm.continual(learner="er_ace", norm="adab2n", config={"scenario": stream, "model": {"width": 4}})
sys.exit(", ".join({"avalanche", "matplotlib", "jaxopt", "quadprog"} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
