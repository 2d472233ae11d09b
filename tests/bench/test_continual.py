"""The learner against the bare loop, the bare loop against the formula in float64, and what is made of the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from machine_code import require_compiler
from torch import Tensor, nn
from torch.nn import functional

from fednorm.bench import avalanche_apps, continual
from fednorm.bench.bare_stream import PaddedImages, RowReservoir, experience_replay_ace
from fednorm.bench.continual import (
    STREAM_ENGINES,
    StepClock,
    StepCost,
    bench_continual,
    bench_table,
    fastest,
    run_avalanche,
    run_bare,
    run_fednorm,
)
from fednorm.bench.stream_case import STREAM_CASES, StreamCase, stream_case_of
from fednorm.errors import ConfigError, UnknownNameError
from fednorm.rng import stream_seed

SMALL = StreamCase(
    name="small",
    model="digits_cnn",
    width=4,
    image_size=8,
    warmup=34,
    train=26,
    augment="none",
    batch_size=8,
    memory_size=12,
)
"""Its memory overflows, and its batches do not divide the experiences: the last of each has two new images."""


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_learner_and_bare_loop_reach_the_same_bits(augment: str) -> None:
    case = replace(SMALL, augment=augment)
    bare, ours = run_bare(case), run_fednorm(case)
    assert set(bare.tensors) == set(ours.tensors)
    start = case.workbench().model.state_dict()
    for key, tensor in bare.tensors.items():
        assert not torch.equal(tensor, start[key]), f"{key} was never trained"
        torch.testing.assert_close(ours.tensors[key], tensor, rtol=0, atol=0)
    assert len(bare.cpu) == len(bare.wall) == len(ours.cpu) == len(ours.wall) == case.steps == 4


def reservoir(offered: list[list[int]], capacity: int, seed: int) -> Iterator[tuple[list[int], torch.Generator]]:
    """Yield what algorithm R holds before each batch, a sample at a time, and the generator that draws from it."""
    insert, draw = (torch.Generator().manual_seed(stream_seed(seed, "buffer", name)) for name in ("insert", "draw"))
    held: list[int] = []
    seen = 0
    for batch in offered:
        yield held, draw
        for row in batch:
            seen += 1
            if len(held) < capacity:
                held.append(row)
                continue
            slot = int(torch.rand((), dtype=torch.float64, generator=insert) * seen)
            if slot < capacity:
                held[slot] = row


def masked_loss(logits: Tensor, labels: list[int], allowed: set[int]) -> Tensor:
    """The mean over samples of -log of the softmax among some classes."""
    columns = sorted(allowed)
    losses = [torch.logsumexp(row[columns], 0) - row[label] for row, label in zip(logits, labels, strict=True)]
    return torch.stack(losses).mean()


def test_bare_loop_is_er_ace() -> None:
    """Two experiences on a linear model, in float64, the classes and the memory held in Python's sets and lists."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    images = torch.randint(0, 256, (34, 3, 2, 2), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2] * 5 + [0] + [3, 4] * 8 + [3, 5])
    experiences = [torch.arange(16), torch.arange(16, 34)]
    size, memory_size, rate, seed = 4, 6, 0.2, 5
    weight, bias = (p.detach().double().requires_grad_() for p in model.parameters())

    batches = []
    for number, rows in enumerate(experiences):
        generator = torch.Generator().manual_seed(stream_seed(seed, "experience", number, "epoch", 0, "order"))
        order = rows[torch.randperm(len(rows), generator=generator)].tolist()
        batches += [(number, order[i : i + size]) for i in range(0, len(order), size)]
    x = (images.double() / 127.5 - 1).flatten(1)
    seen: set[int] = set()
    masks = []
    for (number, new), (held, draw) in zip(
        batches, reservoir([rows for _, rows in batches], memory_size, seed), strict=True
    ):
        targets = labels[new].tolist()
        present = set(targets)
        seen |= present
        allowed = set(range(6)) - (seen - present) if number else set(range(6))
        masks.append(allowed)
        loss = masked_loss(x[new] @ weight.T + bias, targets, allowed)
        if number:
            old = [held[i] for i in torch.randperm(len(held), generator=draw)[: len(new)].tolist()]
            loss = loss + masked_loss(x[old] @ weight.T + bias, labels[old].tolist(), set(range(6)))
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            for parameter, gradient in zip((weight, bias), gradients, strict=True):
                parameter -= rate * gradient
    assert {3, 4, 5} <= masks[4], "classes that were never seen take part"
    assert not masks[4] & {0, 1, 2}

    steps: list[int] = []
    experience_replay_ace(
        model,
        PaddedImages(images, padding=0, flip=False, seed=seed),
        labels,
        experiences,
        num_classes=6,
        batch_size=size,
        memory_size=memory_size,
        learning_rate=rate,
        seed=seed,
        on_experience=steps.clear,
        on_step=lambda: steps.append(1),
    )
    assert len(steps) == 5, "the second experience's"
    torch.testing.assert_close(model[1].weight.double(), weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].bias.double(), bias.detach(), rtol=1e-5, atol=1e-6)


def test_bare_augmentation_crops_and_mirrors() -> None:
    images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    rows = torch.tensor([4, 0, 4])
    generator = torch.Generator().manual_seed(stream_seed(3, "augment", 7))
    top, left = (torch.randint(9, (3, 1), generator=generator).flatten().tolist() for _ in range(2))
    coins = torch.randint(2, (3, 1), generator=generator).flatten().tolist()
    for flip in (False, True):
        found = PaddedImages(images, padding=4, flip=flip, seed=3).batch(rows, 7)
        assert found.is_contiguous(memory_format=torch.channels_last)
        for i, row in enumerate(rows.tolist()):
            black = functional.pad(images[row], [4] * 4)
            cropped = black[:, top[i] : top[i] + 6, left[i] : left[i] + 6]
            if flip and coins[i]:
                cropped = cropped.flip(2)
            assert torch.equal(found[i], cropped.float() / 127.5 - 1)


def test_bare_reservoir_keeps_every_row_equally_often() -> None:
    counts = torch.zeros(20)
    for seed in range(600):
        memory = RowReservoir(5, seed)
        for batch in torch.arange(20).split(3):
            memory.add(batch)
        drawn = memory.draw(9)
        assert sorted(drawn.tolist()) == sorted(memory.rows.tolist()), "all of them, there being fewer than nine"
        counts[drawn] += 1
    # Each of 20 rows is held with probability 1/4: 150 times, with a standard deviation of 10.6.
    assert (counts - 150).abs().max() < 45


def batch_sizes(monkeypatch: pytest.MonkeyPatch, case: StreamCase, **engine: Any) -> tuple[StepCost, list[int]]:
    """Run a strategy of Avalanche's; return its cost and the sizes of all forward passes."""
    sizes: list[int] = []
    make = avalanche_apps.make_strategy

    def watched(name: str, case: StreamCase, model: nn.Module) -> Any:
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        return make(name, case, model)

    monkeypatch.setattr(avalanche_apps, "make_strategy", watched)
    return run_avalanche(case, **engine), sizes


CIFAR_LIKE = replace(SMALL, warmup=32, train=24, augment="crop_flip")


@pytest.mark.parametrize("online", [False, True])
def test_avalanche_er_ace_replays_as_many_as_are_new(online: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cost, sizes = batch_sizes(monkeypatch, CIFAR_LIKE, strategy="er_ace", online=online)
    assert len(cost.cpu) == CIFAR_LIKE.steps == 3
    assert sizes[-6:] == [8] * 6, "two passes a step in the second experience"
    # Online, every batch but the first is an experience after the first, and is replayed to.
    assert len(sizes) == (4 + 3) * 2 - 1 if online else 4 + 3 * 2


def test_avalanche_replay_has_one_pass_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, sizes = batch_sizes(monkeypatch, CIFAR_LIKE, strategy="replay", online=False)
    assert len(cost.cpu) == 3
    assert sizes[:4] == [8] * 4
    assert all(8 < size <= 16 for size in sizes[4:])
    assert sizes[4] == 16


def test_avalanche_trains_on_the_cases_images(recwarn: pytest.WarningsRecorder) -> None:
    stream = CIFAR_LIKE.stream()
    plain, augmented = (
        avalanche_apps.make_experiences(case, stream, online=False)[1].dataset for case in (SMALL, CIFAR_LIKE)
    )
    source = stream.experiences[1].train
    images, labels = source.batch(torch.arange(len(source)))
    image, label, task = plain[3]
    assert torch.equal(image, images[3].float() / 127.5 - 1)
    assert (label, task) == (labels[3], 0)
    padded = functional.pad(image, [4] * 4, value=-1.0)
    crops = [
        torch.equal(crop, found)
        for found in (augmented[3][0],)
        for y in range(9)
        for x in range(9)
        for crop in (padded[:, y : y + 8, x : x + 8], padded[:, y : y + 8, x : x + 8].flip(2))
    ]
    assert any(crops)
    before = torch.random.get_rng_state()
    run_avalanche(CIFAR_LIKE, strategy="er_ace", online=True)
    assert torch.equal(torch.random.get_rng_state(), before), "the process-wide generator was used"
    assert not recwarn.list


def test_every_repetition_of_avalanche_does_the_same_steps() -> None:
    one, other = (run_avalanche(CIFAR_LIKE, strategy="er_ace", online=False).tensors for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_clock_gives_the_last_step_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 2.0, 5.0, 5.5, 7.0, 9.0])
    monkeypatch.setattr(continual.time, "process_time", lambda: next(times))
    clock = StepClock()
    clock.start()
    clock.tick()
    clock.start()
    clock.after_training_iteration(None)
    clock.tick()
    clock.stop()
    assert clock.cpu == [5.0, 5.5, 9.0]
    assert len(clock.wall) == 3


def test_fastest_is_each_steps_own() -> None:
    assert fastest([(1.0, 9.0, 4.0), (3.0, 2.0, 5.0)]) == (1.0 + 2.0 + 4.0) / 3


def test_cases_are_what_the_table_says() -> None:
    resnet, small = STREAM_CASES["resnet18-slim"], stream_case_of("small-cnn")
    assert (resnet.batch_size, resnet.memory_size, resnet.augment) == (10, 500, "crop_flip")
    assert resnet.summary.startswith("resnet18 of width 20 with batch_norm, 32×32, 10 new and 10 memory images a step")
    assert all(case.warmup >= case.memory_size for case in (resnet, small)), "the memory is full when timing begins"
    stream = SMALL.stream()
    rows = torch.cat([part.index for experience in stream for part in (experience.train, experience.test)])
    assert sorted(rows.tolist()) == list(range(34 + 26 + 2 * 10)), "every image is in one experience and one split"
    for experience in stream:
        assert set(experience.train.targets.tolist()) == set(experience.classes)
    assert torch.equal(stream.experiences[0].train.images, SMALL.stream().experiences[0].train.images)
    bench = SMALL.workbench()
    assert bench.config.learner.options == {"memory_size": 12}
    assert bench.norm.__class__.__name__ == "BatchNorm"
    assert (bench.config.train.epochs, bench.config.train.augment) == (1, "none")


def fake(runs: list[tuple[float, ...]], weight: float) -> Callable[[StreamCase], StepCost]:
    coming = iter(runs)

    def run(case: StreamCase) -> StepCost:
        del case
        cpu = next(coming)
        return StepCost(cpu, tuple(2 * seconds for seconds in cpu), {"w": torch.tensor([weight])})

    return run


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    fakes = {
        "bare": fake([(0.002, 0.001), (0.001, 0.004)], 1.25),
        "fednorm": fake([(0.002, 0.003), (0.003, 0.001)], 1.0),
        "avalanche": fake([(0.004, 0.008), (0.005, 0.009)], 7.0),
    }
    monkeypatch.setattr(continual, "STREAM_ENGINES", fakes)
    monkeypatch.setattr(continual, "stream_case_of", lambda name: SMALL if name == "small" else pytest.fail(name))
    lines: list[str] = []
    document = bench_continual(["small"], ["avalanche", "bare"], 2, lines.append)
    assert lines[:2] == [
        "small, bare, run 1 of 2: 1.50 CPU ms a step",
        "small, fednorm, run 1 of 2: 2.50 CPU ms a step",
    ], "engines take turns"
    assert len(lines) == 6
    return document


def test_document_has_ratios_of_the_fastest_steps(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result)) == result
    engines = result["cases"]["small"]["engines"]
    assert list(engines) == ["bare", "fednorm", "avalanche"]
    expected = {
        "cpu_ms": [1.0, 1.5, 6.0],
        "wall_ms": [2.0, 3.0, 12.0],
        "ratio": [1.0, 1.5, 6.0],
        "overhead_ms": [0.0, 0.5, 5.0],
        "to_fednorm": [2 / 3, 1.0, 4.0],
    }
    for key, values in expected.items():
        assert [found[key] for found in engines.values()] == pytest.approx(values), key
    assert [found["difference"] for found in engines.values()] == [0.25, 0.0, None]
    assert engines["bare"]["all_cpu_ms"] == pytest.approx([1.5, 2.5])
    assert result["machine"]["versions"]["avalanche-lib"]


def test_table_says_what_the_document_says(result: dict[str, Any]) -> None:
    table = bench_table(result)
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[0] == ("small: bare", "1.00", "2.00", "1.00×", "+0.00", "0.67×", "2.5e-01")
    assert table.rows[1] == ("small: fednorm", "1.50", "3.00", "1.50×", "+0.50", "1.00×", "0")
    assert table.rows[2] == ("small: avalanche", "6.00", "12.00", "6.00×", "+5.00", "4.00×", "–")
    assert SMALL.summary in table.notes[0]


def test_without_the_bare_loop_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continual, "STREAM_ENGINES", {"fednorm": fake([(1.0, 2.0)], 1.0)})
    monkeypatch.setattr(continual, "stream_case_of", lambda _: SMALL)
    document = bench_continual(["small"], [], 1)
    found = document["cases"]["small"]["engines"]["fednorm"]
    assert found["ratio"] is None
    assert found["overhead_ms"] is None
    assert bench_table(document).rows[0][3:5] == ("–", "–")


def test_mistakes_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continual, "STREAM_ENGINES", dict.fromkeys(STREAM_ENGINES, lambda _: pytest.fail("ran")))
    with pytest.raises(ConfigError, match=r"against must be one of bare.*got 'avalanch'. Did you mean 'avalanche'"):
        bench_continual(["small-cnn"], ["avalanch"], 1)
    with pytest.raises(UnknownNameError, match=r"no benchmark case named 'small'. Did you mean 'small-cnn'"):
        bench_continual(["small"], ["bare"], 1)
    with pytest.raises(ConfigError, match="repeats must be at least 1; got 0"):
        bench_continual(["small-cnn"], ["bare"], 0)


@pytest.mark.slow
def test_a_compiled_case_is_trained_to_the_same_weights() -> None:
    require_compiler()
    case = replace(SMALL, warmup=24, train=16)  # no batches of two images, on which a rounding error becomes a hundred
    plain, compiled = (STREAM_ENGINES[name](case).tensors for name in ("adab2n", "adab2n-compiled"))
    for key, tensor in plain.items():
        torch.testing.assert_close(compiled[key], tensor, rtol=1e-3, atol=1e-4)
