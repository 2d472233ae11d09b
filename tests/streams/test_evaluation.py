"""Accuracy against a count by hand, over all classes and among an experience's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.data.domain import Split
from fednorm.errors import ConfigError
from fednorm.streams.evaluation import accuracy, split_of
from fednorm.streams.stream import Experience, PermutedSplit


class Oracle(nn.Module):
    """A network whose logits for image i of the array are row i of a table; an image is its number, as pixels.

    Args:
        logits: Shape (N, K).
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return self.logits[((images[:, 0, 0, 0] + 1) * 127.5).round().long()]


def numbered(labels: list[int], index: list[int]) -> Split:
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1).contiguous()
    return Split(images, torch.tensor(labels), torch.tensor(index))


@st.composite
def cases(draw: Any) -> tuple[Tensor, Split, list[int], int, list[int] | None]:
    """Draw logits without ties, a split of some rows, own classes, a batch size, and perhaps rows of the split."""
    count, num_classes = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    own = draw(st.lists(st.integers(0, num_classes - 1), min_size=1, unique=True).map(sorted))
    labels = draw(st.lists(st.sampled_from(own), min_size=count, max_size=count))
    index = draw(st.permutations(range(count)).map(lambda order: order[: draw(st.integers(1, count))]))
    order = draw(st.permutations(range(count * num_classes)))
    logits = torch.tensor(order, dtype=torch.float32).view(count, num_classes)
    rows = draw(st.none() | st.lists(st.integers(0, len(index) - 1), min_size=1, unique=True))
    return logits, numbered(labels, index), own, draw(st.integers(1, 5)), rows


@given(cases())
def test_it_is_a_count_by_hand(case: tuple[Tensor, Split, list[int], int, list[int] | None]) -> None:
    logits, split, own, batch_size, rows = case
    model = Oracle(logits).eval()
    found = accuracy(model, split, own, batch_size=batch_size, rows=None if rows is None else torch.tensor(rows))
    chosen = [int(split.index[row]) for row in (range(len(split)) if rows is None else rows)]
    table, labels = logits.tolist(), split.labels.tolist()
    right = [max(range(len(table[i])), key=table[i].__getitem__) == labels[i] for i in chosen]
    right_among_own = [max(own, key=table[i].__getitem__) == labels[i] for i in chosen]
    assert found.overall == sum(right) / len(chosen)
    assert found.among_own == sum(right_among_own) / len(chosen)
    assert found.among_own >= found.overall
    assert sum(model.batches) == len(chosen)
    assert max(model.batches) <= batch_size


def test_pixels_are_taken_as_the_split_gives_them() -> None:
    """A permuted split moves them; its array stays as it is."""
    images = torch.zeros(1, 3, 1, 2, dtype=torch.uint8)
    images[..., 1] = 1
    moved = PermutedSplit(images, torch.tensor([1]), torch.tensor([0]), torch.tensor([1, 0]))
    assert accuracy(Oracle(torch.eye(2)).eval(), moved, (0, 1), batch_size=1).overall == 1.0


def test_a_network_that_has_diverged_is_merely_wrong() -> None:
    logits = torch.full((3, 2), float("nan"))
    found = accuracy(Oracle(logits).eval(), numbered([1, 1, 1], [0, 1, 2]), (0, 1), batch_size=2)
    assert (found.overall, found.among_own) == (0.0, 0.0)


def test_no_graph_is_kept() -> None:
    class Learned(Oracle):
        def forward(self, images: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return super().forward(images)

    model = Learned(torch.eye(2, requires_grad=True)).eval()
    assert accuracy(model, numbered([0, 0], [0, 1]), (0, 1), batch_size=2).overall == 0.5


def test_the_split_that_is_scored_goes_by_its_name() -> None:
    train, held, test = (numbered([0, 1], rows) for rows in ([0], [1], [0, 1]))
    experience = Experience(3, "digits", (0, 1), train, held, test)
    assert split_of(experience, "test") is test
    assert split_of(experience, "validation") is held
    nothing = Experience(3, "digits", (0, 1), train, numbered([0, 1], [0]), test)
    empty = Split(nothing.validation.images, nothing.validation.labels, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"experience 3 were held back. Set data.validation"):
        split_of(Experience(3, "digits", (0, 1), train, empty, test), "validation")
