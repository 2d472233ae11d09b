"""``fednorm bench layers``: what each registered norm costs, beside PyTorch's own layer on the same tensors.

Forward and backward pass of a training step, on feature maps beside ``nn.BatchNorm2d`` and on tokens beside
``nn.LayerNorm``, for batches of 1, 32 and 256. A method that reparameterizes weights is measured with its convolution,
beside ``nn.Conv2d`` and ``nn.BatchNorm2d``; one that brings an attention, as that, beside softmax attention.

Layers take turns, and of each one's passes the fastest counts. Memory is the most that a pass has allocated at a time,
its inputs and parameters not counted: what PyTorch's allocator says, not the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.bench.continual import THREADS, machine, machine_note, require_repeats
from fednorm.bench.layers import NUM_TASKS, PASSES, LayerPass, fastest_pass
from fednorm.cards import NORMS
from fednorm.errors import FedNormError
from fednorm.report.table import Table
from fednorm.rng import torch_seeded
from fednorm.spec import Norm
from fednorm.threads import torch_threads

BATCHES = (1, 32, 256)
MAPS = (64, 16, 16)
"""Channels, height and width of the feature maps: a ResNet-18's second stage, for images of 32 × 32."""
TOKENS = (65, 192)
"""Tokens and features of a ViT-Tiny with patches of 4, for images of 32 × 32."""
HEADS = 3
GRID = (8, 8)
FAR = 2.0
"""A ratio beyond which a table names the layer."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """What stands somewhere in a network, and what PyTorch would have there.

    Attributes:
        base: PyTorch's, in words.
        module: The method's; a new one at each call.
        plain: PyTorch's; a new one at each call.
    """

    base: str
    module: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]


class OfTokens(nn.Module):
    """A layer for (N, C, L) as a transformer calls it: its tokens are (N, L, C).

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens normalized, shape (N, L, C)."""
        y: Tensor = self.layer(x.transpose(1, 2)).transpose(1, 2)
        return y


def place_on_maps(norm: Norm) -> Place | None:
    """Return what a method puts after a convolution's feature maps; None where that is nothing of its own."""
    channels = MAPS[0]
    if _stands_beside(norm):
        return None

    def layer() -> nn.Module:
        return norm.layer(channels, 2)

    def with_convolution() -> nn.Module:
        return nn.Sequential(norm.conv(channels, channels, 3, padding=1, bias=False), layer())

    def plain() -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    if norm.conv_layer is not nn.Conv2d:
        return Place("nn.Conv2d, nn.BatchNorm2d", with_convolution, plain)
    if isinstance(layer(), nn.Identity):
        return None
    return Place("nn.BatchNorm2d", layer, lambda: nn.BatchNorm2d(channels))


def place_on_tokens(norm: Norm) -> Place | None:
    """Return what a method puts where a transformer has layer normalization, or its attention; None for neither."""
    features = TOKENS[1]
    if getattr(norm, "brings_attention", False):
        plain = NORMS["none"].made()
        return Place(
            "softmax attention",
            lambda: norm.attention(features, HEADS, GRID),
            lambda: plain.attention(features, HEADS, GRID),
        )

    if _stands_beside(norm):
        return None

    def layer() -> nn.Module:
        return norm.token_layer(features) if hasattr(norm, "token_layer") else norm.layer(features, 1)

    if isinstance(layer(), nn.Identity):
        return None
    return Place("nn.LayerNorm", lambda: OfTokens(layer()), lambda: nn.LayerNorm(features))


def _stands_beside(norm: Norm) -> bool:
    """Return whether a method's layers are another method's, which is measured under its own name."""
    return getattr(norm, "normalizer", norm) is not norm


KINDS: Mapping[str, tuple[Shape, Callable[[Norm], Place | None]]] = {
    "maps": (MAPS, place_on_maps),
    "tokens": (TOKENS, place_on_tokens),
}
"""What layers are given: the shape of a sample, and what a method puts there."""


def bench_norms(names: Sequence[str], repeats: int, on_line: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure norms beside PyTorch's own layers.

    Args:
        names: The norms; each is measured with its default options.
        repeats: How often each layer has its turn, of :data:`~fednorm.bench.layers.PASSES` passes.
        on_line: Is told what has been measured, a line at a time.

    Returns:
        A document for JSON: ``machine``, ``repeats`` and ``cases``, each with its ``kind``, ``batch``, the ``shape`` of
        the inputs, ``norms`` by name (``base``; ``cpu_ms`` and ``time_ratio`` to the base; ``peak_bytes`` and
        ``memory_ratio``), ``bases`` likewise, and ``refused`` by name, with the reason.

    Raises:
        ConfigError: ``repeats`` is less than 1.
        UnknownNameError: There is no norm of a name.
    """
    require_repeats(repeats)
    norms = {name: NORMS[name].made().for_stream(num_tasks=NUM_TASKS, batch_ratio=1) for name in names}
    cases = []
    with torch_threads(THREADS):
        for kind in KINDS:
            for batch in BATCHES:
                cases.append(case := measure(kind, batch, norms, repeats))
                if on_line:
                    bases = ", ".join(f"{base} {cost['cpu_ms']:.2f} ms" for base, cost in case["bases"].items())
                    on_line(f"{kind}, batch {batch}: {bases or 'nothing to measure'}")
    return {"kind": "bench norms", "machine": machine(), "repeats": repeats, "cases": cases}


def measure(kind: str, batch: int, norms: Mapping[str, Norm], repeats: int) -> dict[str, Any]:
    """Return what norms cost on one kind of input, for batches of one size; see :func:`bench_norms`."""
    sample, place_of = KINDS[kind]
    shape = (batch, *sample)
    passes, base_of, refused = dict[str, LayerPass](), dict[str, str](), dict[str, str]()
    for name, norm in norms.items():
        try:
            place = place_of(norm)
            if place is None:
                continue
            step = made_pass(place.module, shape)
            step()
        except (FedNormError, ValueError) as error:
            refused[name] = " ".join(str(error).split())
            continue
        base_of[name], passes[name] = place.base, step
        if place.base not in passes:
            passes[place.base] = made_pass(place.plain, shape)
    seconds, memory = dict.fromkeys(passes, float("inf")), {name: peak_bytes(step) for name, step in passes.items()}
    for _ in range(repeats):
        for name, step in passes.items():
            seconds[name] = min(seconds[name], fastest_pass(step))

    def cost(name: str) -> dict[str, Any]:
        return {"cpu_ms": 1000 * seconds[name], "peak_bytes": memory[name]}

    return {
        "kind": kind,
        "batch": batch,
        "shape": list(shape),
        "bases": {base: cost(base) for base in dict.fromkeys(base_of.values())},
        "norms": {
            name: {
                "base": base,
                **cost(name),
                "time_ratio": seconds[name] / seconds[base],
                "memory_ratio": memory[name] / memory[base],
            }
            for name, base in base_of.items()
        },
        "refused": refused,
    }


def made_pass(make: Callable[[], nn.Module], shape: Shape) -> LayerPass:
    """Return a training pass of a new module, maps in the layout in which training has them."""
    with torch_seeded(1, "bench", "norms"):
        module, x, grad = make(), torch.randn(shape), torch.randn(shape)
    if len(shape) == 4:
        module = module.to(memory_format=torch.channels_last)
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return LayerPass(module, x, grad, torch.arange(shape[0]) % NUM_TASKS)


def peak_bytes(step: LayerPass) -> int:
    """Return the most bytes that one pass has allocated at a time, after one to warm up."""
    step()
    step.x.grad = None  # what was allocated before is not given back within
    step.layer.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now, most = 0, 0
    for change in _changes(profiler):
        now += change
        most = max(most, now)
    return most


def _changes(profiler: torch.profiler.profile) -> Iterator[int]:
    """Yield the bytes that were allocated, and as negative numbers those given back, in order."""
    results = profiler.profiler.kineto_results if profiler.profiler else None
    events: list[Any] = [event for event in results.events() if event.name() == "[memory]"] if results else []
    yield from (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def norms_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a result of :func:`bench_norms`, a row a norm."""
    cases: Sequence[Mapping[str, Any]] = result["cases"]
    names = dict.fromkeys(name for case in cases for name in (*case["norms"], *case["refused"]))
    rows = tuple((_marked(name), *(_cell(case, name) for case in cases)) for name in names)
    columns = ("norm", *(f"{case['kind']}, batch {case['batch']}" for case in cases))
    far = [name for name in names if any(_is_far(case, name) for case in cases)]
    bases = dict.fromkeys(cost["base"] for case in cases for cost in case["norms"].values())
    others = {
        base: [name for name in names if any(case["norms"].get(name, {}).get("base") == base for case in cases)]
        for base in bases
        if base not in ("nn.BatchNorm2d", "nn.LayerNorm")
    }
    shapes = f"maps of {' × '.join(map(str, MAPS))}, {TOKENS[0]} tokens of {TOKENS[1]} features"
    notes = (
        f"Time, and the most memory allocated, of a forward and backward pass in training, as ratios to nn.BatchNorm2d "
        f"on maps and to nn.LayerNorm on tokens; {shapes}. Of each layer the fastest of {result['repeats']}×{PASSES} "
        "passes counts, and layers take turns. –: the method has no layer there, or refuses.",
        *(f"Beside {base}: {', '.join(having)}." for base, having in others.items()),
        *([f"More than {FAR:g} × the time of its base somewhere: {', '.join(far)}."] if far else []),
        machine_note(result["machine"]),
    )
    return Table("Norms beside PyTorch's own layers", columns, rows, notes)


def _marked(name: str) -> str:
    return f"{name} (reconstruction, unverified)" if NORMS[name].reconstruction else name


def _cell(case: Mapping[str, Any], name: str) -> str:
    cost = case["norms"].get(name)
    return f"{cost['time_ratio']:.2f}× {cost['memory_ratio']:.2f}×" if cost else "–"


def _is_far(case: Mapping[str, Any], name: str) -> bool:
    return bool(case["norms"].get(name, {}).get("time_ratio", 0.0) > FAR)
