"""Replay buffers against the algorithms written sample by sample, and against the distributions they promise."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import chi2
from torch import Tensor

from fednorm.errors import ConfigError, DataError, RecordError
from fednorm.rng import torch_stream
from fednorm.streams.buffer import BalancedBuffer, Buffer, ReservoirBuffer, Samples

KINDS = [ReservoirBuffer, BalancedBuffer]
BUFFERS = pytest.mark.parametrize("kind", KINDS, ids=["reservoir", "balanced"])
K = 4

batch_sizes = st.lists(st.integers(0, 17), max_size=12)
capacities = st.integers(K, 13)
seeds = st.integers(0, 2**31)


def batch(numbers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The samples with these running numbers, which their first two pixels and their tasks tell."""
    images = torch.zeros((len(numbers), 3, 2, 2), dtype=torch.uint8)
    images[:, 0, 0, 0] = numbers % 256
    images[:, 0, 0, 1] = numbers // 256
    return images, labels, numbers


def logits_of(numbers: Tensor) -> Tensor:
    return numbers[:, None] + torch.arange(K) / 8


def feed(buffer: Buffer, labels: Tensor, sizes: list[int], *, first: int = 0, logits: bool = True) -> None:
    numbers = torch.arange(first, first + len(labels))
    for rows in torch.arange(len(labels)).split(sizes):
        extra = (logits_of(numbers[rows]),) if logits else ()
        buffer.add(*batch(numbers[rows], labels[rows]), *extra)


def numbers_of(samples: Samples) -> list[int]:
    """The samples' running numbers, having checked that image, task and logits are of one sample."""
    images = samples.images.long()
    assert torch.equal(images[:, 0, 0, 0] + 256 * images[:, 0, 0, 1], samples.tasks)
    if samples.logits is not None:
        assert torch.equal(samples.logits, logits_of(samples.tasks))
    return samples.tasks.tolist()


def same(one: Samples, other: Samples) -> bool:
    return numbers_of(one) == numbers_of(other) and torch.equal(one.labels, other.labels)


def random_labels(n: int, seed: int, classes: int = K) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def filled(kind: type[Buffer], labels: list[int], capacity: int, seed: int = 0) -> Buffer:
    buffer = kind(capacity, num_classes=max(labels) + 1, seed=seed)
    feed(buffer, torch.tensor(labels), [len(labels)], logits=False)
    return buffer


def uniforms(n: int, seed: int) -> list[float]:
    return torch.rand(n, dtype=torch.float64, generator=torch_stream(seed, "buffer", "insert")).tolist()


# What enters


@given(batch_sizes, capacities, seeds)
@settings(deadline=None, max_examples=150)
def test_the_reservoir_holds_what_insertion_one_by_one_leaves(sizes: list[int], capacity: int, seed: int) -> None:
    n = sum(sizes)
    labels = random_labels(n, seed)
    buffer = ReservoirBuffer(capacity, num_classes=K, seed=seed)
    feed(buffer, labels, sizes)

    random = iter(uniforms(n, seed))
    slots: list[int] = []
    for number in range(n):
        if number < capacity:
            slots.append(number)
            continue
        slot = int(next(random) * (number + 1))
        if slot < capacity:
            slots[slot] = number

    assert (len(buffer), buffer.num_seen) == (len(slots), n)
    if n:
        assert numbers_of(buffer.everything()) == slots
        assert torch.equal(buffer.everything().labels, labels[slots])


def test_late_samples_of_a_large_batch_overwrite_early_ones() -> None:
    """One batch many times the capacity, in which every slot is written again and again."""
    buffers = [ReservoirBuffer(4, num_classes=K, seed=3) for _ in range(2)]
    for buffer, sizes in zip(buffers, [[2000], [1] * 2000], strict=True):
        feed(buffer, random_labels(2000, 0), sizes)
    assert same(buffers[0].everything(), buffers[1].everything())
    assert min(numbers_of(buffers[0].everything())) >= 4


@pytest.mark.parametrize(
    "sizes",
    [[5, 10, 9], *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ([24], [1] * 24))],
    ids=["batches", "one batch", "one by one"],
)
def test_the_reservoir_holds_every_sample_of_the_stream_equally_often(sizes: list[int]) -> None:
    n, capacity, runs = sum(sizes), 6, 1200
    held = Counter[int]()
    for seed in range(runs):
        buffer = ReservoirBuffer(capacity, num_classes=K, seed=seed)
        feed(buffer, torch.zeros(n, dtype=torch.int64), sizes, logits=False)
        numbers = numbers_of(buffer.everything())
        assert len(set(numbers)) == capacity
        held.update(numbers)
    p = capacity / n
    # Of a sample without replacement, the counts' covariance is p (1 - p) n / (n - 1) times the centring matrix.
    statistic = sum((held[i] - runs * p) ** 2 for i in range(n)) / (runs * p * (1 - p)) * (n - 1) / n
    assert chi2.cdf(statistic, n - 1) < 0.999
    assert statistic > 0


def greedy_sampler(labels: list[int], k: int, random: list[float]) -> list[tuple[int, int] | None]:
    """Algorithm 1 of the paper, sample by sample: the memory's slots as (running number, label)."""
    memory: list[tuple[int, int] | None] = []
    counts: dict[int, int] = {}
    seen: set[int] = set()
    for number, label in enumerate(labels):
        if label not in seen or counts[label] < k / len(seen):
            if sum(counts.values()) >= k:
                largest = min(y for y in counts if counts[y] == max(counts.values()))
                candidates = [slot for slot, sample in enumerate(memory) if sample is not None and sample[1] == largest]
                slot = candidates[int(random[number] * len(candidates))]
                counts[largest] -= 1
                memory[slot] = (number, label)
            else:
                memory.append((number, label))
            seen.add(label)
            counts[label] = counts.get(label, 0) + 1
    return memory


@given(batch_sizes, capacities, seeds, st.booleans())
@settings(deadline=None, max_examples=150)
def test_the_balanced_buffer_is_gdumbs_greedy_sampler(
    sizes: list[int], capacity: int, seed: int, by_class: bool
) -> None:
    n = sum(sizes)
    labels = random_labels(n, seed)
    if by_class:
        labels = labels.sort().values
    buffer = BalancedBuffer(capacity, num_classes=K, seed=seed)
    feed(buffer, labels, sizes)
    expected = greedy_sampler(labels.tolist(), capacity, uniforms(n, seed))
    assert (len(buffer), buffer.num_seen) == (len(expected), n)
    if n:
        held = buffer.everything()
        assert list(zip(numbers_of(held), held.labels.tolist(), strict=True)) == expected


def test_the_balanced_buffer_makes_room_for_every_new_class() -> None:
    buffer = BalancedBuffer(12, num_classes=K, seed=0)
    for label, counts in enumerate(([12], [6, 6], [4, 4, 4], [3, 3, 3, 3])):
        feed(buffer, torch.full((40,), label), [8] * 5, first=40 * label)
        assert buffer.everything().labels.bincount().tolist() == counts


def test_the_balanced_buffer_drops_every_sample_of_the_largest_class_equally_often() -> None:
    capacity, runs = 8, 1200
    dropped = Counter[int]()
    for seed in range(runs):
        buffer = BalancedBuffer(capacity, num_classes=2, seed=seed)
        feed(buffer, torch.tensor([0] * capacity + [1]), [capacity + 1], logits=False)
        dropped.update(set(range(capacity)) - set(numbers_of(buffer.everything())))
    assert dropped.total() == runs
    statistic = sum((dropped[i] - runs / capacity) ** 2 for i in range(capacity)) / (runs / capacity)
    assert chi2.cdf(statistic, capacity - 1) < 0.999


@BUFFERS
@given(sizes=batch_sizes, seed=seeds)
@settings(deadline=None, max_examples=40)
def test_the_size_of_the_batches_does_not_change_what_is_held(kind: type[Buffer], sizes: list[int], seed: int) -> None:
    n = sum(sizes) + 1
    labels = random_labels(n, seed)
    whole, parts = (kind(7, num_classes=K, seed=seed) for _ in range(2))
    feed(whole, labels, [n])
    feed(parts, labels, [*sizes, 1])
    assert same(whole.everything(), parts.everything())


@BUFFERS
def test_drawing_does_not_change_what_enters_and_seeds_do(kind: type[Buffer]) -> None:
    labels = random_labels(300, 1)
    quiet, drawn, other = (kind(9, num_classes=K, seed=seed) for seed in (0, 0, 1))
    for buffer in (quiet, drawn, other):
        for start in range(0, 300, 10):
            feed(buffer, labels[start : start + 10], [10], first=start)
            if buffer is drawn:
                buffer.draw(3)
                buffer.draw_balanced(3)
    assert same(quiet.everything(), drawn.everything())
    assert not same(quiet.everything(), other.everything())


# What is drawn


@given(st.integers(1, 40), st.integers(1, 50), seeds)
@settings(deadline=None)
def test_a_draw_is_without_replacement(n: int, count: int, seed: int) -> None:
    buffer = ReservoirBuffer(40, num_classes=K, seed=seed)
    feed(buffer, random_labels(n, seed), [n])
    drawn = buffer.draw(count)
    assert len(drawn) == len(set(numbers_of(drawn))) == min(count, n)
    assert set(numbers_of(drawn)) <= set(range(n))


def test_every_sample_and_every_pair_is_drawn_equally_often() -> None:
    n, count, runs = 6, 2, 3000
    buffer = filled(ReservoirBuffer, [0] * n, n)
    pairs = Counter(frozenset(numbers_of(buffer.draw(count))) for _ in range(runs))
    expected = runs / 15
    assert len(pairs) == 15
    assert chi2.cdf(sum((times - expected) ** 2 for times in pairs.values()) / expected, 14) < 0.999


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 40), seeds)
@settings(deadline=None)
def test_a_balanced_draw_has_equally_many_of_each_class(labels: list[int], count: int, seed: int) -> None:
    buffer = filled(ReservoirBuffer, labels, 30, seed)
    drawn = buffer.draw_balanced(count)
    numbers = numbers_of(drawn)
    assert len(drawn) == count
    assert drawn.labels.tolist() == [labels[number] for number in numbers]
    assert all(low <= high for low, high in pairwise(drawn.labels.tolist()))

    shares = [drawn.labels.tolist().count(label) for label in set(labels)]
    assert max(shares) - min(shares) <= 1
    for label in set(labels):
        members = [number for number, its in enumerate(labels) if its == label]
        times = Counter(number for number in numbers if labels[number] == label)
        # Different while they last, and none again before all the others came as often.
        assert max(times[member] for member in members) - min(times[member] for member in members) <= 1


def test_who_gets_one_more_in_a_balanced_draw_is_random_as_is_who_represents_a_class() -> None:
    buffer = filled(ReservoirBuffer, [0, 0, 0, 1, 1, 1, 2, 2, 2], 9)
    favoured, chosen, runs = Counter[int](), Counter[int](), 1500
    for _ in range(runs):
        drawn = buffer.draw_balanced(4)
        favoured[int(drawn.labels.bincount().argmax())] += 1
        chosen.update(numbers_of(drawn))
    assert chi2.cdf(sum((favoured[i] - runs / 3) ** 2 for i in range(3)) / (runs / 3), 2) < 0.999
    # A sample is in a draw with probability (2/3 · 1/3 + 1/3 · 2/3) = 4/9.
    deviation = (runs * 4 / 9 * 5 / 9) ** 0.5
    assert all(abs(chosen[i] - runs * 4 / 9) < 4 * deviation for i in range(9))


@BUFFERS
def test_what_was_drawn_is_a_copy(kind: type[Buffer]) -> None:
    buffer = filled(kind, [0, 1, 2, 3], 4)
    before = buffer.everything()
    for samples in (buffer.draw(4), buffer.draw_balanced(4), buffer.everything()):
        samples.images.fill_(255)
        samples.tasks.fill_(-1)
    assert same(buffer.everything(), before)


def test_logits_are_kept_detached_as_float32() -> None:
    buffer = ReservoirBuffer(4, num_classes=K, seed=0)
    logits = torch.randn((2, K), dtype=torch.float64, requires_grad=True)
    buffer.add(*batch(torch.arange(2), torch.tensor([0, 1])), logits)
    held = buffer.everything().logits
    assert held is not None
    assert not held.requires_grad
    assert torch.equal(held, logits.detach().float())


# Resuming


@pytest.mark.few(1)
@BUFFERS
@given(before=st.integers(0, 60), with_logits=st.booleans(), seed=seeds)
@settings(deadline=None, max_examples=30)
def test_a_restored_buffer_continues_bit_for_bit(
    kind: type[Buffer], before: int, with_logits: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    labels = random_labels(before + 100, seed)
    original = kind(9, num_classes=K, seed=seed)
    feed(original, labels[:before], [before], logits=with_logits)
    if before:
        original.draw(3)
    file = tmp_path_factory.mktemp("buffer") / "buffer.safetensors"
    save_file(original.state_dict(), file)

    restored = kind(9, num_classes=K, seed=seed + 1)
    feed(restored, labels[:20], [20], logits=not with_logits)
    restored.load_state_dict(load_file(file))
    assert (len(restored), restored.num_seen) == (len(original), before)
    for start in range(before, before + 100, 10):
        for buffer in (original, restored):
            feed(buffer, labels[start : start + 10], [10], first=start, logits=with_logits)
        assert same(original.everything(), restored.everything())
        assert same(original.draw(4), restored.draw(4))
        assert same(original.draw_balanced(6), restored.draw_balanced(6))


@BUFFERS
def test_a_state_is_a_snapshot(kind: type[Buffer], tmp_path: Path) -> None:
    buffer = filled(kind, [0, 1, 2, 3], 5)
    state = buffer.state_dict()
    save_file(state, tmp_path / "at_once")
    feed(buffer, random_labels(200, 0), [10] * 20, first=4, logits=False)
    buffer.draw(2)
    for name, then in load_file(tmp_path / "at_once").items():
        assert torch.equal(state[name], then), name


# Mistakes


@BUFFERS
@pytest.mark.parametrize("capacity", [0, -3, 2.5, True])
def test_a_capacity_that_is_no_positive_integer(kind: type[Buffer], capacity: int) -> None:
    with pytest.raises(ConfigError, match=r"capacity must be an integer of 1 or more"):
        kind(capacity, num_classes=1, seed=0)


@BUFFERS
def test_a_capacity_below_the_number_of_classes(kind: type[Buffer]) -> None:
    with pytest.raises(ConfigError, match=r"capacity 9 .* 10 classes.*Use a capacity of 10 or more"):
        kind(9, num_classes=10, seed=0)


@BUFFERS
def test_nothing_comes_from_an_empty_buffer(kind: type[Buffer]) -> None:
    buffer = kind(5, num_classes=2, seed=0)
    feed(buffer, torch.empty(0, dtype=torch.int64), [0])
    for take in (lambda: buffer.draw(1), lambda: buffer.draw_balanced(1), buffer.everything):
        with pytest.raises(DataError, match="empty buffer"):
            take()


def test_a_count_that_is_no_positive_integer() -> None:
    buffer = filled(ReservoirBuffer, [0, 1], 5)
    for count in (0, -1):
        with pytest.raises(ConfigError, match="count must be an integer of 1 or more"):
            buffer.draw(count)
        with pytest.raises(ConfigError, match="count must be an integer of 1 or more"):
            buffer.draw_balanced(count)


NUMBERS, LABELS = torch.arange(3), torch.tensor([0, 1, 0])
IMAGES = batch(NUMBERS, LABELS)[0]
BAD = {
    "logits only now": ((IMAGES, LABELS, NUMBERS, torch.zeros(3, K)), "without logits; a batch came with logits"),
    "float images": ((IMAGES.float(), LABELS, NUMBERS), r"images of type torch.uint8.*torch.float32"),
    "a row too few": ((IMAGES[:2], LABELS, NUMBERS), r"3 labels.*\(2, 3, 2, 2\)"),
    "other pixels": ((IMAGES[..., :1], LABELS, NUMBERS), r"images of shape \(3, 2, 2\).*\(3, 2, 1\)"),
    "a label too high": ((IMAGES, LABELS + K, NUMBERS), "0 to 3.*4 to 5"),
    "a label below zero": ((IMAGES, LABELS - 1, NUMBERS), "0 to 3.*-1 to 0"),
    "float tasks": ((IMAGES, LABELS, NUMBERS.float()), "tasks of type torch.int64"),
}


@BUFFERS
@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_a_batch_that_does_not_fit_is_named_and_leaves_the_buffer_alone(
    kind: type[Buffer], arguments: tuple[Tensor, ...], message: str
) -> None:
    buffer = kind(5, num_classes=K, seed=0)
    feed(buffer, torch.tensor([0, 1, 2, 3, 0, 1]), [6], logits=False)
    before = buffer.state_dict()
    with pytest.raises(DataError, match=message):
        buffer.add(*arguments)
    after = buffer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_logits_that_stop_coming() -> None:
    buffer = ReservoirBuffer(5, num_classes=K, seed=0)
    feed(buffer, LABELS, [3], logits=True)
    with pytest.raises(DataError, match=r"with logits; a batch came without logits.*every call"):
        feed(buffer, LABELS, [3], logits=False)


def test_a_state_of_another_buffer_is_refused() -> None:
    state = filled(ReservoirBuffer, [0, 1], 5).state_dict()
    with pytest.raises(RecordError, match=r"capacity is 6; the state is of one of capacity 5"):
        ReservoirBuffer(6, num_classes=2, seed=0).load_state_dict(state)
    del state["tasks"]
    with pytest.raises(RecordError, match="incomplete or of another version"):
        ReservoirBuffer(5, num_classes=2, seed=0).load_state_dict(state)
