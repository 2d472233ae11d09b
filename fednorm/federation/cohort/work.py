"""How much work a client's step is, counted from shapes: what decides whether a cohort pays, and how large it is.

Nothing here is timed, so that the same configuration computes the same numbers on every machine.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fednorm.federation.workbench import Workbench

MOST_FLOPS = 50e6
"""Floating-point operations of a client's step up to which a cohort pays on a CPU: above, a step is no longer made of
the calls of its operations, and convolutions of many groups are slower than those of one client."""

MOST_CLIENTS = 200
"""A cohort's size where nobody says: beyond it the calls of a step no longer count."""

BUDGET = 2**28
"""Bytes that a cohort's step may keep, where nobody says how large it is."""


@dataclass(frozen=True)
class Work:
    """What one step of one client takes.

    Attributes:
        flops: Floating-point operations of its forward and backward pass; a multiplication and an addition are two.
        kept: Bytes of its tensors, gradients and of what its forward pass keeps.
    """

    flops: float
    kept: int

    @property
    def clients(self) -> int:
        """How many clients a cohort has where nobody says."""
        return max(1, min(MOST_CLIENTS, BUDGET // max(self.kept, 1)))


def work_of(bench: Workbench, rows: int) -> Work:
    """Return the work of a step on a batch of ``rows`` images.

    Counted on one forward pass of a copy of the network, in evaluation mode; a backward pass counts twice as much.
    """
    size = bench.federation.image_size
    network = copy.deepcopy(bench.model).eval()
    images = torch.zeros(2, 3, size, size, device=bench.trainee.device)
    outputs: list[int] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.numel() * output.element_size() // 2)

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(note)
    from torch.utils.flop_counter import FlopCounterMode  # 0.3 s of imports, which other engines do without

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    state = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    copies = 4 + bool(bench.config.train.momentum)
    return Work(3 * rows * counter.get_total_flops() / 2, copies * state + 2 * rows * sum(outputs))
