from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.cards import OPTIMIZERS
from fednorm.optimizers import _eager
from fednorm.rng import torch_seeded

SHAPES = ((3, 2, 3, 3), (3,), (4, 27), ())


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def trained(optimizer: torch.optim.Optimizer, steps: int = 4) -> list[Tensor]:
    """Take steps along drawn gradients, one of them missing at times; the rate changes on the way."""
    places = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for place, parameter in enumerate(places):
            gradient = torch.randn(parameter.shape, generator=generator)
            if (place + step) % 5:
                parameter.grad = gradient
        with torch_seeded(3, "step", step):  # upgd draws noise
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
    return [parameter.detach().clone() for parameter in places]


def assert_same_bits(method: str, **options: Any) -> None:
    ours = getattr(_eager, method)(parameters(), **options)
    theirs = getattr(torch.optim, method)(parameters(), **options)
    assert all(map(torch.equal, trained(ours), trained(theirs)))
    (of_ours, groups), (of_theirs, their_groups) = (o.state_dict().values() for o in (ours, theirs))
    assert groups == their_groups
    assert of_ours.keys() == of_theirs.keys()
    for place, kept in of_ours.items():
        assert kept.keys() == of_theirs[place].keys()
        assert all(value is None or torch.equal(value, of_theirs[place][name]) for name, value in kept.items())


rates = st.floats(1e-4, 1.0)
shares = st.one_of(st.just(0.0), st.floats(0.01, 0.99))


@given(lr=rates, momentum=shares, dampening=shares, weight_decay=shares, nesterov=st.booleans(), maximize=st.booleans())
def test_sgd_is_pytorchs_to_the_bit(
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool
) -> None:
    for foreach in (True, False):
        assert_same_bits(
            "SGD",
            lr=lr,
            momentum=momentum,
            dampening=0.0 if nesterov and momentum else dampening,
            weight_decay=weight_decay,
            nesterov=nesterov and momentum > 0,
            maximize=maximize,
            foreach=foreach,
        )


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["Adam", "AdamW"])
@given(lr=rates, betas=st.tuples(shares, shares), weight_decay=shares, amsgrad=st.booleans(), maximize=st.booleans())
def test_the_adams_are_pytorchs_to_the_bit(method: str, **options: Any) -> None:
    for foreach in (True, False):
        assert_same_bits(method, **options, foreach=foreach)


@pytest.mark.parametrize("name", OPTIMIZERS.built_in)
def test_a_copy_a_pickle_and_a_loaded_state_go_on_as_the_optimizer_itself(name: str) -> None:
    def made() -> torch.optim.Optimizer:
        return OPTIMIZERS[name].make(parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    begun = made()
    trained(begun)
    others = [copy.deepcopy(begun), pickle.loads(pickle.dumps(begun))]
    loaded = made()
    for place, parameter in zip(loaded.param_groups[0]["params"], begun.param_groups[0]["params"], strict=True):
        place.data.copy_(parameter.data)
    loaded.load_state_dict(copy.deepcopy(begun.state_dict()))  # tensors of a state are not copied by either
    expected = trained(begun)
    for other in (*others, loaded):
        assert all(map(torch.equal, trained(other), expected))


def test_gradients_are_on_after_a_step_and_hooks_are_called() -> None:
    optimizer, calls = _eager.SGD(parameters(), lr=0.1), list[str]()
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> float:
        assert torch.is_grad_enabled()
        loss = sum((p.square().sum() for p in optimizer.param_groups[0]["params"]), torch.zeros(()))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert optimizer.step(closure) > 0
    assert calls == ["before", "after"]
    assert torch.is_grad_enabled()


@pytest.mark.slow  # in the default tier, test_startup.py sees it of sgd
def test_no_optimizer_of_ours_imports_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from fednorm.cards import OPTIMIZERS\n"
        "for card in OPTIMIZERS:\n"
        "    weight = torch.nn.Parameter(torch.ones(3, 2))\n"
        "    optimizer = card.make([weight], lr=0.1, momentum=0.9, weight_decay=0.1)\n"
        "    optimizer.zero_grad()\n"
        "    weight.sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.load_state_dict(optimizer.state_dict())\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_hooks_around_a_step_are_called() -> None:
    """Where there is none, a step goes without what PyTorch puts around it for them."""
    optimizer, called = _eager.SGD(parameters(), lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    trained(optimizer, 1)
    assert called == ["before", "after"]
