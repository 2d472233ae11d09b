"""The yardstick: ER-ACE as one would write it in plain PyTorch, in one loop, for nothing but this.

It shares no code with the learner but the names of its random streams, so that batches, memory and augmentation are the
same. Images are kept as padded floats, channels last, ready to be cropped; the memory holds the numbers of rows instead
of pixels. A general learner may do neither, and is measured against a loop that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.rng import stream_seed, torch_stream


class RowReservoir:
    """A reservoir of row numbers: algorithm R.

    Args:
        capacity: Most rows held.
        seed: Of what enters and of what is drawn.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.rows = torch.empty(capacity, dtype=torch.int64)
        self.seen = 0
        self._insert = torch_stream(seed, "buffer", "insert")
        self._draw = torch_stream(seed, "buffer", "draw")

    def draw(self, count: int) -> Tensor:
        """Return ``count`` different rows, or all of them where there are fewer."""
        held = min(self.seen, len(self.rows))
        return self.rows[torch.randperm(held, generator=self._draw)[:count]]

    def add(self, rows: Tensor) -> None:
        """Offer a batch of rows."""
        seen, capacity, n = self.seen, len(self.rows), len(rows)
        free = min(max(capacity - seen, 0), n)
        self.rows[seen : seen + free] = rows[:free]
        if free < n:
            uniform = torch.rand(n - free, dtype=torch.float64, generator=self._insert)
            slots = (uniform * torch.arange(seen + free + 1, seen + n + 1)).long()
            for slot, row in zip(slots.tolist(), rows[free:].tolist(), strict=True):
                if slot < capacity:
                    self.rows[slot] = row
        self.seen += n


class PaddedImages:
    """Images as floats in [-1, 1], from which batches are cropped and mirrored.

    Args:
        images: Pixels, uint8, shape (N, 3, S, S).
        padding: Black pixels on each side; 0 for no augmentation.
        flip: Whether to mirror one image in two.
        seed: Of the augmentation.
    """

    def __init__(self, images: Tensor, *, padding: int, flip: bool, seed: int) -> None:
        padded = functional.pad(images, [padding] * 4).permute(0, 2, 3, 1)
        self._pixels = padded.contiguous().float().div_(127.5).sub_(1.0)
        self._side = torch.arange(images.shape[2])
        self._padding, self._flip, self._seed = padding, flip, seed
        self._generator = torch.Generator()

    def batch(self, rows: Tensor, step: int) -> Tensor:
        """Return images of some rows, augmented as in the given step, shape (n, 3, S, S), channels last."""
        if not self._padding:
            return self._pixels[rows].permute(0, 3, 1, 2)
        generator, shape = self._generator.manual_seed(stream_seed(self._seed, "augment", step)), (len(rows), 1)
        top = torch.randint(2 * self._padding + 1, shape, generator=generator)
        left = torch.randint(2 * self._padding + 1, shape, generator=generator)
        mirrored = torch.randint(2, shape, generator=generator).bool()
        across = self._side
        if self._flip:
            across = torch.where(mirrored, self._side.flip(0), self._side)
        y, x = top + self._side, left + across
        return self._pixels[rows[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def experience_replay_ace(
    model: nn.Module,
    images: PaddedImages,
    labels: Tensor,
    experiences: Sequence[Tensor],
    *,
    num_classes: int,
    batch_size: int,
    memory_size: int,
    learning_rate: float,
    seed: int,
    on_experience: Callable[[], None],
    on_step: Callable[[], None],
) -> None:
    """Train by ER-ACE, one pass over each experience, new and memory samples in one forward pass.

        loss = cross_entropy(f(x_new), y_new; classes in the batch or never seen) + cross_entropy(f(x_mem), y_mem)

    The first experience has neither mask nor replay.

    Args:
        model: The network, with its initial weights; it is changed.
        images: All images.
        labels: All labels, int64, shape (N,).
        experiences: The rows of each experience.
        num_classes: K.
        batch_size: New samples a step; as many come from memory.
        memory_size: Samples that the memory holds.
        learning_rate: Of SGD.
        seed: Of the order of the samples and of the memory.
        on_experience: Called before every experience.
        on_step: Called after every step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, foreach=True)
    memory = RowReservoir(memory_size, seed)
    seen = torch.zeros(num_classes, dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    step = 0
    model.train()
    for number, experience in enumerate(experiences):
        on_experience()
        order = torch.randperm(len(experience), generator=torch_stream(seed, "experience", number, "epoch", 0, "order"))
        for part in torch.split(order, batch_size):
            new = experience[part]
            n = len(new)
            present = torch.zeros_like(seen)
            present[labels[new]] = True
            seen |= present
            rows = torch.cat([new, memory.draw(n)]) if number else new
            logits, targets = model(images.batch(rows, step)), labels[rows]
            if number:
                masked = logits[:n].masked_fill(seen & ~present, lowest)
                loss = functional.cross_entropy(masked, targets[:n])
                loss = loss + functional.cross_entropy(logits[n:], targets[n:])
            else:
                loss = functional.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            memory.add(new)
            step += 1
            on_step()
