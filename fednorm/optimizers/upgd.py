"""upgd: gradient descent with noise, gated by each weight's utility: what is useful is held, what is not is perturbed.

Elsayed, Mahmood. Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning. ICLR 2024.
https://arxiv.org/abs/2404.00781, algorithm 1 (first-order utility, global scaling). Official code: mohmdelsayed/upgd.

    u <- b u + (1 - b) (-g w),      s = sigmoid(u / (1 - b^t) / max u)
    w <- (1 - lr weight_decay) w - lr (g + sigma z) (1 - s),      z ~ N(0, 1)

with g the gradient, b ``train.beta_utility``, and max u the largest u of all weights. The utility -g w is how much the
loss would grow without the weight, to first order. A weight of utility 0 has s = 1/2, so that it moves at half the rate
of SGD; the official README doubles lr for it, the code of the paper's experiments does not, nor does this: lr is what
the paper calls step size. The paper's values: b 0.999 or so, sigma 0.001 to 0.1, weight decay 0 to 0.01.

Two properties of the official code that are kept: the maximum is that of the u that are not yet corrected, so that in
the first 1 / (1 - b) steps the ratio is larger by 1 / (1 - b^t) and s nearly 0 or 1; and where no utility is positive,
the ratio changes its sign. Where the maximum is exactly 0 the official code divides 0 by 0; here s is 1/2.

The noise is drawn from PyTorch's process-wide generator, which a learner and a client seed by the run's seed and the
step, so that a run resumes to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.optimizers import OptimizerSpec
from fednorm.optimizers._eager import Eager
from fednorm.optimizers._radial import below_one, laid_like, not_negative


class UPGD(Eager):
    """Utility-based perturbed gradient descent.

    Args:
        params: The parameters, or groups of them.
        lr: The learning rate, greater than 0.
        weight_decay: 0 or more; decoupled from the gradient, and not gated.
        beta_utility: b, in [0, 1).
        sigma: The noise's standard deviation, 0 or more.

    Raises:
        ConfigError: An option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        beta_utility: float = 0.999,
        sigma: float = 0.001,
    ) -> None:
        options.number("upgd", "lr", lr, above=0)
        not_negative("upgd", "weight_decay", weight_decay)
        below_one("upgd", "beta_utility", beta_utility)
        not_negative("upgd", "sigma", sigma)
        defaults = {"lr": lr, "weight_decay": weight_decay, "beta_utility": beta_utility, "sigma": sigma}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and the gradients anew, as PyTorch's optimizers take it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not trained:
            return loss
        largest = torch.stack([self._utility(*each).max().to(trained[0][0].device) for each in trained]).max()
        for parameter, gradient, group in trained:
            self._move(parameter, gradient, group, largest)
        return loss

    def _utility(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Take a gradient into a parameter's utility, and return that."""
        state = self.state[parameter]
        # A tensor on the CPU, as PyTorch's Adam has it: what keeps optimizers' states keeps tensors.
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        utility: Tensor = laid_like(state.get("avg_utility"), parameter)
        state["avg_utility"] = utility.mul_(group["beta_utility"]).addcmul_(
            gradient, parameter, value=group["beta_utility"] - 1
        )
        return utility

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], largest: Tensor) -> None:
        """Update a parameter, with the largest utility of all."""
        state = self.state[parameter]
        correction = 1 - group["beta_utility"] ** int(state["step"])
        ratio = (state["avg_utility"] / correction) / largest.to(parameter.device)
        free = 1 - torch.sigmoid(ratio.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf))
        noise = torch.randn_like(gradient) * group["sigma"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcmul_(gradient + noise, free, value=-group["lr"])


def _make(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    beta_utility: float = 0.999,
    sigma: float = 0.001,
) -> torch.optim.Optimizer:
    del momentum
    return UPGD(list(parameters), lr=lr, weight_decay=weight_decay, beta_utility=beta_utility, sigma=sigma)


SPEC = OptimizerSpec(
    name="upgd",
    summary="Gradient descent with noise, both gated by each weight's utility (UPGD); decoupled weight decay.",
    citation=Citation(
        title="Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning",
        authors="Elsayed, Mahmood",
        year=2024,
        arxiv="2404.00781",
        where="ICLR 2024; official code mohmdelsayed/upgd",
    ),
    make=_make,
    deviations=("Where no weight has any utility, the gate is 1/2; the official code divides 0 by 0.",),
    verified=("A loop over single weights that follows the official code, noise included.",),
)
