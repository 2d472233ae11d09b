"""A small stream, learners on it, and what a test needs to train the same network by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.avalanche import strategy_of, to_avalanche
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.streams.buffer import Samples
from fednorm.streams.learner import Learner
from fednorm.streams.stream import Stream

Build = Callable[..., Learner]
Bare = Callable[..., tuple[nn.Module, torch.optim.Optimizer]]
Watch = Callable[[Learner], "Watched"]
State = dict[str, Tensor]

SEED = 5
RATE = 0.05
TEMPLATE = (
    "train_mb_size",
    "train_epochs",
    "eval_mb_size",
    "augment",
    "schedule",
    "begin",
    "adjust",
    "after",
    "plugins",
)


@pytest.fixture(scope="session")
def stream(make: Callable[..., Stream]) -> Stream:
    """Five experiences of two digits each: 40 training images of 8x8 pixels, 20 test images."""
    return make("split_digits", train_per_experience=40, test_per_experience=20)


@pytest.fixture(scope="session")
def experiences(stream: Stream) -> list[Any]:
    return list(to_avalanche(stream).train_stream)


@pytest.fixture
def bare() -> Bare:
    """Make a network and its optimizer; every call gives the same weights."""

    def make_bare(norm: str = "batch_norm", *, momentum: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model("digits_cnn", make_norm(norm), num_classes=10, image_size=8, width=4, seed=3)
        return model, torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum)

    return make_bare


@pytest.fixture
def build(bare: Bare) -> Build:
    """Make a learner on such a network; what is no argument of the template is an option of the method."""

    def build_learner(
        name: str, norm: str = "batch_norm", *, model: nn.Module | None = None, momentum: float = 0.0, **settings: Any
    ) -> Learner:
        template = {"train_mb_size": 8} | {key: settings.pop(key) for key in TEMPLATE if key in settings}
        network, optimizer = bare(norm, momentum=momentum)
        if model is not None:
            network, optimizer = model, torch.optim.SGD(model.parameters(), lr=RATE)
        make = strategy_of(import_module(f"scenarios.learners.{name}").SPEC.make)
        options = make.Options(**settings)
        return make(model=network, optimizer=optimizer, num_classes=10, options=options, seed=SEED, **template)

    return build_learner


class Watched(list[Samples]):
    """The batches of new samples that a learner was given.

    Attributes:
        states: The model before each of them.
    """

    def __init__(self) -> None:
        self.states: list[State] = []


@pytest.fixture
def watch() -> Watch:
    """Keep every batch that a learner is given from here on."""

    def watched(learner: Learner) -> Watched:
        kept = Watched()
        observe = type(learner).observe

        def observe_and_keep(new: Samples) -> Tensor:
            kept.append(new)
            kept.states.append({key: value.clone() for key, value in learner.model.state_dict().items()})
            return observe(learner, new)

        learner.observe = observe_and_keep
        return kept

    return watched


@pytest.fixture
def retrace(bare: Bare) -> Callable[..., None]:
    """Take every step of a learner by itself, from where the learner stood, and require that both end alike.

    Step by step, because two ways to write a formula differ in the last bits, and training multiplies that.
    """

    def check(
        states: Iterable[State],
        batches: Iterable[Any],
        loss_of: Callable[[nn.Module, Any], Tensor],
        *,
        norm: str = "batch_norm",
        rates: Iterable[float] | None = None,
        clip: float = 0.0,
    ) -> None:
        states, batches = list(states), list(batches)
        model, optimizer = bare(norm)
        for step, batch in enumerate(batches):
            model.load_state_dict(states[step])
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.param_groups[0]["lr"] = RATE if rates is None else list(rates)[step]
            optimizer.step()
            for key, value in model.state_dict().items():
                found = states[step + 1][key]
                torch.testing.assert_close(
                    found, value, rtol=1e-4, atol=2e-6, msg=lambda m, at=(step, key): f"{at}: {m}"
                )
        assert len(states) == len(batches) + 1

    return check


@pytest.fixture
def state() -> Callable[[nn.Module], State]:
    """Return a copy of a model's tensors."""
    return lambda model: {key: value.clone() for key, value in model.state_dict().items()}
