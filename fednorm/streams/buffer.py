"""Replay buffers: what a learner keeps of the stream, filled online and drawn from at every step.

A buffer holds pixels as they were read (uint8, before any augmentation), so that every replay augments anew, or what a
data set gave in their place, ready for the network; and of each sample its label, its task and, for distillation, the
logits it had when it came. It lives where the samples do that it is given; what a checkpoint keeps of it, on the CPU.

Two streams of random numbers, named after the run's seed, one for what enters and one for what is drawn: how often a
learner draws does not change what the buffer holds. Each sample takes its own random number, so that the same samples
in batches of another size leave the same buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fednorm.data.domain import taken
from fednorm.errors import ConfigError, DataError, RecordError
from fednorm.options import whole
from fednorm.rng import torch_stream


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of a buffer; copies, which later additions leave alone.

    Attributes:
        images: Pixels, uint8, shape (n, 3, H, W); or samples of another kind, shape (n, ...).
        labels: Classes, int64, shape (n,).
        tasks: The task each came from, int64, shape (n,).
        logits: The logits each was stored with, float32, shape (n, K); None in a buffer without logits.
    """

    images: Tensor
    labels: Tensor
    tasks: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of samples, n."""
        return len(self.labels)

    def taken(self, rows: Tensor) -> Samples:
        """Return some of the samples, without their logits."""
        return Samples(taken(self.images, rows), taken(self.labels, rows), taken(self.tasks, rows))


class Buffer(ABC):
    """At most ``capacity`` samples of a stream. A subclass says which, by :meth:`_place`.

    Args:
        capacity: Most samples held; at least ``num_classes``.
        num_classes: K; labels are 0 to K - 1.
        seed: The run's seed.

    Attributes:
        capacity: Most samples held.
        num_classes: K.
        num_seen: Samples offered so far, whether they were kept or not.
        pixels: Whether images must be pixels, as by default; False for a data set that gives other samples.

    Raises:
        ConfigError: The capacity is not a positive integer, or smaller than the number of classes.
    """

    def __init__(self, capacity: int, *, num_classes: int, seed: int) -> None:
        whole("buffer", "capacity", capacity, at_least=1)
        if capacity < num_classes:
            raise ConfigError(
                f"A buffer of capacity {capacity} cannot hold a sample of each of the {num_classes} classes: the "
                f"classes left out would be forgotten, whatever the learner. Use a capacity of {num_classes} or more."
            )
        self.capacity = capacity
        self.num_classes = num_classes
        self.num_seen = 0
        self.pixels = True
        self._size = 0
        self._store: dict[str, Tensor] = {}
        self._insert = torch_stream(seed, "buffer", "insert")
        self._draw = torch_stream(seed, "buffer", "draw")

    def __len__(self) -> int:
        """Return the number of samples held."""
        return self._size

    @abstractmethod
    def _place(self, labels: Tensor) -> dict[int, int]:
        """Decide which samples of a batch are held once all of it has been offered, one after the other.

        Args:
            labels: The batch's labels, int64, shape (n,).

        Returns:
            For each slot of the buffer that the batch writes, the last row written there. Free slots are taken in
            ascending order.
        """

    def add(self, images: Tensor, labels: Tensor, tasks: Tensor, logits: Tensor | None = None) -> None:
        """Offer a batch, sample by sample in its order.

        Args:
            images: Un-augmented pixels, uint8, shape (n, 3, H, W); anything of shape (n, ...) if not :attr:`pixels`.
            labels: Classes, int64, shape (n,).
            tasks: Tasks, int64, shape (n,).
            logits: What the model made of the samples, shape (n, K); kept detached, as float32. In every call or in
                none.

        Raises:
            DataError: A shape or type differs from these or from the samples held, or a label is out of range. The
                buffer is as it was.
        """
        batch = {"images": images, "labels": labels, "tasks": tasks}
        if logits is not None:
            batch["logits"] = logits.detach().float()
        self._check(batch)
        if not len(labels):
            return
        if not self._store:
            self._store = {name: rows.new_empty((self.capacity, *rows.shape[1:])) for name, rows in batch.items()}
        placed = self._place(labels)
        self.num_seen += len(labels)
        if not placed:
            return
        slots, rows = (torch.tensor(list(each), device=labels.device) for each in (placed, placed.values()))
        for name, held in self._store.items():
            held.index_copy_(0, slots, batch[name].index_select(0, rows))
        self._size = max(self._size, max(placed) + 1)

    def draw(self, count: int) -> Samples:
        """Return ``min(count, len(self))`` different samples, every subset of that size being equally likely.

        Raises:
            ConfigError: ``count`` is not a positive integer.
            DataError: The buffer is empty.
        """
        self._require(count)
        return self._take(torch.randperm(self._size, generator=self._draw)[:count])

    def draw_balanced(self, count: int) -> Samples:
        """Return ``count`` samples, as equally many of each class held as possible, in ascending order of class.

        With C classes held, each gets ``count // C`` or one more; who gets one more is random. Within a class the
        samples are different while they last. A class with fewer than its share repeats: each of its samples comes
        equally often, or once more, which do being random.

        Raises:
            ConfigError: ``count`` is not a positive integer.
            DataError: The buffer is empty.
        """
        self._require(count)
        shuffled = torch.randperm(self._size, generator=self._draw)
        labels, order = self._store["labels"].cpu()[shuffled].sort(stable=True)
        sizes = torch.unique_consecutive(labels, return_counts=True)[1]
        shares = torch.full_like(sizes, count // len(sizes))
        shares[torch.randperm(len(sizes), generator=self._draw)[: count % len(sizes)]] += 1

        owner = torch.repeat_interleave(shares)
        rank = torch.arange(count) - (shares.cumsum(0) - shares)[owner]
        start = sizes.cumsum(0) - sizes
        return self._take(shuffled[order[start[owner] + rank % sizes[owner]]])

    def everything(self) -> Samples:
        """Return every sample held, in the order of their slots.

        Raises:
            DataError: The buffer is empty.
        """
        self._require(1)
        return self._take(torch.arange(self._size))

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of all that the buffer needs to go on: samples, counters and both generators' states."""
        held = {name: rows[: self._size].to("cpu", copy=True) for name, rows in self._store.items()}
        return {
            "capacity": torch.tensor(self.capacity),
            "num_seen": torch.tensor(self.num_seen),
            "insert": self._insert.get_state(),
            "draw": self._draw.get_state(),
            **held,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where the buffer that gave ``state`` was: the same samples enter, and the same are drawn.

        Samples stay on the device on which they are given.

        Raises:
            RecordError: An entry is missing or unknown, or the state is of a buffer of another capacity.
        """
        required, rows = {"capacity", "num_seen", "insert", "draw"}, {"images", "labels", "tasks"}
        held = set(state) - required
        if not required <= set(state) or (held and held - {"logits"} != rows):
            raise RecordError(
                f"A buffer's state has the entries {', '.join(sorted(required))}, and {', '.join(sorted(rows))} and "
                f"perhaps logits when it is not empty; got {', '.join(sorted(state)) or 'none'}. The checkpoint is "
                "incomplete or of another version: start the run anew."
            )
        if int(state["capacity"]) != self.capacity:
            raise RecordError(
                f"This buffer's capacity is {self.capacity}; the state is of one of capacity {int(state['capacity'])}, "
                "and would not go on as that one did. Resume with the configuration of the checkpoint."
            )
        self.num_seen = int(state["num_seen"])
        self._size = len(state["labels"]) if held else 0
        self._store = {}
        for name in sorted(held):
            self._store[name] = state[name].new_empty((self.capacity, *state[name].shape[1:]))
            self._store[name][: self._size] = state[name]
        # Copies: of a view of other memory PyTorch makes no generator's state.
        self._insert.set_state(state["insert"].to("cpu", copy=True))
        self._draw.set_state(state["draw"].to("cpu", copy=True))

    def _take(self, slots: Tensor) -> Samples:
        return Samples(**{name: rows.index_select(0, slots.to(rows.device)) for name, rows in self._store.items()})

    def _require(self, count: int) -> None:
        whole("buffer", "count", count, at_least=1)
        if not self._size:
            raise DataError(
                "Nothing can be drawn from an empty buffer. Add a batch first, or train on new samples alone while "
                "len(buffer) is 0."
            )

    def _check(self, batch: dict[str, Tensor]) -> None:
        labels = batch["labels"]
        n = len(labels)
        for name, rows in batch.items():
            dtype, dim = _FORMATS[name]
            if name == "images" and not self.pixels:
                dtype, dim = rows.dtype, rows.ndim
            if rows.dtype != dtype or rows.ndim != dim or len(rows) != n:
                raise DataError(
                    f"A buffer takes {name} of type {dtype} with {dim} dimension{'s' * (dim > 1)} and one row for each "
                    f"of the {n} labels; got {rows.dtype}, shape {tuple(rows.shape)}. Hand over one batch, its pixels "
                    "as they were read."
                )
        if self._store and self._store.keys() != batch.keys():
            raise DataError(
                f"This buffer was begun {_with_logits('logits' in self._store)}; a batch came "
                f"{_with_logits('logits' in batch)}. Give logits in every call of add(), or in none."
            )
        for name, held in self._store.items():
            if held.shape[1:] != batch[name].shape[1:]:
                raise DataError(
                    f"This buffer holds {name} of shape {tuple(held.shape[1:])} a sample; a batch came with "
                    f"{tuple(batch[name].shape[1:])}. Use a new buffer for samples of another shape."
                )
            if held.dtype != batch[name].dtype:
                raise DataError(
                    f"This buffer holds {name} of type {held.dtype}; a batch came with {batch[name].dtype}. Let all "
                    "experiences of a stream come from one kind of data set."
                )
        if n:
            low, high = (int(label) for label in labels.aminmax())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"Labels must lie in 0 to {self.num_classes - 1}, there being {self.num_classes} classes; a batch "
                    f"came with {low} to {high}. Remap the labels, or give the buffer the right num_classes."
                )


class ReservoirBuffer(Buffer):
    """A uniform sample of all that was offered: algorithm R (Vitter, ACM TOMS 11(1), 1985; credited to Waterman).

    The first ``capacity`` samples fill the slots in order. Of the n-th sample (n from 1) after them, a slot j is drawn
    uniformly from 0 to n - 1; the sample takes slot j if there is one (j < capacity), and is dropped otherwise. Every
    sample so far is then held with probability ``capacity / n``. This is ER's buffer (Chaudhry et al., arXiv
    1902.10486) and DER++'s (Buzzega et al., arXiv 2004.07211).
    """

    def _place(self, labels: Tensor) -> dict[int, int]:
        seen, n = self.num_seen, len(labels)
        filling = min(max(self.capacity - seen, 0), n)
        placed = dict(zip(range(seen, seen + filling), range(filling), strict=True))
        if filling < n:
            uniform = torch.rand(n - filling, dtype=torch.float64, generator=self._insert)
            slots = (uniform * torch.arange(seen + filling + 1, seen + n + 1)).long()
            rows = (slots < self.capacity).nonzero().flatten()
            # A dictionary keeps the last row of a slot, as insertion one by one would.
            placed.update(zip(slots[rows].tolist(), (rows + filling).tolist(), strict=True))
        return placed


class BalancedBuffer(Buffer):
    """As many of each class as of every other: GDumb's greedy sampler (Prabhu et al., ECCV 2020, algorithm 1).

    A sample enters if its class is new, or has fewer than ``capacity / C`` samples here (a real number, C being the
    number of classes seen before the sample). If there is no free slot, it takes the place of a random sample of the
    largest class. Among equally large classes the paper does not choose; here the one with the lowest label gives way.

    What enters early stays: within a class this is not a uniform sample of the stream. Where the capacity is no
    multiple of C, the classes take turns in having one more, so samples keep being replaced.
    """

    def _place(self, labels: Tensor) -> dict[int, int]:
        uniform = torch.rand(len(labels), dtype=torch.float64, generator=self._insert).tolist()
        held = self._store["labels"].to("cpu", copy=True)
        size = self._size
        counts = held[:size].bincount(minlength=self.num_classes).tolist()
        # No class is ever lost (the capacity being at least K), so the classes held are the classes seen.
        classes = sum(count > 0 for count in counts)
        placed: dict[int, int] = {}
        for row, label in enumerate(labels.tolist()):
            if counts[label] and counts[label] * classes >= self.capacity:
                continue
            if size < self.capacity:
                slot = size
                size += 1
            else:
                largest = counts.index(max(counts))
                members = (held == largest).nonzero().flatten()
                slot = int(members[int(uniform[row] * len(members))])
                counts[largest] -= 1
            classes += counts[label] == 0
            counts[label] += 1
            held[slot] = label
            placed[slot] = row
        return placed


_FORMATS = {
    "images": (torch.uint8, 4),
    "labels": (torch.int64, 1),
    "tasks": (torch.int64, 1),
    "logits": (torch.float32, 2),
}


def _with_logits(given: bool) -> str:
    return "with logits" if given else "without logits"
