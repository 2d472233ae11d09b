"""``fednorm bench continual --layers``: what a normalization layer costs, beside PyTorch's own batch normalization.

Forward and backward pass of a training step over every normalization layer of a slim ResNet-18, at the joint batch of
online learning: new samples of the last of five tasks, then as many from memory, of all of them, announced as the
training step announces them. Layers take turns, and of each one's passes the fastest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.bench.continual import THREADS, machine, machine_note, require_repeats
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.report.table import Table
from fednorm.rng import torch_seeded
from fednorm.spec import HookedLayer, Norm
from fednorm.threads import torch_threads

BATCH = 20
NUM_TASKS = 5
PASSES = 5
"""Passes of each layer in a repetition."""

LAYOUTS: Mapping[str, torch.memory_format] = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}
"""Memory layouts; training on a stream uses the first."""

BASELINE = "nn.BatchNorm2d"

_NORMS: Mapping[str, Mapping[str, Any]] = {
    "adab2n": {"corrected": False},
    "adab2n corrected": {"corrected": True},
    "continual_norm": {},
    "task_balanced_norm": {},
    "batch_renorm": {},
    "switch_norm": {},
    "batch_norm_corrected": {},
}

Shape = tuple[int, ...]


def layer_shapes() -> list[Shape]:
    """Return the input's shape of every normalization layer of the slim ResNet-18, in the order of the forward pass."""
    model = make_model("resnet18", make_norm("batch_norm"), num_classes=10, width=20)
    shapes: list[Shape] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _module, inputs, _output: shapes.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        model(torch.zeros(BATCH, 3, 32, 32))
    return shapes


def norms() -> dict[str, Norm]:
    """Return the methods that are timed, fitted to the stream, by the names of the rows."""
    made = {name: make_norm(name.split()[0], options) for name, options in _NORMS.items()}
    return {name: norm.for_stream(num_tasks=NUM_TASKS, batch_ratio=1) for name, norm in made.items()}


def batch_tasks() -> Tensor:
    """Return the task of every sample: half of the last task, then the tasks in turn."""
    half = BATCH // 2
    return torch.cat([torch.full((half,), NUM_TASKS - 1), torch.arange(half) % NUM_TASKS])


class LayerPass:
    """A layer with an input and a gradient of its output, for one training pass after the other.

    Args:
        layer: The layer.
        x: The input; a leaf of the graph.
        grad: The gradient of the output.
        tasks: The task of every sample.
    """

    def __init__(self, layer: nn.Module, x: Tensor, grad: Tensor, tasks: Tensor) -> None:
        self.layer, self.x, self.grad, self.tasks = layer.train(), x.requires_grad_(), grad, tasks

    def __call__(self) -> None:
        """Pass forward and backward, a penalty included, once; gradients are taken anew."""
        layer = self.layer
        self.x.grad = None
        layer.zero_grad()
        penalty = None
        if isinstance(layer, HookedLayer):
            layer.set_tasks(self.tasks, NUM_TASKS)
        outputs, grads = [layer(self.x)], [self.grad]
        if isinstance(layer, HookedLayer) and (penalty := layer.penalty()) is not None:
            outputs.append(penalty)
            grads.append(torch.ones_like(penalty))
        torch.autograd.backward(outputs, grads)


def fastest_pass(step: Callable[[], None], passes: int = PASSES) -> float:
    """Return the processor seconds of the fastest of some passes, after one to warm up."""
    step()
    found = []
    for _ in range(passes):
        before = time.process_time()
        step()
        found.append(time.process_time() - before)
    return min(found)


def bench_layers(repeats: int, on_line: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Time normalization layers beside ``nn.BatchNorm2d``.

    Args:
        repeats: How often each layer has its turn, of :data:`PASSES` passes.
        on_line: Is told what has been measured, a line at a time.

    Returns:
        A document for JSON: ``machine``, ``shapes`` of the inputs, and ``layouts`` by name: for each norm ``cpu_ms``,
        forward and backward through all layers, and ``ratio`` to ``nn.BatchNorm2d`` in the same layout.

    Raises:
        ConfigError: ``repeats`` is less than 1.
    """
    require_repeats(repeats)
    shapes = layer_shapes()
    layouts = {}
    with torch_threads(THREADS):
        for name, layout in LAYOUTS.items():
            seconds = _time_layers(shapes, layout, repeats)
            layouts[name] = {
                norm: {"cpu_ms": 1000 * spent, "ratio": spent / seconds[BASELINE]} for norm, spent in seconds.items()
            }
            if on_line:
                on_line(f"{name}: {1000 * seconds[BASELINE]:.2f} CPU ms in {BASELINE}")
    return {
        "kind": "bench layers",
        "machine": machine(),
        "repeats": repeats,
        "shapes": [list(shape) for shape in shapes],
        "layouts": layouts,
    }


def _time_layers(shapes: Sequence[Shape], layout: torch.memory_format, repeats: int) -> dict[str, float]:
    """Return the processor seconds of each norm, summed over the layers."""
    total = dict.fromkeys((BASELINE, *_NORMS), 0.0)
    for shape in shapes:
        best = dict.fromkeys(total, float("inf"))
        passes = dict(_passes(shape, layout))
        for _ in range(repeats):
            for name, step in passes.items():
                best[name] = min(best[name], fastest_pass(step))
        total = {name: spent + best[name] for name, spent in total.items()}
    return total


def _passes(shape: Shape, layout: torch.memory_format) -> Iterator[tuple[str, LayerPass]]:
    channels, tasks = shape[1], batch_tasks()
    layers = {BASELINE: nn.BatchNorm2d(channels)} | {name: norm.layer(channels, 2) for name, norm in norms().items()}
    with torch_seeded(1, "bench", "layers"):
        x, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    for name, layer in layers.items():
        yield name, LayerPass(layer, x.clone(), grad, tasks)


def layers_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a result of :func:`bench_layers`, a row a norm."""
    layouts: Mapping[str, Mapping[str, Mapping[str, float]]] = result["layouts"]
    names = list(next(iter(layouts.values())))
    rows = tuple(
        (
            name,
            *(
                cell
                for costs in layouts.values()
                for cell in (f"{costs[name]['cpu_ms']:.2f}", f"{costs[name]['ratio']:.2f}×")
            ),
        )
        for name in names
    )
    columns = ("layer", *(head for layout in layouts for head in (f"{layout}: CPU ms", f"{layout}: ratio")))
    notes = (
        f"Forward and backward through the {len(result['shapes'])} normalization layers of a slim ResNet-18 (32×32, "
        f"{BATCH} images of {NUM_TASKS} tasks), training, penalties included; ratio to {BASELINE} in the same layout. "
        f"Of each layer the fastest of {result['repeats']}×{PASSES} passes.",
        machine_note(result["machine"]),
    )
    return Table("Normalization layers", columns, rows, notes)
