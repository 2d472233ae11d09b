"""The yardstick: federated averaging as one would write it in plain PyTorch, in one loop, for nothing but this.

It shares no code with the engine but the names of its random streams, so that the batches are the same. Images are
kept as floats, ready for the network; server tensors are loaded once a round for all evaluations. A general engine
may do neither, and is measured against a loop that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.rng import torch_stream


@dataclass(frozen=True, eq=False)
class Data:
    """One client's images, float32, and labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def federated_averaging(
    model: nn.Module,
    clients: Sequence[Data],
    *,
    rounds: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_round: Callable[[], None],
) -> dict[str, Tensor]:
    """Train by FedAvg, every client in every round, and evaluate every client after each.

        w <- sum_k n_k w_k / sum_k n_k   over every float of the state dict; integers are the first client's

    Args:
        model: The network, with its initial weights; it is changed.
        clients: Their images.
        rounds: Number of rounds.
        batch_size: Images a step; one epoch a round.
        learning_rate: Of SGD.
        seed: Of the order of each client's images in each round.
        on_round: Called after every round.

    Returns:
        The server's tensors.
    """
    server = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    history = []
    for server_round in range(1, rounds + 1):
        sums: dict[str, Tensor] = {}
        for number, data in enumerate(clients):
            model.load_state_dict(server)
            generator = torch_stream(seed, "client", number, "round", server_round, "batches")
            loss = _train(model, data, batch_size, learning_rate, generator)
            history.append({"round": server_round, "client": number, "train_loss": loss})
            _accumulate(sums, model, len(data.train_labels))
        images = sum(len(data.train_labels) for data in clients)
        server = {key: total / images if total.is_floating_point() else total for key, total in sums.items()}
        model.load_state_dict(server)
        for number, data in enumerate(clients):
            loss, accuracy = _evaluate(model, data)
            history.append({"round": server_round, "client": number, "test_loss": loss, "accuracy": accuracy})
        on_round()
    return server


def _train(model: nn.Module, data: Data, batch_size: int, learning_rate: float, generator: torch.Generator) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    model.train()
    total = 0.0
    for rows in torch.split(torch.randperm(len(data.train_labels), generator=generator), batch_size):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(data.train_images[rows]), data.train_labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item() * len(rows)
    return total / len(data.train_labels)


def _accumulate(sums: dict[str, Tensor], model: nn.Module, images: int) -> None:
    for key, tensor in model.state_dict().items():
        if key not in sums:
            sums[key] = tensor * images if tensor.is_floating_point() else tensor.clone()
        elif tensor.is_floating_point():
            sums[key].add_(tensor, alpha=images)


@torch.no_grad()
def _evaluate(model: nn.Module, data: Data, batch_size: int = 64) -> tuple[float, float]:
    model.eval()
    loss, hits = 0.0, 0
    batches = zip(torch.split(data.test_images, batch_size), torch.split(data.test_labels, batch_size), strict=True)
    for images, labels in batches:
        logits = model(images)
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        hits += int((logits.argmax(1) == labels).sum())
    return loss / len(data.test_labels), hits / len(data.test_labels)
