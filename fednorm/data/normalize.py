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


def measured_by_image(splits: Iterable[Split]) -> Scaling:
    """Return the mean over images of each one's mean, and of each one's std (with n - 1), by channel.

    FedRDN's official statistics (IAMJackYan/FedRDN): the std is that within images, and less than that of all pixels.
    A channel in which every image is of one colour is centred and not stretched.

    Raises:
        DataError: There are no images.
    """
    means, stds, count = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), 0
    for split in splits:
        for rows in torch.split(torch.arange(len(split)), CHUNK) if len(split) else ():
            images = split.batch(rows)[0].flatten(2).cpu().double() / 255
            std, mean = torch.std_mean(images, 2)
            means, stds = (means + mean.sum(0), stds + std.sum(0)) if count else (mean.sum(0), std.sum(0))
            count += len(images)
    if not count:
        raise DataError("data.normalize measures training images, and there are none. Use 'half' or 'none'.")
    return Scaling((tuple((means / count).tolist()),), (tuple(s or 1.0 for s in (stds / count).tolist()),))


def scaled(split: S, scaling: Scaling) -> S:
    """Return the split under another scaling; its arrays are the same objects."""
    return split if split.scaling == scaling else dataclasses.replace(split, scaling=scaling)


def normalized(federation: Federation, how: str) -> Federation:
    """Return the federation with every split scaled as ``data.normalize`` says.

    Args:
        federation: The clients. Where something is measured, it is over their training images, none held back.
        how: ``half``, ``none``, ``global``, ``domain``, or what a strategy asks for, ``client``: by each client's own
            training images (:func:`measured_by_image`), or those of all where a client has none.
    """
    if how == "half":
        return federation
    training = federation.training_clients
    measure = measured_by_image if how == "client" else measured
    of_all = FIXED[how] if how in FIXED else measure(client.train for client in training)
    by_domain: dict[str, Scaling] = {}
    if how == "domain":
        for domain in dict.fromkeys(client.domain for client in training):
            by_domain[domain] = measured(client.train for client in training if client.domain == domain)
    if how == "client":
        clients = _rescaled_apart(federation.clients, of_all)
    else:
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


def _rescaled_apart(clients: Sequence[Client], of_all: Scaling) -> Sequence[Client]:
    """Return clients with the images of each scaled by its own training images."""
    made = []
    for client in clients:
        own = measured_by_image([client.train]) if len(client.train) else of_all
        train, validation, test = (scaled(part, own) for part in (client.train, client.validation, client.test))
        made.append(dataclasses.replace(client, train=train, validation=validation, test=test))
    return tuple(made)


def notes(how: str, whose: str, unseen: Iterable[str] = ()) -> tuple[str, ...]:
    """Return what the reader of a table must know of a measured normalization."""
    if how == "client":
        return ("Images are normalized by the mean and std of their own client's training images.",)
    if how not in ("global", "domain"):
        return ()
    names = ", ".join(unseen)
    other = f"; {names}, on which nobody trained, by those of all others" if names else ""
    what = f"the training images of all {whose}" if how == "global" else f"their own domain's training images{other}"
    return (f"Images are normalized by the mean and std of {what}.",)
