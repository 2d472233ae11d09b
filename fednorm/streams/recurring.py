"""Classes that come again: blurry boundaries, and streams with repetition, of a class-incremental stream.

Each moves training images between experiences and leaves the rest: every image is in one experience, tests and held
back images are those of an experience's own classes, which are what an accuracy matrix is about. A label then tells
nobody its task.

* Blurry boundaries: a share of each experience's training images is of other experiences' classes. Blurry-M of Bang,
  Kim, Yoo, Ha, Choi. Rainbow Memory. CVPR 2021, https://arxiv.org/abs/2103.17230, where M is the share in percent.
* Repetition: every class comes again in each later experience with a probability, and its training images are dealt
  evenly to the experiences that it comes in. The sampling-based generator of Hemati et al. Class-Incremental Learning
  with Repetition. CoLLAs 2023, https://arxiv.org/abs/2301.11396, with its probability of repetition; images of a class
  are there drawn anew for each experience, and may come twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fednorm.errors import ConfigError
from fednorm.options import share as require_share
from fednorm.rng import stream
from fednorm.streams.stream import Experience


def recurring(
    experiences: Sequence[Experience], *, blurry: float, repetition: float, seed: int, order_seed: int
) -> list[Experience]:
    """Return experiences whose classes come again as the options say; the same ones where both are 0.

    Args:
        experiences: Of classes that no other experience has.
        blurry: Share of each experience's training images that go to others, in [0, 1).
        repetition: Probability that a class comes again in a later experience, in [0, 1].
        seed: Decides which images go where.
        order_seed: Decides which classes come again where.

    Raises:
        ConfigError: An option is out of range, or both are set, or there is one experience.
    """
    require_share("scenario", "blurry", blurry)
    require_share("scenario", "repetition", repetition)
    if not blurry and not repetition:
        return list(experiences)
    if blurry and repetition:
        raise ConfigError(
            f"scenario.blurry is {blurry:g} and scenario.repetition {repetition:g}: two ways for classes to come "
            "again. Leave one of them at 0."
        )
    if blurry == 1:
        raise ConfigError("scenario.blurry is 1: an experience would have no image of its own classes. Set it below 1.")
    if len(experiences) == 1:
        raise ConfigError(
            f"scenario.{'blurry' if blurry else 'repetition'} lets classes come again in other experiences, and there "
            "is one. Set scenario.num_experiences to 2 or more."
        )
    rows = _blurred(experiences, blurry, seed) if blurry else _repeated(experiences, repetition, seed, order_seed)
    return [_with_rows(experience, own) for experience, own in zip(experiences, rows, strict=True)]


def _with_rows(experience: Experience, rows: Sequence[Tensor]) -> Experience:
    """Return an experience that trains on other rows of its arrays, in the arrays' order."""
    return replace(experience, train=replace(experience.train, index=torch.cat(list(rows)).sort().values))


def _blurred(experiences: Sequence[Experience], share: float, seed: int) -> list[list[Tensor]]:
    """Return the rows of each experience, a share of everyone's dealt to the others in turn."""
    count = len(experiences)
    rows: list[list[Tensor]] = []
    given: list[Tensor] = []
    for experience in experiences:
        index = experience.train.index
        order = torch.from_numpy(stream(seed, "stream", "blurry", experience.number).permutation(len(index)))
        leaving = min(round(share * len(index)), len(index) - 1)
        rows.append([index[order[leaving:]]])
        given.append(index[order[:leaving]])
    for origin, leaving_rows in enumerate(given):
        for turn in range(1, count):
            rows[(origin + turn) % count].append(leaving_rows[turn - 1 :: count - 1])
    return rows


def _repeated(experiences: Sequence[Experience], probability: float, seed: int, order_seed: int) -> list[list[Tensor]]:
    """Return the rows of each experience, those of a class dealt evenly to the experiences that it comes in."""
    rows: list[list[Tensor]] = [[] for _ in experiences]
    for place, experience in enumerate(experiences):
        index, labels = experience.train.index, experience.train.targets
        for label in experience.classes:
            later = stream(order_seed, "stream", "repetition", label).random(len(experiences) - place - 1) < probability
            places = [place, *(place + 1 + int(each) for each in np.flatnonzero(later))]
            own = index[labels == label]
            order = torch.from_numpy(stream(seed, "stream", "repeated rows", label).permutation(len(own)))
            # The experience in which a class comes first has no fewer of it than any other.
            for turn, where in enumerate(places):
                rows[where].append(own[order[turn :: len(places)]])
    return rows
