"""Accuracy on the experiences of a stream, over all classes and among an experience's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednorm.data.domain import Split
from fednorm.errors import ConfigError
from fednorm.streams.stream import Experience


@dataclass(frozen=True)
class Accuracy:
    """Shares of images that are right.

    Attributes:
        overall: With every class to choose from (class-incremental).
        among_own: With the experience's own classes to choose from, as if its task were known (task-incremental).
        finite: Whether every output was a number; where not, the shares mean nothing.
    """

    overall: float
    among_own: float
    finite: bool = True


def split_of(experience: Experience, name: str) -> Split:
    """Return the images that are scored, ``test`` or ``validation``.

    Raises:
        ConfigError: No images were held back for validation.
    """
    split = experience.validation if name == "validation" else experience.test
    if not len(split):
        raise ConfigError(
            f"evaluate.split is 'validation', and no images of experience {experience.number} were held back. Set "
            "data.validation to the share of each experience's training images to hold back, e.g. 0.1."
        )
    return split


def scope_of(experiences: str, *, memorization: bool, joint: bool) -> str:
    """Return which experiences are scored after each: ``all``, those ``seen`` so far, or the ``current`` one.

    Args:
        experiences: ``evaluate.experiences``: one of these, or ``auto``.
        memorization: Whether the stream is about memorization, which is of the present experience.
        joint: Whether the learner is given all experiences at once.
    """
    if experiences == "auto":
        return "current" if memorization else "all"
    return "all" if joint else experiences


def is_scored(scope: str, number: int, present: int) -> bool:
    """Return whether an experience is scored after the present one, both by their numbers."""
    return scope == "all" or number == present or (scope == "seen" and number < present)


@torch.no_grad()
def accuracy(
    model: nn.Module, split: Split, classes: Sequence[int], *, batch_size: int, rows: Tensor | None = None
) -> Accuracy:
    """Score a model, which is in evaluation mode.

    Args:
        model: The model.
        split: The images.
        classes: The experience's own classes.
        batch_size: Images a forward pass.
        rows: The rows that are scored; all of them if None.
    """
    chosen = torch.arange(len(split)) if rows is None else rows
    own: Tensor | None = None
    hits = hits_among_own = 0
    finite = True
    for part in torch.split(chosen, batch_size):
        images, labels = split.inputs(part)
        logits = model(images)
        own = torch.tensor(classes, device=logits.device) if own is None else own
        finite = finite and bool(logits.amax(1).isfinite().all())  # classes may be masked
        hits += int((logits.argmax(1) == labels).sum())
        hits_among_own += int((own[logits[:, own].argmax(1)] == labels).sum())
    return Accuracy(hits / len(chosen), hits_among_own / len(chosen), finite)
