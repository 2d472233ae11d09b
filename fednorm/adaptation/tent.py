"""tent: entropy of the predictions is minimized over the scales and shifts of normalization layers, batch by batch.

    L = mean over the batch of  - sum_k p_k log p_k,      p = softmax(logits)

Batch normalization takes the statistics of the test batch, in every forward pass; one step of the optimizer on the
affine tensors of normalization layers follows each batch, and everything else stands still. The prediction of a batch
is that of the forward pass whose entropy is minimized: *before* the step that the batch causes, *after* those of all
batches before it. Of a network without batch normalization (group, layer, instance normalization; the gains of scaled
weight standardization) the affine tensors are adapted and there are no statistics to take.

It is known to need large and mixed batches: with few images, or with images of one class, the entropy is minimized by
predicting one class for all of them.

Wang, Shelhamer, Liu, Olshausen, Darrell. Tent: Fully Test-Time Adaptation by Entropy Minimization. ICLR 2021.
https://arxiv.org/abs/2006.10726
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fednorm.adaptation import Adaptation, AdaptationSpec, Adapter, Knowledge
from fednorm.adaptation._layers import affine_parameters, by_batch, entropy, replace_forward, statistics_layers
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.optimizers._eager import SGD, Adam
from fednorm.options import number, one_of, whole

SGD_MOMENTUM = 0.9
"""Momentum of ``sgd``, as in the paper's runs on ImageNet."""


@dataclass(frozen=True, kw_only=True)
class Tent(Adaptation):
    """Minimizes the entropy of the predictions.

    Attributes:
        learning_rate: Of the optimizer, a step.
        optimizer: ``adam`` (the paper's on CIFAR), or ``sgd`` with momentum 0.9 (its own on ImageNet).
        steps: Steps a batch; the prediction is that of the last one's forward pass.
    """

    method: ClassVar[str] = "tent"

    learning_rate: float = 0.001
    optimizer: Literal["adam", "sgd"] = "adam"
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self.method, "learning_rate", self.learning_rate, above=0)
        one_of(self.method, "optimizer", self.optimizer, ("adam", "sgd"))
        whole(self.method, "steps", self.steps, at_least=1)

    @property
    def passes(self) -> tuple[float, float]:
        """A pass with gradients a step."""
        return float(self.steps), 0.0

    def check(self, model: nn.Module) -> None:
        """Refuse a network without scales and shifts, and layers that evaluate by statistics in another way."""
        statistics_layers(model, self.method)
        if not affine_parameters(model):
            raise ConfigError(
                "Adaptation 'tent' adapts the scales and shifts of normalization layers, and the network has none. "
                "Take a norm that learns them, or adaptation 'atp', which adapts every tensor."
            )

    def begin(self, model: nn.Module, knowledge: Knowledge) -> Adapter:
        """Return what predicts each batch, and then takes its step."""
        del knowledge
        model.requires_grad_(False)
        parameters = list(affine_parameters(model).values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        for layer in statistics_layers(model, self.method).values():
            replace_forward(layer, by_batch(layer))
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adam":
            optimizer = Adam(parameters, lr=self.learning_rate)
        else:
            optimizer = SGD(parameters, lr=self.learning_rate, momentum=SGD_MOMENTUM)

        @torch.enable_grad()
        def step(images: Tensor) -> Tensor:
            logits: Tensor = model(images)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(entropy(logits).mean())
            optimizer.step()
            return logits.detach()

        def predict(images: Tensor) -> Tensor:
            for _ in range(self.steps - 1):
                step(images)
            return step(images)

        return predict


SPEC = AdaptationSpec(
    name="tent",
    summary="Entropy of the predictions is minimized over normalization's scales and shifts, under batch statistics.",
    citation=Citation(
        title="Tent: Fully Test-Time Adaptation by Entropy Minimization",
        authors="Wang, Shelhamer, Liu, Olshausen, Darrell",
        year=2021,
        arxiv="2006.10726",
    ),
    make=Tent,
    predicts="before",
    deviations=(
        "Layers other than normalization are in evaluation mode; the official code puts the whole network into "
        "training mode, which turns dropout on.",
        "Layer and group normalization, and the gains of standardized weights, are adapted too; the official code has "
        "BatchNorm2d alone.",
        "A batch that has one value of a channel leaves the shift of it; PyTorch's training mode refuses such a batch.",
    ),
    verified=("one step against PyTorch's own layers in training mode and its optimizer, written out",),
)
