"""adamw: Adam with decoupled weight decay, as in PyTorch.

Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019. https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.optimizers import OptimizerSpec, torch_adam
from fednorm.optimizers._eager import AdamW

SPEC = OptimizerSpec(
    name="adamw",
    summary="Adam whose weight decay does not pass through the moments.",
    citation=Citation(
        title="Decoupled Weight Decay Regularization", authors="Loshchilov, Hutter", year=2019, arxiv="1711.05101"
    ),
    make=torch_adam(AdamW),
    adaptive=True,
)
