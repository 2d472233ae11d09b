"""What is timed of a normalization layer: the shapes, the pass, and what is made of the seconds."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from fednorm.bench import layers
from fednorm.bench.layers import LAYOUTS, LayerPass, bench_layers, fastest_pass, layer_shapes, layers_table
from fednorm.errors import ConfigError
from fednorm.norms import make_norm
from fednorm.norms.adab2n import AdaB2NLayer


def test_shapes_are_those_of_a_slim_resnet18() -> None:
    """The stem and four blocks' norms of w channels at 32×32, then two stages' five of 2w, 4w, 8w at half the size."""
    expected = [(20, 20 * 2**stage, 32 // 2**stage, 32 // 2**stage) for stage in range(4)]
    assert Counter(layer_shapes()) == dict.fromkeys(expected, 5)
    assert layer_shapes()[0] == expected[0]


def test_batch_has_every_task_and_new_samples_first() -> None:
    tasks = layers.batch_tasks()
    assert tasks.tolist() == [4] * 10 + [0, 1, 2, 3, 4] * 2
    made = layers.norms()
    assert made["task_balanced_norm"].batch_ratio == 1  # type: ignore[attr-defined]
    parts = made["task_balanced_norm"].layer(4, 2)
    parts.set_tasks(tasks, layers.NUM_TASKS)  # type: ignore[operator]
    assert parts.division(20) == (10, 2), "the layer is timed at work"  # type: ignore[operator]
    corrected = [made[name].corrected for name in ("adab2n", "adab2n corrected")]  # type: ignore[attr-defined]
    assert corrected == [False, True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_takes_all_gradients_once(layout: str) -> None:
    """Twice in a row it leaves the gradients of loss = sum(y * grad) + penalty, the tasks announced."""
    torch.manual_seed(0)
    x, grad = (torch.randn(20, 6, 4, 4).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    timed, other = (make_norm("adab2n", {"lambd": 0.5}).layer(6, 2) for _ in range(2))
    step = LayerPass(timed, x.clone(), grad, layers.batch_tasks())
    for _ in range(2):
        step()
        assert isinstance(other, AdaB2NLayer)
        other.zero_grad()
        other.set_tasks(layers.batch_tasks(), layers.NUM_TASKS)
        leaf = x.clone().requires_grad_()
        y = other(leaf)
        penalty = other.penalty()
        assert penalty is not None
        ((y * grad).sum() + penalty).backward()
        assert step.x.grad is not None
        torch.testing.assert_close(step.x.grad, leaf.grad, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(timed.parameters(), other.parameters(), strict=True):
            assert theirs.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert int(timed.num_batches_tracked) == 2


def test_a_pass_needs_no_hooks() -> None:
    layer = nn.BatchNorm2d(3)
    grad = torch.randn(4, 3, 2, 2)
    LayerPass(layer, torch.randn(4, 3, 2, 2), grad, layers.batch_tasks())()
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)))


def test_fastest_pass_leaves_the_first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    durations = iter([0.5, 4.0, 2.0, 3.0])
    monkeypatch.setattr(layers.time, "process_time", lambda: now[0])
    assert fastest_pass(lambda: now.__setitem__(0, now[0] + next(durations)), passes=3) == 2.0


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two shapes; a pass takes a second in the baseline, and one more for each norm after it."""
    monkeypatch.setattr(layers, "layer_shapes", lambda: [(20, 4, 2, 2), (20, 8, 1, 1)])
    seconds = {name: 1.0 + i for i, name in enumerate((layers.BASELINE, *layers.norms()))}

    def steps(shape: tuple[int, ...], layout: torch.memory_format) -> Any:
        slow = 3.0 if layout is torch.contiguous_format else 1.0
        return [(name, slow * spent * shape[1]) for name, spent in seconds.items()]

    monkeypatch.setattr(layers, "_passes", steps)
    monkeypatch.setattr(layers, "fastest_pass", lambda spent: spent)
    return bench_layers(2)


def test_document_has_sums_and_ratios(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result)) == result
    assert result["layouts"]["channels_last"]["nn.BatchNorm2d"] == {"cpu_ms": 12_000.0, "ratio": 1.0}
    assert result["layouts"]["channels_last"]["adab2n"] == {"cpu_ms": 24_000.0, "ratio": 2.0}
    assert result["layouts"]["contiguous"]["adab2n corrected"] == {"cpu_ms": 108_000.0, "ratio": 3.0}


def test_table_says_what_the_document_says(result: dict[str, Any]) -> None:
    table = layers_table(result)
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[1] == ("adab2n", "24000.00", "2.00×", "72000.00", "2.00×")
    assert "2 normalization layers" in table.notes[0]


def test_no_repetition_is_refused() -> None:
    with pytest.raises(ConfigError, match="repeats must be at least 1; got 0"):
        bench_layers(0)


def test_a_real_measurement_has_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "layer_shapes", lambda: [(20, 20, 4, 4)])
    found = bench_layers(1)["layouts"]
    assert list(found) == ["channels_last", "contiguous"]
    for costs in found.values():
        assert list(costs) == ["nn.BatchNorm2d", *layers.norms()]
        assert costs["switch_norm"]["cpu_ms"] > costs["nn.BatchNorm2d"]["cpu_ms"] > 0
