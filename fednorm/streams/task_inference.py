"""Which experience a test image is of, where nobody says: the one whose normalization tensors fit the image best.

Normalization tensors that are kept per experience (``grid.norms = "per_experience"``, of a stream ``train.norms``;
domain-specific batch normalization, Chang et al., arXiv 1906.03950) ask for the experience of every test image. Without
it each image x gets a misfit under each experience e that was met, with that experience's tensors in the network, and
the least one decides; of equal ones, the experience that was met first. ``evaluate.infer_task`` names the misfit.

``entropy``, by how sure the network is of its answer:

    d_e(x) = - sum_c p_c log p_c,    p = softmax(f_e(x))

over the classes that the network's loss was over: all of them, or with ``train.heads = "task"`` those of e. It is how
von Oswald et al. choose among the networks of a hypernetwork (HNET+ENT, arXiv 1906.00695); Wortsman et al. (SupSup,
arXiv 2006.14769) descend the entropy of a mixture instead.

``statistics``, by how likely what the first layer with running moments is given is under those of e, channel by channel
and as if it were Gaussian:

    d_e(x) = sum_c [ log sigma_ec + (s_c^2 + (mu_c - M_ec)^2) / (2 sigma_ec^2) ],    sigma_ec^2 = V_ec + eps

with mu_c, s_c^2 the mean and (biased) variance of channel c over the image's positions, and M_e, V_e the running mean
and variance of e. But for terms that are the same for every e it is KL(N(mu, s^2) || N(M_e, sigma_e^2)), summed over
channels. In front of that layer there is nothing of an experience's own, so that one forward pass serves all of them.
This distance is ours. Segu et al. (batch normalization embeddings, arXiv 2011.12672) take the 2-Wasserstein distance at
every layer, and weigh the experiences by it instead of choosing one; the likelihood is the same whatever a channel's
scale, and needs no variance of its own where an image has one number a channel.

An image that may be of one experience only is of that one. With ``evaluate.infer_task_per = "batch"`` the images of
each batch of ``evaluate.batch_size``, which are of one experience here, are taken for the same: their misfits are
averaged.

Then the image is answered as if the experience that was inferred had been given: under its tensors, among its classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm.adaptation._layers import is_plain, keeps_moments, running
from fednorm.config import RunConfig
from fednorm.data.domain import Split
from fednorm.device import wide
from fednorm.errors import ConfigError
from fednorm.streams.stream import Stream

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """An experience that an image may be of.

    Attributes:
        number: Its number.
        classes: Its own classes.
        tensors: Its normalization tensors, by their keys in the state dict; None for those that the network has.
    """

    number: int
    classes: Sequence[int]
    tensors: Tensors | None


@dataclass(frozen=True)
class Inferred:
    """What came of the images of one experience.

    Attributes:
        accuracy: The share that is classified right.
        inferred: The share whose experience is inferred right.
    """

    accuracy: float
    inferred: float


def entropy_misfit(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax of logits, shape (n, K), in nats, shape (n,), in float64.

    A class whose logit is minus infinity has no part in it.
    """
    probabilities = logits.to(wide(logits.device)).softmax(1)
    entropy: Tensor = torch.special.entr(probabilities).sum(1)
    return entropy


def statistics_misfit(inputs: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return d_e of what a layer is given, shape (n,), in float64: see the formula of this module.

    Args:
        inputs: Of each image C channels with any number of positions, shape (n, C, ...).
        mean: M_e, shape (C,).
        var: V_e, shape (C,).
        eps: What the layer adds to the variance.
    """
    values = inputs.to(wide(inputs.device)).flatten(2) if inputs.ndim > 2 else inputs.to(wide(inputs.device))[..., None]
    own_var, own_mean = torch.var_mean(values, 2, correction=0)
    total = var.to(values) + eps
    each = 0.5 * total.log() + (own_var + (own_mean - mean.to(values)) ** 2) / (2 * total)
    return each.sum(1)


def choices(misfits: Tensor, batch_size: int | None = None) -> Tensor:
    """Return which candidate has the least misfit for each image, int64, shape (n,); of equal ones the first.

    Args:
        misfits: By candidate and image, shape (T, n). What is no number is never the least.
        batch_size: Images that come together and are taken for the same, by their mean misfit; None for each by itself.
    """
    known = misfits.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if batch_size is not None:
        known = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in torch.split(known, batch_size, 1)], 1)
    return known.argmin(0)


def passes(infer_task: str, candidates: int) -> int:
    """Return how often a network sees an image that may be of any of some experiences, for an estimate of its time."""
    return {"none": 1, "entropy": candidates, "statistics": candidates + 1}[infer_task]


class TaskInference:
    """Scores a network on images of which nobody says the experience.

    Args:
        model: The network.
        how: ``entropy`` or ``statistics``.
        per_batch: Whether the images of a batch are taken for the same.
        batch_size: Images a forward pass.
        own_classes: Whether the network's loss was over the classes of a sample's own experience alone.
        wearing: Gives the network other normalization tensors within.
        images: A few images as the network is given them, by which the first layer with running moments is found.

    Raises:
        ConfigError: ``statistics``, and no layer has running moments, or the first one evaluates by another formula.
    """

    def __init__(
        self,
        model: nn.Module,
        how: str,
        *,
        per_batch: bool,
        batch_size: int,
        own_classes: bool,
        wearing: Callable[[Tensors | None], AbstractContextManager[None]],
        images: Tensor,
    ) -> None:
        self.batch_size, self.per_batch, self.own_classes = batch_size, per_batch, own_classes
        self._wearing = wearing
        self._first = _first_layer(model, images) if how == "statistics" else None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: nn.Module,
        stream: Stream,
        wearing: Callable[[Tensors | None], AbstractContextManager[None]],
    ) -> Self | None:
        """Return what a run's configuration asks for; None where nothing is inferred.

        Args:
            config: The run's configuration.
            model: Its network.
            stream: What it is scored on.
            wearing: Gives the network other normalization tensors within.

        Raises:
            ConfigError: The network keeps no such statistics, or an answer among an experience's classes is always
                sure.
        """
        evaluate, first = config.evaluate, stream.experiences[0].train
        if evaluate.infer_task == "none":
            return None
        _require_unsure(config, stream)
        return cls(
            model,
            evaluate.infer_task,
            per_batch=evaluate.infer_task_per == "batch",
            batch_size=evaluate.batch_size,
            own_classes=config.train.heads == "task",
            wearing=wearing,
            images=first.inputs(torch.arange(min(2, len(first))))[0],
        )

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        split: Split,
        number: int,
        candidates: Sequence[Candidate],
        rows: Tensor | None = None,
    ) -> Inferred:
        """Infer the experience of each image, and classify it under that one's tensors, among its classes.

        Args:
            model: The network, in evaluation mode.
            split: The images, all of one experience.
            number: That experience's.
            candidates: The experiences that they may be of, in the order in which they were met.
            rows: The rows that are scored; all of them if None.
        """
        scored = torch.arange(len(split)) if rows is None else rows
        misfits: list[Tensor] = []
        right: list[Tensor] = []
        for candidate in candidates:
            with self._wearing(candidate.tensors):
                entropies, hits = self._answers(model, split, scored, candidate.classes)
            misfits.append(entropies)
            right.append(hits)
        if self._first is not None:
            misfits = [*self._statistics(model, split, scored, candidates)]
        chosen = choices(torch.stack(misfits), self.batch_size if self.per_batch else None)
        numbers = torch.tensor([candidate.number for candidate in candidates], device=chosen.device)
        hits = torch.stack(right).gather(0, chosen[None])
        return Inferred(int(hits.sum()) / len(scored), int((numbers[chosen] == number).sum()) / len(scored))

    def _answers(self, model: nn.Module, split: Split, rows: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the entropy of each image's answer, and whether the answer among some classes is right."""
        entropies, right = [], []
        for images, labels in self._batches(split, rows):
            logits = model(images)
            own = torch.tensor(classes, device=logits.device)
            among = logits[:, own]
            entropies.append(entropy_misfit(among if self.own_classes else logits))
            right.append(own[among.argmax(1)] == labels)
        return torch.cat(entropies), torch.cat(right)

    def _statistics(self, model: nn.Module, split: Split, rows: Tensor, candidates: Sequence[Candidate]) -> Tensor:
        """Return the misfits of the first layer's input, by candidate and image."""
        assert self._first is not None
        path, layer = self._first
        keys = f"{path}.running_mean", f"{path}.running_var"
        own = dict(zip(keys, running(layer), strict=True))
        moments = [{**own, **(candidate.tensors or {})} for candidate in candidates]
        misfits = []
        for images, _ in self._batches(split, rows):
            with _first_input([layer]) as heard:
                model(images)
            inputs = heard[0][1]
            misfits.append(
                torch.stack([statistics_misfit(inputs, each[keys[0]], each[keys[1]], layer.eps) for each in moments])
            )
        return torch.cat(misfits, 1)

    def _batches(self, split: Split, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(rows, self.batch_size):
            yield split.inputs(part)


def _require_unsure(config: RunConfig, stream: Stream) -> None:
    """Refuse to tell experiences by how sure answers are, where an answer among one class is always sure.

    Raises:
        ConfigError: It is so.
    """
    alone = [experience.number for experience in stream if len(experience.classes) == 1]
    if config.evaluate.infer_task == "entropy" and config.train.heads == "task" and alone:
        raise ConfigError(
            "evaluate.infer_task = 'entropy' takes the experience among whose classes the network is surest, with "
            f"train.heads = 'task', and experience {alone[0] + 1} has one class, of which it is always sure: every "
            "image would be of that one. Take 'statistics', train.heads = 'one', or experiences of more classes."
        )


def _first_layer(model: nn.Module, images: Tensor) -> tuple[str, _BatchNorm]:
    """Return the layer with running moments that a network comes to first, and its path.

    Raises:
        ConfigError: There is none, or it evaluates by another formula than batch normalization's.
    """
    paths = {module: path for path, module in model.named_modules() if keeps_moments(module)}
    training = {module: module.training for module in model.modules()}
    with torch.no_grad(), _first_input(list(paths)) as heard:
        model.eval()(images)
    for module, mode in training.items():
        module.training = mode
    remedy = "Take norm batch_norm, or evaluate.infer_task = 'entropy', which asks for no statistics."
    if not heard:
        raise ConfigError(
            "evaluate.infer_task = 'statistics' compares what a layer is given with each experience's running mean and "
            f"variance, and this network keeps none. {remedy}"
        )
    layer = heard[0][0]
    if not isinstance(layer, _BatchNorm) or not is_plain(layer):
        raise ConfigError(
            "evaluate.infer_task = 'statistics' compares what a layer is given with the running mean and variance by "
            f"which it is normalized, and {paths[layer] or 'the network'} ({type(layer).__name__}), the first layer "
            f"with running statistics, evaluates by another formula than batch normalization's. {remedy}"
        )
    return paths[layer], layer


@contextmanager
def _first_input(layers: Sequence[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Hear what the first of some layers that is called is given, within: the layer, and its input."""
    heard: list[tuple[nn.Module, Tensor]] = []

    def hear(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not heard:
            heard.append((layer, inputs[0].detach()))

    handles = [layer.register_forward_pre_hook(hear) for layer in layers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
