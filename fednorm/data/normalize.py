"""Mean and std of training images, and the scalings that a run makes of them (``data.normalize``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from fednorm.data.clients import Clients
from fednorm.data.domain import Client, Federation, Split
from fednorm.data.scaling import HALF, UNIT, Scaling
from fednorm.errors import DataError

FIXED: Mapping[str, Scaling] = {"half": HALF, "none": UNIT}
"""Scalings that no image is measured for."""

CHUNK = 512
"""Images that are read at once."""

S = TypeVar("S", bound=Split)


def measured(splits: Iterable[Split]) -> Scaling:
    """Return the mean and std of every pixel of some images, by channel, exact before the last rounding.

        mean = sum x / N,   std^2 = sum x^2 / N - mean^2      (in integers, x in 0 to 255)

    A channel whose pixels are all the same is centred and not stretched: its std counts as 1.

    Raises:
        DataError: There are no images.
    """
    total = squares = torch.zeros(0, dtype=torch.int64)
    count = 0
    for split in splits:
        for rows in torch.split(torch.arange(len(split)), CHUNK):
            images = split.batch(rows)[0].to(torch.int64) if len(rows) else None
            if images is None:
                continue
            if not count:
                total = squares = images.new_zeros(images.shape[1])
            total, squares = total + images.sum((0, 2, 3)), squares + images.square().sum((0, 2, 3))
            count += images.numel() // images.shape[1]
    if not count:
        raise DataError("data.normalize measures training images, and there are none. Use 'half' or 'none'.")
    means = [t / (255 * count) for t in total.tolist()]
    variances = [
        (q * count - t * t) / (255 * count) ** 2 for t, q in zip(total.tolist(), squares.tolist(), strict=True)
    ]
    return Scaling((tuple(means),), (tuple(v**0.5 or 1.0 for v in variances),))


def scaled(split: S, scaling: Scaling) -> S:
    """Return the split under another scaling; its arrays are the same objects."""
    return split if split.scaling == scaling else dataclasses.replace(split, scaling=scaling)


def normalized(federation: Federation, how: str) -> Federation:
    """Return the federation with every split scaled as ``data.normalize`` says.

    Args:
        federation: The clients. Where something is measured, it is over their training images, none held back.
        how: ``half``, ``none``, ``global`` or ``domain``.
    """
    if how == "half":
        return federation
    training = federation.training_clients
    of_all = FIXED[how] if how in FIXED else measured(client.train for client in training)
    by_domain: dict[str, Scaling] = {}
    if how == "domain":
        for domain in dict.fromkeys(client.domain for client in training):
            by_domain[domain] = measured(client.train for client in training if client.domain == domain)
    clients = _rescaled(federation.clients, lambda domain: by_domain.get(domain, of_all))
    unseen = [domain for domain in federation.domains if domain not in by_domain] if how == "domain" else []
    return dataclasses.replace(federation, clients=clients, notes=(*federation.notes, *notes(how, "clients", unseen)))


def _rescaled(clients: Sequence[Client], scaling_of: Callable[[str], Scaling]) -> Sequence[Client]:
    if isinstance(clients, Clients):
        return clients.rescaled(scaling_of)
    made = []
    for client in clients:
        parts = (client.train, client.validation, client.test)
        train, validation, test = (scaled(part, scaling_of(client.domain)) for part in parts)
        made.append(dataclasses.replace(client, train=train, validation=validation, test=test))
    return tuple(made)


def notes(how: str, whose: str, unseen: Iterable[str] = ()) -> tuple[str, ...]:
    """Return what the reader of a table must know of a measured normalization."""
    if how not in ("global", "domain"):
        return ()
    names = ", ".join(unseen)
    other = f"; {names}, on which nobody trained, by those of all others" if names else ""
    what = f"the training images of all {whose}" if how == "global" else f"their own domain's training images{other}"
    return (f"Images are normalized by the mean and std of {what}.",)
