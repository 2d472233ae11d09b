"""adam: adaptive moment estimation, as in PyTorch; weight decay is added to the gradient.

Kingma, Ba. Adam: A Method for Stochastic Optimization. ICLR 2015. https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.optimizers import OptimizerSpec, torch_adam
from fednorm.optimizers._eager import Adam

SPEC = OptimizerSpec(
    name="adam",
    summary="Adaptive moment estimation; weight decay is added to the gradient.",
    citation=Citation(
        title="Adam: A Method for Stochastic Optimization", authors="Kingma, Ba", year=2015, arxiv="1412.6980"
    ),
    make=torch_adam(Adam),
    adaptive=True,
)
