"""Differentially private training of a client: DP-SGD, with Opacus's clipping, noise and accountant.

Abadi et al. Deep Learning with Differential Privacy. CCS 2016. https://arxiv.org/abs/1607.00133. Each step draws every
image with probability q = B / n, clips the gradient of each image to length C, and takes in place of the batch's
gradient

    (sum_i g_i min(1, C / ||g_i||) + sigma C N(0, I)) / (q n)

The gradient of one image is that of the network on this image alone (``torch.func``), so that every layer has one whose
output for an image depends on no other image: group, layer and instance normalization, and scaled weight
standardization do. Batch normalization has none, which is why it is refused. Clipping and noise are Opacus's
``DPOptimizer`` (https://arxiv.org/abs/2109.12298); its own gradients of single images are not used, since it knows the
layers by their types and ours are others.

The noise comes from the run's seed: who knows it can take it away. This is a simulation of private training, not
private training, and sites of their own are not asked for it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fednorm.cards import NORMS
from fednorm.errors import ConfigError
from fednorm.optim.cbp import ContinualBackprop
from fednorm.optim.redo import ReDo
from fednorm.optim.self_normalized_resets import SelfNormalizedResets
from fednorm.spec import HookedLayer
from fednorm.training.step import TrainingStep
from fednorm.training.trainee import Trainee

LOOK_AT_IMAGES = (ContinualBackprop, ReDo, SelfNormalizedResets)
"""Effects that use more of the images than their gradients."""


def opacus() -> Any:
    """Return the package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what its own imports deprecate
            import opacus.accountants
            import opacus.optimizers
    except ImportError as error:
        raise ConfigError(
            "train.private_noise asks for differentially private training, which needs the package opacus: pip install "
            '"fednorm[private]".'
        ) from error
    return opacus


def require_private(trainee: Trainee) -> None:
    """Refuse what private training cannot do.

    Args:
        trainee: What trains.

    Raises:
        ConfigError: Its norm mixes images or keeps statistics of them, a layer or an effect takes part in the step
            beside it, or the run asks for an arithmetic that is not supported.
    """
    config, train = trainee.config, trainee.config.train
    norm = config.norm.name
    single = ", ".join(card.name for card in NORMS if not card.batch_coupled)
    if trainee.batch_coupled:
        raise ConfigError(
            f"Private training (train.private_noise) needs the gradient of each image, and norm {norm!r} has none: "
            "what it makes of an image depends on the others of the batch. Take a norm that works on single images: "
            f"{single}."
        )
    written = [path for path, module in trainee.model.named_modules() if _tracks(module)]
    if written:
        raise ConfigError(
            f"Private training (train.private_noise) protects gradients, and layer {written[0]} of norm {norm!r} keeps "
            "running statistics of the images, which would be sent as they are. Take group_norm, layer_norm or sws."
        )
    hooked = next((path for path, module in trainee.model.named_modules() if isinstance(module, HookedLayer)), None)
    if hooked is not None:
        raise ConfigError(
            f"Layer {hooked} of norm {norm!r} takes part in the training step beside its forward pass, which private "
            "training (train.private_noise) does not account for. Take group_norm, layer_norm or sws."
        )
    if config.amp != "none" or config.compile:
        raise ConfigError("Private training (train.private_noise) computes in single precision: leave amp and compile.")
    looks = next((effect for effect in trainee.effects if isinstance(effect, LOOK_AT_IMAGES)), None)
    if looks is not None:
        raise ConfigError(
            f"{type(looks).__name__} resets units by what the images make of them, which private training "
            "(train.private_noise) does not account for. Leave it out."
        )
    for key, off in (("linear_probe_rounds", 0), ("trainable", "all")):
        if getattr(train, key) != off:
            raise ConfigError(
                f"train.{key} and private training (train.private_noise) do not go together. Leave train.{key} out."
            )
    opacus()  # it takes its time to import


def _tracks(module: nn.Module) -> bool:
    """Return whether a layer's running statistics follow the images."""
    return any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))


class PrivateStep(TrainingStep):
    """A step on the noised sum of clipped gradients of single images.

    Args:
        trainee: What trains.
        count: n, the client's training images.
        generator: What the noise is drawn from, on the trainee's device.
        **effects: ``adjust``, ``after`` and ``loss`` of :class:`~fednorm.training.step.TrainingStep`; ``adjust`` sees
            the private gradient.
    """

    def __init__(self, trainee: Trainee, count: int, generator: torch.Generator, **effects: Any) -> None:
        super().__init__(trainee.model, trainee.optimizer, **effects)
        train = trainee.config.train
        self._classes = trainee.num_classes
        self._private = opacus().optimizers.DPOptimizer(
            trainee.optimizer,
            noise_multiplier=train.private_noise,
            max_grad_norm=train.private_clip,
            expected_batch_size=min(train.batch_size, count),
            loss_reduction="mean",
            generator=generator,
        )

    def __call__(
        self, images: Tensor, labels: Tensor, *, tasks: Tensor | None = None, num_tasks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Train on one batch, which may be empty: the noise is then all there is.

        Returns:
            The batch's mean loss before the update, and its logits, both detached; 0 of an empty batch.
        """
        del tasks, num_tasks  # of layers with hooks, which are refused
        self._private.zero_grad(set_to_none=True)
        losses, logits = self._single_gradients(images, labels)
        self._private.pre_step()
        for parameter in self._trained().values():
            parameter.grad_sample = None  # type: ignore[attr-defined]
        for change in self.adjust:
            change()
        self.optimizer.step()
        for change in self.after:
            change()
        return losses.mean() if len(losses) else losses.sum(), logits

    def _trained(self) -> dict[str, nn.Parameter]:
        return {key: parameter for key, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _single_gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Give every parameter its gradients of single images; return their losses and logits."""
        trained = self._trained()
        if not len(images):
            for parameter in trained.values():
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
            return images.new_zeros(0), images.new_zeros((0, self._classes))
        gradients, losses, logits = single_gradients(self.model, self.loss, images, labels)
        for key, parameter in trained.items():
            parameter.grad_sample = gradients[key]  # type: ignore[attr-defined]
        return losses, logits


def single_gradients(
    model: nn.Module, loss: Any, images: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the gradient of the loss of each image.

    Args:
        model: The network, in training mode; no layer of it may mix images.
        loss: Of logits and labels, the mean over images.
        images: Shape (B, C, H, W).
        labels: Shape (B,).

    Returns:
        For each trained parameter its gradients, shape (B, ...); the losses, shape (B,); the logits, shape (B, K).
    """
    trained = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    rest = {key: p.detach() for key, p in model.named_parameters() if not p.requires_grad}
    rest |= {key: buffer.detach() for key, buffer in model.named_buffers()}

    def of_one(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(model, {**rest, **parameters}, (image[None],))
        return loss(logits, label[None]), logits[0]

    computed = vmap(grad_and_value(of_one, has_aux=True), in_dims=(None, 0, 0), randomness="different")
    gradients, (losses, logits) = computed(trained, images.contiguous(), labels)
    return gradients, losses.detach(), logits.detach()


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy after steps of DP-SGD, by Renyi accounting.

    Mironov, Talwar, Zhang. Renyi Differential Privacy of the Sampled Gaussian Mechanism. 2019.
    https://arxiv.org/abs/1908.10530; by Opacus's accountant, in the better conversion of Balle et al., 2020.

    Args:
        noise: sigma, the noise multiplier.
        rate: q, the share of the images that a step draws.
        steps: How many steps there were.
        delta: Delta, in (0, 1).
    """
    if not steps:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of orders beyond those it knows
        accountant = opacus().accountants.RDPAccountant()
        accountant.history = [(noise, rate, steps)]
        return float(accountant.get_epsilon(delta))
